"""What the simulated GPU counts and CUDA has no name for: transfers, operations, events of memory, and its limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pytest_diffopt.accelerators.simulated.boundary import COUNTERS, counters

_ops = torch.ops.pytest_diffopt_sim

Device = torch.device | str | int | None


def _index(device: Device = None) -> int:
    """The index of a device, as torch.cuda resolves it.

    Raises:
        ValueError: it is not a CUDA device.
        torch.AcceleratorError: there is no device of that index.
    """
    if isinstance(device, int):
        index: int | None = device
    elif device is None:
        index = None
    else:
        device = torch.device(device)
        if device.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        index = device.index
    if index is None:
        return int(_ops.current_device())
    _ops.check_device(index)
    return index


def set_memory_limit(limit_bytes: int | None, device: Device = None) -> None:
    """How much memory the GPU has, in bytes; None for what it began with."""
    if limit_bytes is not None and limit_bytes < 0:
        raise ValueError(f"limit_bytes: found {limit_bytes}; it takes bytes, or None for the default")
    _ops.set_capacity(_index(device), -1 if limit_bytes is None else int(limit_bytes))


@contextlib.contextmanager
def as_capability(capability: tuple[int, int]) -> Iterator[None]:
    """torch chooses attention's kernel as on a GPU of another compute capability, whichever one is simulated."""
    before = int(_ops.capability())
    _ops.set_capability(capability[0] * 10 + capability[1])
    try:
        yield
    finally:
        _ops.set_capability(before)


def set_caching_allocator(enabled: bool) -> None:
    """Round sizes and keep freed blocks as CUDA's caching allocator does; off, every byte counts as it was asked for."""
    _ops.set_caching(enabled)


def is_caching_allocator() -> bool:
    return bool(_ops.caching())


def transfer_stats(device: Device = None) -> dict[str, int]:
    """Bytes and calls that crossed: ``h2d`` host to device, ``d2h`` back, ``d2d`` within and between devices."""
    c = counters(_index(device))
    return {name: c[name] for name in COUNTERS if name[:3] in ("h2d", "d2h", "d2d")}


def kernel_count(device: Device = None) -> int:
    """Operations that the device has run since :func:`reset_counts`."""
    return counters(_index(device))["kernels"]


def reset_counts(device: Device = None) -> None:
    """Transfers, operations and allocations are counted from nought again."""
    _ops.reset_counts(_index(device))


def record_operations(enabled: bool = True) -> None:
    """Begin (forgetting the last recording) or end to write down which operations run."""
    _ops.record_operations(enabled)


def recorded_operations() -> dict[str, int]:
    """How often each operation ran, by its name, e.g. ``aten::mm``."""
    lines = (line.rsplit(" ", 1) for line in _ops.recorded_operations())
    return {name: int(times) for name, times in lines}


class MemoryEvent(NamedTuple):
    """What happened to a block of memory.

    Attributes:
        block: its number, which no other block ever has; negative for host memory that is not torch's own.
        bytes: what it takes, negative where it was freed; 0 for a copy into it.
        operation: that did it, e.g. ``"aten::mm"``; "" where none did.
        mark: the last one that :func:`mark_memory_events` was given before it.
        source: the block that was copied, else 0.
        pinned: whether that is pinned memory of the host.
        low, high: of a kernel's workspace that a cost rule foretold, and that is given back at once: its bytes at the
            least and at the most, where ``bytes`` are the expected ones; else 0.
    """

    block: int
    bytes: int
    operation: str
    mark: int
    source: int
    pinned: bool
    low: int = 0
    high: int = 0


def record_memory_events(enabled: bool = True, *, only_live: bool = False) -> None:
    """Begin (forgetting the last recording) or end to write down what happens to memory.

    With ``only_live`` the events of blocks that were freed, and copies, may be forgotten at any time: for hours of them.
    """
    _ops.open_ledger(enabled, only_live)


def mark_memory_events(mark: int) -> None:
    """Let every later event say ``mark``."""
    _ops.mark_ledger(mark)


def recorded_memory_events(device: Device = None) -> list[MemoryEvent]:
    """What happened on one device, in order."""
    names = _ops.ledger_operations()
    index = _index(device)
    return [
        MemoryEvent(block, count, names[operation], mark, source, bool(pinned), low, high)
        for block, count, source, pinned, operation, mark, on, low, high in _ops.ledger_events().tolist()
        if on == index
    ]


def replay_reserved_memory(workspaces: str = "expected", device: Device = None) -> int:
    """The most that CUDA's caching allocator would reserve for the recorded events, in bytes, from nothing reserved.

    Args:
        workspaces: what kernels take for themselves, by their cost rules: ``"low"``, ``"expected"`` or ``"high"``.
    """
    known = ("low", "expected", "high")
    if workspaces not in known:
        raise ValueError(f"workspaces: found {workspaces!r}; it takes one of {', '.join(known)}")
    return int(_ops.replay_reserved(_index(device), known.index(workspaces)))


def memory_blocks(tensors: list[torch.Tensor]) -> list[int]:
    """The number of each tensor's block, on the host as well; 0 for a tensor without memory."""
    return list(_ops.block_numbers(tensors))
