"""The simulated device, as every test of this folder finds it: empty, device 0 current, counters at nought."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import pytest_diffopt.accelerators.simulated  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_frozen(frozen_libraries: Callable[[], None]) -> None: ...


@pytest.fixture(autouse=True)
def sim() -> Iterator[Any]:
    """``torch.sim``, with no counts, no limit and one byte counted as one."""
    sim: Any = torch.sim  # type: ignore[attr-defined]
    gc.collect()
    for index in range(sim.device_count()):
        sim.reset_peak_memory_stats(index)
        sim.reset_counts(index)
    yield sim
    sim.set_device(0)
    sim.set_caching_allocator(False)
    sim.empty_cache()
    for index in range(sim.device_count()):
        sim.set_memory_limit(None, index)
