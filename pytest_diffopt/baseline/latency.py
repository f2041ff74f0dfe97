"""Latency as a ratio, compiled to eager, with the interval that repeated calls give it; of a real accelerator alone.

Absolute times differ from machine to machine and from day to day; what compilation gains on one machine, in one process, can
be held against what it gained before. The first call (with its compilation), the second and the steady state are told apart.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_diffopt.baseline.record import Latency, Ratio

if TYPE_CHECKING:
    from pytest_diffopt.observation.observation import Observation

TIMED_CALLS = 9
"""Calls made for their time alone, of a recipe and of its eager reference."""
_ONCE = 1.5
"""A first or second call comes once in a process: its ratio may be so many times off, either way."""
_SAMPLES = 2000


def latency_of(observation: Observation, reference: Observation) -> Latency | None:
    """The recipe's times against those of its eager reference; None where nothing was timed, or one of them did not run.

    Args:
        observation, reference: both with `Observation.timed_seconds`, from one process.
    """
    if not (observation.timed_seconds and reference.timed_seconds) or observation.failure or reference.failure:
        return None
    own, eager = ([call.seconds for call in one.calls if call.kind == "call"] for one in (observation, reference))
    first, second = (
        _once(own[place] / eager[place]) if min(len(own), len(eager)) > place and eager[place] else None
        for place in (0, 1)
    )
    return Latency(first, second, steady_ratio(observation.timed_seconds, reference.timed_seconds))


def steady_ratio(own: Sequence[float], eager: Sequence[float]) -> Ratio:
    """The ratio of the medians of two series of seconds, and the interval that holds it at 95%, by the bootstrap.

    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, the percentile interval.
    """
    draw = random.Random(0)  # the same interval for the same times
    found = sorted(
        statistics.median(draw.choices(own, k=len(own))) / statistics.median(draw.choices(eager, k=len(eager)))
        for _ in range(_SAMPLES)
    )
    low, high = found[int(0.025 * _SAMPLES)], found[int(0.975 * _SAMPLES) - 1]
    return Ratio(_short(statistics.median(own) / statistics.median(eager)), _short(low), _short(high))


def _once(ratio: float) -> Ratio:
    return Ratio(_short(ratio), _short(ratio / _ONCE), _short(ratio * _ONCE))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
