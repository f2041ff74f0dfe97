"""Which device a recipe runs on, and its memory: one small facade over torch's device modules.

On a machine with no accelerator a simulated GPU stands in (``sim``): torch's own ``cuda``, while it is in use. The host
itself (``cpu``) is taken where it is asked for: everything is judged there except what only an accelerator can show, its
memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.accelerators.allocation_events import AllocationEvent, CudaEvents, SimulatedEvents
from pytest_diffopt.accelerators.sharing import take_device
from pytest_diffopt.errors import DiffoptError

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators.simulated import SyncRecording

KINDS = ("cuda", "xpu", "mps", "sim", "cpu")
"""In the order in which ``auto`` looks for them; the simulated one is always there."""


@dataclass(frozen=True)
class Accelerator:
    """A device that recipes run on.

    Attributes:
        kind: one of :data:`KINDS`.
        name: as the device calls itself.
        total_memory_bytes: None where the device does not say (``cpu``, ``mps``).
        capability: e.g. ``(8, 9)`` on CUDA, else None.
        simulation: which GPU is simulated, where one is.
    """

    kind: str
    name: str
    total_memory_bytes: int | None = None
    capability: tuple[int, int] | None = None
    simulation: Simulation | None = None

    @property
    def device_type(self) -> str:
        """torch's name of the device's type: a simulated GPU is ``cuda``."""
        return "cuda" if self.is_simulated else self.kind

    @property
    def is_real(self) -> bool:
        """Whether it is hardware of its own."""
        return self.kind not in ("sim", "cpu")

    @property
    def is_simulated(self) -> bool:
        """Whether the host computes for it, and only its memory is its own."""
        return self.kind == "sim"

    @property
    def is_host(self) -> bool:
        """Whether it is the host, which has no memory apart."""
        return self.kind == "cpu"

    @property
    def device(self) -> torch.device:
        """The current device of the kind, e.g. ``cuda:0``; the host and mps have one only."""
        import torch

        if self.kind in ("cpu", "mps"):
            return torch.device(self.kind)
        return torch.device(self.device_type, self._module.current_device())

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A simulated GPU is there inside this, and gone after it; any other device is there anyway. It nests."""
        if self.simulation is None:
            yield
            return
        with self.simulation.in_use():
            yield

    @functools.cached_property
    def _module(self) -> Any:
        import torch

        return getattr(torch, self.device_type)

    @functools.cached_property
    def _simulated(self) -> Any:
        """What torch.cuda has no name for."""
        from pytest_diffopt.accelerators import simulated

        return simulated

    def synchronize(self) -> None:
        """Wait until everything that was queued on the device has run."""
        if not self.is_host:
            self._module.synchronize()

    def reset_peak(self) -> None:
        """Begin a new measurement of :meth:`peak_bytes`."""
        if not self.is_host and hasattr(self._module, "reset_peak_memory_stats"):
            for index in range(self._module.device_count()):
                self._module.reset_peak_memory_stats(index)

    def peak_bytes(self) -> int | None:
        """Peak of allocated bytes since :meth:`reset_peak`, or None where the device does not count them."""
        if not self.is_host and hasattr(self._module, "max_memory_allocated"):
            return int(self._module.max_memory_allocated())
        return None

    def peak_reserved_bytes(self) -> int | None:
        """Peak of what the caching allocator held of the device since :meth:`reset_peak`; None where it is not counted."""
        if not self.is_host and hasattr(self._module, "max_memory_reserved"):
            return int(self._module.max_memory_reserved())
        return None

    def beside_bytes(self) -> int | None:
        """Of the device's memory in use now, what torch's allocator does not hold: the driver's, and other processes'."""
        if self.is_host or not hasattr(self._module, "mem_get_info"):
            return None
        free, total = self._module.mem_get_info()
        return int(total - free - self._module.memory_reserved())

    def live_bytes(self) -> int | None:
        """Bytes allocated now, or None where the device does not count them."""
        if not self.is_host and hasattr(self._module, "memory_allocated"):
            return int(self._module.memory_allocated())
        return None

    def elsewhere_bytes(self) -> int | None:
        """Peak bytes since :meth:`reset_peak` on devices of this kind other than the current one; None where not counted."""
        if (
            self.is_host
            or not hasattr(self._module, "max_memory_allocated")
            or not hasattr(self._module, "device_count")
        ):
            return None
        current = self._module.current_device()
        others = (index for index in range(self._module.device_count()) if index != current)
        return sum(int(self._module.max_memory_allocated(index)) for index in others)

    def allocated_bytes(self, requested_bytes: int) -> int:
        """What the device's counters say for a block of so many bytes: torch's caching allocators count steps of 512."""
        if self.is_host or (self.is_simulated and not self._simulated.is_caching_allocator()):
            return requested_bytes
        return -(-requested_bytes // 512) * 512

    def transferred_bytes(self) -> dict[str, int] | None:
        """Bytes copied so far, ``h2d`` from the host and ``d2h`` to it; None where the device does not count them."""
        if not self.is_simulated:
            return None
        stats = self._simulated.transfer_stats()
        return {"h2d": int(stats["h2d_bytes"]), "d2h": int(stats["d2h_bytes"])}

    def sync_recording(self) -> SyncRecording | None:
        """What writes down where the host waits for the device; None where the device does not tell."""
        return self._simulated.SyncRecording() if self.is_simulated else None

    @functools.cached_property
    def _events(self) -> SimulatedEvents | CudaEvents | None:
        if self.is_simulated:
            return SimulatedEvents(self._simulated)
        return CudaEvents(self._module) if self.kind == "cuda" else None

    def start_allocation_events(self) -> bool:
        """Begin to write down what happens to the memory; False where the device does not tell, or tells somebody else."""
        return self._events is not None and self._events.start()

    def mark_allocation_events(self, mark: int) -> None:
        """Let every later event say ``mark``: a number, from 0 at the start."""
        if self._events is not None:
            self._events.mark(mark)

    def allocation_events(self) -> list[AllocationEvent]:
        """What happened on the current device since the start, in order."""
        return self._events.read() if self._events is not None else []

    def stop_allocation_events(self) -> None:
        """Write no more down. What was written is gone with the next start."""
        if self._events is not None:
            self._events.stop()

    def blocks(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """The block that each tensor lies in, as events name it, of the host as well; 0 where it has no memory."""
        return self._events.blocks(tensors) if self._events is not None else [0] * len(tensors)

    def count_host_memory(self, on: bool) -> None:
        """Begin, or end, to count what torch takes of the host; the peak begins as well. Simulated GPUs alone do."""
        if self.is_simulated:
            self._simulated.count_host_memory(on)
            self._simulated.reset_peak_host_memory_stats()

    def host_bytes(self) -> tuple[int, int] | None:
        """(what torch's allocators hold of the host, the most since the peak began); None where nobody counts it."""
        if not self.is_simulated:
            return None
        stats = self._simulated.host_memory_stats()
        return stats["allocated"], stats["peak_allocated"]

    def empty_cache(self) -> None:
        """Give cached blocks back to the device."""
        if not self.is_host:
            self._module.empty_cache()


@dataclass(frozen=True)
class Simulation:
    """Which GPU is simulated.

    Attributes:
        gpu: the card's name.
        devices: how many of it there are.
        memory_bytes: of each; None for the card's.
        index: of the one that is current when it comes into use.
    """

    gpu: str
    devices: int = 1
    memory_bytes: int | None = None
    index: int = 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """It is there inside this. A GPU that is simulated already, by whoever, is used as it is."""
        from pytest_diffopt.accelerators.simulated import current, simulated_cuda

        if current() is not None:
            yield
            return
        import torch

        with simulated_cuda(self.gpu, devices=self.devices, memory=self.memory_bytes):
            torch.cuda.init()  # type: ignore[no-untyped-call]  # before it torch's counters say 0, whatever is left on it
            torch.cuda.set_device(self.index)
            yield


_RESETS = ("reset_peak_memory_stats", "reset_max_memory_allocated")
"""torch's functions that begin a new peak."""


class Peak:
    """The highest number of bytes on an accelerator in a span of time, whoever resets the device's own counter in it.

    Open it, and :meth:`begin` as often as a new span begins. On a device without counters :meth:`bytes` is None.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._highest = self._elsewhere = 0
        self._borrowed = contextlib.ExitStack()

    def __enter__(self) -> Peak:
        import torch

        if self._accelerator.peak_bytes() is not None:
            modules = (self._accelerator._module, torch.accelerator)
            for holder in (*modules, *(m.memory for m in modules if hasattr(m, "memory"))):
                for name in _RESETS:
                    if hasattr(holder, name):
                        self._borrowed.callback(setattr, holder, name, getattr(holder, name))
                        setattr(holder, name, self._noting(getattr(holder, name)))
        self.begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self._borrowed.close()

    def begin(self) -> None:
        """A new span begins now."""
        self._accelerator.reset_peak()
        self._highest = self._elsewhere = 0

    def bytes(self) -> int | None:
        """The peak of the span so far."""
        now = self._accelerator.peak_bytes()
        return None if now is None else max(now, self._highest)

    def elsewhere_bytes(self) -> int | None:
        """The peak of the span so far on the other devices of the kind; see :meth:`Accelerator.elsewhere_bytes`."""
        now = self._accelerator.elsewhere_bytes()
        return None if now is None else max(now, self._elsewhere)

    def _noting(self, reset: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(reset)
        def note_and_reset(*args: Any, **kwargs: Any) -> Any:
            self._highest = self.bytes() or 0
            self._elsewhere = self.elsewhere_bytes() or 0
            return reset(*args, **kwargs)

        return note_and_reset


def select(kind: str = "auto", worker: int | None = None) -> Accelerator:
    """The accelerator of that kind; ``auto`` takes the first real one there is, else a simulated GPU.

    Args:
        kind: one of :data:`KINDS`, or ``auto``.
        worker: which of several processes on this host this is, from 0: it takes its own device, round robin over those
            visible, for good. None leaves the process the device that is current.

    Raises:
        DiffoptError: the kind is unknown, or there is no such device on this machine.
        UnverifiableError: the simulated one cannot be built here.
    """
    import torch

    kind = resolve_kind(kind)
    if kind == "cpu":
        return Accelerator("cpu", "cpu")
    if kind == "mps":
        return Accelerator("mps", "mps")
    if kind == "sim":
        from pytest_diffopt.accelerators.simulated.gpu import load_library

        load_library()
        return simulated_gpu(worker=worker)
    module = getattr(torch, kind)
    if worker is not None:
        take_device(kind, worker, module)
    properties = module.get_device_properties(module.current_device())
    capability = module.get_device_capability() if kind == "cuda" else None
    return Accelerator(kind, str(properties.name), int(properties.total_memory), capability)


DEFAULT_GPU = "rtx-4090"
"""The GPU that is simulated where none was named."""


def simulated_gpu(gpu: str | None = None, *, worker: int | None = None) -> Accelerator:
    """A simulated GPU, there while it is :meth:`Accelerator.in_use`; nothing is built for the answer.

    Args:
        gpu: the card's name; None for the one that is simulated now, else :data:`DEFAULT_GPU`.
        worker: as of :func:`select`.

    Raises:
        DiffoptError: no card has that name, or ``DIFFOPT_SIM_DEVICES`` is no number of devices.
    """
    from pytest_diffopt.accelerators.simulated import current
    from pytest_diffopt.accelerators.simulated.cards import properties_of

    now = current()
    if now is not None and gpu is None:
        properties, devices, name = now.properties, now.devices, now.name
    else:
        name = gpu or DEFAULT_GPU
        properties, devices = properties_of(name), _devices_wanted()
    index = 0 if worker is None else worker % devices
    return Accelerator(
        "sim",
        f"simulated {properties.name}",
        properties.total_memory,
        (properties.major, properties.minor),
        Simulation(name, devices, properties.total_memory, index),
    )


def _devices_wanted() -> int:
    from pytest_diffopt.accelerators.simulated.gpu import MOST_DEVICES

    text = os.environ.get("DIFFOPT_SIM_DEVICES", "2")
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= MOST_DEVICES:
        raise DiffoptError(
            f"DIFFOPT_SIM_DEVICES: found {text!r}; it takes a number of devices from 1 to {MOST_DEVICES}"
        )
    return int(text)


def resolve_kind(kind: str = "auto") -> str:
    """The kind of device that :func:`select` would take; nothing is built or initialized for the answer.

    Raises:
        DiffoptError: the kind is unknown, or there is no such device on this machine.
    """
    if kind == "auto":
        return next(k for k in KINDS if _available(k))
    if kind not in KINDS:
        raise DiffoptError(f"device: found {kind!r}; it takes one of: auto, {', '.join(KINDS)}")
    if not _available(kind):
        present = ", ".join(k for k in KINDS if _available(k))
        raise DiffoptError(f"device: found {kind!r}, which this machine does not have; here it takes: auto, {present}")
    return kind


def _available(kind: str) -> bool:
    import torch

    if kind in ("sim", "cpu"):
        return True
    if kind == "cuda" and _simulated_now():
        return False
    module = getattr(torch, kind, None)
    return bool(module is not None and module.is_available())


def _simulated_now() -> bool:
    """Whether ``torch.cuda`` is a simulated GPU at this moment."""
    gpu = sys.modules.get("pytest_diffopt.accelerators.simulated.gpu")
    return gpu is not None and gpu.current() is not None
