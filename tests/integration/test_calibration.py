"""A replica measured on the simulated device, every operation computed, beside its forecast, in which none is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers.models.attention_dispatch  # noqa: F401  its import sets a global that the snapshots compare
import pytest
import torch

from pytest_diffopt import Offloading, Quantization, Recipe
from pytest_diffopt.accelerators import Accelerator, select, simulated
from pytest_diffopt.command_line.main import main
from pytest_diffopt.errors import ForecastError
from pytest_diffopt.forecasting.calibration import calibrate, forecast_apart, measure
from pytest_diffopt.forecasting.running import forecast
from pytest_diffopt.preparation.borrowed_state import differences, take_snapshot
from pytest_diffopt.replicas import cache

GIB = 2**30
SIZE = (96, 96)
PLAIN = Recipe("plain", "tiny-flux", dtype="bfloat16", call={"kwargs": {"max_sequence_length": 32}})
NF4 = Quantization(
    "bitsandbytes_4bit",
    ["transformer", "text_encoder_2"],
    {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
)


@pytest.fixture(scope="module")
def replica() -> str:
    return str(cache.ensure("tiny-flux"))


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    found = select("sim")
    before = simulated.is_caching_allocator()
    with found.in_use():
        simulated.set_caching_allocator(True)
        yield found
    simulated.set_caching_allocator(before)


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        (PLAIN, "holes"),
        (PLAIN.replace(offloading=Offloading("model")), "real"),
        (PLAIN.replace(offloading=Offloading("group", use_stream=True), vae_tiling=32), "holes"),
    ],
    ids=["plain", "model offloading, real weights", "group offloading, tiles"],
)
def test_what_is_measured_is_what_was_forecast(
    replica: str, accelerator: Accelerator, recipe: Recipe, weights: str
) -> None:
    before = take_snapshot()
    made = calibrate(
        recipe, replica, accelerator=accelerator, sizes=SIZE, weights=replica if weights == "real" else None
    )
    assert differences(before, take_snapshot(), with_random=True) == []
    assert made.measured.stopped == ""
    assert made.weights == weights
    off = {(one.phase, one.component): round(one.off, 3) for one in made.compared if one.phase != "reserved"}
    components = ("", "text_encoder", "text_encoder_2", "transformer", "vae")
    assert off == dict.fromkeys(off, 0)
    assert {("peak", ""), *(("call", name) for name in components)} <= off.keys()
    assert (("place", "") in off) == (recipe.offloading is None)
    assert all(one.inside for one in made.compared if one.phase != "reserved")


def test_quantized_calls_are_measured_as_forecast_and_loading_has_the_kernels_of_the_host(
    replica: str, accelerator: Accelerator
) -> None:
    made = calibrate(
        PLAIN.replace(quantization=NF4, offloading=Offloading("model")), replica, accelerator=accelerator, sizes=SIZE
    )
    assert [one for one in made.compared if one.phase in ("place", "call") and not one.inside] == []
    (load,) = [one for one in made.compared if one.phase == "load"]
    assert load.measured > load.high
    assert not made.holds


def test_a_run_that_ends_early_says_where_and_what_was_measured_until_then(
    replica: str, accelerator: Accelerator
) -> None:
    live = accelerator.live_bytes() or 0
    simulated.set_memory_limit(live + 27 * 2**20)
    try:
        measured = measure(PLAIN.replace(pipeline=replica, call={"sizes": SIZE, "calls": 1}), accelerator)
    finally:
        simulated.set_memory_limit(None)
    told = re.fullmatch(
        r"it stopped in the call of (\w+): OutOfMemoryError: CUDA out of memory\. Tried .*", measured.stopped
    )
    assert told is not None
    assert measured.stopped_by == f"OutOfMemoryError in the call of {told[1]}"
    assert measured.spans[-1].component == told[1]
    assert [span.phase for span in measured.spans][:3] == ["load", "place", "call"]
    assert accelerator.live_bytes() == live  # and nothing is left behind


def test_the_command_prints_the_comparison_and_appends_a_row_for_each_recipe(
    replica: str, accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = tmp_path / "my.recipes.toml", tmp_path / "rows.jsonl"
    path.write_text(PLAIN.to_toml())
    rows.write_text('{"earlier": 1}\n')
    arguments = [str(path), "--model", replica, "--device", "sim", "--size", "96x96", "--row", str(rows)]
    assert main(["calibrate", *arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())  # lines end where the width says
    assert "simulated NVIDIA GeForce RTX 4090 · kernels of ada · holes in place of weights" in out
    assert "plain: all 8 forecasts hold what was measured." in out
    earlier, row = map(json.loads, rows.read_text().splitlines())
    assert earlier == {"earlier": 1}
    assert (row["schema_version"], row["model"], row["weights"], row["stopped"]) == (1, "FluxPipeline", "holes", "")
    assert {one["phase"] for one in row["compared"]} == {"place", "call", "peak", "reserved"}
    assert row["versions"]["torch"] == torch.__version__
    assert replica not in rows.read_text()


def test_a_forecast_in_a_process_of_its_own_is_the_same_and_says_why_there_is_none(replica: str) -> None:
    asked = {"sizes": SIZE, "steps": 3, "gpu": "rtx-4090", "assume": {"attention": "fused"}}
    apart, here = forecast_apart(PLAIN, replica, **asked), forecast(PLAIN, replica, **asked)
    assert replace(apart, seconds=0.0) == replace(here, seconds=0.0)
    with pytest.raises(ForecastError, match=r"No full-size model is called 'flux\.1-dve'"):
        forecast_apart(PLAIN, "flux.1-dve")
