"""A simulated GPU for a whole process and for those that it starts, which find it in their environment.

What a process inherits is read at the end of its ``import torch``, by :mod:`pytest_diffopt.autoload`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_diffopt.byte_sizes import human, parse_bytes
from pytest_diffopt.errors import DiffoptError

if TYPE_CHECKING:
    from pytest_diffopt.accelerators.simulated import SimulatedGpu

GPU, DEVICES, MEMORY = "DIFFOPT_GPU", "DIFFOPT_GPU_DEVICES", "DIFFOPT_GPU_MEMORY"
"""The environment variables; tests compare them with those of the options."""


@dataclass(frozen=True)
class ChosenGpu:
    """A GPU to simulate, as it was asked for.

    Attributes:
        name: of the card.
        devices: how many of them.
        memory_bytes: of each; None for the card's own.
    """

    name: str
    devices: int = 1
    memory_bytes: int | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> ChosenGpu | None:
        """What the variables say; None where :data:`GPU` is not set.

        Raises:
            ValueError: :data:`DEVICES` is no number, or :data:`MEMORY` no size.
        """
        name = environment.get(GPU, "").strip()
        if not name:
            return None
        devices = environment.get(DEVICES, "").strip() or "1"
        if not devices.isdecimal():
            raise ValueError(f"{DEVICES}: found {devices!r}; it takes a whole number from 1 on")
        memory = environment.get(MEMORY, "").strip()
        size: str | int = int(memory) if memory.isdecimal() else memory
        return cls(name, int(devices), parse_bytes(size, MEMORY) if memory else None)

    def variables(self) -> dict[str, str]:
        """The inverse of :meth:`of`."""
        found = {GPU: self.name}
        if self.devices != 1:
            found[DEVICES] = str(self.devices)
        if self.memory_bytes is not None:
            found[MEMORY] = str(self.memory_bytes)
        return found


@contextlib.contextmanager
def whole_process(chosen: ChosenGpu | None) -> Iterator[SimulatedGpu | None]:
    """Inside it this process and those that it starts are on that GPU; with None those that it starts are on none.

    A process that is on this very GPU since ``import torch`` stays on it.

    Raises:
        DiffoptError: no card has that name.
        ValueError: there are more devices than can be, or the memory is no size.
        UnverifiableError: it cannot be entered, see :class:`~pytest_diffopt.accelerators.simulated.simulated_cuda`.
    """
    with contextlib.ExitStack() as borrowed:
        borrowed.callback(_set_variables, {name: os.environ.get(name) for name in (GPU, DEVICES, MEMORY)})
        _set_variables(dict.fromkeys((GPU, DEVICES, MEMORY)))  # first of all: torch may be imported below
        gpu = None
        if chosen is not None:
            from pytest_diffopt.accelerators.simulated import current, simulated_cuda

            asked = simulated_cuda(chosen.name, chosen.devices, chosen.memory_bytes)
            gpu = current()
            if gpu is None or not asked.gives(gpu):
                gpu = borrowed.enter_context(asked)
            _set_variables(chosen.variables())
        yield gpu


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def enter_for_good() -> None:
    """Enter the GPU that the environment names, until the process ends.

    A mistake in it ends the process: torch would hide what it was behind an error of its own.
    """
    from pytest_diffopt.accelerators.simulated import current, simulated_cuda

    if current() is not None:
        return
    try:
        chosen = ChosenGpu.of(os.environ)
        if chosen is not None:
            simulated_cuda(chosen.name, chosen.devices, chosen.memory_bytes).__enter__()
    except (DiffoptError, ValueError) as error:
        where = "" if str(error).startswith("DIFFOPT_") else f"{GPU}: "
        sys.stderr.write(f"{where}{error}\n")  # a thread that exits is silent
        raise SystemExit(2) from None


def described(gpu: SimulatedGpu) -> str:
    """``"NVIDIA GeForce RTX 4090, 23.43 GiB"``."""
    several = f"{gpu.devices} × " if gpu.devices > 1 else ""
    return f"{several}{gpu.properties.name}, {human(gpu.memory_bytes)}{' each' if several else ''}"
