"""Where the host waits for the simulated GPU: the operations that wait on CUDA, and no others."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pytest_diffopt.accelerators.simulated import SimulatedGpu, SyncRecording


class Tensors:
    """What the operations below are given."""

    def __init__(self) -> None:
        self.numbers = torch.arange(6, device="cuda")
        self.square = torch.rand(4, 4, device="cuda")
        self.row = torch.ones(4, device="cuda")
        self.mask = self.square > 0.5
        self.host = torch.rand(4, 4)
        self.large = torch.rand(200, 200)
        self.pinned = torch.rand(4, 4).pin_memory()
        self.positions = torch.tensor([0, 1])
        self.stream = torch.cuda.Stream()
        self.event = torch.cuda.Event()
        self.event.record()


Program = Callable[[Tensors], Any]


def assign(tensor: torch.Tensor, index: Any, value: Any) -> None:
    tensor[index] = value


# how often the host waits, and whether torch's own debug mode sees it, by CUDA's kernels in aten/src/ATen/native/cuda
SEEN: dict[str, tuple[int, Program]] = {
    "item": (1, lambda t: t.numbers[0].item()),
    "bool": (1, lambda t: bool(t.numbers[0])),
    "int": (1, lambda t: int(t.numbers[0])),
    "float": (1, lambda t: float(t.numbers[0])),
    "in a text": (1, lambda t: f"{t.numbers[0]}"),
    "if any": (1, lambda t: 1 if t.mask.any() else 0),
    "contains": (1, lambda t: 3 in t.numbers),
    "tolist": (1, lambda t: t.numbers.tolist()),
    "a slice's ends": (2, lambda t: t.numbers[t.numbers[1] : t.numbers[3]]),
    "max of Python": (5, lambda t: max(t.numbers)),
    "nonzero": (1, lambda t: t.numbers.nonzero()),
    "where": (1, lambda t: torch.where(t.mask)),
    "argwhere": (1, lambda t: torch.argwhere(t.mask)),
    "mask as index": (1, lambda t: t.square[t.mask]),
    "two masks as index": (2, lambda t: t.square[t.row > 0, t.row > 0]),
    "positions on the host": (1, lambda t: t.square[t.positions]),
    "list as index": (1, lambda t: t.square[[0, 2]]),
    "a tensor into a mask": (1, lambda t: assign(t.square, t.mask, t.row[0])),
    "a number into positions": (1, lambda t: assign(t.square, t.numbers[:2], 0.5)),
    "a number into one element": (1, lambda t: assign(t.row, 0, 2.0)),
    "masked_select": (1, lambda t: torch.masked_select(t.square, t.mask)),
    "unique": (1, lambda t: torch.unique(t.numbers)),
    "unique_consecutive": (1, lambda t: torch.unique_consecutive(t.numbers)),
    "repeat_interleave": (2, lambda t: torch.repeat_interleave(t.numbers, torch.ones_like(t.numbers))),
    "bincount": (2, lambda t: torch.bincount(t.numbers)),
    "histc": (2, lambda t: torch.histc(t.square)),
    "multinomial": (2, lambda t: torch.multinomial(t.row, 2)),
    "normal": (1, lambda t: torch.normal(t.square, t.square)),
    "equal": (1, lambda t: torch.equal(t.numbers, t.numbers + 0)),
    "allclose": (1, lambda t: torch.allclose(t.square, t.square + 0)),
    "is_nonzero": (1, lambda t: torch.is_nonzero(t.numbers[1])),
    "one_hot": (1, lambda t: torch.nn.functional.one_hot(t.numbers)),
    "inverse": (1, lambda t: torch.linalg.inv(t.square + torch.eye(4, device="cuda"))),
    "cpu": (1, lambda t: t.square.cpu()),
    "numpy": (1, lambda t: t.square.cpu().numpy()),
    "cuda": (1, lambda t: t.host.cuda()),
    "cuda from pinned memory": (1, lambda t: t.pinned.cuda()),
    "a tensor of numbers": (1, lambda t: torch.tensor([1, 2], device="cuda")),
    "a tensor of an array": (1, lambda t: torch.as_tensor(np.ones(3), device="cuda")),
    "arange to a tensor": (1, lambda t: torch.arange(t.numbers[2], device="cuda")),
    "a stream": (1, lambda t: t.stream.synchronize()),
}
UNSEEN: dict[str, Program] = {
    "the device": lambda t: torch.cuda.synchronize(),
    "the accelerator": lambda t: torch.accelerator.synchronize(),
    "an event": lambda t: t.event.synchronize(),
    "unique rows": lambda t: torch.unique(t.square, dim=0),
    "much pageable memory": lambda t: t.large.to("cuda", non_blocking=True),
    "into pageable memory": lambda t: t.host.copy_(t.square, non_blocking=True),
}
NO_WAIT: dict[str, Program] = {
    "arithmetic": lambda t: t.square * 2 + t.row,
    "a number of the host": lambda t: t.square * torch.tensor(2.0),
    "softmax": lambda t: t.square.softmax(0),
    "sort": lambda t: t.square.sort(),
    "topk": lambda t: t.square.topk(2),
    "positions on the device": lambda t: t.square[t.numbers[:2]],
    "a number into a mask": lambda t: assign(t.square, t.mask, 0.5),
    "a number into a slice": lambda t: assign(t.row, slice(0, 2), 2.0),
    "masked_fill": lambda t: t.square.masked_fill(t.mask, 0.0),
    "repeat_interleave to a size": lambda t: torch.repeat_interleave(
        t.numbers, torch.ones_like(t.numbers), output_size=6
    ),
    "repeat_interleave by a number": lambda t: torch.repeat_interleave(t.numbers, 2),
    "equal to itself": lambda t: torch.equal(t.numbers, t.numbers),
    "another shape": lambda t: torch.equal(t.numbers, t.row),
    "pinned to the device": lambda t: t.pinned.to("cuda", non_blocking=True),
    "little pageable memory": lambda t: t.host.to("cuda", non_blocking=True),
    "to the host, which is pinned for it": lambda t: t.square.to("cpu", non_blocking=True),
    "into pinned memory": lambda t: t.pinned.copy_(t.square, non_blocking=True),
    "nothing to copy": lambda t: torch.empty(0, device="cuda").cpu(),
    "to another GPU": lambda t: t.square.to("cuda:1"),
    "clone": lambda t: t.square.clone(),
    "full": lambda t: torch.full((2,), 3, device="cuda"),
    "arange": lambda t: torch.arange(3, device="cuda"),
    "random numbers": lambda t: torch.randn(3, device="cuda", generator=torch.Generator("cuda")),
    "a stream waits": lambda t: torch.cuda.current_stream().wait_stream(t.stream),
    "an event is asked": lambda t: t.event.query(),
    "one element at a time": lambda t: list(t.numbers),
    "the host's own": lambda t: t.host.nonzero().tolist(),
}


def waits(gpu: SimulatedGpu, program: Program) -> tuple[int, int]:
    """(how often the host waits, how often torch's debug mode says so)."""
    tensors = Tensors()
    gpu.record_syncs()
    program(tensors)
    gpu.record_syncs(False)
    counted = sum(sync.count for sync in gpu.syncs())
    assert sum(sync.count for sync in gpu.syncs() if sync.in_torch) == warned(program)
    return counted, warned(program)


def warned(program: Program) -> int:
    tensors = Tensors()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            program(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", SEEN)
def test_an_operation_waits_as_often_as_on_cuda_and_the_debug_mode_says_so(gpu: SimulatedGpu, name: str) -> None:
    times, program = SEEN[name]
    assert waits(gpu, program) == (times, times)


@pytest.mark.parametrize("name", UNSEEN)
def test_a_wait_of_cuda_itself_is_counted_and_the_debug_mode_is_silent(gpu: SimulatedGpu, name: str) -> None:
    assert waits(gpu, UNSEEN[name]) == (1, 0)


@pytest.mark.parametrize("name", NO_WAIT)
def test_an_operation_that_does_not_wait_on_cuda_is_not_counted(gpu: SimulatedGpu, name: str) -> None:
    assert waits(gpu, NO_WAIT[name]) == (0, 0)


def test_a_dry_device_waits_as_often(gpu: SimulatedGpu) -> None:
    with gpu.dry():
        weight = torch.empty(512, 512, device="cuda")
        gpu.record_syncs()
        torch.ones((), device="cuda").item()
        (weight @ weight).nonzero()
        weight.cpu()
        gpu.record_syncs(False)
    assert [sync.operation for sync in gpu.syncs()] == [
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::copy_ to the host",
    ]


def test_the_debug_mode_raises_before_anything_is_read(gpu: SimulatedGpu) -> None:
    number = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert torch.cuda.get_sync_debug_mode() == 2
        with pytest.raises(RuntimeError) as raised:
            number.item()
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert str(raised.value) == "called a synchronizing CUDA operation"
    assert gpu.transfer_stats()["d2h_calls"] == 0


def read(tensor: torch.Tensor) -> float:
    return float(tensor)  # the line


LINE = read.__code__.co_firstlineno + 1


def test_a_wait_has_its_line(gpu: SimulatedGpu) -> None:
    number = torch.ones((), device="cuda")
    gpu.record_syncs()
    for step in range(3):
        gpu.mark_syncs(step)
        for _ in range(step):
            read(number)
    gpu.record_syncs(False)
    found = gpu.syncs()
    assert [(sync.mark, sync.count) for sync in found] == [(1, 1), (2, 2)]
    for sync in found:
        assert sync.place == sync.user
        assert sync.place is not None
        assert (Path(sync.place.file).name, sync.place.line, sync.place.function) == (Path(__file__).name, LINE, "read")
        assert sync.place.text == "return float(tensor)  # the line"
    read(number)
    assert len(gpu.syncs()) == 2, "the recording has ended"


def test_a_library_that_waits_has_its_line_and_that_of_its_user(gpu: SimulatedGpu) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2, device="cuda")
    gpu.record_syncs()
    scheduler.index_for_timestep(scheduler.timesteps[1])
    gpu.record_syncs(False)
    places = {
        (sync.place.file.rpartition("/")[2], sync.user.function) for sync in gpu.syncs() if sync.place and sync.user
    }
    assert places == {
        (
            "scheduling_flow_match_euler_discrete.py",
            "test_a_library_that_waits_has_its_line_and_that_of_its_user",
        )
    }


def test_compiled_code_waits_where_it_reads(gpu: SimulatedGpu) -> None:
    @torch.compile(backend="eager")
    def scaled(tensor: torch.Tensor) -> torch.Tensor:
        doubled = tensor * 2
        if doubled.sum() > 0:
            return doubled + 1
        return doubled

    tensor = torch.ones(3, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaled(tensor)
        gpu.record_syncs()
        scaled(tensor)
        gpu.record_syncs(False)
    assert [(sync.operation, sync.count) for sync in gpu.syncs()] == [("aten::_local_scalar_dense", 1)]
    torch.compiler.reset()


def test_recordings_are_apart(gpu: SimulatedGpu) -> None:
    number = torch.ones((), device="cuda")
    outer, inner = SyncRecording(), SyncRecording()
    outer.start()
    number.item()
    inner.start()
    number.item()
    inner.stop()
    number.item()
    outer.stop()
    number.item()
    assert [sum(sync.count for sync in one.syncs()) for one in (outer, inner)] == [3, 1]


def test_other_threads_are_heard(gpu: SimulatedGpu) -> None:
    number = torch.ones((), device="cuda")
    gpu.record_syncs()
    threads = [threading.Thread(target=lambda: [read(number) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gpu.record_syncs(False)
    assert sum(sync.count for sync in gpu.syncs()) == 200


LEFT = """
import torch
from pytest_diffopt.accelerators.simulated import simulated_cuda

for time in range(2):
    with simulated_cuda("rtx-4090") as gpu:
        assert torch.cuda.get_sync_debug_mode() == 0
        kept = torch.ones(3, device="cuda")
        found = gpu.syncs()
        kept.sum().item()
        assert gpu.syncs() == found  # nobody records yet
        gpu.record_syncs()
        torch.cuda.memory._record_memory_history()
        torch.ones(3, device="cuda").sum().item()
        assert len(gpu.syncs()) == 1
        torch.cuda.set_sync_debug_mode("error")
    del kept  # its memory is given back after the GPU is
with simulated_cuda("rtx-4090") as gpu:
    gpu.record_syncs()
    torch.cuda.memory._record_memory_history()
    kept = torch.ones(3, device="cuda")
    print("whole")
"""


def test_recordings_end_with_the_gpu_and_with_the_process() -> None:
    ran = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "whole\n", "")
