"""Forecasts made by hand, for the tests of what is said of them."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.forecasting.record import Estimate, Forecast, LiveTensors, PhaseForecast
from pytest_diffopt.observation.observation import Owner, PhaseResidency, Residency

GIB = 1 << 30


def estimate(low: float, expected: float | None = None, high: float | None = None) -> Estimate:
    """In GiB; exact where one number is given."""
    expected = low if expected is None else expected
    return Estimate(int(low * GIB), int(expected * GIB), int((expected if high is None else high) * GIB))


RESIDENCY = Residency(
    owners=(Owner("transformer", "weights"), Owner("vae", "working")),
    phases=(
        PhaseResidency("loading", 0, 5, 5, 12 * GIB),
        PhaseResidency("call 0", 5, 9, 8, 15 * GIB, "vae", "aten::add"),
    ),
    positions=(0, 5, 8, 9),
    bytes=((0, 0), (12 * GIB, 0), (12 * GIB, 3 * GIB), (12 * GIB, 0)),
)


def made(
    recipe: str = "nf4", load: float = 12.1962, vae: tuple[float, float, float] = (13.9, 14.9453, 16.1), **fields: Any
) -> Forecast:
    """A forecast of FLUX.1-dev: two components load to ``load``, and the VAE's decoding peaks in the call."""
    phases = (
        PhaseForecast("load", "text_encoder_2", estimate(load / 2)),
        PhaseForecast("load", "transformer", estimate(load)),
        PhaseForecast("call", "transformer", estimate(5), operation="aten::addmm"),
        PhaseForecast("call", "vae", estimate(*vae), operation="aten::convolution"),
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
