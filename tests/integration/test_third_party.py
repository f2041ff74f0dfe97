"""The example repository, as an outsider has it: the wheel in a fresh environment, and only its own README's commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party"
WHERE = "import pytest_diffopt; print(pytest_diffopt.__file__)"
TEXT: dict[str, Any] = {"check": True, "capture_output": True, "text": True}


def commands() -> list[str]:
    """The README's shell commands, in order."""
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def outsider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example outside of this repository, and an environment with the wheel and what the example asks for."""
    place = tmp_path_factory.mktemp("outside")
    shutil.copytree(EXAMPLE, place / "stripes")
    wheel_command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(place / "wheel"), str(ROOT)]
    subprocess.run(wheel_command, check=True, env=clean())
    (wheel,) = (place / "wheel").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    python = place / "venv" / "bin" / "python"
    # torch and the libraries are those that are installed here, behind what the example's own command installs; the
    # environment `bare` of tox.ini has the wheel with nothing else in reach
    (folder,) = (place / "venv" / "lib").glob("python*/site-packages")
    (folder / "installed-here.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    own = [str(wheel), "pytest", "-c", str(ROOT / "constraints.txt")]  # pytest, as its command is of this environment
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", *own], check=True)
    install, expected = commands()[0], "pip install -e .[test]"
    assert install == expected
    # the example's own command, with what a package index does not have yet and the versions that were tried
    arguments = [str(python), "-m", *install.split(), "-q", "-c", str(ROOT / "constraints.txt")]
    arguments += ["--find-links", str(place / "wheel")]
    subprocess.run(arguments, check=True, cwd=place / "stripes", env=clean())
    where = subprocess.run([str(python), "-c", WHERE], cwd=place, env=clean(), **TEXT)
    assert where.stdout.startswith(str(place)), where.stdout  # the wheel's, not this repository's
    return place


def clean() -> dict[str, str]:
    """The environment without what this test run put into it; caches of compiled code are kept, as they cost minutes."""
    dropped = ("PYTHONPATH", "PYTEST_", "TOX_", "VIRTUAL_ENV", "COV_", "DIFFOPT_TEST", "PIP_CONSTRAINT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(place: Path, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    """A command of the README in the example's folder, with the environment's programs first."""
    environment = {**clean(), "PATH": f"{place / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    words = [*command.split(), *more]
    return subprocess.run(words, cwd=place / "stripes", env=environment, capture_output=True, text=True, check=False)


def test_the_gate_of_the_example_opens_with_the_readmes_command(outsider: Path) -> None:
    ran = run(outsider, commands()[1], "--diffopt-report=report.md")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[-2].startswith("GATE PASSED: 20 verdicts of ")
    assert "everything is as recorded" in (outsider / "stripes" / "report.md").read_text(encoding="utf-8")


def test_a_graph_break_in_the_model_closes_it_with_its_place(outsider: Path) -> None:
    model = outsider / "stripes" / "src" / "stripes" / "model.py"
    healthy = model.read_text(encoding="utf-8")
    model.write_text(
        healthy.replace(
            "        for block in self.blocks:\n            hidden = block(hidden)\n        return self.leave",
            "        print(hidden.shape)\n        for block in self.blocks:\n            hidden = block(hidden)\n"
            "        return self.leave",
        ),
        encoding="utf-8",
    )
    assert model.read_text(encoding="utf-8") != healthy
    try:
        ran = run(outsider, commands()[1])
    finally:
        model.write_text(healthy, encoding="utf-8")
    assert ran.returncode == 1
    assert re.search(r"nf4-compile · graph_breaks: .*1 graph break, 0 allowed|nf4-compile · graph_breaks: ", ran.stdout)
    assert re.search(r"transformer/StripesTransformer\.forward  (src/)?stripes/model\.py:\d+", ran.stdout)
    assert "test_one_graph_serves_every_size" in ran.stdout
    assert ran.stdout.splitlines()[-2].startswith("GATE FAILED: ")


def test_quantization_that_was_taken_out_closes_it_as_worse_than_recorded(outsider: Path) -> None:
    recipes = outsider / "stripes" / "tests" / "stripes.recipes.toml"
    healthy = recipes.read_text(encoding="utf-8")
    recipes.write_text(
        healthy.replace('components = ["transformer"]', 'components = ["text_encoder"]'), encoding="utf-8"
    )
    try:
        ran = run(outsider, commands()[1], "-k", "nf4 and not compile and baseline")
    finally:
        recipes.write_text(healthy, encoding="utf-8")
    assert ran.returncode == 1
    assert re.search(r"worse: format of \d+ layers of transformer: .*: nf4 recorded, plain now", ran.stdout), ran.stdout
    assert "--diffopt-update-baseline" in ran.stdout


@pytest.mark.parametrize("path", [EXAMPLE / ".github/workflows/recipes.yml", ROOT / ".github/workflows/ci.yml"])
def test_workflows_are_sound_and_use_options_that_there_are(path: Path) -> None:
    import yaml

    from pytest_diffopt.options import OPTIONS

    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "permissions", "jobs"} <= set(found)
    assert found.get("on", found.get(True))  # YAML 1.1 reads the key as a boolean
    steps = [step for job in found["jobs"].values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all(job["runs-on"] for job in found["jobs"].values())
    used = set(re.findall(r"--diffopt-[a-z-]+", path.read_text(encoding="utf-8")))
    assert used <= {option.flag for option in OPTIONS}
