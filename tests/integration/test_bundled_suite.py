"""The bundled suite: in the wheel, collected out of an installed package from anywhere, and complete."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from pytest_diffopt.recipe import Recipe
from pytest_diffopt.recipe_loading import load_recipes
from pytest_diffopt.replicas import registry

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "pytest_diffopt" / "suite"
FILES = sorted(SUITE.glob("*.recipes.toml"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, as pip puts it into site-packages, entry point included."""
    place = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(place), str(ROOT)], check=True)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site-packages")
    return place / "site-packages"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on the suite out of that folder, with no configuration of ours in sight."""
    cwd.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "pytest_diffopt.suite"]
    return subprocess.run([*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def collected(ran: subprocess.CompletedProcess[str]) -> Counter[str]:
    """The items by file, as ``--collect-only -q`` lists them."""
    items = [line for line in ran.stdout.splitlines() if ".recipes.toml::" in line]
    return Counter(line.partition("::")[0].rpartition("/")[2] for line in items)


def all_recipes() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for path in FILES:
        loaded = load_recipes(path)
        assert not found.keys() & loaded.keys(), f"{path.name}: a name stands in two files"
        found |= loaded
    return found


def test_it_is_collected_whole_out_of_the_wheel_from_anywhere(installed: Path, tmp_path: Path) -> None:
    ran = run(installed, tmp_path / "elsewhere", "--collect-only", "-q", "-c", os.devnull, f"--rootdir={tmp_path}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert set(collected(ran)) == {path.name for path in FILES}
    (tmp_path / "elsewhere" / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers --strict-config\n")
    under_a_configuration = run(installed, tmp_path / "elsewhere", "--collect-only", "-q")
    assert collected(under_a_configuration) == collected(ran), under_a_configuration.stdout


def test_a_part_of_it_runs_on_two_workers_out_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    arguments = ["-k", "sd-nf4 and not compile and not offload", "-n", "2", "--dist", "loadgroup", "-q", "-rA"]
    ran = run(installed, tmp_path / "there", *arguments, "--diffopt-device=sim")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = [line for line in ran.stdout.splitlines() if line.startswith("PASSED ")]
    assert sorted(line.rpartition("recipes.toml::")[2] for line in passed) == [
        f"sd-nf4::{check}" for check in ("memory", "parity", "quantization", "state")
    ]
    assert not list((tmp_path / "there").iterdir())  # it leaves nothing behind


def families_of(recipes: dict[str, Recipe]) -> dict[str, list[Recipe]]:
    by_family: dict[str, list[Recipe]] = {name: [] for name in registry.families}
    for recipe in recipes.values():
        family = registry.find(str(recipe.pipeline))
        assert family is not None, f"{recipe.name}: {recipe.pipeline!r} is no replica, and would be downloaded"
        by_family[family.name].append(recipe)
    return by_family


@pytest.mark.parametrize("family", registry.families)
def test_every_replica_is_quantized_compiled_and_offloaded_alone_and_together(family: str) -> None:
    recipes = families_of(all_recipes())[family]

    def there(nf4: bool, compiled: bool, offloading: str) -> bool:
        """Whether a recipe without known faults has just these parts."""
        return any(
            not recipe.known_faults.get("run")
            and any(one.kwargs.get("bnb_4bit_quant_type") == "nf4" for one in recipe.quantizations) == nf4
            and bool(recipe.compilation) == compiled
            and (recipe.offloading.strategy if recipe.offloading is not None else "") == offloading
            for recipe in recipes
        )

    assert there(True, False, ""), "nf4"
    assert there(True, True, ""), "nf4, compiled"
    assert there(True, False, "model"), "nf4, offloaded by components"
    assert there(False, False, "group"), "offloaded by groups"
    assert there(True, True, "model") or there(True, True, "group"), "nf4, compiled, offloaded"


def test_the_recipes_of_the_guide_are_in_it_as_they_stand_in_the_examples() -> None:
    bundled = all_recipes()
    for name, recipe in load_recipes(ROOT / "examples" / "quantize-compile-offload.recipes.toml").items():
        assert bundled[name] == recipe


def test_a_library_that_need_not_be_there_is_required_by_each_recipe_that_needs_it() -> None:
    from pytest_diffopt.quantization_backends import BACKENDS

    def lacking(recipe: Recipe) -> list[str]:
        needed = {BACKENDS[one.backend].distribution for one in recipe.quantizations} - {None, "bitsandbytes"}
        return [str(name) for name in needed if not any(text.startswith(str(name)) for text in recipe.requires)]

    assert {recipe.name: found for recipe in all_recipes().values() if (found := lacking(recipe))} == {}
    assert {name for recipe in all_recipes().values() for name in recipe.requires} == {
        "torchao>=0.18",
        "optimum-quanto>=0.2.6",
        "gguf>=0.10",
    }
