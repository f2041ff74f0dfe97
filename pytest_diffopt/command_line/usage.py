"""What a program took of its simulated GPUs: counted while it runs, then lines for people and JSON for programs."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.byte_sizes import human

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators.simulated import SimulatedGpu

SCHEMA_VERSION = 1

_MOST_OWNERS = 8
_MOST_PLACES = 10


@dataclass(frozen=True)
class DeviceUsage:
    """What one GPU counted, over the whole program.

    Attributes:
        h2d_bytes, h2d_calls: copies from the host; ``d2h`` to the host, ``d2d`` within the GPU and between GPUs.
        kernels: operations that ran on it.
        out_of_memory: how often memory was asked for that was not there.
    """

    device: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    h2d_bytes: int
    h2d_calls: int
    d2h_bytes: int
    d2h_calls: int
    d2d_bytes: int
    d2d_calls: int
    kernels: int
    out_of_memory: int


@dataclass(frozen=True)
class Owner:
    """Whose memory was on a GPU.

    Attributes:
        name: of the component and its class, or of the operation that made what belongs to no module.
        kind: ``"weights"`` or ``"operation"``.
    """

    name: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class OutOfMemory:
    """The error that ended the program.

    Attributes:
        message: torch's, on one line.
        device: that had the most in use.
        owners: whose memory was on it, the most first.
    """

    message: str
    device: int
    owners: tuple[Owner, ...]


@dataclass(frozen=True)
class Syncs:
    """A place at which the host waited for a GPU.

    Attributes:
        place: the innermost line that is not torch's, ``"…/x.py:12, in step"``; ``""`` where there is none.
        called_from: your own line, where that is another one.
        operation: that waited, ``"aten::_local_scalar_dense"``.
    """

    place: str
    called_from: str
    operation: str
    count: int


@dataclass(frozen=True)
class Usage:
    """A program and what it took.

    Attributes:
        program: its words, the script or module first.
        memory_bytes: of each GPU.
        syncs: where the host waited for the GPUs, the most often first.
    """

    program: tuple[str, ...]
    exit_status: int
    gpu: str
    memory_bytes: int
    devices: tuple[DeviceUsage, ...]
    syncs: tuple[Syncs, ...] = ()
    out_of_memory: OutOfMemory | None = None
    simulated: bool = field(default=True, init=False)

    def to_data(self) -> dict[str, Any]:
        """For JSON. Bytes are bytes; what is not known is null."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def lines(self) -> list[str]:
        """For people."""
        found = [f"diffopt run: {self.gpu}, {human(self.memory_bytes)}, SIMULATED: no GPU was used"]
        for device in self.devices:
            where = f"GPU {device.device}: " if len(self.devices) > 1 else ""
            transfers = [
                f"{human(size)} {direction} in {calls}"
                for direction, size, calls in (
                    ("to the GPU", device.h2d_bytes, _times(device.h2d_calls, "copy", "copies")),
                    ("to the host", device.d2h_bytes, _times(device.d2h_calls, "copy", "copies")),
                    ("on the GPU", device.d2d_bytes, _times(device.d2d_calls, "copy", "copies")),
                )
            ]
            peak = human(device.peak_allocated_bytes)
            found += [
                f"  {where}peak memory: {peak} allocated, {human(device.peak_reserved_bytes)} reserved",
                f"  {where}transfers: {', '.join(transfers)}",
                f"  {where}kernels: {device.kernels}",
            ]
            if device.out_of_memory:
                found.append(f"  {where}out of memory: {_times(device.out_of_memory, 'time', 'times')}")
        found.append(f"  host syncs: {sum(sync.count for sync in self.syncs)}")
        for sync in self.syncs[:_MOST_PLACES]:
            caller = f", called from {sync.called_from}" if sync.called_from else ""
            found.append(f"    {sync.count:>6} × {sync.operation} at {sync.place or 'no line of Python'}{caller}")
        if len(self.syncs) > _MOST_PLACES:
            found.append(f"    and {_times(len(self.syncs) - _MOST_PLACES, 'more place', 'more places')}")
        if self.out_of_memory is not None:
            found.append(f"  it ended out of memory; GPU {self.out_of_memory.device} held:")
            found += [f"    {human(owner.bytes):>11}  {_owner_words(owner)}" for owner in self.out_of_memory.owners]
        return found


def _times(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _owner_words(owner: Owner) -> str:
    return f"weights of {owner.name}" if owner.kind == "weights" else f"made by {owner.name}"


class Meter:
    """Counts what a program takes, also where the program begins its own peaks and counts.

    Args:
        gpu: entered, and stays so until :meth:`read`.
        borrowed: closed when nothing is counted any more.
    """

    def __init__(self, gpu: SimulatedGpu, borrowed: contextlib.ExitStack) -> None:
        from pytest_diffopt.accelerators.simulated.host_syncs import SyncRecording

        self._gpu = gpu
        self._lock = threading.Lock()
        self._peaks: list[Counter[str]] = [Counter() for _ in range(gpu.devices)]
        self._sums: list[Counter[str]] = [Counter() for _ in range(gpu.devices)]
        self.out_of_memory: OutOfMemory | None = None
        gpu.record_memory_events(only_live=True)
        self._syncs = SyncRecording()  # of its own: the program may make one
        self._syncs.start()
        self._watch_resets(borrowed)

    def failed(self, error: BaseException) -> None:
        """Look whose memory is there, if that is why the program ends."""
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            device = max(range(self._gpu.devices), key=torch.cuda.memory_allocated)
            message = str(error).splitlines()[0]
            self.out_of_memory = OutOfMemory(message, device, tuple(owners(self._gpu, device)))

    def read(self) -> tuple[DeviceUsage, ...]:
        """What was counted so far, a GPU each."""
        for index in range(self._gpu.devices):
            self._note_peaks(index)
        found = []
        for index in range(self._gpu.devices):
            now, peaks, sums = _counters(index), self._peaks[index], self._sums[index]
            found.append(
                DeviceUsage(
                    device=index,
                    peak_allocated_bytes=peaks["peak_allocated"],
                    peak_reserved_bytes=peaks["peak_reserved"],
                    **{name: sums[name] + now[name] for name in _SUMS},
                )
            )
        return tuple(found)

    def syncs(self) -> tuple[Syncs, ...]:
        """Where the host waited so far, the most often first."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for sync in self._syncs.syncs():
            place = sync.place.place if sync.place is not None else ""
            user = sync.user.place if sync.user is not None else ""
            counts[place, "" if user == place else user, sync.operation] += sync.count
        return tuple(Syncs(*where, times) for where, times in counts.most_common())

    def _note_peaks(self, index: int) -> None:
        now, peaks = _counters(index), self._peaks[index]
        for name in ("peak_allocated", "peak_reserved"):
            peaks[name] = max(peaks[name], now[name])

    def _note_sums(self, index: int) -> None:
        now = _counters(index)
        self._note_peaks(index)
        self._sums[index].update({name: now[name] for name in _SUMS})

    def _watch_resets(self, borrowed: contextlib.ExitStack) -> None:
        import torch

        from pytest_diffopt.accelerators import simulated
        from pytest_diffopt.accelerators.simulated.borrowing import set_for_a_while

        def noting(note: Callable[[int], None], reset: Callable[..., Any]) -> Callable[..., Any]:
            def note_and_reset(*args: Any, **kwargs: Any) -> Any:
                with self._lock:
                    for index in range(self._gpu.devices):
                        note(index)
                    return reset(*args, **kwargs)

            return note_and_reset

        for owner, name, note in (
            (torch._C, "_cuda_resetPeakMemoryStats", self._note_peaks),
            (torch._C, "_accelerator_resetPeakStats", self._note_peaks),
            (torch._C, "_cuda_resetAccumulatedMemoryStats", self._note_sums),
            (torch._C, "_accelerator_resetAccumulatedStats", self._note_sums),
            (simulated, "reset_counts", self._note_sums),
        ):
            if hasattr(owner, name):
                set_for_a_while(owner, name, noting(note, getattr(owner, name)), borrowed)


_SUMS = (
    *("h2d_bytes", "h2d_calls", "d2h_bytes", "d2h_calls", "d2d_bytes", "d2d_calls"),
    *("kernels", "out_of_memory"),
)


def _counters(index: int) -> dict[str, int]:
    from pytest_diffopt.accelerators.simulated.boundary import counters

    return counters(index)


def owners(gpu: SimulatedGpu, device: int) -> Iterator[Owner]:
    """Whose memory is on a GPU now, the most first: weights of modules that are alive, else what an operation made."""
    live: dict[int, tuple[int, str]] = {}
    for event in gpu.recorded_memory_events(device):
        if event.bytes > 0 and not (event.low or event.high):  # a workspace is given back at once
            live[event.block] = event.bytes, event.operation
        elif event.bytes < 0:
            live.pop(event.block, None)
    found: Counter[tuple[str, str]] = Counter()
    for name, module in _modules():
        for block in _blocks_of(gpu, module):
            size, _ = live.pop(block, (0, ""))
            found["weights", name] += size
    for size, operation in live.values():
        found["operation", operation or "no operation"] += size
    for (kind, name), size in found.most_common(_MOST_OWNERS):
        if size:
            yield Owner(name, kind, size)


def _blocks_of(gpu: SimulatedGpu, module: torch.nn.Module) -> list[int]:
    from pytest_diffopt.observation.residency import weights_of

    return list(gpu.memory_blocks([tensor for _, tensor in weights_of(module)]))


def _modules() -> Sequence[tuple[str, torch.nn.Module]]:
    """The modules that are alive and in no other, each with its class, and its name in a pipeline that has it."""
    import torch

    # the class of their own, as isinstance() asks some objects of libraries for one, which they warn of
    objects = [(type(one), one) for one in gc.get_objects()]
    alive = [one for kind, one in objects if issubclass(kind, torch.nn.Module)]
    library: Any = sys.modules.get("diffusers.pipelines.pipeline_utils")
    pipelines = [one for kind, one in objects if library is not None and issubclass(kind, library.DiffusionPipeline)]
    named = {id(module): name for pipeline in pipelines for name, module in pipeline.components.items()}
    inner = {id(child) for module in alive for child in module._modules.values()}
    roots = [module for module in alive if id(module) not in inner]
    return [(_name_of(module, named.get(id(module), "")), module) for module in roots]


def _name_of(module: torch.nn.Module, component: str) -> str:
    inside = module._modules.get("_orig_mod")  # of what torch.compile returns
    kind = type(module if inside is None else inside).__name__
    return f"{component} ({kind})" if component else kind
