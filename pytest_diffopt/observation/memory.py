"""The memory watch: what the accelerator holds while a pipeline is prepared, during each call, and after it.

The peak of loading and the peak of a call are told apart, and results that the observation itself holds are not counted
as growth.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_diffopt.observation.layers import tensor_bytes
from pytest_diffopt.observation.observation import CallMemory, MemoryRecord

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators import Accelerator


class MemoryWatch:
    """Reads the accelerator's counters. On a device without counters nothing is written down."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._before: int | None = None
        self._load_peak = self._loaded = 0
        self._calls: list[CallMemory] = []

    @property
    def counts(self) -> bool:
        """Whether the device counts its memory."""
        return self._before is not None

    def open(self) -> None:
        """Begin: what is allocated now belongs to others."""
        self._before = self._settled()
        self.accelerator.reset_peak()

    def loaded(self) -> None:
        """The pipeline is prepared."""
        if self.counts:
            self._load_peak = self.accelerator.peak_bytes() or 0
            self._loaded = self._settled() or 0

    def call_begins(self) -> None:
        """A call is about to be made."""
        if self.counts:
            self.accelerator.reset_peak()

    def call_ends(self, call: int, components: Mapping[str, torch.nn.Module], held_bytes: int) -> None:
        """A call was made; ``held_bytes`` of results on the accelerator are held by the observation."""
        if not self.counts:
            return
        peak = self.accelerator.peak_bytes() or 0
        self._calls.append(
            CallMemory(
                call=call,
                peak_bytes=peak,
                live_bytes=(self._settled() or 0) - held_bytes,
                residency={name: self._resident(module) for name, module in components.items()},
            )
        )

    @property
    def record(self) -> MemoryRecord | None:
        """What was written down; None on a device without counters."""
        if self._before is None:
            return None
        return MemoryRecord(self._before, self._load_peak, self._loaded, tuple(self._calls))

    def _settled(self) -> int | None:
        """Live bytes once everything queued has run and garbage is gone; None where the device does not count."""
        if self.accelerator.live_bytes() is None:
            return None
        self.accelerator.synchronize()
        gc.collect()
        return self.accelerator.live_bytes()

    def _resident(self, module: torch.nn.Module) -> int:
        kind = self.accelerator.kind
        found = {
            tensor.data_ptr(): tensor_bytes(tensor)
            for tensor in [*module.parameters(), *module.buffers()]
            if tensor.device.type == kind
        }
        return sum(found.values())
