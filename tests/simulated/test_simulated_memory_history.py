"""torch's snapshot of the allocator, and its history, true for the simulated GPU."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.accelerators.simulated import SimulatedGpu

SEGMENTS = ["segment_alloc", "segment_free"]


def segments(device: int = 0) -> list[dict[str, Any]]:
    return [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == device]


def entries(device: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = torch.cuda.memory._snapshot()["device_traces"][device]
    return found


@pytest.fixture(autouse=True)
def _history_ends() -> Any:
    yield
    torch.cuda.memory._record_memory_history(None)


def make(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def test_without_the_caching_allocator_a_block_is_a_segment_at_its_datas_address(gpu: SimulatedGpu) -> None:
    before = {segment["address"] for segment in segments()}
    small, large, other = make(100), make(3 << 20), torch.empty(7, device="cuda:1")
    found = {segment["address"]: segment for segment in segments() if segment["address"] not in before}
    assert {address: segment["total_size"] for address, segment in found.items()} == {
        small.data_ptr(): 100,
        large.data_ptr(): 3 << 20,
    }
    assert [found[one.data_ptr()]["segment_type"] for one in (small, large)] == ["small", "large"]
    (block,) = found[small.data_ptr()]["blocks"]
    assert (block["address"], block["size"], block["requested_size"], block["state"]) == (
        small.data_ptr(),
        100,
        100,
        "active_allocated",
    )
    assert other.data_ptr() in {segment["address"] for segment in segments(1)}
    assert sum(segment["allocated_size"] for segment in segments()) == torch.cuda.memory_allocated()
    del small, large, block
    assert {segment["address"] for segment in segments()} == before


def test_with_the_caching_allocator_segments_hold_blocks_that_are_used_and_unused(gpu: SimulatedGpu) -> None:
    outside = torch.cuda.memory_allocated()
    gpu.set_caching_allocator(True)
    torch.cuda.empty_cache()
    first, second, third = make(1000), make(600_000), make(5 << 20)
    del second
    found = [segment for segment in segments() if len(segment["blocks"]) > 1 or segment["total_size"] >= 2 << 20]
    assert [(one["segment_type"], one["total_size"]) for one in found] == [("small", 2 << 20), ("large", 20 << 20)]
    small, large = found
    assert [(block["size"], block["requested_size"], block["state"]) for block in small["blocks"]] == [
        (1024, 1000, "active_allocated"),
        ((2 << 20) - 1024, 0, "inactive"),
    ]
    assert [block["state"] for block in large["blocks"]] == ["active_allocated", "inactive"]
    for segment in found:
        assert [block["address"] for block in segment["blocks"]] == [
            segment["address"] + sum(block["size"] for block in segment["blocks"][:at])
            for at in range(len(segment["blocks"]))
        ]
    assert sum(segment["total_size"] for segment in segments()) == torch.cuda.memory_reserved()
    assert sum(segment["allocated_size"] for segment in segments()) == torch.cuda.memory_allocated()
    del first, third
    torch.cuda.empty_cache()
    assert sum(segment["total_size"] for segment in segments()) == torch.cuda.memory_reserved() == outside


def test_the_history_has_what_came_and_went_with_its_lines(gpu: SimulatedGpu) -> None:
    torch.cuda.memory._record_memory_history()
    kept = make(300)
    make(200)
    found = entries()
    assert [(entry["action"], entry["size"]) for entry in found] == [
        ("segment_alloc", 300),
        ("alloc", 300),
        ("segment_alloc", 200),
        ("alloc", 200),
        ("free_requested", 200),
        ("free_completed", 200),
        ("segment_free", 200),
    ]
    assert found[1]["addr"] == kept.data_ptr()
    inner = next(frame for frame in found[1]["frames"] if frame["filename"] == __file__)
    assert (inner["name"], inner["line"]) == ("make", make.__code__.co_firstlineno + 1)
    assert found[1]["time_us"] <= found[-1]["time_us"]
    block = next(one["blocks"][0] for one in segments() if one["address"] == kept.data_ptr())
    assert block["frames"] == found[1]["frames"]
    assert torch._C._cuda_isHistoryEnabled()  # type: ignore[attr-defined]
    torch.cuda.memory._record_memory_history(None)
    assert not torch._C._cuda_isHistoryEnabled()  # type: ignore[attr-defined]
    make(100)
    assert entries() == []


def test_a_history_has_so_many_entries_and_actions_as_were_asked_for(gpu: SimulatedGpu) -> None:
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=2, skip_actions=SEGMENTS)
    make(10)
    make(20)
    assert [(entry["action"], entry["size"], entry["frames"]) for entry in entries()] == [
        ("free_requested", 20, []),
        ("free_completed", 20, []),
    ]
    torch.cuda.memory._record_memory_history("state", clear_history=True)
    kept = make(30)
    assert entries() == []
    block = next(one["blocks"][0] for one in segments() if one["address"] == kept.data_ptr())
    assert "make" in [frame["name"] for frame in block["frames"]]


def test_entries_have_the_users_metadata(gpu: SimulatedGpu) -> None:
    torch.cuda.memory._record_memory_history(context=None)
    torch.cuda.memory._set_memory_metadata("step 3")
    make(10)
    torch.cuda.memory._set_memory_metadata("")
    make(10)
    assert [entry["user_metadata"] for entry in entries() if entry["action"] == "alloc"] == ["step 3", ""]


def test_out_of_memory_is_in_the_history_with_what_is_free(gpu: SimulatedGpu) -> None:
    limit = torch.cuda.memory_reserved() + 1000
    gpu.set_memory_limit(limit)
    torch.cuda.memory._record_memory_history()
    with pytest.raises(torch.OutOfMemoryError):
        make(2000)
    (entry,) = entries()
    assert (entry["action"], entry["size"], entry["device_free"]) == ("oom", 2000, 1000)
    assert "make" in [frame["name"] for frame in entry["frames"]]


def test_segments_of_the_caching_allocator_come_and_go_in_the_history(gpu: SimulatedGpu) -> None:
    gpu.set_caching_allocator(True)
    torch.cuda.empty_cache()
    torch.cuda.memory._record_memory_history(context=None)
    make(1000)
    make(1000)
    torch.cuda.empty_cache()
    assert [(entry["action"], entry["size"]) for entry in entries()] == [
        ("segment_alloc", 2 << 20),
        ("alloc", 1024),
        ("free_requested", 1024),
        ("free_completed", 1024),
        ("alloc", 1024),
        ("free_requested", 1024),
        ("free_completed", 1024),
        ("segment_free", 2 << 20),
    ]


def test_a_snapshot_is_dumped_for_torchs_viewer(gpu: SimulatedGpu, tmp_path: Path) -> None:
    from torch.cuda import _memory_viz  # type: ignore[attr-defined]

    torch.cuda.memory._record_memory_history()
    kept = make(300)
    torch.cuda.memory._dump_snapshot(str(tmp_path / "snapshot.pickle"))
    snapshot = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    assert snapshot["device_traces"][0]
    assert "alloc" in _memory_viz.trace(snapshot)
    assert f"total_allocated: {torch.cuda.memory_allocated():.1f}B" in _memory_viz.segsum(
        snapshot
    )  # of all tests so far
    assert _memory_viz.trace_plot(snapshot).lstrip().startswith("<")
    del kept


def test_results_of_operations_and_hollow_blocks_are_there_too(gpu: SimulatedGpu) -> None:
    torch.cuda.memory._record_memory_history(context=None)
    ones = torch.ones(10, device="cuda")
    result = ones + ones
    assert [entry["addr"] for entry in entries() if entry["action"] == "alloc"] == [ones.data_ptr(), result.data_ptr()]
    with gpu.dry():
        hollow = torch.empty(1 << 20, device="cuda")
        assert (1 << 22) in [segment["total_size"] for segment in segments()]
        del hollow
    assert sum(segment["allocated_size"] for segment in segments()) == torch.cuda.memory_allocated()


def test_our_reader_of_cudas_history_reads_it(gpu: SimulatedGpu) -> None:
    from pytest_diffopt.accelerators.allocation_events import CudaEvents

    events = CudaEvents(torch.cuda)
    assert events.start()
    events.mark(7)
    ones = torch.ones(10, device="cuda")
    (block,) = events.blocks([ones])
    del ones
    found = events.read()
    events.stop()
    assert [(event.block, event.bytes, event.mark) for event in found] == [(block, 40, 7), (block, -40, 7)]
