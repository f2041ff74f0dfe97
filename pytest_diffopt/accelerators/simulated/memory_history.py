"""What ``torch.cuda.memory_snapshot()`` and torch's history of the allocator say of the simulated GPU's memory.

Without the caching allocator each block is a segment of its own, at the address of its data. With it segments and blocks
are those of its book-keeping, whose addresses are its own.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from pytest_diffopt.accelerators.simulated.host_syncs import leave_alone

_ops = torch.ops.pytest_diffopt_sim

# In the order of the library's MemoryAction; a block that is freed can be used again at once.
_ALLOC, _FREE, _SEGMENT_ALLOC, _SEGMENT_FREE, _OUT_OF_MEMORY = range(5)
_NAMES = {_ALLOC: "alloc", _SEGMENT_ALLOC: "segment_alloc", _SEGMENT_FREE: "segment_free", _OUT_OF_MEMORY: "oom"}

Frame = dict[str, Any]


class History:
    """What happened to the memory, and where each live block was taken, as far as somebody asked for it.

    Attributes:
        metadata: that every later entry has, as ``user_metadata``.
    """

    def __init__(self, devices: int) -> None:
        self.enabled: str | None = None
        self.metadata = ""
        self._context: str | None = None
        self._skipped: frozenset[str] = frozenset()
        self._traces: list[deque[dict[str, Any]]] = [deque() for _ in range(devices)]
        self._frames: dict[tuple[int, int], list[Frame]] = {}  # of live blocks, by device and address
        self._lock = threading.RLock()  # an entry makes garbage, and collecting it may free a block
        self._listener = ctypes.CFUNCTYPE(
            None, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
        )(self._heard)

    def record(
        self,
        enabled: str | None,
        context: str | None = "all",
        stacks: str = "all",
        max_entries: int = sys.maxsize,
        clear_history: bool = False,
        compile_context: bool = False,
        annotations: bool = False,
        skip_actions: Iterable[str] = (),
        pinned_memory: bool = False,
        gpu: bool = True,
    ) -> None:
        """Stands for ``torch._C._cuda_record_memory_history``. Frames are Python's, whatever ``stacks`` says."""
        if pinned_memory:  # torch 2.14 asks for it
            raise NotImplementedError("The simulated GPU has no history of pinned memory.")
        if not gpu:
            enabled = None
        if enabled not in (None, "state", "all"):
            raise RuntimeError("expected state to be 'state', 'all', or None")
        if context not in (None, "state", "alloc", "all"):
            raise RuntimeError("expected context to be 'state', 'alloc', 'all', or None")
        with self._lock:
            if enabled is None or clear_history:
                self._traces = [deque() for _ in self._traces]
                self._frames.clear()
            self.enabled, self._context, self._skipped = enabled, context, frozenset(skip_actions)
            self._traces = [deque(trace, min(max_entries, sys.maxsize)) for trace in self._traces]
        address = ctypes.cast(self._listener, ctypes.c_void_p).value
        _ops.set_memory_listener(address if enabled is not None else 0)
        atexit.unregister(self.stop)
        if enabled is not None:
            atexit.register(self.stop)

    def record_legacy(
        self,
        enabled: bool,
        record_context: bool = True,
        max_entries: int = 1,
        trace_record_context: bool = False,
        record_context_cpp: bool = False,
        clear_history: bool = False,
        compile_context: bool = False,
        annotations: bool = False,
        skip_actions: Iterable[str] = (),
        pinned_memory: bool = False,
        gpu: bool = True,
    ) -> None:
        """Stands for ``torch._C._cuda_record_memory_history_legacy``."""
        context = ("alloc" if trace_record_context else "state") if record_context else None
        state = "all" if enabled else None
        self.record(state, context, "all", max_entries, clear_history, False, False, skip_actions, pinned_memory, gpu)

    def stop(self) -> None:
        """Nothing may be heard once Python ends."""
        self.enabled = None
        _ops.set_memory_listener(0)

    def is_enabled(self) -> bool:
        return self.enabled is not None

    def _heard(self, action: int, device: int, address: int, size: int, free: int) -> None:
        if self.enabled is None:
            return
        with self._lock:
            wanted = action == _ALLOC and self._context is not None
            wanted = wanted or self._context == "all" or (self._context == "alloc" and action == _SEGMENT_ALLOC)
            frames = _frames() if wanted else []
            if action == _ALLOC and frames:
                self._frames[device, address] = frames
            elif action == _FREE:
                self._frames.pop((device, address), None)
            if self.enabled != "all" or device >= len(self._traces):
                return
            if self._context == "state":
                frames = []
            names = ("free_requested", "free_completed") if action == _FREE else (_NAMES[action],)
            for name in names:
                if name not in self._skipped:
                    self._traces[device].append(self._entry(name, address, size, free, frames))

    def _entry(self, name: str, address: int, size: int, free: int, frames: list[Frame]) -> dict[str, Any]:
        where = {"device_free": free} if name == "oom" else {"addr": address}
        return {
            "action": name,
            **where,
            "frames": frames,
            "size": size,
            "stream": 0,
            "time_us": time.time_ns() // 1000,
            "pool_id": (0, 0),
            "user_metadata": self.metadata,
            "compile_context": "N/A",
        }

    def frames_of(self, address: int) -> list[Frame] | None:
        """Stands for ``torch._C._cuda_allocationTraceback``: where a live block was taken; None where nobody asked for it."""
        with self._lock:
            return next((frames for (_, at), frames in self._frames.items() if at == address), None)

    def snapshot(self, pool: tuple[Any, ...] | None = None) -> dict[str, Any]:
        """Stands for ``torch._C._cuda_memorySnapshot``. Every block is in the pool (0, 0)."""
        with_traces = pool is None or len(pool) < 3 or bool(pool[2])
        segments = []
        if pool is None or tuple(pool[:2]) == (0, 0):
            for device in range(len(self._traces)):
                segments += self._segments(device)
        with self._lock:
            return {
                "segments": segments,
                "device_traces": [list(trace) if with_traces else [] for trace in self._traces],
                "allocator_settings": {
                    "PYTORCH_CUDA_ALLOC_CONF": "",
                    "max_split_size": -1,
                    "garbage_collection_threshold": 0.0,
                    "expandable_segments": False,
                },
                "external_annotations": [],
            }

    def _segments(self, device: int) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for begin, whole, small, address, size, requested, taken in _ops.block_records(device).tolist():
            segment = found.setdefault(
                begin,
                {
                    "device": device,
                    "address": begin,
                    "total_size": whole,
                    "stream": 0,
                    "segment_type": "small" if small else "large",
                    "segment_pool_id": (0, 0),
                    "is_expandable": False,
                    "allocated_size": 0,
                    "active_size": 0,
                    "requested_size": 0,
                    "frames": [],
                    "blocks": [],
                },
            )
            if taken:
                segment["allocated_size"] += size
                segment["active_size"] += size
                segment["requested_size"] += requested
            segment["blocks"].append(
                {
                    "address": address,
                    "size": size,
                    "requested_size": requested,
                    "state": "active_allocated" if taken else "inactive",
                    "frames": self._frames.get((device, address), []),
                }
            )
        return sorted(found.values(), key=lambda segment: segment["address"])


def _frames() -> list[Frame]:
    """Python's lines, the innermost first."""
    found = []
    frame = sys._getframe().f_back
    frame = frame.f_back if frame is not None else None
    while frame is not None:
        code = frame.f_code
        found.append({"filename": code.co_filename, "line": frame.f_lineno, "name": code.co_name})
        frame = frame.f_back
    return found


for _function in (History._heard, History._entry, _frames):
    leave_alone(_function)
