"""The ladder of recipes: which rungs there are, in which order, when it stops; what the command says, writes and returns."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_diffopt.accelerators.gpus import CARDS
from pytest_diffopt.command_line.main import main
from pytest_diffopt.errors import DiffoptError, ForecastError
from pytest_diffopt.forecasting.advice import (
    BROKEN,
    BUS_BYTES_PER_SECOND,
    Advice,
    Cost,
    Rung,
    advise,
    combinations,
    cost_of,
    default_steps,
)
from pytest_diffopt.forecasting.record import Forecast, PhaseForecast
from pytest_diffopt.recipe import Offloading, Quantization, Recipe
from pytest_diffopt.recipe_loading import load_recipes, loads_recipes
from pytest_diffopt.replicas import Registry, stable_diffusion_xl
from pytest_diffopt.report.advice import verdict
from tests.made_forecasts import GIB, gib
from tests.made_forecasts import of_the_guide as made

MIB = 2**20
WEIGHTS = {"transformer": 22 * GIB, "text_encoder_2": 9 * GIB, "text_encoder": GIB // 4, "vae": GIB // 6}


def told(recipe: Recipe, vae: float, rest: float, moved: tuple[int, int] = (0, 0), **fields: Any) -> Forecast:
    """A forecast whose VAE peaks at ``vae`` GiB and all else at ``rest``, which moves (in all, at a further step) bytes."""
    phases = (
        PhaseForecast("load", "transformer", gib(rest - 1)),
        PhaseForecast("call", "transformer", gib(rest)),
        PhaseForecast("call", "vae", gib(vae)),
    )
    high = max(phases, key=lambda one: one.peak.expected)
    known: dict[str, Any] = {
        "phases": phases,
        "peak": high.peak,
        "peak_component": high.component,
        "reserved": gib(max(vae, rest) + 0.25),
        "floor_bytes": high.peak.low,
        "weights_bytes": WEIGHTS,
        "steps": 3,
        "h2d_bytes": moved[0],
        "d2h_bytes": 0,
        "step_h2d_bytes": moved[1],
    }
    return made(recipe.name, **{**known, **fields})


class Told:
    """Stands for what forecasts: FLUX.1-dev as it is, roughly."""

    def __init__(self) -> None:
        self.calls: list[tuple[Recipe, str | None, dict[str, Any]]] = []
        self.failing: tuple[str, ...] = ()
        self.more: dict[str, Any] = {}

    def __call__(self, recipe: Recipe, model: str | None = None, **given: Any) -> Forecast:
        given["progress"]("loading transformer")
        self.calls.append((recipe, model, given))
        if recipe.name in self.failing:
            raise ForecastError(f"{recipe.name} stopped.")
        weights = {"": 31.5, "bitsandbytes_8bit": 17.0, "bitsandbytes_4bit": 11.0}
        rest = weights[recipe.quantization.backend if recipe.quantization else ""]
        moved = (0, 0)
        if recipe.offloading is not None:
            moved = (int(rest * GIB), 0)
            if recipe.offloading.strategy == "model":
                return told(recipe, 3 if recipe.vae_tiling else 5, rest * 0.7, moved, **self.more)
            moved, rest = (int(rest * 2.4 * GIB), int(rest * 0.7 * GIB)), 0.5
        return told(recipe, rest + (0.25 if recipe.vae_tiling else 2), rest, moved, **self.more)

    @property
    def names(self) -> list[str]:
        return [recipe.name for recipe, _, _ in self.calls]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Told:
    module = types.ModuleType("pytest_diffopt.forecasting.running")
    module.forecast = found = Told()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


# The order.


def test_rungs_are_ordered_by_what_they_move_then_by_overlap_quantization_and_tiles() -> None:
    nf4, int8 = "bitsandbytes_4bit", "bitsandbytes_8bit"
    ordered = [
        Cost(MIB),
        Cost(0, tiled=True),
        Cost(2 * MIB, quantization=int8),
        Cost(0, quantization=int8, tiled=True),
        Cost(0, quantization=nf4),
        Cost(800 * MIB, quantization=nf4),
        Cost(6 * GIB, overlapped=True, quantization=nf4),
        Cost(22 * GIB, overlapped=True),
        Cost(22 * GIB + MIB, overlapped=True, tiled=True),
        Cost(22 * GIB),
    ]
    assert sorted(ordered, key=lambda cost: cost.key) == ordered
    assert len({cost.key for cost in ordered}) == len(ordered)


def test_a_cost_says_what_it_is_made_of() -> None:
    assert Cost(MIB).why == "nothing is moved or quantized"
    assert Cost(22 * GIB, overlapped=True, quantization="bitsandbytes_4bit", tiled=True).why == (
        "22.00 GiB a step over the bus, beside the computing: 0.75 s at the least; "
        "quantized layers have more to do at each product; what the VAE's tiles share is decoded twice"
    )
    assert pytest.approx(31.508e9, rel=1e-4) == BUS_BYTES_PER_SECOND


def test_what_a_call_moves_once_is_spread_over_its_steps_and_what_each_step_moves_is_not() -> None:
    plain = Recipe("r", "tiny-flux")
    once = made(steps=3, h2d_bytes=14 * GIB, d2h_bytes=14 * GIB)
    assert cost_of(plain, once, 28).step_bytes == GIB
    each = made(steps=3, h2d_bytes=4 * GIB, step_h2d_bytes=GIB, step_d2h_bytes=GIB, d2h_bytes=3 * GIB)
    assert cost_of(plain, each, 7).step_bytes == (7 + 4 * 2) * GIB // 7
    assert cost_of(plain, each, 3).step_bytes == 7 * GIB // 3
    streamed = plain.replace(offloading=Offloading("group", use_stream=True), vae_tiling=512)
    assert cost_of(streamed, each, 3) == Cost(7 * GIB // 3, overlapped=True, tiled=True)


def test_steps_are_by_default_those_of_the_pipeline() -> None:
    assert [default_steps(name) for name in ("FluxPipeline", "WanPipeline", "NoPipeline")] == [28, 50, 50]


# Climbing.


def test_it_climbs_in_the_expected_order_and_stops_when_enough_surely_fit(asked: Told) -> None:
    advice = advise("flux.1-dev", budget="13.5GiB")
    assert asked.names == ["bf16", "int8", "nf4", "nf4-model"]
    assert [(rung.name, rung.fit) for rung in advice.rungs] == [
        ("bf16", "does not fit"),
        ("int8", "does not fit"),
        ("nf4", "fits"),
        ("nf4-model", "fits"),
    ]
    assert advice.best is advice.rungs[2]
    assert (advice.steps, advice.model, advice.budget_bytes) == (28, "flux.1-dev", 27 * GIB // 2)
    why = {one.name: one.why for one in advice.left_out}
    assert why["bf16-sequential"] == "2 that cost less time surely fit"
    assert why["bf16-tiled"] == "tiles of the VAE would not make bf16 fit"
    assert why["nf4-tiled"] == "nf4 fits without tiles"
    assert why["nf4-model-tiled"] == "tiles of the VAE would not make nf4-model fit"
    assert why["nf4-sequential"] == BROKEN["bitsandbytes_4bit", "sequential"]


def test_tiles_are_tried_where_the_vae_alone_is_too_large(asked: Told) -> None:
    advice = advise("flux.1-dev", budget="12GiB", steps=2)
    assert asked.names == ["bf16", "int8", "nf4", "nf4-tiled", "nf4-model"]
    assert [rung.name for rung in advice.fitting] == ["nf4-tiled", "nf4-model"]
    tiled = asked.calls[3][0]
    assert (tiled.vae_tiling, tiled.quantization) == (512, asked.calls[2][0].quantization)
    assert {given["steps"] for _, _, given in asked.calls} == {2}


def test_everything_is_climbed_on_demand_and_comes_out_in_the_expected_order(asked: Told) -> None:
    advice = advise("flux.1-dev", budget="12GiB", all=True)
    assert [rung.name for rung in advice.rungs] == [
        "bf16",
        "bf16-tiled",
        "int8",
        "int8-tiled",
        "nf4",
        "nf4-tiled",
        "nf4-model",
        "bf16-model",
        "nf4-group",
        "nf4-group-tiled",
        "bf16-group",
        "bf16-group-tiled",
        "bf16-sequential",
        "bf16-sequential-tiled",
    ]
    assert sorted(asked.names) == sorted(rung.name for rung in advice.rungs)
    left = [one.name for one in advice.left_out]
    assert left == [
        "nf4-model-tiled",
        "int8-model",
        "bf16-model-tiled",
        "int8-group",
        "nf4-sequential",
        "int8-sequential",
    ]


def test_what_is_quantized_is_large_and_no_vae(asked: Told) -> None:
    advise("flux.1-dev", budget="12GiB")
    quantized = asked.calls[1][0].quantization
    assert quantized == Quantization("bitsandbytes_8bit", ["transformer", "text_encoder_2"])


def test_of_a_small_model_the_largest_component_is_quantized(asked: Told) -> None:
    asked.more = {"weights_bytes": {"unet": GIB // 2, "text_encoder": GIB // 4, "vae": 2 * GIB}}
    advise("sdxl", budget="12GiB")
    assert asked.calls[1][0].quantization == Quantization("bitsandbytes_8bit", ["unet"])


def test_a_rung_that_fails_is_told_last_and_the_others_are_climbed(asked: Told) -> None:
    asked.failing = ("int8", "nf4")
    advice = advise("flux.1-dev", budget="23GiB")
    assert [(rung.name, rung.failure) for rung in advice.rungs][-2:] == [
        ("int8", "int8 stopped."),
        ("nf4", "nf4 stopped."),
    ]
    assert [rung.name for rung in advice.fitting][:1] == ["nf4-model"]


def test_a_card_is_judged_by_what_is_reserved_with_its_own_kernels(asked: Told) -> None:
    advice = advise("flux.1-dev", gpu="RTX 4080", assume={"attention": "fused"}, sizes=(512, 512), dtype="float16")
    assert [rung.name for rung in advice.fitting] == ["nf4", "nf4-model"]
    recipe, model, given = asked.calls[-1]
    assert (model, given["gpu"], given["assume"], given["sizes"]) == (
        "flux.1-dev",
        "rtx-4080",
        {"attention": "fused"},
        (512, 512),
    )
    assert (recipe.dtype, asked.names[0]) == ("float16", "fp16")
    assert recipe.forecast is not None
    assert (recipe.forecast.gpu, recipe.forecast.sizes) == ("rtx-4080", ((512, 512),))
    assert recipe.forecast.assume == {"attention": "fused"}


def test_what_is_not_known_never_surely_fits(asked: Told) -> None:
    asked.more = {"unknown": ("The host reads something.",)}
    advice = advise("flux.1-dev", budget="80GiB")
    assert {rung.fit for rung in advice.rungs} == {"may fit"}
    assert advice.best is None


def test_without_a_budget_nothing_is_judged(asked: Told) -> None:
    advice = advise("flux.1-dev")
    assert {rung.fit for rung in advice.rungs} == {None}
    assert advice.rungs[0].recipe.forecast is None


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"budget": "16 gigs"}, ValueError),
        ({"gpu": "rtx-4091"}, DiffoptError),
        ({"dtype": "int8"}, DiffoptError),
    ],
)
def test_wrong_input_is_refused_before_anything_is_forecast(
    asked: Told, wanted: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        advise("flux.1-dev", **wanted)
    assert asked.calls == []


def test_every_broken_rung_is_a_known_fault_in_the_examples_and_none_is_climbed() -> None:
    faults = load_recipes(Path(__file__).parents[2] / "examples" / "known-library-faults.recipes.toml")
    known = {
        (recipe.quantization.backend, recipe.offloading.strategy)
        for recipe in faults.values()
        if recipe.known_faults and recipe.quantization is not None and recipe.offloading is not None
    }
    assert set(BROKEN) <= known
    assert set(BROKEN) <= set(combinations())


def test_a_ladder_for_a_model_without_a_replica_names_the_model_itself(
    asked: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = Registry(full_sizes=stable_diffusion_xl.FULL_SIZES)
    monkeypatch.setattr("pytest_diffopt.forecasting.advice.registry", without)
    advice = advise("sdxl", budget="80GiB")
    assert advice.rungs[0].recipe.pipeline == "stabilityai/stable-diffusion-xl-base-1.0"


# The command.


@pytest.fixture
def ran(
    asked: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["advise", *arguments])
        except SystemExit as ended:
            status = int(str(ended.code))
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_table_marks_the_first_that_surely_fits(ran: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = ran("--model", "flux.1-dev", "--max-memory", "12GiB")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0] == (
        "Memory in GiB, forecast without a GPU, the fastest recipe first · "
        "flux.1-dev · 1024×1024 · 28 steps · to fit 12.00 GiB"
    )
    assert lines[2].split("  ")[1] == "rung"
    assert [line.split("  ")[0] for line in lines if line.startswith(">")] == ["> nf4-tiled"]
    row = next(line for line in lines if line.startswith("> nf4-tiled"))
    assert row.split("  ")[-1].strip() == "fits"
    assert "4-bit (nf4), all on the GPU, the VAE in tiles of 512" in row
    assert "nf4-tiled is the first that surely fits 12.00 GiB. What it costs: quantized layers" in " ".join(out.split())
    assert "  nf4-sequential: accelerate sends" in out
    assert max(map(len, lines)) <= 160


def test_nothing_that_surely_fits_is_1_and_says_what_takes_least(ran: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = ran("--model", "flux.1-dev", "--max-memory", "512MiB", "--toml", "none.recipes.toml")
    assert status == 1
    assert "No rung fits 512.00 MiB; nf4-group-tiled takes least, 0.75 GiB." in " ".join(out.split())
    assert not Path("none.recipes.toml").exists()


def test_the_recipes_that_fit_are_a_file_of_recipes_with_their_budget(
    ran: Callable[..., tuple[int, str, str]],
) -> None:
    status, _, _ = ran("--model", "flux.1-dev", "--gpu", "rtx-4080", "--toml", "fits.recipes.toml", "--size", "768x768")
    assert status == 0
    recipes = load_recipes("fits.recipes.toml")
    assert list(recipes) == ["nf4", "nf4-model"]
    for recipe in recipes.values():
        assert recipe.pipeline == "tiny-flux"
        assert recipe.forecast is not None
        assert (recipe.forecast.model, recipe.forecast.gpu) == ("flux.1-dev", "rtx-4080")
        assert recipe.forecast.sizes == ((768, 768),)


def test_json_is_alone_on_standard_output(ran: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = ran("--model", "flux.1-dev", "--max-memory", "12GiB", "--json", "-")
    whole = json.loads(out)
    assert status == 0
    assert (whole["schema_version"], whole["model"], whole["steps"]) == (1, "flux.1-dev", 28)
    rung = whole["rungs"][3]
    assert (rung["name"], rung["fit"], rung["cost"]["tiled"]) == ("nf4-tiled", "fits", True)
    assert Forecast.from_json(json.dumps(rung["forecast"])).recipe == "nf4-tiled"
    (recipe,) = loads_recipes(rung["recipe"]).values()
    assert recipe.vae_tiling == 512
    assert "nf4-tiled is the first that surely fits" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model flux.1-dev", "one of the arguments --max-memory --gpu is required"),
        (
            "--model flux.1-dev --gpu rtx-4090 --max-memory 1GiB",
            "argument --max-memory: not allowed with argument --gpu",
        ),
        ("--max-memory 1GiB", "the following arguments are required: --model"),
        ("--model flux.1-dve --max-memory 1GiB", "argument --model: No full-size model is called 'flux.1-dve'."),
        ("--model flux.1-dev --gpu rtx-4091", "argument --gpu: No card is called 'rtx-4091'."),
        (
            "--model flux.1-dev --gpu rtx-4090 --toml no/a.toml",
            "argument --toml: 'no/a.toml' cannot be written: its folder is missing.",
        ),
        (
            "--model flux.1-dev --gpu rtx-4090 --toml a --json ./a",
            "argument --toml: 'a' is --json's file already",
        ),
        (
            "--model flux.1-dev --gpu rtx-4090 --assume a=1 --assume a=2",
            "argument --assume: 'a' is given twice, as '1' and '2'",
        ),
    ],
)
def test_a_mistake_is_named_and_nothing_is_forecast(
    ran: Callable[..., tuple[int, str, str]], asked: Told, arguments: str, sentence: str
) -> None:
    status, out, err = ran(*arguments.split())
    assert (status, out, asked.calls) == (2, "", [])
    assert sentence in err


def test_the_verdict_tells_what_may_fit_and_what_failed() -> None:
    recipe = Recipe("a", "tiny-flux")
    empty = Advice("flux.1-dev", "bfloat16", GIB, None, 28, (Rung("a", "", recipe, failure="no"),))
    assert verdict(empty) == "No rung could be forecast."
    may = Advice("flux.1-dev", "bfloat16", GIB, None, 28, (Rung("a", "", recipe, made(), fit="may fit"),))
    assert verdict(may) == "No rung is sure to fit 1.00 GiB; a may."
    assert CARDS["rtx-4080"].generation == "ada"
