"""Forecasts made by hand, for the tests of what is judged and shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_diffopt.checks import forecast as check
from pytest_diffopt.checks.evidence import ForecastEvidence
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.forecasting.cards import card
from pytest_diffopt.forecasting.record import Estimate, Forecast, LiveTensors, Phase, PhaseForecast
from pytest_diffopt.recipe import Recipe

GIB = 2**30


def gib(low: float, expected: float | None = None, high: float | None = None) -> Estimate:
    """A range in GiB; of one number it is that number."""
    expected = low if expected is None else expected
    return Estimate(int(low * GIB), int(expected * GIB), int((expected if high is None else high) * GIB))


def phase(kind: Phase, component: str, peak: Estimate, **fields: Any) -> PhaseForecast:
    return PhaseForecast(kind, component, peak, **fields)


def made(peak: Estimate | None = None, **fields: Any) -> Forecast:
    """flux.1-dev, 4-bit: a transformer that runs at the peak, above what loading takes; healthy unless ``fields`` differ."""
    peak = gib(14.5, 15, 15.5) if peak is None else peak
    phases: Sequence[PhaseForecast] = (
        phase("load", "transformer", gib(12)),
        phase("call", "text_encoder", gib(9), call=0),
        phase("call", "transformer", peak, call=1, operation="aten::bmm"),
    )
    healthy: dict[str, Any] = {
        "recipe": "flux",
        "model": "flux.1-dev",
        "pipeline": "FluxPipeline",
        "dtype": "bfloat16",
        "sizes": ((1024, 1024),),
        "steps": 28,
        "peak": peak,
        "peak_phase": "call",
        "peak_component": "transformer",
        "peak_operation": "aten::bmm",
        "phases": phases,
        "live_at_peak": (
            LiveTensors("transformer", "transformer_blocks.*", "weights", "", 8 * GIB, 152),
            LiveTensors("transformer", "transformer_blocks.*.attn", "working", "aten::bmm", GIB, 1),
        ),
        "reserved": Estimate(peak.low, peak.expected, peak.high),
        "floor_bytes": peak.low,
        "weights_bytes": {"transformer": 8 * GIB, "text_encoder": GIB},
    }
    return Forecast(**{**healthy, **fields})


def recipe(max_memory: str | int | None = "16GiB", gpu: str | None = None, **fields: Any) -> Recipe:
    budget = {"model": "flux.1-dev", "max_memory": max_memory, "gpu": gpu}
    return Recipe(**{"name": "flux", "pipeline": "tiny-flux", "forecast": budget, **fields})


def judged(forecast: Forecast | None, asked: Recipe | None = None, **given: Any) -> Verdict:
    """What the check says."""
    asked = recipe() if asked is None else asked
    gpu = asked.forecast.gpu if asked.forecast is not None else None
    given = {"models": ("flux.1-dev", "black-forest-labs/FLUX.1-dev"), "card": card(gpu) if gpu else None, **given}
    return check.judge(ForecastEvidence(asked, forecast, **given))
