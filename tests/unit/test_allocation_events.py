"""What CUDA's allocator keeps in its history, read as events; the snapshots are written by hand, in torch's form."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_diffopt.accelerators import Accelerator
from pytest_diffopt.accelerators.allocation_events import AllocationEvent, events_of_snapshot


def frame(name: str, filename: str = "??") -> dict[str, Any]:
    return {"name": name, "filename": filename, "line": 1}


def entry(action: str, addr: int, size: int, *frames: dict[str, Any], mark: str = "0") -> dict[str, Any]:
    stream = {"stream": 0, "time_us": 5, "compile_context": "N/A", "user_metadata": mark}
    return {"action": action, "addr": addr, "size": size, "frames": list(frames), **stream}


ADDMM = (
    frame("c10::cuda::CUDACachingAllocator::Native::NativeCachingAllocator::allocate(unsigned long)"),
    frame("at::_ops::empty_strided::redispatch(c10::DispatchKeySet, c10::ArrayRef<c10::SymInt>)"),
    frame("at::_ops::addmm::call(at::Tensor const&, at::Tensor const&)"),
    frame("at::_ops::linear::call(at::Tensor const&, at::Tensor const&)"),
    frame("forward", "/site-packages/torch/nn/modules/linear.py"),
    frame("at::_ops::unrelated::call()"),
    frame("main", "run.py"),
)


def test_blocks_come_when_taken_and_go_when_that_is_requested() -> None:
    trace = [
        entry("segment_alloc", 4096, 2 << 20),
        entry("alloc", 4096, 400, *ADDMM, mark="3"),
        entry("alloc", 8192, 100),
        entry("free_requested", 4096, 400, mark="4"),
        entry("free_completed", 4096, 400),
        {"action": "oom", "size": 10, "device_free": 3, "frames": [], "stream": 0},
    ]
    assert events_of_snapshot({"segments": [], "device_traces": [[], trace]}, 1) == [
        AllocationEvent(4096, 400, "aten::linear", 3),
        AllocationEvent(8192, 100, "", 0),
        AllocationEvent(4096, -400, "", 4),
    ]


@pytest.mark.parametrize(
    ("frames", "operation"),
    [
        (ADDMM, "aten::linear"),
        (ADDMM[:2], "aten::empty_strided"),
        ((frame("to", "run.py"),), "to"),
        ((frame("start", "lib.cpp"), frame("to", "run.py")), "to"),
        ((), ""),
    ],
)
def test_the_operation_is_the_one_that_python_called(frames: tuple[dict[str, Any], ...], operation: str) -> None:
    (event,) = events_of_snapshot({"device_traces": [[entry("alloc", 1, 1, *frames)]]}, 0)
    assert event.operation == operation


def test_a_trace_without_metadata_is_read_too() -> None:
    old = {"action": "alloc", "addr": 1, "size": 2, "frames": [], "stream": 0}
    assert events_of_snapshot({"device_traces": [[old]]}, 0) == [AllocationEvent(1, 2, "", 0)]


def test_a_device_that_does_not_tell_says_so_and_gives_nothing() -> None:
    host = Accelerator("cpu", "cpu")
    assert host.start_allocation_events() is False
    host.mark_allocation_events(1)
    assert host.allocation_events() == []
    host.stop_allocation_events()
