"""What a calibration compares, says and gives away; made by hand, with nothing run."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pytest_diffopt.accelerators import Accelerator
from pytest_diffopt.command_line.main import main
from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.forecasting import calibration
from pytest_diffopt.forecasting.calibration import (
    Calibration,
    Compared,
    Measured,
    Span,
    anonymous,
    calibrate,
    card_of,
    compare,
)
from pytest_diffopt.recipe import Offloading, Recipe
from pytest_diffopt.recipe_loading import loads_recipes
from pytest_diffopt.report.calibrations import calibration_lines, summary
from tests.made_forecasts import GIB, gib
from tests.made_forecasts import of_the_guide as made

DEVICE = {"kind": "cuda", "name": "NVIDIA GeForce RTX 4090", "capability": (8, 9), "total_bytes": 24 * GIB}


def span(phase: str, component: str, allocated: float, reserved: float = 16) -> Span:
    return Span(phase, component, int(allocated * GIB), int(reserved * GIB))


MEASURED = Measured(
    (
        span("load", "", 12.2),
        span("place", "", 12.2),
        span("call", "", 5),
        span("call", "transformer", 5.5),
        span("call", "vae", 15.2, 17),
    ),
    beside_bytes=GIB // 2,
)


def calibrated(measured: Measured = MEASURED, recipe: Recipe | None = None, **fields: Any) -> Calibration:
    told = made(reserved=gib(15, 16, 17))
    recipe = recipe if recipe is not None else Recipe("nf4", "tiny-flux")
    return Calibration(recipe, told, measured, "holes", DEVICE, {"torch": "2.13"}, "Linux", **fields)


def test_phases_and_components_are_compared_that_both_know() -> None:
    found = {(one.phase, one.component): (one.inside, round(one.off, 3)) for one in compare(made(), MEASURED)}
    assert found[("load", "")] == (True, 0)
    assert found[("call", "transformer")] == (False, 0.1)
    assert found[("call", "vae")] == (True, 0.017)
    assert found[("peak", "")] == (True, 0.017)
    assert ("call", "text_encoder") not in found


def test_the_bounds_of_a_range_are_inside_and_so_is_what_is_promised_beyond() -> None:
    assert [Compared("call", "", 1000, 1100, 1200, at).inside for at in (994, 995, 1000, 1200, 1206, 1207)] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]


def test_of_a_run_that_ended_early_the_whole_is_not_compared() -> None:
    early = Measured(
        MEASURED.spans[:4], stopped="it stopped in the call of vae: E: x", stopped_by="E in the call of vae"
    )
    assert {one.phase for one in compare(made(), early)} == {"load", "call"}  # it forecasts no placing
    assert not calibrated(early).holds
    assert json.loads(calibrated(early).to_json())["stopped"] == "E in the call of vae"


def test_it_says_how_many_forecasts_do_not_hold_and_which_is_furthest_off() -> None:
    assert summary(calibrated()) == (
        "nf4: 1 of 5 forecasts do not hold what was measured; "
        "call of transformer is furthest off, +10.0% of what was expected."
    )
    assert summary(calibrated(Measured(()))) == "nf4: nothing was measured."
    lines = calibration_lines(calibrated(), width=120, color=False)
    assert lines[0] == (
        "nf4 · flux.1-dev · 1024×1024 · 2 steps · NVIDIA GeForce RTX 4090 · kernels of ada · holes in place of weights"
    )
    row = next(line.split() for line in lines if "transformer" in line)
    assert row == ["call", "transformer", "5.0000", "5.0000", "5.0000", "5.5000", "+10.0%", "above"]
    assert "Beside torch, 512.00 MiB were in use: the driver's, and those of other processes." in lines


def test_a_row_has_no_name_of_a_host_or_user_no_path_and_no_text_of_the_calls(tmp_path: Path) -> None:
    recipe = Recipe(
        "my secret recipe",
        str(tmp_path),
        offloading=Offloading("group", offload_to_disk_path=str(tmp_path / "disk")),
        call={"prompts": "my secret prompt", "kwargs": {"negative_prompt": "secret", "guidance_scale": 4.5}},
        known_faults={"parity": "secret"},
        forecast={"model": str(tmp_path), "max_memory": "1GiB"},
    )
    row = calibrated(recipe=recipe).to_json()
    assert "\n" not in row
    for private in ("secret", str(tmp_path), platform.node(), os.sep + getpass.getuser()):
        assert private not in row
    (given,) = loads_recipes(json.loads(row)["recipe"]).values()
    assert (given.pipeline, given.call.kwargs) == ("FluxPipeline", {"guidance_scale": 4.5})
    assert given.offloading is not None
    assert given.offloading.offload_to_disk_path == "offloaded"
    assert set(json.loads(row)) <= set(calibration.__doc__.replace("``", " ").split()) | {"pipeline"}  # type: ignore[union-attr]


def test_a_public_model_is_named_and_a_directory_is_not() -> None:
    assert json.loads(calibrated().to_json())["model"] == "flux.1-dev"
    own = Calibration(Recipe("a", "tiny-flux"), made(model="my-folder"), MEASURED, "real", DEVICE, {})
    assert json.loads(own.to_json())["model"] == "FluxPipeline"


def test_an_anonymous_recipe_does_the_same() -> None:
    recipe = Recipe("a", "tiny-flux", dtype="bfloat16", offloading=Offloading("model"), vae_tiling=512)
    found = anonymous(recipe, "FluxPipeline")
    assert (found.dtype, found.offloading, found.vae_tiling) == ("bfloat16", recipe.offloading, 512)


@pytest.mark.parametrize(
    ("accelerator", "card"),
    [
        (Accelerator("cuda", "NVIDIA GeForce RTX 4090", 1, (8, 9)), "rtx-4090"),
        (Accelerator("cuda", "NVIDIA A100-SXM4-80GB", 1, (8, 0)), "a100-80gb"),
        (Accelerator("cuda", "NVIDIA A40", 1, (8, 6)), "rtx-3060-12gb"),
        (Accelerator("cuda", "NVIDIA H200", 1, (9, 0)), "h200"),
        (Accelerator("cuda", "NVIDIA GH200 480GB", 1, (9, 0)), "h100-80gb"),
        (Accelerator("cuda", "Tesla V100-DGXS-32GB", 1, (7, 0)), "v100-16gb"),
        (Accelerator("cuda", "Tesla M40", 1, (5, 2)), None),
        (Accelerator("sim", "Simulated accelerator"), None),
    ],
)
def test_the_card_is_found_by_its_name_or_its_generation(accelerator: Accelerator, card: str | None) -> None:
    assert card_of(accelerator) == card


def test_a_device_that_does_not_count_is_refused() -> None:
    with pytest.raises(DiffoptError, match="the device cpu does not count its memory"):
        calibrate(Recipe("a", "tiny-flux"), "flux.1-dev", accelerator=Accelerator("cpu", "cpu"))


@pytest.mark.parametrize(("said", "version"), [("550.54.15\n550.54.15\n", "550.54.15"), ("", "")])
def test_the_driver_is_asked_by_nvidias_own_tool(monkeypatch: pytest.MonkeyPatch, said: str, version: str) -> None:
    ran = types.SimpleNamespace(stdout=said)
    monkeypatch.setattr(calibration.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(calibration.subprocess, "run", lambda *args, **kwargs: ran)
    assert calibration._driver() == version
    monkeypatch.setattr(calibration.shutil, "which", lambda name: None)
    assert calibration._driver() == ""


def test_a_tool_that_fails_leaves_the_driver_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(calibration.shutil, "which", lambda name: name)
    monkeypatch.setattr(calibration.subprocess, "run", fails)
    assert calibration._driver() == ""


# The command.


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("my.recipes.toml").write_text('[recipe.nf4]\npipeline = "tiny-flux"\n[recipe.wan]\npipeline = "tiny-wan"\n')
    return "my.recipes.toml"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status = main(["calibrate", *arguments])
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    return said.err.partition("error: ")[2].removesuffix("\n")


@pytest.mark.skipif("torch" in sys.modules and sys.modules["torch"].cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_it_is_refused_before_anything_is_run(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, path, "--model", "flux.1-dev") == (
        "calibrate measures on a GPU, and torch finds no CUDA device on this machine. forecast and advise need none; "
        "--device sim runs models that the host can compute."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model flux.1-dev --row no/a", "argument --row: 'no/a' cannot be written: its folder is missing."),
        (
            "--model flux.1-dev --recipe nf5",
            "argument --recipe: my.recipes.toml has no recipe 'nf5'; did you mean 'nf4'?",
        ),
        ("--model flux.1-dve", "argument --model: No full-size model is called 'flux.1-dve'."),
        (
            "--model flux.1-dev --assume a=1 --assume a=2",
            "argument --assume: 'a' is given twice, as '1' and '2'",
        ),
    ],
)
def test_a_mistake_is_named(path: str, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str) -> None:
    assert refused(capsys, path, *arguments.split()).startswith(sentence)


@pytest.mark.parametrize("ends", ["inside", "outside", "refused"])
def test_the_exit_status_says_whether_all_holds(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    fits = Measured((span("load", "", 12.2), span("call", "vae", 15, 16)))
    monkeypatch.setattr("pytest_diffopt.command_line.calibrate._device", lambda kind: Accelerator("sim", "sim"))

    def answers(recipe: Recipe, model: str | None, **given: Any) -> Calibration:
        given["progress"]("measuring")
        if ends == "refused":
            raise DiffoptError("it is broken.")
        return calibrated(fits if ends == "inside" else MEASURED, recipe)

    monkeypatch.setattr(calibration, "calibrate", answers)
    assert main(["calibrate", path, "--model", "flux.1-dev", "--row", "rows"]) == (0 if ends == "inside" else 1)
    said = capsys.readouterr()
    assert said.err == "left out, as no --model has their pipeline: wan (WanPipeline)\n"
    assert len(Path("rows").read_text().splitlines()) == (0 if ends == "refused" else 1)
    if ends == "refused":
        assert said.out == "nf4 · flux.1-dev could not be calibrated: it is broken.\n"
