"""What happened to an accelerator's memory, in order: every block that came and went, and by which operation.

The simulated device writes it down itself. CUDA's allocator keeps a history too; its code here was written from torch's
source and documentation and has not run on a GPU.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class AllocationEvent(NamedTuple):
    """One thing that happened to a block of memory.

    Attributes:
        block: the block, while it lives: its address on CUDA; on the simulated device a number that is never used again.
        bytes: taken, or negative where given back; 0 for a copy into the block.
        operation: what did it, e.g. ``"aten::mm"``; ``""`` where no operation ran.
        mark: the last number that was given to :meth:`Accelerator.mark_allocation_events` before it.
        source: the block that was copied, also one of the host; 0 where nothing was, and on CUDA.
        pinned: whether that block is pinned memory of the host.
        low, high: of a kernel's workspace on the dry simulated device, at the least and at the most; else 0.
    """

    block: int
    bytes: int
    operation: str
    mark: int
    source: int = 0
    pinned: bool = False
    low: int = 0
    high: int = 0


class SimulatedEvents:
    """Events of the simulated device, copies among them. One recording at a time: a second one would delete the first."""

    _recording: weakref.ref[SimulatedEvents] | None = None

    def __init__(self, module: Any) -> None:
        self._module = module

    def start(self) -> bool:
        other = SimulatedEvents._recording and SimulatedEvents._recording()
        if other is not None and other is not self:
            return False
        SimulatedEvents._recording = weakref.ref(self)
        self._module.record_memory_events(True)
        return True

    def mark(self, mark: int) -> None:
        self._module.mark_memory_events(mark)

    def read(self) -> list[AllocationEvent]:
        return [AllocationEvent(*event) for event in self._module.recorded_memory_events()]

    def stop(self) -> None:
        SimulatedEvents._recording = None
        self._module.record_memory_events(False)

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        return [int(number) for number in self._module.memory_blocks(list(tensors))]


class CudaEvents:  # pragma: no cover
    """Events out of the history of CUDA's caching allocator. Not run yet: no GPU was at hand.

    A history that somebody else keeps is left alone. Bytes are those that were asked for, without the allocator's rounding.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def start(self) -> bool:
        import torch

        if getattr(torch._C, "_cuda_isHistoryEnabled", lambda: True)() or not hasattr(
            self._module.memory, "_set_memory_metadata"
        ):
            return False
        skipped = ["free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap", "snapshot"]
        self._module.memory._record_memory_history(
            "all", context="alloc", stacks="all", clear_history=True, skip_actions=skipped
        )
        self.mark(0)
        return True

    def mark(self, mark: int) -> None:
        self._module.memory._set_memory_metadata(str(mark))

    def read(self) -> list[AllocationEvent]:
        return events_of_snapshot(self._module.memory._snapshot(), self._module.current_device())

    def stop(self) -> None:
        self._module.memory._set_memory_metadata("")
        self._module.memory._record_memory_history(None)

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        return [tensor.untyped_storage().data_ptr() for tensor in tensors]


def events_of_snapshot(snapshot: Mapping[str, Any], device: int) -> list[AllocationEvent]:
    """The events of one device out of ``torch.cuda.memory._snapshot()``.

    A block is given back when that is requested, as ``torch.cuda.memory_allocated`` counts it. Marks are the decimal
    numbers in the entries' ``user_metadata``.
    """
    signs = {"alloc": 1, "free_requested": -1}
    return [
        AllocationEvent(
            block=int(entry["addr"]),
            bytes=signs[entry["action"]] * int(entry["size"]),
            operation=_operation(entry.get("frames", ())),
            mark=int(entry.get("user_metadata") or 0),
        )
        for entry in snapshot["device_traces"][device]
        if entry["action"] in signs
    ]


def _operation(frames: Sequence[Mapping[str, Any]]) -> str:
    """The outermost operation called by the innermost Python function; that function where no operation is seen."""
    found = ""
    for frame in frames:  # from the innermost
        if operation := re.search(r"at::_ops::(\w+)::(?:call|redispatch)\b", frame["name"]):
            found = f"aten::{operation[1]}"
        elif frame["filename"].endswith(".py"):
            return found or frame["name"]
    return found
