"""What documentation pages call on torch.cuda is there on torch.sim, and does what is meant."""

from __future__ import annotations

import importlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import benchmark


def test_memory_functions_tell_of_one_tensor(sim: Any) -> None:
    before = sim.memory_allocated()
    sim.reset_peak_memory_stats()
    x = torch.ones(2**18, device="sim")
    assert sim.memory_allocated() - before == x.nbytes
    assert sim.max_memory_allocated() - before >= x.nbytes
    assert sim.memory_cached() == sim.memory_reserved() == sim.device_memory_used()
    assert sim.max_memory_cached() == sim.max_memory_reserved()
    free, total = sim.mem_get_info()
    assert total - free == sim.memory_reserved()
    summary = sim.memory_summary()
    assert str(sim.memory_allocated()) in summary
    assert "Out of memory: 0 times" in summary
    assert "Segments" not in sim.memory_summary(0, abbreviated=True)
    del x
    sim.reset_max_memory_cached()
    sim.reset_max_memory_allocated()
    sim.empty_cache()
    assert sim.max_memory_allocated() == before


def test_submodules_are_imported_by_their_names(sim: Any) -> None:
    for name, taken in {
        "memory": ["max_memory_allocated", "memory_summary", "empty_cache", "_record_memory_history"],
        "random": ["manual_seed_all"],
        "amp": ["autocast", "GradScaler", "custom_fwd"],
        "nvtx": ["range_push", "range_pop", "range"],
        "graphs": ["CUDAGraph"],
    }.items():
        module = importlib.import_module(f"torch.sim.{name}")
        assert getattr(sim, name) is module
        assert [one for one in taken if not hasattr(module, one)] == []


def test_no_memory_left_is_torchs_own_error(sim: Any) -> None:
    sim.set_memory_limit(sim.memory_allocated() + 1024)
    with pytest.raises(sim.OutOfMemoryError, match="Tried to allocate"):
        torch.empty(2**20, device="sim")
    assert sim.memory_stats()["num_ooms"] == 1


def test_a_memory_history_is_accepted_and_a_snapshot_is_written(sim: Any, tmp_path: Path) -> None:
    sim.memory._record_memory_history(max_entries=1000)
    sim.memory._dump_snapshot(str(tmp_path / "snapshot.pickle"))
    sim.memory._record_memory_history(enabled=None)
    assert pickle.loads((tmp_path / "snapshot.pickle").read_bytes())["segments"] == []


def test_autocast_by_its_old_name_casts(sim: Any) -> None:
    x = torch.ones(4, 4, device="sim")
    with sim.amp.autocast(dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with sim.amp.autocast():
        assert (x @ x).dtype == torch.float16
    with sim.amp.autocast(enabled=False):
        assert (x @ x).dtype == torch.float32
    assert sim.amp.GradScaler(init_scale=4.0).scale(x).sum().item() == 64


def test_ranges_nest(sim: Any) -> None:
    assert sim.nvtx.range_push("outer") == 0
    with sim.nvtx.range("step {}", 3):
        assert sim.nvtx.range_push("inner") == 2
        assert sim.nvtx.range_pop() == 2
    assert sim.nvtx.range_pop() == 0
    sim.nvtx.range_end(sim.nvtx.range_start("a"))
    sim.nvtx.mark("a")


def test_graphs_of_kernels_are_refused_by_name(sim: Any) -> None:
    for attempt in (
        sim.CUDAGraph,
        lambda: sim.graph(None),
        sim.graph_pool_handle,
        lambda: sim.make_graphed_callables(None, None),
    ):
        with pytest.raises(NotImplementedError, match=r"records no graphs of kernels \(torch.cuda.CUDAGraph\)"):
            attempt()
    assert not sim.is_current_stream_capturing()


def test_the_device_is_described(sim: Any) -> None:
    properties = sim.get_device_properties(0)
    assert (properties.major, properties.minor) == sim.get_device_capability() == (8, 0)
    assert sim.get_arch_list() == ["sm_80"]
    assert sim.is_tf32_supported()
    assert sim.get_allocator_backend() == "native"
    assert sim.utilization() == sim.get_sync_debug_mode() == 0
    assert sim.memory_snapshot() == []
    sim.set_sync_debug_mode("warn")


def test_timing_as_pages_do_it(sim: Any) -> None:
    start, end = sim.Event(enable_timing=True), sim.Event(enable_timing=True)
    start.record()
    x = torch.ones(64, 64, device="sim")
    stream = sim.Stream()
    with sim.stream(stream):
        x @ x
    sim.current_stream().wait_stream(stream)
    end.record()
    sim.synchronize()
    assert start.elapsed_time(end) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timer = benchmark.Timer("f(x)", globals={"f": lambda x: x @ x, "x": x}, num_threads=1)
        assert timer.timeit(3).mean > 0
        assert timer.blocked_autorange(min_run_time=0.001).median > 0
