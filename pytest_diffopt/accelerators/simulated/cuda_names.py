"""Names of ``torch.cuda`` that scripts and documentation pages use, and that ask little of a device.

`memory`, `random`, `amp`, `nvtx` and `graphs` become modules of ``torch.sim``; what a simulated device cannot do says so.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

OutOfMemoryError = torch.OutOfMemoryError
AcceleratorError = torch.AcceleratorError
has_half = True

# ---------------------------------------------------------------------------------------------------------- memory


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """A table of what :func:`memory_stats` tells, in bytes and counts."""
    face: Any = torch.sim  # type: ignore[attr-defined]
    stats = face.memory_stats(device)
    lines = [f"Memory summary of {face.get_device_name(device)}, sim:{face._index(device)}"]
    lines.append(f"{'':24}{'now':>16}{'peak':>16}{'in all':>16}{'freed':>16}")
    names = {
        "Allocated memory": "allocated_bytes",
        "Requested memory": "requested_bytes",
        "Reserved memory": "reserved_bytes",
        "Allocations": "allocation",
        "Segments": "segment",
    }
    for title, key in list(names.items())[: 3 if abbreviated else None]:
        figures = (stats.get(f"{key}.all.{kind}", "") for kind in ("current", "peak", "allocated", "freed"))
        lines.append(f"{title:24}" + "".join(f"{figure:>16}" for figure in figures))
    lines.append(f"Out of memory: {stats['num_ooms']} times")
    return "\n".join(lines)


def memory_cached(device: Any = None) -> int:
    """The old name of ``memory_reserved``."""
    return int(torch.sim.memory_reserved(device))  # type: ignore[attr-defined]


def max_memory_cached(device: Any = None) -> int:
    """The old name of ``max_memory_reserved``."""
    return int(torch.sim.max_memory_reserved(device))  # type: ignore[attr-defined]


def reset_max_memory_cached(device: Any = None) -> None:
    torch.sim.reset_peak_memory_stats(device)  # type: ignore[attr-defined]


def memory_snapshot(mempool_id: Any = None, include_traces: bool = True) -> list[dict[str, Any]]:
    """Nothing: the device keeps no segments. ``record_memory_events`` is its history."""
    return []


def get_allocator_backend() -> str:
    return "native"


def device_memory_used(device: Any = None) -> int:
    free, total = torch.sim.mem_get_info(device)  # type: ignore[attr-defined]
    return int(total - free)


def _record_memory_history(*args: Any, **kwargs: Any) -> None:
    """Accepted; the device's own history is ``record_memory_events``."""


def _snapshot(device: Any = None, augment_with_fx_traces: bool = False) -> dict[str, Any]:
    return {"segments": [], "device_traces": [], "allocator_settings": {}}


def _dump_snapshot(filename: str = "dump_snapshot.pickle", augment_with_fx_traces: bool = False) -> None:
    Path(filename).write_bytes(pickle.dumps(_snapshot()))


# --------------------------------------------------------------------------------------------------------- devices


def get_arch_list() -> list[str]:
    major, minor = torch.sim.get_device_capability()  # type: ignore[attr-defined]
    return [f"sm_{major}{minor}"]


def is_tf32_supported() -> bool:
    return True


def utilization(device: Any = None) -> int:
    """Per cent of time in which a kernel ran: 0, since everything has run when a call returns."""
    torch.sim.synchronize(device)  # type: ignore[attr-defined]
    return 0


def set_sync_debug_mode(debug_mode: int | str) -> None:
    """Accepted: nothing here waits."""


def get_sync_debug_mode() -> int:
    return 0


# ------------------------------------------------------------------------------------------------------------ nvtx


def range_push(msg: str) -> int:
    """How many ranges are open below this one, as NVTX counts them."""
    global _open_ranges
    _open_ranges += 1
    return _open_ranges - 1


def range_pop() -> int:
    global _open_ranges
    _open_ranges -= 1
    return _open_ranges


def range_start(msg: str) -> int:
    return 0


def range_end(range_id: int) -> None:
    """Nobody listens."""


def mark(msg: str) -> None:
    """Nobody listens."""


@contextlib.contextmanager
def range(msg: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    range_push(msg.format(*args, **kwargs))
    try:
        yield
    finally:
        range_pop()


_open_ranges = 0

# ------------------------------------------------------------------------------------------------------------- amp


class autocast(torch.amp.autocast_mode.autocast):
    """``torch.autocast("sim")`` by the old name that ``torch.cuda.amp`` has for it."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True) -> None:
        super().__init__("sim", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler("sim")`` by the old name that ``torch.cuda.amp`` has for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("sim", *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------- graphs


def _no_graphs() -> NoReturn:
    raise NotImplementedError(
        "The simulated device records no graphs of kernels (torch.cuda.CUDAGraph): its kernels have run when a call returns."
    )


class CUDAGraph:
    """Refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _no_graphs()


class graph:
    """Refused."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _no_graphs()


def graph_pool_handle() -> NoReturn:
    _no_graphs()


def make_graphed_callables(*args: Any, **kwargs: Any) -> NoReturn:
    _no_graphs()


def is_current_stream_capturing() -> bool:
    return False


# ---------------------------------------------------------------------------------------------------- registration

_MEMORY = (
    *("memory_summary", "memory_cached", "max_memory_cached", "reset_max_memory_cached", "memory_snapshot"),
    *("get_allocator_backend", "device_memory_used"),
)
_PRIVATE_MEMORY = ("_record_memory_history", "_snapshot", "_dump_snapshot")
_DEVICES = (
    *("OutOfMemoryError", "AcceleratorError", "has_half", "get_arch_list", "is_tf32_supported", "utilization"),
    *("set_sync_debug_mode", "get_sync_debug_mode"),
)
_NVTX = ("range_push", "range_pop", "range_start", "range_end", "mark", "range")
_AMP = ("autocast", "GradScaler")
_GRAPHS = ("CUDAGraph", "graph", "graph_pool_handle", "make_graphed_callables", "is_current_stream_capturing")
_OF_MEMORY = (
    *("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_stats"),
    *("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_accumulated_memory_stats", "mem_get_info"),
    *("empty_cache", "set_per_process_memory_fraction", "get_per_process_memory_fraction"),
)
_OF_RANDOM = (
    *("manual_seed", "manual_seed_all", "seed", "seed_all", "initial_seed", "get_rng_state", "get_rng_state_all"),
    *("set_rng_state", "set_rng_state_all"),
)


def add_names(face: types.ModuleType) -> None:
    """Give ``torch.sim`` these names, and its submodules, which ``import`` finds too."""
    own = globals()
    for name in (*_MEMORY, *_DEVICES, *_GRAPHS):
        setattr(face, name, own[name])
    held = {
        "memory": {name: getattr(face, name) for name in _OF_MEMORY} | _named((*_MEMORY, *_PRIVATE_MEMORY)),
        "random": {name: getattr(face, name) for name in _OF_RANDOM},
        "nvtx": _named(_NVTX),
        "amp": _named(_AMP) | {"custom_fwd": torch.amp.custom_fwd, "custom_bwd": torch.amp.custom_bwd},
        "graphs": _named(_GRAPHS),
    }
    for submodule, names in held.items():
        made = types.ModuleType(f"torch.sim.{submodule}")
        for name, value in names.items():
            setattr(made, name, value)
        setattr(face, submodule, made)
        sys.modules[made.__name__] = made


def _named(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: globals()[name] for name in names}
