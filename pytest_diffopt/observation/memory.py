"""The memory watch: what the accelerator holds while a pipeline is prepared, during each call, and after it.

The peak of loading and the peak of a call are told apart, and what the observation itself holds, results and arguments,
is not counted as growth.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_diffopt.accelerators import Peak
from pytest_diffopt.errors import UnverifiableError
from pytest_diffopt.observation.holders import holders
from pytest_diffopt.observation.layers import weight_tensors
from pytest_diffopt.observation.observation import CallMemory, MemoryRecord
from pytest_diffopt.observation.residency import ResidencyLedger, mapped_bytes
from pytest_diffopt.preparation import kept_tables

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators import Accelerator


SHOWN = 3
"""Names of tensors that are written down for a component that stays."""


LITTLE_BYTES = 4096
"""After the first call nearly every pipeline keeps so much, a scheduler's steps: no reason for more calls."""


_mark: list[object] = []
"""Not empty, and frozen, once something was found to be frozen."""


def somebody_froze() -> bool:
    """Whether something is frozen for the garbage collector. To count it takes 50 ms where the libraries are, so whether
    that is still so is told by one object, which is found among those that refer to another only if it is not frozen."""
    if _mark and not any(found is _mark for found in gc.get_referrers(_mark[0])):
        return True
    _mark.clear()
    if gc.get_freeze_count():
        _mark.append(object())
    return bool(_mark)


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
        self._held_at_begin: list[int] = []
        self._inputs = ""
        self._kept_results = 0
        self._host_before = 0
        self._load_host_peak: int | None = None

    @property
    def counts(self) -> bool:
        """Whether the device counts its memory."""
        return self._before is not None

    def open(self) -> None:
        """Begin: what is allocated now belongs to others."""
        live = self.accelerator.live_bytes()
        if live is not None:
            kept_tables.look()  # what is frozen below is not found any more
        if live:
            self._settled()  # what earlier runs left in cycles is not this one's
        if live is not None:
            # what lives by now, half a million objects of the libraries too, need not be looked at after every call
            self._frozen = not somebody_froze()
            if not self._frozen and not live:
                gc.collect()  # what is frozen now stays so, as what somebody else froze
            gc.freeze()
        self.accelerator.count_host_memory(True)
        self._host_before = (self.accelerator.host_bytes() or (0, 0))[0]
        self._before = self.accelerator.live_bytes()
        self._peak.__enter__()
        self._elsewhere_before = self._peak.elsewhere_bytes() or 0
        if self._before is not None:
            self.ledger.open(self._before)

    def loaded(self, components: Mapping[str, torch.nn.Module]) -> None:
        """The pipeline is prepared; these are its components."""
        if self.counts:
            self._load_peak = self._peak.bytes() or 0
            kept_tables.look()  # of what was imported to prepare it
            self._loaded = self._settled() or 0
            self._load_host_peak = self._host(components, 0)[1]
            resident = {name: self._resident(module)[0] for name, module in components.items()}
            self._loaded_residency = {name: sum(blocks.values()) for name, blocks in resident.items()}
            self.ledger.knows(components)
            self.ledger.look()
            self.ledger.phase("")

    def call_begins(self, phase: str, held_bytes: int, inputs: str = "") -> None:
        """A call is about to be made.

        Args:
            phase: its name in the residency, such as ``"call 0"``.
            held_bytes: on the accelerator, of results that the observation holds already.
            inputs: a digest of what it is given.
        """
        self._held = held_bytes
        self._inputs = inputs
        if self.counts:
            self._peak.begin()
            self.accelerator.count_host_memory(True)
            self._transferred = self.accelerator.transferred_bytes()
            self.ledger.phase(phase)

    def call_ends(
        self,
        call: int,
        components: Mapping[str, torch.nn.Module],
        held_bytes: int,
        *,
        held_on_host: int = 0,
        repeated: bool = False,
    ) -> None:
        """A call was made; ``held_bytes`` on the accelerator, and so many on the host, are held by the observation: results,
        and its arguments."""
        if not self.counts:
            return
        peak = self._peak.bytes() or 0
        moved = self.accelerator.transferred_bytes()
        begun = self._transferred
        resident = {name: self._resident(module) for name, module in components.items()}
        live = (self._settled() or 0) - held_bytes
        weights = sum({a: size for blocks, _ in resident.values() for a, size in blocks.items()}.values())
        host, host_peak = self._host(components, held_on_host)
        stays = live - (self._before or 0) - weights > LITTLE_BYTES
        self._calls.append(
            CallMemory(
                call=call,
                peak_bytes=peak - self._held,
                live_bytes=live,
                residency={name: sum(blocks.values()) for name, (blocks, _) in resident.items()},
                weights_bytes=weights,
                host_bytes=host,
                host_peak_bytes=host_peak,
                holders=holders(components, self.accelerator.device_type) if stays else (),
                staying={name: names for name, (_, names) in resident.items() if names},
                buffers={name: size for name, module in components.items() if (size := self._resident_buffers(module))},
                elsewhere_bytes=max(0, (self._peak.elsewhere_bytes() or 0) - self._elsewhere_before),
                tables_bytes=kept_tables.held_bytes(self.accelerator.device_type),
                h2d_bytes=moved["h2d"] - begun["h2d"] if moved and begun else None,
                d2h_bytes=moved["d2h"] - begun["d2h"] if moved and begun else None,
                repeated=repeated,
                inputs=self._inputs,
            )
        )
        self._held_at_begin.append(self._held)
        self.ledger.look()
        self.ledger.phase("")

    def close(self) -> None:
        """End: what happens to the memory from here on is not this run's."""
        self._peak.__exit__(None, None, None)
        self.accelerator.count_host_memory(False)
        self.ledger.close()
        if self._frozen:
            gc.unfreeze()
            self._frozen = False
        if self.ledger.record is None:
            return
        # a counter can be reset by a function that was taken out of torch before it was watched; what happened cannot
        phases = self.ledger.record.phases[1:]
        for at, (call, held, phase) in enumerate(zip(self._calls, self._held_at_begin, phases, strict=False)):
            self._calls[at] = replace(call, peak_bytes=max(call.peak_bytes, phase.peak_bytes - held))

    def results_let_go(self) -> None:
        """The observation holds no results any more: what is still there of them, the pipeline keeps."""
        if self.counts and self._calls:
            self._kept_results = max(0, (self._settled() or 0) - self._calls[-1].live_bytes)

    def kept_more(self) -> tuple[str, ...]:
        """Digests of the inputs of calls after which more was kept than before, at most two; none where none kept more.

        Each is a leak, or something that is kept once: only more calls of the same kind tell. A higher peak than an equal
        call had before counts too, since what is kept on the host may be sent to the device by every call.
        """
        own = [call for call in self._calls if not call.repeated]
        more: dict[str, None] = {}
        for at, call in enumerate(own[1:], 1):
            equal = [earlier.peak_bytes for earlier in own[:at] if earlier.inputs == call.inputs]
            more_on_host = (call.host_bytes or 0) - (own[at - 1].host_bytes or 0) > LITTLE_BYTES
            if more_on_host or call.live_bytes > own[at - 1].live_bytes or (equal and call.peak_bytes > max(equal)):
                more[call.inputs] = None
        kept_at_first = own[0].live_bytes - self._loaded if own else 0
        if not more and (kept_at_first > LITTLE_BYTES or self._kept_results):
            more[own[-1].inputs] = None
        return tuple(more)[-2:]

    def still_growing(self) -> bool:
        """Whether the repeated calls ended with more than they began with, live or at their peaks."""
        kinds: dict[str, list[CallMemory]] = {}
        for call in self._calls:
            if call.repeated:
                kinds.setdefault(call.inputs, []).append(call)
        return any(
            calls[-1].live_bytes > calls[0].live_bytes
            or calls[-1].peak_bytes > calls[0].peak_bytes
            or (calls[-1].host_bytes or 0) - (calls[0].host_bytes or 0) > LITTLE_BYTES
            for calls in kinds.values()
        )

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
            self._kept_results,
            self._load_host_peak,
        )

    def _host(self, components: Mapping[str, torch.nn.Module], held: int) -> tuple[int | None, int | None]:
        """(held of the host, the most since the peak began) without what the observation holds."""
        if (counted := self.accelerator.host_bytes()) is None:
            return None, None
        others = self._host_before + held - mapped_bytes(components, self.accelerator)
        return counted[0] - others, counted[1] - others

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
            if tensor.device.type == self.accelerator.device_type and tensor.untyped_storage().data_ptr():
                storage = tensor.untyped_storage()
                blocks[storage.data_ptr()] = self.accelerator.allocated_bytes(storage.nbytes())
                names.append(name)
        return blocks, tuple(names[:SHOWN])

    def _resident_buffers(self, module: torch.nn.Module) -> int:
        buffers = [buffer for buffer in module.buffers() if buffer.device.type == self.accelerator.device_type]
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
        gc.collect()  # what an earlier test left in a cycle is none of this one's memory
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
