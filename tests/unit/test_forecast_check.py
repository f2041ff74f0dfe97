"""The check forecast: what it says, word for word, and that a session makes each forecast once and no other run for it."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from typing import Any

import pytest

from pytest_diffopt.checks import check, checks_for
from pytest_diffopt.checks.session import Session
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.errors import ReplicaError, UnverifiableError
from pytest_diffopt.forecasting.record import Forecast, LiveTensors
from pytest_diffopt.recipe import Recipe
from tests.made_forecasts import GIB, gib, judged, made, phase, recipe

# What it says.


def test_a_recipe_that_fits_passes_with_its_numbers() -> None:
    verdict = judged(made(), recipe("16GiB", "rtx-4090"))
    assert verdict.status == "passed"
    assert verdict.sentence == (
        "flux.1-dev peaks at 15.00 GiB (14.50 to 15.50) while transformer runs: "
        "within the 16.00 GiB allowed; it fits the 23.43 GiB of the rtx-4090"
    )
    assert verdict.figures == {
        "model": "flux.1-dev",
        "phase": "call",
        "component": "transformer",
        "operation": "aten::bmm",
        "peak_low_bytes": int(14.5 * GIB),
        "peak_expected_bytes": 15 * GIB,
        "peak_high_bytes": int(15.5 * GIB),
        "load_peak_bytes": 12 * GIB,
        "call_peak_bytes": 15 * GIB,
        "reserved_expected_bytes": 15 * GIB,
        "reserved_high_bytes": int(15.5 * GIB),
        "limit_bytes": 16 * GIB,
        "gpu": "rtx-4090",
        "gpu_bytes": int(23.43 * GIB),
    }
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
    assert verdict.evidence == (
        "the peak: call 1, transformer, aten::bmm; calls of 28 steps at 1024×1024",
        "8.00 GiB  transformer/transformer_blocks.*  weights (152 tensors)",
        "1.00 GiB  transformer/transformer_blocks.*.attn  working of aten::bmm",
    )


def test_a_recipe_that_does_not_fit_fails_with_where_and_what_to_try() -> None:
    verdict = judged(made(gib(33.5)), recipe("16GiB", "rtx-4090", name="flux"))
    assert verdict.text == "\n".join(
        [
            (
                "flux · forecast: flux.1-dev peaks at 33.50 GiB while transformer runs: "
                "16.00 GiB allowed, at least 17.50 GiB too little; "
                "the rtx-4090 has 23.43 GiB, with CUDA's context of at least 256.00 MiB 10.32 GiB too little"
            ),
            "  the peak: call 1, transformer, aten::bmm; calls of 28 steps at 1024×1024",
            "  8.00 GiB  transformer/transformer_blocks.*  weights (152 tensors)",
            "  1.00 GiB  transformer/transformer_blocks.*.attn  working of aten::bmm",
            (
                "  transformer has 8.00 GiB of weights: "
                'quantization = { backend = "bitsandbytes_4bit", components = ["transformer"] }'
            ),
            '  components need not be there all at once: offloading = { strategy = "model" }',
        ]
    )


def test_a_recipe_that_may_fit_is_unverified_with_what_makes_the_range_wide() -> None:
    verdict = judged(made(gib(14, 15, 24), wide=("the workspace of cuDNN",)), recipe("16GiB", "rtx-4090"))
    assert verdict.status == "unverified"
    assert verdict.sentence == (
        "flux.1-dev peaks at 15.00 GiB (14.00 to 24.00) while transformer runs: "
        "its range reaches 8.00 GiB over the 16.00 GiB allowed; "
        "with what the allocator reserves and CUDA's context of up to 640.00 MiB its range reaches 1.20 GiB over the "
        "23.43 GiB of the rtx-4090"
    )
    assert "the range is wide: the workspace of cuDNN" in verdict.evidence
    assert verdict.evidence[-1] == (
        "up to 24.00 GiB may be taken: promise that, or say in assume what is known of the machine"
    )


@pytest.mark.parametrize(
    ("phase_kind", "component", "doing"),
    [
        ("load", "vae", "vae loads"),
        ("place", "vae", "vae is placed"),
        ("call", "vae", "vae runs"),
        ("load", "", "the pipeline loads"),
        ("place", "", "the pipeline is placed"),
        ("call", "", "the pipeline runs between its components"),
    ],
)
def test_the_sentence_says_what_was_done_at_the_peak(phase_kind: Any, component: str, doing: str) -> None:
    verdict = judged(made(peak_phase=phase_kind, peak_component=component))
    assert f"while {doing}: " in verdict.sentence


def hints(given: Recipe, **fields: Any) -> tuple[str, ...]:
    verdict = judged(made(gib(33.5), **fields), given)
    return verdict.evidence[1 + len(fields.get("live_at_peak", (1, 2))) :]


def test_what_to_try_follows_from_the_recipe_and_from_what_is_alive() -> None:
    quantized = recipe(quantization={"backend": "bitsandbytes_4bit"})
    assert hints(quantized) == ('components need not be there all at once: offloading = { strategy = "model" }',)
    by_model = quantized.replace(offloading={"strategy": "model"})
    assert hints(by_model) == (
        'transformer need not be there as a whole: offloading = { strategy = "group", offload_type = "leaf_level" }',
    )
    assert hints(quantized.replace(offloading={"strategy": "group"})) == ()
    working = (LiveTensors("vae", "decoder", "working", "aten::convolution", GIB, 3),)
    assert hints(quantized, live_at_peak=working) == (
        "most of it is working memory: fewer pixels, frames or images a call lower it, and tiling where a VAE runs",
    )


def test_a_forecast_that_could_not_be_made_is_unverified_with_the_cause() -> None:
    verdict = judged(None, error="No full-size model is called 'x'.\nThere are\n  others")
    assert verdict.status == "unverified"
    assert verdict.sentence == "no forecast was made: No full-size model is called 'x'."
    assert verdict.evidence == ("There are", "  others")


# The session.


class Maker:
    """Stands for `forecasting.running`: counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def forecast(self, asked: Recipe, model: str | None = None, **given: Any) -> Forecast:
        self.asked.append({"recipe": asked.name, "model": model, **given})
        if self.error is not None:
            raise self.error
        return made(recipe=asked.name)


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Maker:
    import pytest_diffopt.forecasting

    maker = Maker()
    fake = types.ModuleType("pytest_diffopt.forecasting.running")
    fake.forecast = maker.forecast  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(pytest_diffopt.forecasting, "running", fake, raising=False)
    return maker


class OnlyForecasts(Session):
    """Runs nothing."""

    def _observe(self, recipe: Recipe, *, force_eager: bool) -> Any:
        raise AssertionError(f"{recipe.name} was run")


def test_the_check_is_there_where_the_recipe_has_the_part() -> None:
    assert checks_for(recipe()) == ("parity", "state", "forecast")
    assert checks_for(recipe(forecast=None)) == ("parity", "state")


def test_it_is_judged_without_a_run_of_the_recipe(maker: Maker) -> None:
    assert OnlyForecasts().judge(recipe(), "forecast").status == "passed"
    (asked,) = maker.asked
    assert asked == {
        "recipe": "flux",
        "model": "flux.1-dev",
        "sizes": None,
        "steps": None,
        "gpu": None,
        "assume": {},
        "kwargs": {},
        "progress": None,
    }


def test_everything_that_the_budget_says_is_asked_for(maker: Maker) -> None:
    budget = {
        "model": "flux.1-dev",
        "gpu": "rtx-4090",
        "sizes": [512, 512],
        "num_inference_steps": 4,
        "assume": {"attention": "math"},
        "kwargs": {"guidance_scale": 1.0},
    }
    OnlyForecasts().judge(recipe(forecast=budget), "forecast")
    (asked,) = maker.asked
    assert asked["sizes"] == ((512, 512),)
    assert (asked["steps"], asked["gpu"]) == (4, "rtx-4090")
    assert (asked["assume"], asked["kwargs"]) == ({"attention": "math"}, {"guidance_scale": 1.0})


def test_a_forecast_is_made_once_for_equal_content_and_model_whatever_the_limit(maker: Maker) -> None:
    session = OnlyForecasts()
    assert session.judge(recipe("16GiB"), "forecast").status == "passed"
    assert session.judge(recipe("14GiB", name="tight"), "forecast").status == "failed"
    assert len(maker.asked) == 1
    session.judge(recipe("16GiB", "rtx-4090"), "forecast")
    session.judge(recipe("16GiB", dtype="bfloat16"), "forecast")
    session.judge(recipe(forecast={"model": "flux.1-schnell", "max_memory": "16GiB"}), "forecast")
    assert len(maker.asked) == 4
    session.judge(recipe(forecast={"model": "black-forest-labs/flux.1-dev", "max_memory": "16GiB"}), "forecast")
    assert len(maker.asked) == 4
    session.release()
    session.judge(recipe(), "forecast")
    assert len(maker.asked) == 5


def test_a_forecast_of_another_recipe_is_not_renamed_to_the_one_that_is_asked_for(
    maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker.forecast = lambda asked, model, **given: made(recipe="stray")  # type: ignore[method-assign]
    monkeypatch.setattr(sys.modules["pytest_diffopt.forecasting.running"], "forecast", maker.forecast)
    session = OnlyForecasts()
    for name in ("flux", "again"):
        verdict = session.judge(recipe(name=name), "forecast")
        assert verdict.sentence == "the forecast is of the recipe 'stray', not of this one"


def test_the_model_that_was_made_is_compared_with_the_one_that_was_asked_for(maker: Maker) -> None:
    session = OnlyForecasts()
    schnell = session.judge(recipe(forecast={"model": "flux.1-schnell", "max_memory": "16GiB"}), "forecast")
    assert schnell.sentence == "the forecast is of flux.1-dev; asked for was flux.1-schnell"
    by_id = recipe(forecast={"model": "black-forest-labs/FLUX.1-dev", "max_memory": "16GiB"})
    assert session.judge(by_id, "forecast").status == "passed"
    own = recipe(pipeline="black-forest-labs/FLUX.1-schnell", forecast={"max_memory": "16GiB"})
    assert session.judge(own, "forecast").sentence == "the forecast is of flux.1-dev; asked for was flux.1-schnell"


def test_an_error_is_said_at_every_use_and_tried_once(maker: Maker) -> None:
    maker.error = ReplicaError("the vae cannot be built")
    session = OnlyForecasts()
    for _ in range(2):
        verdict = session.judge(recipe(), "forecast")
        assert (verdict.status, verdict.sentence) == ("unverified", "no forecast was made: the vae cannot be built")
    assert len(maker.asked) == 1


def test_an_unknown_card_is_told_before_anything_is_forecast(maker: Maker) -> None:
    verdict = OnlyForecasts().judge(recipe(None, "rtx-4091"), "forecast")
    assert verdict.status == "unverified"
    assert verdict.sentence.startswith("no forecast was made: No card is called 'rtx-4091'. Did you mean 'rtx-4090'?")
    assert maker.asked == []


def test_check_judges_all_checks_of_a_recipe_and_the_forecast_with_them(
    maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unverifiable(self: Session, recipe: Recipe, *, force_eager: bool) -> Any:
        raise UnverifiableError("no accelerator")

    monkeypatch.setattr(Session, "_observe", unverifiable)
    verdicts = check(recipe())
    assert [(one.check, one.status) for one in verdicts] == [
        ("parity", "unverified"),
        ("state", "unverified"),
        ("forecast", "passed"),
    ]


def test_a_phase_that_is_higher_than_the_peak_is_the_peak() -> None:
    verdict = judged(made(phases=(*made().phases, phase("call", "vae", gib(15.75), call=2, operation="aten::cat"))))
    assert verdict.sentence.startswith("flux.1-dev peaks at 15.75 GiB while vae runs: ")
    assert verdict.evidence[0].startswith("the peak: call 2, vae, aten::cat; ")
    assert verdict.figures["peak_expected_bytes"] == int(15.75 * GIB)


def test_a_session_without_a_forecast_never_imports_what_makes_one() -> None:
    code = (
        "import sys, pytest_diffopt.checks.session\n"
        "from pytest_diffopt.installation import problems_with_installation\n"
        "from pytest_diffopt.recipe import Recipe\n"
        "problems_with_installation(Recipe('a', 'tiny-flux'))\n"
        "names = ('running', 'assumptions', 'cards')\n"
        "print([name for name in names if f'pytest_diffopt.forecasting.{name}' in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
