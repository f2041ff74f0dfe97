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
    sim,
)

COUNTS_VALUES = ("nonzero", "unique", "masked by itself", "masked")
"""The size of their results depends on values."""

DRY_NAMES = tuple(name for name in NAMES if name not in COUNTS_VALUES)


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

    def step(self, name: str, numbers: tuple[int, ...]) -> str:
        """Raised error, or nothing."""
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
        if not isinstance(result, Exception):
            self.add(result)
            return ""
        self.drop([chosen[i] for i in made.writes])
        return repr(result)

    def layouts(self) -> list[tuple[Any, ...]]:
        storages: dict[int, int] = {}
        return [
            (
                *(one.dtype, one.shape, one.stride(), one.storage_offset(), one.device, one.is_conj(), one.is_neg()),
                one.untyped_storage().nbytes(),
                storages.setdefault(one.untyped_storage()._cdata, len(storages)),
            )
            for one in self.tensors
        ]


def counters(device: int) -> dict[str, int]:
    stats = sim.memory_stats(device)
    return {
        "peak_bytes": stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"],
        "allocations": stats["allocation.all.allocated"],
        "frees": stats["allocation.all.freed"],
        "kernels": sim.kernel_count(device),
        **sim.transfer_stats(device),
    }


def trace(program: Sequence[Step], real_bytes: int | None) -> list[Seen]:
    """Run a program, dry where it is told how large a real block is at most."""
    seen = []
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        if real_bytes is not None:
            stack.enter_context(sim.dry(real_bytes=real_bytes))
        pool = Pool()
        base = requested()
        for name, numbers in program:
            for index in range(2):
                sim.reset_counts(index)
                sim.reset_peak_memory_stats(index)
            raised = pool.step(name, numbers)
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
    return tensor.device.type == "sim" and not sim.is_hollow(tensor)


def compare(program: Sequence[Step], real_bytes: int) -> int:
    """Run a program computed and dry, and return how many tensors of unknown values it compared.

    Raises:
        AssertionError: the runs differ.
    """
    hollow = 0
    wet, dry = trace(program, None), trace(program, real_bytes)
    for at, ((name, _), a, b) in enumerate(zip(program, wet, dry, strict=True)):
        step = f"step {at}, {name}"
        assert bool(a.raised) == bool(b.raised), f"{step}: computed {a.raised or 'well'}, dry {b.raised or 'well'}"
        assert a.layouts == b.layouts, f"{step}: {a.layouts} and {b.layouts}"
        assert a.live_bytes == b.live_bytes, f"{step}: {a.live_bytes} and {b.live_bytes} bytes are alive"
        if not a.raised:
            assert a.counters == b.counters, f"{step}: {differences(a.counters, b.counters)}"
        for one, other, layout in zip(a.bits, b.bits, a.layouts, strict=True):
            assert other is None or one == other, f"{step}: {layout} has other values"
        hollow += sum(values is None for values in b.bits)
    return hollow


def differences(wet: list[dict[str, int]], dry: list[dict[str, int]]) -> str:
    return ", ".join(
        f"sim:{index} {name} {a[name]} and {b[name]}"
        for index, (a, b) in enumerate(zip(wet, dry, strict=True))
        for name in a
        if a[name] != b[name]
    )
