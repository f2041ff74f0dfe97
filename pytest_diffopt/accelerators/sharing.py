"""Several processes on the accelerators of one host: which device each takes, and a lock for who needs one alone."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import UnverifiableError
from pytest_diffopt.user_cache import cache_directory

if TYPE_CHECKING:
    from filelock import FileLock, ReadWriteLock

    from pytest_diffopt.accelerators import Accelerator

VISIBLE = "CUDA_VISIBLE_DEVICES"

_DRIVER_SECONDS = 20.0
"""How long nvidia-smi may take."""

_BEFORE_TOLD_SECONDS = 0.5
"""How long a device is waited for in silence."""


def show_own_device(worker: int) -> None:
    """Let this process see one CUDA device alone, round robin over those it may see: ``cuda:0`` is that one.

    Nothing is done where torch is imported already, since the driver reads the variable once; nor where there is no more
    than one device. :func:`take_device` chooses then.

    Args:
        worker: which of the host's workers, from 0.
    """
    if "torch" in sys.modules:
        return
    given = os.environ.get(VISIBLE)
    devices = _uuids() if given is None else [name.strip() for name in given.split(",") if name.strip()]
    if len(devices) > 1:
        os.environ[VISIBLE] = devices[worker % len(devices)]


def _uuids() -> list[str]:
    """The devices that NVIDIA's driver shows, in its order."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    command = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip().startswith("GPU-")]


def take_device(kind: str, worker: int, module: Any) -> None:
    """Make the device of a worker the current one, round robin over those visible.

    Args:
        kind: one of :data:`pytest_diffopt.accelerators.KINDS`; the host and mps have one device.
        worker: which of the host's workers, from 0.
        module: ``torch.cuda``, or the like.
    """
    if kind not in ("cpu", "mps") and (count := int(module.device_count())) > 1:
        module.set_device(worker % count)


@contextlib.contextmanager
def held(accelerator: Accelerator, *, alone: bool, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Use a device, with others or alone, among the processes of this host and user that use it through this function.

    The kernel gives the lock back where a process ends, however it ends.

    Args:
        alone: wait until nobody else uses it, and let nobody else begin.
        waiting: called with a few words, where the device is not free at once.

    Raises:
        UnverifiableError: it is needed alone, and the lock cannot be made. Who shares it goes on without.
    """
    import sqlite3

    from filelock import FileLock, ReadWriteLock, Timeout

    path = lock_file(accelerator)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = ReadWriteLock(path, is_singleton=False)
        door = FileLock(path.with_suffix(".door"))  # who waits to be alone keeps it shut: nobody new comes before
        try:
            _enter(lock, door, alone, _BEFORE_TOLD_SECONDS)
        except Timeout:
            if waiting is not None:
                waiting(f"waiting for {accelerator.name}, which {'others use' if alone else 'a recipe uses alone'}")
            _enter(lock, door, alone, -1)
    except (OSError, sqlite3.Error) as error:
        if alone:
            raise UnverifiableError(
                f"The recipe asks for {accelerator.name} alone, and the lock for that cannot be taken: {error}. "
                f"DIFFOPT_CACHE_DIR names a directory that can be written."
            ) from error
        yield
        return
    try:
        yield
    finally:
        lock.close()


def _enter(lock: ReadWriteLock, door: FileLock, alone: bool, timeout_seconds: float) -> None:
    with door.acquire(timeout=timeout_seconds):
        (lock.acquire_write if alone else lock.acquire_read)(timeout_seconds)


def lock_file(accelerator: Accelerator) -> Path:
    """The file of a device's lock: a host's own, though hosts may share the user's directory."""
    name = re.sub(r"[^\w.-]", "_", f"{platform.node() or 'host'}-{device_identity(accelerator)}")
    return cache_directory() / "devices" / f"{name}.lock"


def device_identity(accelerator: Accelerator) -> str:
    """What tells the current device from others of the host, whatever number a process knows it by."""
    if accelerator.simulation is not None:
        return f"{accelerator.kind}-{accelerator.simulation.index}"
    device = accelerator.device
    if device.index is None:
        return str(device.type)
    properties = accelerator._module.get_device_properties(device.index)
    return f"{device.type}-{getattr(properties, 'uuid', device.index)}"
