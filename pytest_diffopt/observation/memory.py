"""The memory watch: what the accelerator holds while a pipeline is prepared, during each call, and after it.

The peak of loading and the peak of a call are told apart, and results that the observation itself holds are not counted
as growth.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_diffopt.accelerators import Peak
from pytest_diffopt.errors import UnverifiableError
from pytest_diffopt.observation.layers import weight_tensors
from pytest_diffopt.observation.observation import CallMemory, MemoryRecord
from pytest_diffopt.observation.residency import ResidencyLedger

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators import Accelerator


SHOWN = 3
"""Names of tensors that are written down for a component that stays."""


class MemoryWatch:
    """Reads the accelerator's counters. On a device without counters nothing is written down."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.ledger = ResidencyLedger(accelerator)
        self._peak = Peak(accelerator)
        self._before: int | None = None
        self._load_peak = self._loaded = self._held = self._elsewhere_before = 0
        self._loaded_residency: dict[str, int] = {}
        self._transferred: dict[str, int] | None = None
        self._calls: list[CallMemory] = []
        self._frozen = False

    @property
    def counts(self) -> bool:
        """Whether the device counts its memory."""
        return self._before is not None

    def open(self) -> None:
        """Begin: what is allocated now belongs to others."""
        live = self.accelerator.live_bytes()
        if live:
            self._settled()  # what earlier runs left in cycles is not this one's
        if live is not None and not gc.get_freeze_count():
            # half a million objects of the libraries need not be looked at after every call
            gc.freeze()
            self._frozen = True
        self._before = self.accelerator.live_bytes()
        self._peak.__enter__()
        self._elsewhere_before = self.accelerator.elsewhere_bytes() or 0
        if self._before is not None:
            self.ledger.open(self._before)

    def loaded(self, components: Mapping[str, torch.nn.Module]) -> None:
        """The pipeline is prepared; these are its components."""
        if self.counts:
            self._load_peak = self._peak.bytes() or 0
            self._loaded = self._settled() or 0
            resident = {name: self._resident(module)[0] for name, module in components.items()}
            self._loaded_residency = {name: sum(blocks.values()) for name, blocks in resident.items()}
            self.ledger.knows(components)
            self.ledger.look()
            self.ledger.phase("")

    def call_begins(self, phase: str, held_bytes: int) -> None:
        """A call is about to be made.

        Args:
            phase: its name in the residency, such as ``"call 0"``.
            held_bytes: on the accelerator, of results that the observation holds already.
        """
        self._held = held_bytes
        if self.counts:
            self._peak.begin()
            self._transferred = self.accelerator.transferred_bytes()
            self.ledger.phase(phase)

    def call_ends(
        self, call: int, components: Mapping[str, torch.nn.Module], held_bytes: int, *, repeated: bool = False
    ) -> None:
        """A call was made; ``held_bytes`` of results on the accelerator are held by the observation."""
        if not self.counts:
            return
        peak = self._peak.bytes() or 0
        moved = self.accelerator.transferred_bytes()
        begun = self._transferred
        resident = {name: self._resident(module) for name, module in components.items()}
        self._calls.append(
            CallMemory(
                call=call,
                peak_bytes=peak - self._held,
                live_bytes=(self._settled() or 0) - held_bytes,
                residency={name: sum(blocks.values()) for name, (blocks, _) in resident.items()},
                weights_bytes=sum({a: size for blocks, _ in resident.values() for a, size in blocks.items()}.values()),
                staying={name: names for name, (_, names) in resident.items() if names},
                buffers={name: size for name, module in components.items() if (size := self._resident_buffers(module))},
                elsewhere_bytes=(self.accelerator.elsewhere_bytes() or 0) - self._elsewhere_before,
                h2d_bytes=moved["h2d"] - begun["h2d"] if moved and begun else None,
                d2h_bytes=moved["d2h"] - begun["d2h"] if moved and begun else None,
                repeated=repeated,
            )
        )
        self.ledger.look()
        self.ledger.phase("")

    def close(self) -> None:
        """End: what happens to the memory from here on is not this run's."""
        self._peak.__exit__(None, None, None)
        self.ledger.close()
        if self._frozen:
            gc.unfreeze()
            self._frozen = False

    def is_growing(self) -> bool:
        """Whether a warm call left more than the one before it: a leak, or something that is kept once."""
        live = [call.live_bytes for call in self._calls[1:]]
        return any(later > earlier for earlier, later in itertools.pairwise(live))

    @property
    def record(self) -> MemoryRecord | None:
        """What was written down; None on a device without counters."""
        if self._before is None:
            return None
        return MemoryRecord(
            self._before,
            self._load_peak,
            self._loaded,
            tuple(self._calls),
            self._loaded_residency,
            self.ledger.record,
        )

    def _settled(self) -> int | None:
        """Live bytes once everything queued has run and garbage is gone; None where the device does not count."""
        if self.accelerator.live_bytes() is None:
            return None
        self.accelerator.synchronize()
        gc.collect()
        return self.accelerator.live_bytes()

    def _resident(self, module: torch.nn.Module) -> tuple[dict[int, int], tuple[str, ...]]:
        """(address → bytes of the blocks that hold the module's weights on the accelerator; the first few of their names)."""
        blocks: dict[int, int] = {}
        names: list[str] = []
        for name, tensor in weight_tensors(module):
            if tensor.device.type == self.accelerator.kind and tensor.untyped_storage().data_ptr():
                storage = tensor.untyped_storage()
                blocks[storage.data_ptr()] = self.accelerator.allocated_bytes(storage.nbytes())
                names.append(name)
        return blocks, tuple(names[:SHOWN])

    def _resident_buffers(self, module: torch.nn.Module) -> int:
        buffers = [buffer for buffer in module.buffers() if buffer.device.type == self.accelerator.kind]
        storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in buffers}
        return sum(self.accelerator.allocated_bytes(size) for size in storages.values())


class MemorySpan:
    """What happens to the accelerator's memory while something else runs, e.g. a test; a context manager.

    Attributes:
        before_bytes: on the accelerator when it was opened.

    Raises:
        UnverifiableError: on entry, where the device does not count its memory.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.before_bytes = 0
        self._transferred: dict[str, int] = {}
        self._peak = Peak(accelerator)
        self._final: int | None = None

    def __enter__(self) -> MemorySpan:
        live = self.accelerator.live_bytes()
        if live is None:
            raise UnverifiableError(f"the device in use, {self.accelerator.kind}, has no memory that could be measured")
        self.before_bytes = live
        self._transferred = self.accelerator.transferred_bytes() or {}
        self._peak.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.accelerator.synchronize()
        self._final = self._peak.bytes()
        self._peak.__exit__(*exception)

    def begin(self) -> None:
        """Begin the peak anew, e.g. once a pipeline is loaded."""
        self._peak.begin()

    @property
    def peak_bytes(self) -> int:
        """The highest so far, with what was there before; after the span, the highest in it."""
        return self._final if self._final is not None else self._peak.bytes() or 0

    @property
    def live_bytes(self) -> int:
        """On the accelerator now."""
        return self.accelerator.live_bytes() or 0

    @property
    def transferred_bytes(self) -> dict[str, int] | None:
        """Copied since it was opened, ``h2d`` and ``d2h``; None where the device does not count that."""
        now = self.accelerator.transferred_bytes()
        return None if now is None else {way: size - self._transferred.get(way, 0) for way, size in now.items()}
