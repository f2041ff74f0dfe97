"""torch's own Python for CUDA runs on the simulated GPU, and says what it says on a real one."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import benchmark

from pytest_diffopt.accelerators.simulated import SimulatedGpu


def test_memory_functions_count_one_tensor(gpu: SimulatedGpu) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.ones(2**18, device="cuda")
    assert torch.cuda.memory_allocated() - before == x.nbytes
    assert torch.cuda.max_memory_allocated() - before >= x.nbytes
    assert torch.cuda.max_memory_reserved() >= torch.cuda.memory_reserved()
    free, total = torch.cuda.mem_get_info()
    assert total - free == torch.cuda.memory_reserved()
    assert total == gpu.memory_bytes
    stats = torch.cuda.memory_stats()
    assert stats["allocated_bytes.all.current"] == torch.cuda.memory_allocated()
    assert stats["allocation.all.allocated"] - stats["allocation.all.freed"] == stats["allocation.all.current"]
    summary = torch.cuda.memory_summary()
    assert "PyTorch CUDA memory summary, device ID 0" in summary
    assert "| Allocated memory      |" in summary
    assert len(torch.cuda.memory_summary(0, abbreviated=True)) < len(summary)
    torch.accelerator.empty_host_cache()
    del x
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    assert torch.cuda.max_memory_allocated() == before


def test_submodules_are_torchs_own() -> None:
    for name, taken in {
        "memory": ["max_memory_allocated", "memory_summary", "empty_cache", "_record_memory_history"],
        "random": ["manual_seed_all"],
        "amp": ["autocast", "GradScaler", "custom_fwd"],
        "nvtx": ["range_push", "range_pop", "range"],
        "graphs": ["CUDAGraph"],
    }.items():
        module = importlib.import_module(f"torch.cuda.{name}")
        assert getattr(torch.cuda, name) is module
        assert [one for one in taken if not hasattr(module, one)] == []


def test_no_memory_left_is_torchs_own_error(gpu: SimulatedGpu) -> None:
    gpu.set_memory_limit(torch.cuda.memory_allocated() + 1024)
    with pytest.raises(
        torch.cuda.OutOfMemoryError, match=r"^CUDA out of memory\. Tried to allocate 4\.00 MiB\. GPU 0 has"
    ):
        torch.empty(2**20, device="cuda")
    assert torch.cuda.memory_stats()["num_ooms"] == 1


def test_a_memory_history_is_accepted_and_a_snapshot_is_written(tmp_path: Path) -> None:
    torch.cuda.memory._record_memory_history(max_entries=1000)
    torch.cuda.memory._dump_snapshot(str(tmp_path / "snapshot.pickle"))
    torch.cuda.memory._record_memory_history(enabled=None)
    assert {"segments", "device_traces"} <= set(pickle.loads((tmp_path / "snapshot.pickle").read_bytes()))
    assert isinstance(torch.cuda.memory_snapshot(), list)


def test_autocast_by_its_old_name_casts() -> None:
    x = torch.ones(4, 4, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates these names itself
        with torch.cuda.amp.autocast(dtype=torch.bfloat16):
            assert (x @ x).dtype == torch.bfloat16
        with torch.cuda.amp.autocast():
            assert (x @ x).dtype == torch.float16
        with torch.cuda.amp.autocast(enabled=False):
            assert (x @ x).dtype == torch.float32
        assert torch.cuda.amp.GradScaler(init_scale=4.0).scale(x).sum().item() == 64


def test_ranges_nest() -> None:
    assert torch.cuda.nvtx.range_push("outer") == 0
    with torch.cuda.nvtx.range("step {}", 3):
        assert torch.cuda.nvtx.range_push("inner") == 2
        assert torch.cuda.nvtx.range_pop() == 2
    assert torch.cuda.nvtx.range_pop() == 0
    torch.cuda.nvtx.range_end(torch.cuda.nvtx.range_start("a"))
    torch.cuda.nvtx.mark("a")
    with torch.cuda.profiler.profile():
        torch.ones(2, device="cuda") + 1


def test_graphs_of_kernels_are_refused_by_name() -> None:
    for attempt in (torch.cuda.CUDAGraph, torch.cuda.graph_pool_handle):
        with pytest.raises(NotImplementedError, match=r"^The simulated GPU has no torch\.cuda\.(CUDAGraph|graph_pool)"):
            attempt()
    assert not torch.cuda.is_current_stream_capturing()


def test_the_device_is_described(gpu: SimulatedGpu) -> None:
    properties = torch.cuda.get_device_properties(0)
    assert properties.name == torch.cuda.get_device_name(1) == gpu.properties.name == "NVIDIA GeForce RTX 4090"
    assert (properties.major, properties.minor) == torch.cuda.get_device_capability() == (8, 9)
    assert torch.cuda.get_arch_list() == ["sm_89"]
    assert repr(properties).startswith(
        "_CudaDeviceProperties(name='NVIDIA GeForce RTX 4090', major=8, minor=9, total_me"
    )
    assert torch.cuda.is_bf16_supported()
    assert torch.cuda.is_tf32_supported()
    assert torch.cuda.can_device_access_peer(0, 1)
    assert torch.cuda.get_allocator_backend() == "native"
    assert torch.cuda.memory.list_gpu_processes(0)
    assert torch.backends.cuda.is_built()
    assert torch.backends.cudnn.is_available()
    assert torch.backends.cudnn.version() >= 90000
    assert torch.version.cuda is not None


def test_an_accelerator_in_general_is_this_one() -> None:
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch.accelerator.device_count() == 2
    torch.accelerator.set_device_index(1)
    assert torch.cuda.current_device() == torch.accelerator.current_device_index() == 1
    torch.accelerator.set_device_index(0)
    assert torch.accelerator.current_stream().stream_id == torch.cuda.current_stream().stream_id
    assert torch.get_device_module() is torch.cuda


def test_synchronization_can_be_watched() -> None:
    for mode, number in (("warn", 1), ("error", 2), ("default", 0)):
        torch.cuda.set_sync_debug_mode(mode)
        assert torch.cuda.get_sync_debug_mode() == number


def test_timing_as_pages_do_it() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    x = torch.ones(64, 64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x @ x
    torch.cuda.current_stream().wait_stream(stream)
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timer = benchmark.Timer("f(x)", globals={"f": lambda x: x @ x, "x": x}, num_threads=1)
        assert timer.timeit(3).mean > 0
        assert timer.blocked_autorange(min_run_time=0.001).median > 0


def test_streams_are_objects_of_their_own(gpu: SimulatedGpu) -> None:
    stream, other = torch.cuda.Stream(), torch.cuda.Stream(device="cuda:1", priority=-1)
    assert stream != torch.cuda.default_stream()
    assert (stream.device, other.device) == (torch.device("cuda:0"), torch.device("cuda:1"))
    assert torch.cuda.Stream.priority_range() == (0, -5)
    assert isinstance(stream, torch.Stream)
    assert hash(stream) == hash(torch.cuda.Stream(stream_id=stream.stream_id, device_index=0, device_type=1))
    external = torch.cuda.ExternalStream(stream.cuda_stream)
    assert external.cuda_stream == stream.cuda_stream
    event = stream.record_event()
    assert event.query()
    torch.cuda.default_stream().wait_event(event)
    with stream:
        assert torch.cuda.current_stream() == stream
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    with pytest.raises(torch.AcceleratorError, match="invalid device ordinal"):
        torch.cuda.default_stream(9)


def test_a_part_of_the_memory_can_be_set_aside_in_torchs_words(gpu: SimulatedGpu) -> None:
    torch.cuda.set_per_process_memory_fraction(0.5)
    assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(0.5)
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="Allowed range: 0~1"):
            torch.cuda.set_per_process_memory_fraction(wrong)
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_storages_are_made_resized_and_shared() -> None:
    storage = torch.UntypedStorage(16, device="cuda")
    assert (storage.device, storage.nbytes(), storage.is_cuda) == (torch.device("cuda:0"), 16, True)
    storage.resize_(64)
    assert storage.nbytes() == 64
    assert torch.UntypedStorage([1, 2, 3], device="cuda:1").tolist() == [1, 2, 3]
    host = torch.arange(4.0)
    there = host.untyped_storage().cuda()
    assert there.device == torch.device("cuda:0")
    assert there.cpu().tolist() == host.untyped_storage().tolist()
    assert torch.tensor([], device="cuda").set_(there, 0, (4,)).view(torch.float32).numel() >= 1  # type: ignore[call-overload]


def test_a_file_of_another_gpu_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"a": torch.arange(3.0, device="cuda:1")}, file)
    wheres: list[tuple[Any, str]] = [
        (None, "cuda:1"),
        ("cpu", "cpu"),
        ("cuda", "cuda:0"),
        ({"cuda:1": "cuda:0"}, "cuda:0"),
        (lambda storage, place: storage.cuda(0), "cuda:0"),
    ]
    for where, expected in wheres:
        loaded = torch.load(file, map_location=where, weights_only=True)["a"]
        assert (str(loaded.device), loaded.tolist()) == (expected, [0, 1, 2])
    with pytest.raises(RuntimeError, match="Attempting to deserialize object on CUDA device 7"):
        torch.load(file, map_location="cuda:7", weights_only=True)


def _trained(make: Callable[[Any], torch.optim.Optimizer], device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).to(device)
    optimizer = make(model.parameters())
    x, y = (torch.randn(5, width, generator=torch.Generator().manual_seed(1)).to(device) for width in (8, 4))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("way", ["foreach", "fused", "plain"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adadelta"])
def test_optimizers_of_every_kind_train_as_on_the_host(name: str, way: str) -> None:
    kind = getattr(torch.optim, name)
    if way == "fused" and name not in ("SGD", "Adam", "AdamW", "Adagrad"):
        pytest.skip("torch has no fused one")
    options = {"plain": {"foreach": False}}.get(way, {way: True})
    if name == "Adagrad" and way == "fused":
        pytest.skip("torch has it for the host alone")
    host = _trained(lambda p: kind(p, lr=0.01, foreach=False), "cpu")
    torch.testing.assert_close(_trained(lambda p: kind(p, lr=0.01, **options), "cuda"), host, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_can_be_captured_keeps_its_steps_on_the_device() -> None:
    parameter = torch.ones(3, device="cuda", requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], capturable=True)
    parameter.square().sum().backward()
    optimizer.step()
    assert optimizer.state[parameter]["step"].device == torch.device("cuda:0")


def test_gradient_scaling_skips_an_overflow_and_halves() -> None:
    w = torch.ones(3, device="cuda", requires_grad=True)
    for fused in (False, True):
        optimizer = torch.optim.SGD([w], 0.1, fused=fused)
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
        optimizer.zero_grad()
        scaler.scale((w * torch.tensor([1.0, float("inf"), 1.0], device="cuda")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert w.tolist() == [1, 1, 1]
        assert scaler.get_scale() == 2.0


def test_an_exported_program_runs_here_and_remembers_the_device(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU()).to("cuda")
    x = torch.ones(2, 8, device="cuda")
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    assert loaded(x).device == x.device
    assert torch.equal(loaded(x), model(x))


def test_a_module_is_copied_with_its_device_and_pickled() -> None:
    layer = nn.Linear(2, 2).cuda(1)
    assert copy.deepcopy(layer).weight.device == torch.device("cuda:1")
    assert pickle.loads(pickle.dumps(layer)).weight.device == torch.device("cuda:1")


def test_memory_pools_are_accepted() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        x = torch.ones(4, device="cuda")
    assert x.sum().item() == 4


def test_softmax_of_half_precision_gives_float32_and_its_gradient_half() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype).cuda().requires_grad_()
        for function in (torch.softmax, torch.log_softmax):
            y = function(x, -1, dtype=torch.float32)
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, function(x.float(), -1))
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            wide = x.detach().float().requires_grad_()
            (expected,) = torch.autograd.grad(function(wide, -1).square().sum(), wide)
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient, expected.to(dtype))


def test_products_of_half_precision_give_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 8, 8, generator=generator).bfloat16().cuda() for _ in range(2))
    wide = a.float() @ b.float()
    assert torch.equal(torch.bmm(a, b, out_dtype=torch.float32), wide)
    assert torch.equal(torch.mm(a[0], b[0], out_dtype=torch.float32), wide[0])
    c = torch.ones(8, 8, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(
        torch.addmm(c, a[0], b[0], out_dtype=torch.float32), torch.addmm(c.float(), a[0].float(), b[0].float())
    )
    out = torch.empty(0, device="cuda")
    torch.mm(a[0], b[0], out_dtype=torch.float32, out=out)
    assert torch.equal(out, wide[0])
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        torch.mm(a[0], b[0].cpu(), out_dtype=torch.float32)
