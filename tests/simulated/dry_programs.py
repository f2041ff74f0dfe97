"""The random programs once more, on the device alone: computed and dry, compared step by step.

After each step both runs have the same layouts, share memory alike and counted the same; and what a dry run says that it
knows has the computed run's bits.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from pytest_diffopt.accelerators import simulated
from tests.simulated.random_programs import (
    LARGEST,
    NAMES,
    OPERATIONS,
    PLACES,
    POOL,
    Draw,
    Step,
    Tensors,
    _attempt,
    bits,
    requested,
)

NEEDS_VALUES = ("nonzero", "unique", "masked by itself", "masked", "item", "from numbers")
"""What they return depends on values."""

OTHER_STRIDES = (
    "abs",
    "roll",
    "index",
    "index, column",
    *(name.removesuffix(" 2") for name in NAMES if ", out" in name),
)
"""torch's shape functions for these are in Python, and do not keep the operand's memory format: other strides, same bytes."""

HOSTS_OWN = ("power", "embedding", "normal_", "arange, out 2", "cat, out 2")
"""Of integers the host's ``pow`` makes a tensor less than the shape function; its ``embedding`` copies indices that are not
contiguous once more; it draws booleans; what it resizes is resized to other strides or by other rules."""

DRY_NAMES = tuple(name for name in NAMES if name not in (*NEEDS_VALUES, *HOSTS_OWN))


@dataclass
class Seen:
    """What one step left behind; ``bits`` is None for a tensor whose values nobody knows."""

    raised: str
    layouts: list[tuple[Any, ...]]
    bits: list[bytes | None]
    live_bytes: list[int]
    counters: list[dict[str, int]]


class Pool:
    """The tensors of one run."""

    def __init__(self) -> None:
        self.tensors: Tensors = []

    def add(self, made: Any) -> None:
        for one in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(one, torch.Tensor) and one.numel() <= LARGEST:
                self.tensors.append(one)
        del self.tensors[: max(0, len(self.tensors) - POOL)]

    def drop(self, chosen: Sequence[int]) -> None:
        """What a failed step may have half changed, and everything that shares its memory."""
        gone = {self.tensors[i].untyped_storage()._cdata for i in chosen}
        self.tensors = [one for one in self.tensors if one.untyped_storage()._cdata not in gone]

    def step(self, name: str, numbers: tuple[int, ...], raised: str = "") -> str:
        """The error, if there was one. Where the other run ``raised`` one, this one tries too, and what it makes is gone."""
        if name == "delete":
            if self.tensors:
                del self.tensors[numbers[0] % len(self.tensors)]
            return ""
        if name == "move to another device":
            if self.tensors:
                self.add(self.tensors[numbers[0] % len(self.tensors)].to(PLACES[numbers[1] % len(PLACES)]))
            return ""
        made = OPERATIONS[name]
        if made.operands > len(self.tensors):
            return ""
        chosen = [numbers[-1 - i] % len(self.tensors) for i in range(made.operands)]
        operands = [self.tensors[i] for i in chosen]
        place = str(operands[0].device) if operands else PLACES[numbers[2] % 16 // 7]
        result = _attempt(made, Draw(place, numbers), operands)
        if not isinstance(result, Exception) and not raised:
            self.add(result)
            return ""
        self.drop([chosen[i] for i in made.writes])
        return raised or repr(result)

    def layouts(self) -> list[tuple[Any, ...]]:
        storages: dict[int, int] = {}
        return [
            (
                *(one.dtype, one.shape, _strides(one), one.storage_offset(), one.device, one.is_conj(), one.is_neg()),
                one.untyped_storage().nbytes(),
                storages.setdefault(one.untyped_storage()._cdata, len(storages)),
            )
            for one in self.tensors
        ]


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Those that lead anywhere: the host's kernels promote types with copies, which changes the others."""
    return tuple(
        stride if size > 1 and tensor.numel() else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def counters(device: int) -> dict[str, int]:
    stats = torch.cuda.memory_stats(device)
    return {
        "peak_bytes": stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"],
        "allocations": stats["allocation.all.allocated"],
        "frees": stats["allocation.all.freed"],
        "kernels": simulated.kernel_count(device),
        **simulated.transfer_stats(device),
    }


def trace(program: Sequence[Step], real_bytes: int | None, other: Sequence[Seen] = ()) -> list[Seen]:
    """Run a program, dry where it is told how large a real block is at most; the ``other`` run went before it."""
    seen: list[Seen] = []
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        if real_bytes is not None:
            stack.enter_context(simulated.dry(real_bytes=real_bytes))
        pool = Pool()
        base = requested()
        for name, numbers in program:
            for index in range(2):
                simulated.reset_counts(index)
                torch.cuda.reset_peak_memory_stats(index)
            raised = pool.step(name, numbers, other[len(seen)].raised if other else "")
            counted = [counters(index) for index in range(2)]
            live = [now - before for now, before in zip(requested(), base, strict=True)]
            known = [None if not _is_known(one) else bits(one) for one in pool.tensors]
            seen.append(Seen(raised, pool.layouts(), known, live, counted))
        del pool
    if requested() != base:  # a failed step's traceback may hold its operands in a cycle
        gc.collect()
    assert requested() == base, f"{base} bytes were on the devices, {requested()} are left"
    return seen


def _is_known(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and not simulated.is_hollow(tensor)


def compare(program: Sequence[Step], real_bytes: int) -> int:
    """Run a program computed and dry, and return how many tensors of unknown values it compared.

    Raises:
        AssertionError: the runs differ.
    """
    hollow = 0
    wet = trace(program, None)
    dry = trace(program, real_bytes, wet)
    for at, ((name, _), a, b) in enumerate(zip(program, wet, dry, strict=True)):
        step = f"step {at}, {name}"
        if not a.raised and "needed that nobody computed" in b.raised:
            return hollow  # an index of no dimension is read by the host
        assert a.raised == b.raised, f"{step}: computed {a.raised or 'well'}, dry {b.raised or 'well'}"
        for one, other in zip(a.layouts, b.layouts, strict=True):
            if name.removesuffix(" 2") in OTHER_STRIDES and one[:2] + one[3:] == other[:2] + other[3:] and one != other:
                return hollow
            assert one == other, f"{step}: {one} and {other}"
        assert a.live_bytes == b.live_bytes, f"{step}: {a.live_bytes} and {b.live_bytes} bytes are alive"
        if not a.raised:
            assert a.counters == b.counters, f"{step}: {differences(a.counters, b.counters)}"
        for values, known, layout in zip(a.bits, b.bits, a.layouts, strict=True):
            assert known is None or values == known, f"{step}: {layout} has other values"
        hollow += sum(values is None for values in b.bits)
    return hollow


def differences(wet: list[dict[str, int]], dry: list[dict[str, int]]) -> str:
    return ", ".join(
        f"cuda:{index} {name} {a[name]} and {b[name]}"
        for index, (a, b) in enumerate(zip(wet, dry, strict=True))
        for name in a
        if a[name] != b[name]
    )
