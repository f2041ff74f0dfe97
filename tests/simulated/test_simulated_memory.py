"""The device counts every byte: live, peak, reserved, and what crosses."""

from __future__ import annotations

import gc
import re
import threading

import pytest
import torch
from torch import nn

from pytest_diffopt.accelerators.simulated import SimulatedGpu

KIB, MIB, GIB = 2**10, 2**20, 2**30


def floats(count: int, device: str = "cuda") -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32, device=device)


def test_live_and_peak_bytes_are_those_of_the_tensors() -> None:
    base = torch.cuda.memory_allocated()
    a = floats(100)
    b = floats(50)
    assert torch.cuda.memory_allocated() - base == 600
    c = a[:50] + b  # 200 more
    view = a.view(10, 10)
    del a
    assert torch.cuda.memory_allocated() - base == 800
    del view
    assert torch.cuda.memory_allocated() - base == 400
    assert torch.cuda.max_memory_allocated() - base == 800
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() - base == 400
    del b, c
    assert torch.cuda.memory_allocated() == base


def test_a_chain_of_temporaries_peaks_where_it_was_computed_by_hand() -> None:
    x = floats(256).zero_()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = ((x + 1) * 2).relu()  # two of them alive at any time
    assert torch.cuda.max_memory_allocated() - base == 2 * 1024
    assert torch.cuda.memory_allocated() - base == 1024
    del y


def test_backward_peaks_with_the_saved_activations() -> None:
    w = floats(256).zero_().requires_grad_()
    base = torch.cuda.memory_allocated()
    (w * 2).square().sum().backward()
    assert torch.cuda.memory_allocated() - base == 1024  # the gradient
    w.grad = None
    assert torch.cuda.memory_allocated() == base


def test_a_module_takes_what_its_parameters_and_buffers_take() -> None:
    base = torch.cuda.memory_allocated()
    module = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20)).to("cuda")
    assert torch.cuda.memory_allocated() - base == 4 * (10 * 20 + 20 + 4 * 20) + 8
    module(torch.zeros(3, 10, device="cuda")).sum().backward()
    module.zero_grad()
    module.to("cpu")
    gc.collect()
    assert torch.cuda.memory_allocated() == base


def test_every_reallocation_is_charged() -> None:
    base = torch.cuda.memory_allocated()
    x = floats(10)
    x.resize_(100)
    assert torch.cuda.memory_allocated() - base == 400
    x.untyped_storage().resize_(1000)
    assert torch.cuda.memory_allocated() - base == 1000
    x.untyped_storage().resize_(0)
    assert torch.cuda.memory_allocated() == base
    out = floats(0)
    torch.add(floats(8), 1, out=out)
    assert torch.cuda.memory_allocated() - base == 32


def test_a_resized_tensor_is_charged_to_its_own_device() -> None:
    x = torch.ones(1, device="cuda:1")
    first, second = torch.cuda.memory_allocated(0), torch.cuda.memory_allocated(1)
    x.resize_(100)
    assert (torch.cuda.memory_allocated(0) - first, torch.cuda.memory_allocated(1) - second) == (0, 396)


def test_transfers_are_counted_in_bytes_and_calls(gpu: SimulatedGpu) -> None:
    host = torch.zeros(100)
    x = host.to("cuda")
    y = x.clone()
    y.to("cpu")
    y.cpu()
    x[0].item()
    assert gpu.transfer_stats() == {
        "h2d_bytes": 400,
        "d2h_bytes": 804,
        "d2d_bytes": 400,
        "h2d_calls": 1,
        "d2h_calls": 3,
        "d2d_calls": 1,
    }
    gpu.reset_counts()
    assert set(gpu.transfer_stats().values()) == {0}


def test_a_request_beyond_the_limit_raises_in_cudas_words_and_changes_nothing(gpu: SimulatedGpu) -> None:
    base = torch.cuda.memory_allocated()
    gpu.set_memory_limit(base + 3 * MIB)
    kept = torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(MIB + 1, dtype=torch.uint8, device="cuda")
    message = str(raised.value)
    assert message.startswith("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has a total capacity of ")
    free = r" of which (1\.00 MiB|102\d\.\d\d KiB) is free\. "  # what other tests of the process left may round it
    assert re.search(
        rf"{free}Including non-PyTorch memory, this process has .* memory in use\. Of the allocated memory .* is allocated "
        r"by PyTorch, and 0 bytes is reserved by PyTorch but unallocated\. If reserved but unallocated memory is large",
        message,
    )
    assert torch.cuda.memory_allocated() - base == 2 * MIB
    exactly = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info() == (0, base + 3 * MIB)
    del kept, exactly
    assert torch.cuda.memory_stats()["num_ooms"] == 1


def test_an_operations_result_may_not_pass_the_limit_either(gpu: SimulatedGpu) -> None:
    x = floats(1000).zero_()
    base = torch.cuda.memory_allocated()
    gpu.set_memory_limit(base + 4000)
    y = x + 1
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 3\.91 KiB"):
        x + y
    assert torch.cuda.memory_allocated() - base == 4000
    gpu.set_memory_limit(None)
    assert (x + y).sum().item() == 1000


def test_a_part_of_the_memory_can_be_set_aside_for_the_process(gpu: SimulatedGpu) -> None:
    base = torch.cuda.memory_allocated()
    gpu.set_memory_limit(base + 4 * MIB)
    torch.cuda.set_per_process_memory_fraction(0.5)
    assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(0.5)
    with pytest.raises(torch.OutOfMemoryError, match=r"memory in use\. 2\.00 MiB allowed; Of the allocated"):
        torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match="Allowed range: 0~1"):
        torch.cuda.set_per_process_memory_fraction(1.5)


def test_without_the_caching_allocator_reserved_is_allocated() -> None:
    x = floats(3)
    assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated()
    del x
    assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated()


def test_the_caching_allocator_rounds_and_keeps_blocks_as_cudas_does(gpu: SimulatedGpu) -> None:
    live, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    gpu.set_caching_allocator(True)

    def now() -> tuple[int, int]:
        return torch.cuda.memory_allocated() - live, torch.cuda.memory_reserved() - reserved

    small = floats(1)
    assert now() == (512, 2 * MIB)
    another = torch.empty(513, dtype=torch.uint8, device="cuda")
    assert now() == (512 + 1024, 2 * MIB)
    middle = torch.empty(5 * MIB, dtype=torch.uint8, device="cuda")  # a segment of 20 MiB, split
    assert now() == (1536 + 5 * MIB, 22 * MIB)
    beside = torch.empty(
        14 * MIB + 512 * KIB, dtype=torch.uint8, device="cuda"
    )  # the rest: less than 1 MiB would be left
    assert now() == (1536 + 20 * MIB, 22 * MIB)
    large = torch.empty(11 * MIB, dtype=torch.uint8, device="cuda")  # rounded up to 2 MiB; the rest is not split off
    assert now() == (1536 + 32 * MIB, 34 * MIB)
    assert (
        torch.cuda.memory_stats()["requested_bytes.all.current"] - live
        == 4 + 513 + (5 + 11) * MIB + 14 * MIB + 512 * KIB
    )
    del middle, large, beside
    assert now() == (1536, 34 * MIB)
    again = torch.empty(18 * MIB, dtype=torch.uint8, device="cuda")  # fits where middle and beside were
    assert now() == (1536 + 18 * MIB, 34 * MIB)
    del again
    torch.cuda.empty_cache()
    assert now() == (1536, 2 * MIB)
    del small, another
    torch.cuda.empty_cache()
    assert now() == (0, 0)


def test_the_caching_allocator_gives_back_what_it_kept_before_it_fails(gpu: SimulatedGpu) -> None:
    gpu.set_caching_allocator(True)
    gpu.set_memory_limit(torch.cuda.memory_reserved() + 24 * MIB)
    kept = torch.empty(20 * MIB, dtype=torch.uint8, device="cuda")
    del kept
    other = torch.empty(24 * MIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1, dtype=torch.uint8, device="cuda")
    del other


def test_what_was_taken_before_the_mode_changed_is_given_back_right(gpu: SimulatedGpu) -> None:
    live, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    exact = floats(3)
    gpu.set_caching_allocator(True)
    rounded = floats(3)
    gpu.set_caching_allocator(False)
    assert torch.cuda.memory_allocated() - live == 12 + 512
    del exact, rounded
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (live, reserved)


def test_threads_do_not_lose_a_byte(gpu: SimulatedGpu) -> None:
    base = torch.cuda.memory_allocated()

    def work() -> None:
        for _ in range(300):
            x = torch.ones(100, device="cuda")
            (x + 1).mul_(2).cpu()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.cuda.memory_allocated() == base
    assert gpu.transfer_stats()["d2h_calls"] == 4 * 300


def test_an_accelerator_in_general_sees_the_same_numbers() -> None:
    x = floats(1000)
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch.accelerator.device_count() == torch.cuda.device_count() == 2
    assert torch.accelerator.memory_allocated() == torch.cuda.memory_allocated()
    assert torch.accelerator.max_memory_allocated() == torch.cuda.max_memory_allocated()
    assert torch.accelerator.memory_reserved() == torch.cuda.memory_reserved()
    del x
    torch.accelerator.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
