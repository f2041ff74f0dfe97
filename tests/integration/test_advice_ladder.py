"""The ladder of a public model in full size, forecast; and that what it writes is collected and holds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_diffopt import Advice, advise
from pytest_diffopt.recipe_loading import load_recipes, loads_recipes

GIB = 2**30
EXAMPLE = Path(__file__).parents[2] / "examples" / "flux-on-16-gb.recipes.toml"


@pytest.fixture(scope="module")
def ladder() -> Advice:
    return advise("flux.1-dev", gpu="rtx-4080")


def test_a_card_of_16_gb_needs_four_bits_and_tiles(ladder: Advice) -> None:
    assert [(rung.name, rung.fit) for rung in ladder.rungs] == [
        ("bf16", "does not fit"),
        ("int8", "does not fit"),
        ("nf4", "may fit"),
        ("nf4-tiled", "fits"),
        ("nf4-model", "fits"),
    ]
    whole, tiled = ladder.rungs[2].forecast, ladder.rungs[3].forecast
    assert whole is not None
    assert tiled is not None
    assert whole.peak_component == "vae"
    # the tiles lower what the VAE takes, and nothing else
    assert whole.phase_peak("call", "vae").low - tiled.phase_peak("call", "vae").high > GIB
    assert whole.phase_peak("call", "transformer") == tiled.phase_peak("call", "transformer")


def test_what_is_offloaded_moves_a_call_s_bytes_over_its_steps(ladder: Advice) -> None:
    *resident, offloaded = ladder.rungs
    assert {rung.cost.bus_seconds < 1e-3 for rung in resident if rung.cost is not None} == {True}
    assert offloaded.cost is not None
    assert offloaded.forecast is not None
    moved = offloaded.forecast.h2d_bytes + offloaded.forecast.d2h_bytes
    assert offloaded.cost.step_bytes == moved // 28  # and a further step moves nothing
    assert moved == pytest.approx(2 * sum(offloaded.forecast.weights_bytes.values()), rel=0.01)


def test_the_example_is_what_is_written_for_that_card(ladder: Advice) -> None:
    assert loads_recipes(ladder.to_toml()) == load_recipes(EXAMPLE)


def test_the_example_is_collected_and_holds(
    run_pytest: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    shutil.copy(EXAMPLE, pytester.path / EXAMPLE.name)
    result = run_pytest(EXAMPLE.name, "--diffopt-device=sim")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=10)
