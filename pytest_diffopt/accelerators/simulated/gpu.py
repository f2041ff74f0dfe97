"""``with simulated_cuda("rtx-4090"):``, a GPU in software: borrowed, and given back."""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType
from typing import Any

import torch

from pytest_diffopt.accelerators.simulated.boundary import DeviceProperties
from pytest_diffopt.accelerators.simulated.build import ensure_library
from pytest_diffopt.byte_sizes import parse_bytes
from pytest_diffopt.errors import UnverifiableError

MOST_DEVICES = 16


class SimulatedGpu:
    """The GPU that ``with simulated_cuda(...) as gpu`` gives.

    Attributes:
        properties: what ``torch.cuda.get_device_properties()`` returns.
        devices: how many of them there are.
        memory_bytes: of each.
    """

    def __init__(self, name: str, properties: DeviceProperties, devices: int) -> None:
        self.name = name
        self.properties = properties
        self.devices = devices
        self.memory_bytes = properties.total_memory

    def __repr__(self) -> str:
        return f"<simulated {self.properties.name}, {self.devices} of it>"

    def __getattr__(self, name: str) -> Any:
        """Everything of :mod:`pytest_diffopt.accelerators.simulated` that measures or limits it."""
        from pytest_diffopt.accelerators import simulated

        if name in simulated.OF_A_GPU:
            return getattr(simulated, name)
        raise AttributeError(f"A simulated GPU has no {name!r}; it has {', '.join(sorted(simulated.OF_A_GPU))}")


_lock = threading.RLock()
_current: SimulatedGpu | None = None
_entered_in: int | None = None  # the process


def current() -> SimulatedGpu | None:
    """The GPU that is simulated now, or None."""
    return _current


class simulated_cuda:
    """Context manager: ``torch.device("cuda")`` is a simulated GPU inside it, and what it was before after it.

    Tensors on it lie in the host's memory and are computed by the host's kernels; what is simulated is the device: each
    byte on it is counted, its memory has an end, tensors of different devices do not mix, copies across are counted.

    Args:
        gpu: the card's name, as ``diffopt cards`` lists it.
        devices: how many of them, 1 to 16.
        memory: of each, in bytes or as ``"12GiB"``; None for what CUDA reports on that card.

    Raises:
        DiffoptError: no card has that name.
        ValueError: ``devices`` or ``memory`` is out of range.
        UnverifiableError: on entering: the library cannot be built; a simulated GPU is in use already; a real GPU was
            used in this process.
    """

    def __init__(self, gpu: str = "rtx-4090", devices: int = 1, memory: int | str | None = None) -> None:
        from pytest_diffopt.accelerators.simulated.cards import properties_of

        if not isinstance(devices, int) or isinstance(devices, bool) or not 1 <= devices <= MOST_DEVICES:
            raise ValueError(f"devices: found {devices!r}; it takes 1 to {MOST_DEVICES}")
        self._gpu = SimulatedGpu(
            gpu, properties_of(gpu, None if memory is None else parse_bytes(memory, "memory")), devices
        )
        self._borrowed: contextlib.ExitStack | None = None

    def gives(self, gpu: SimulatedGpu) -> bool:
        """Whether this is what ``gpu`` is: the same card, as many of it, with as much memory."""
        return self._gpu.properties == gpu.properties and self._gpu.devices == gpu.devices

    def __enter__(self) -> SimulatedGpu:
        global _current, _entered_in
        with _lock:
            if _current is not None:
                raise UnverifiableError(_in_use(_current))
            _check_real_gpu()
            load_library()
            from pytest_diffopt.accelerators.simulated.borrowing import borrow
            from pytest_diffopt.accelerators.simulated.host_syncs import stop_recordings

            ops = torch.ops.pytest_diffopt_sim
            properties, devices = self._gpu.properties, self._gpu.devices
            borrowed = contextlib.ExitStack()
            try:
                ops.activate(devices, properties.major * 10 + properties.minor)
                borrowed.callback(ops.deactivate)
                borrowed.callback(stop_recordings)
                for index in range(devices):
                    ops.set_default_capacity(index, properties.total_memory)
                    ops.set_capacity(index, -1)
                    ops.reset_counts(index)
                    ops.reset_peaks(index)
                borrow(properties, devices, borrowed)  # modules that are imported later add to it
            except BaseException:
                borrowed.close()
                raise
            self._borrowed = borrowed
            _current, _entered_in = self._gpu, os.getpid()
        return self._gpu

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current, _entered_in
        with _lock:
            borrowed, self._borrowed = self._borrowed, None
            if borrowed is not None:  # it was entered
                _current = _entered_in = None
                borrowed.close()


def _in_use(gpu: SimulatedGpu) -> str:
    if _entered_in != os.getpid():
        return (
            "This process was forked while a simulated GPU was in use, and has it still. Start it with 'spawn', or fork "
            "before the GPU is entered."
        )
    return (
        f"A simulated GPU is in use already ({gpu.properties.name}), in this thread or another: a process has one kind at a "
        f"time. Leave the outer 'with simulated_cuda(...)' first, or use its GPU."
    )


def _check_real_gpu() -> None:
    if torch.cuda._initialized and torch.cuda.is_available():
        raise UnverifiableError(
            "A real GPU was used in this process, and CUDA cannot be simulated beside it. Enter simulated_cuda in a process "
            "in which nothing has run on the GPU."
        )


_loaded = False


def load_library() -> None:
    """Load the library, and build it first where it was not yet. What it registers lies dormant.

    Raises:
        UnverifiableError: it cannot be built or loaded.
    """
    global _loaded
    with _lock:
        if _loaded:
            return
        library = ensure_library()
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise UnverifiableError(
                f"The simulated GPU was built and cannot be loaded ({error.__cause__ or error}); "
                f"remove {library.parent}, and it is built again."
            ) from error
        _loaded = True
