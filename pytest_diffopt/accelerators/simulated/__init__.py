"""CUDA, simulated: ``with simulated_cuda("rtx-4090") as gpu:`` makes ``torch.device("cuda")`` that GPU, with no GPU.

Tensors on it live in host memory and are computed by the CPU's kernels; what is simulated is the *device*: each byte on
it is counted, tensors of different devices do not mix, copies across are counted, its memory has an end. torch's own
Python for CUDA runs on it. The library behind it is built on first use (see :mod:`.build`).

Importing this changes nothing. What ``torch.cuda`` has no name for is here and on ``gpu``.
"""

from __future__ import annotations

from typing import NoReturn

from pytest_diffopt.accelerators.simulated.dry_runs import (
    count_host_memory,
    dry,
    empty_host_cache,
    host_memory_stats,
    is_dry,
    is_hollow,
    register_cost,
    register_dry_kernel,
    reset_peak_host_memory_stats,
)
from pytest_diffopt.accelerators.simulated.gpu import SimulatedGpu, current, simulated_cuda
from pytest_diffopt.accelerators.simulated.host_syncs import HostSync, SyncRecording, mark_syncs, record_syncs, syncs
from pytest_diffopt.accelerators.simulated.measures import (
    MemoryEvent,
    as_capability,
    is_caching_allocator,
    kernel_count,
    mark_memory_events,
    memory_blocks,
    record_memory_events,
    record_operations,
    recorded_memory_events,
    recorded_operations,
    replay_reserved_memory,
    reset_counts,
    set_caching_allocator,
    set_memory_limit,
    transfer_stats,
)

__all__ = [
    "OF_A_GPU",
    "HostSync",
    "MemoryEvent",
    "SimulatedGpu",
    "SyncRecording",
    "as_capability",
    "count_host_memory",
    "current",
    "dry",
    "empty_host_cache",
    "host_memory_stats",
    "is_caching_allocator",
    "is_dry",
    "is_hollow",
    "kernel_count",
    "mark_memory_events",
    "mark_syncs",
    "memory_blocks",
    "record_memory_events",
    "record_operations",
    "record_syncs",
    "recorded_memory_events",
    "recorded_operations",
    "register_cost",
    "register_dry_kernel",
    "replay_reserved_memory",
    "reset_counts",
    "reset_peak_host_memory_stats",
    "set_caching_allocator",
    "set_memory_limit",
    "simulated_cuda",
    "syncs",
    "transfer_stats",
]

_OF_THE_MODULE = frozenset(
    [
        "OF_A_GPU",
        "HostSync",
        "MemoryEvent",
        "SimulatedGpu",
        "SyncRecording",
        "as_capability",
        "current",
        "simulated_cuda",
    ]
)
OF_A_GPU = frozenset(__all__) - _OF_THE_MODULE
"""What ``gpu`` has besides its own attributes, by name."""


def __getattr__(name: str) -> NoReturn:
    if name in ("adapt_libraries", "adapted_libraries"):
        raise AttributeError(
            f"{__name__}.{name} is gone, and so are torch.sim and torch.device('sim'): the simulated device is CUDA itself. "
            f"Write 'with simulated_cuda(\"rtx-4090\") as gpu:' and torch.device('cuda')."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
