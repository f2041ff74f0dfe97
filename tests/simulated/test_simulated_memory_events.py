"""The device writes down what happens to its memory: which block, how many bytes, which operation."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pytest_diffopt.accelerators.simulated import SimulatedGpu


@pytest.fixture(autouse=True)
def recording(gpu: SimulatedGpu) -> Iterator[None]:
    gpu.record_memory_events()
    yield
    gpu.record_memory_events(False)


def taken(gpu: SimulatedGpu) -> list[tuple[str, int]]:
    return [(event.operation, event.bytes) for event in gpu.recorded_memory_events() if event.bytes > 0]


def test_a_block_is_seen_to_come_and_go(gpu: SimulatedGpu) -> None:
    x = torch.empty(100, device="cuda")
    (block,) = gpu.memory_blocks([x])
    del x
    came, went = gpu.recorded_memory_events()
    assert (came.block, came.bytes, came.operation) == (block, 400, "aten::empty")
    assert (went.block, went.bytes, went.operation) == (block, -400, "")


def test_memory_is_the_doing_of_the_operation_that_asked_for_it_however_it_did(gpu: SimulatedGpu) -> None:
    x = torch.zeros(4, 4, device="cuda")
    y = x @ x
    y.resize_(100)
    nn.functional.layer_norm(x, (4,))
    nn.functional.conv1d(x[None], torch.zeros(2, 4, 1, device="cuda"))
    made = taken(gpu)
    assert made[:3] == [("aten::zero_", 64), ("aten::mm", 64), ("aten::resize_", 400)]
    assert ("aten::native_layer_norm", 64) in made
    assert ("aten::convolution", 32) in made


def test_an_operation_is_not_blamed_for_memory_that_it_is_not_given(gpu: SimulatedGpu) -> None:
    x = torch.zeros(4, device="cuda")
    left = torch.empty(50, device="cuda")
    y = x + 1
    left.zero_()
    assert taken(gpu) == [("aten::zero_", 16), ("aten::empty", 200), ("aten::add", 16)]
    del y


def test_the_sum_of_the_events_is_what_the_counters_say_at_every_moment(gpu: SimulatedGpu) -> None:
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).to("cuda")
    model(torch.randn(5, 32, device="cuda")).sum().backward()
    sims = [event.bytes for event in gpu.recorded_memory_events()]
    heights = [base + sum(sims[: at + 1]) for at in range(len(sims))]
    assert heights[-1] == torch.cuda.memory_allocated()
    assert max(heights) == torch.cuda.max_memory_allocated()


def test_rounded_bytes_are_the_ones_written_down_with_the_caching_allocator(gpu: SimulatedGpu) -> None:
    gpu.set_caching_allocator(True)
    x = torch.empty(1, device="cuda")
    del x
    assert [event.bytes for event in gpu.recorded_memory_events()] == [512, -512]


def test_what_is_copied_across_names_both_blocks(gpu: SimulatedGpu) -> None:
    host = torch.ones(100)
    x = host.to("cuda")
    back = x.cpu()
    pinned = host.pin_memory()
    y = pinned.to("cuda")
    copies = [(event.source, event.block, event.pinned) for event in gpu.recorded_memory_events() if not event.bytes]
    on_host, on_sim, again, pin, other = gpu.memory_blocks([host, x, back, pinned, y])
    assert copies == [(on_host, on_sim, False), (on_sim, again, False), (pin, other, True)]


def test_a_number_is_never_used_again_and_foreign_memory_has_its_address(gpu: SimulatedGpu) -> None:
    import numpy as np

    numbers = set()
    for _ in range(50):
        numbers |= set(gpu.memory_blocks([torch.empty(10), torch.empty(10, device="cuda")]))
    assert len(numbers) == 100
    foreign = np.zeros(5, dtype="float32")
    assert gpu.memory_blocks([torch.from_numpy(foreign)]) == [-foreign.ctypes.data]
    x = torch.empty(10, device="cuda")
    assert len(set(gpu.memory_blocks([x, x.view(2, 5), x.detach()]))) == 1
    assert gpu.memory_blocks([torch.empty(3, device="meta"), torch.empty(0, device="cuda")]) == [0, 0]


def test_events_name_the_last_mark_and_their_device(gpu: SimulatedGpu) -> None:
    first = torch.empty(1, device="cuda")
    gpu.mark_memory_events(7)
    other = torch.empty(2, device="cuda:1")
    del first
    assert [(event.bytes, event.mark) for event in gpu.recorded_memory_events()] == [(4, 0), (-4, 7)]
    assert [(event.bytes, event.mark) for event in gpu.recorded_memory_events("cuda:1")] == [(8, 7)]
    del other


def test_nothing_is_written_down_before_and_after_and_a_new_recording_forgets(gpu: SimulatedGpu) -> None:
    x = torch.empty(10, device="cuda")
    gpu.record_memory_events(False)
    del x
    assert [event.bytes for event in gpu.recorded_memory_events()] == [40]
    waiting = torch.empty(3, device="cuda")
    gpu.record_memory_events()
    waiting.zero_()
    y = waiting + 1
    assert taken(gpu) == [("aten::add", 12)]
    del y


def test_a_failed_request_leaves_no_event(gpu: SimulatedGpu) -> None:
    gpu.set_memory_limit(torch.cuda.memory_allocated())
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(10, device="cuda")
    assert gpu.recorded_memory_events() == []


def test_each_thread_has_its_own_operation_and_the_sum_stays_right(gpu: SimulatedGpu) -> None:
    def add() -> None:
        x = torch.zeros(100, device="cuda")
        for _ in range(200):
            x = x + 1

    def multiply() -> None:
        y = torch.zeros(50, device="cuda")
        for _ in range(200):
            y = y * 2

    threads = [threading.Thread(target=work) for work in (add, multiply)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = taken(gpu)
    assert made.count(("aten::add", 400)) == made.count(("aten::mul", 200)) == 200
    assert len(made) == 402
    assert sum(event.bytes for event in gpu.recorded_memory_events()) == 0
