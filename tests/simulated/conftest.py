"""A simulated GPU, as every test of this folder finds it: empty, device 0 current, counters at 0."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from pytest_diffopt.accelerators.simulated import SimulatedGpu, simulated_cuda


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_frozen(frozen_libraries: Callable[[], None]) -> None: ...


@pytest.fixture(scope="module")
def two_gpus(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu | None]:
    """Two of them; None in a module whose tests enter by themselves, or start processes that do (``ENTERS = False``)."""
    if not getattr(request.module, "ENTERS", True):
        yield None
        return
    with simulated_cuda("rtx-4090", devices=2) as gpu:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # until then it has no statistics
        yield gpu


@pytest.fixture(autouse=True)
def gpu(two_gpus: SimulatedGpu | None) -> Iterator[SimulatedGpu | None]:
    """The GPU, with no counts, no limit and one byte counted as one."""
    if two_gpus is None:
        yield None
        return
    gc.collect()
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
        two_gpus.reset_counts(index)
    yield two_gpus
    torch.cuda.set_device(0)
    two_gpus.set_caching_allocator(False)
    torch.cuda.empty_cache()
    for index in range(torch.cuda.device_count()):
        two_gpus.set_memory_limit(None, index)
