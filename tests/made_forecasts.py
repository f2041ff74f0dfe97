"""Forecasts made by hand, for the tests of what is judged and shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_diffopt.accelerators.gpus import card
from pytest_diffopt.checks import forecast as check
from pytest_diffopt.checks.evidence import ForecastEvidence
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.forecasting.record import Estimate, Forecast, LiveTensors, Phase, PhaseForecast
from pytest_diffopt.observation.observation import Owner, PhaseResidency, Residency
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


RESIDENCY = Residency(
    owners=(Owner("transformer", "weights"), Owner("vae", "working")),
    phases=(
        PhaseResidency("loading", 0, 5, 5, 12 * GIB),
        PhaseResidency("call 0", 5, 9, 8, 15 * GIB, "vae", "aten::add"),
    ),
    positions=(0, 5, 8, 9),
    bytes=((0, 0), (12 * GIB, 0), (12 * GIB, 3 * GIB), (12 * GIB, 0)),
)


def of_the_guide(
    recipe: str = "nf4", load: float = 12.1962, vae: tuple[float, float, float] = (13.9, 14.9453, 16.1), **fields: Any
) -> Forecast:
    """A forecast of FLUX.1-dev: two components load to ``load``, and the VAE's decoding peaks in the call."""
    phases = (
        PhaseForecast("load", "text_encoder_2", gib(load / 2)),
        PhaseForecast("load", "transformer", gib(load)),
        PhaseForecast("call", "transformer", gib(5), operation="aten::addmm"),
        PhaseForecast("call", "vae", gib(*vae), operation="aten::convolution"),
    )
    highest = max(phases, key=lambda phase: phase.peak.expected)
    known: dict[str, Any] = {
        "recipe": recipe,
        "model": "flux.1-dev",
        "pipeline": "FluxPipeline",
        "dtype": "bfloat16",
        "sizes": ((1024, 1024),),
        "steps": 2,
        "peak": highest.peak,
        "peak_phase": highest.phase,
        "peak_component": highest.component,
        "peak_operation": highest.operation,
        "phases": phases,
        "live_at_peak": (
            LiveTensors("transformer", "transformer_blocks.*.attn.to_q", "weights", "", 7 * GIB, 19),
            LiveTensors("vae", "decoder.up_blocks.*.conv", "workspace", "aten::convolution", 3 * GIB, 1),
            LiveTensors("", "", "working", "aten::randn", GIB // 1024, 1),
        ),
        "reserved": Estimate(highest.peak.low, highest.peak.expected + GIB // 8, highest.peak.high + GIB // 8),
        "floor_bytes": highest.peak.low,
        "host_bytes": 3 * GIB,
        "pinned_bytes": GIB,
        "h2d_bytes": 2 * GIB,
        "d2h_bytes": GIB // 2,
        "generation": "ada",
        "residency": RESIDENCY,
    }
    return Forecast(**{**known, **fields})
