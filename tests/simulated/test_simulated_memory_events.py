"""The device writes down what happens to its memory: which block, how many bytes, which operation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def recording(sim: Any) -> Iterator[None]:
    sim.record_memory_events()
    yield
    sim.record_memory_events(False)


def taken(sim: Any) -> list[tuple[str, int]]:
    return [(event.operation, event.bytes) for event in sim.recorded_memory_events() if event.bytes > 0]


def test_a_block_is_seen_to_come_and_go(sim: Any) -> None:
    x = torch.empty(100, device="sim")
    (block,) = sim.memory_blocks([x])
    del x
    came, went = sim.recorded_memory_events()
    assert (came.block, came.bytes, came.operation) == (block, 400, "aten::empty")
    assert (went.block, went.bytes, went.operation) == (block, -400, "")


def test_memory_is_the_doing_of_the_operation_that_asked_for_it_however_it_did(sim: Any) -> None:
    x = torch.zeros(4, 4, device="sim")
    y = x @ x
    y.resize_(100)
    nn.functional.layer_norm(x, (4,))
    nn.functional.conv1d(x[None], torch.zeros(2, 4, 1, device="sim"))
    made = taken(sim)
    assert made[:3] == [("aten::zero_", 64), ("aten::mm", 64), ("aten::resize_", 400)]
    assert ("aten::native_layer_norm", 64) in made
    assert ("aten::convolution", 32) in made


def test_an_operation_is_not_blamed_for_memory_that_it_is_not_given(sim: Any) -> None:
    x = torch.zeros(4, device="sim")
    left = torch.empty(50, device="sim")
    y = x + 1
    left.zero_()
    assert taken(sim) == [("aten::zero_", 16), ("aten::empty", 200), ("aten::add", 16)]
    del y


def test_the_sum_of_the_events_is_what_the_counters_say_at_every_moment(sim: Any) -> None:
    base = sim.memory_allocated()
    sim.reset_peak_memory_stats()
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).to("sim")
    model(torch.randn(5, 32, device="sim")).sum().backward()
    sims = [event.bytes for event in sim.recorded_memory_events()]
    heights = [base + sum(sims[: at + 1]) for at in range(len(sims))]
    assert heights[-1] == sim.memory_allocated()
    assert max(heights) == sim.max_memory_allocated()


def test_rounded_bytes_are_the_ones_written_down_with_the_caching_allocator(sim: Any) -> None:
    sim.set_caching_allocator(True)
    x = torch.empty(1, device="sim")
    del x
    assert [event.bytes for event in sim.recorded_memory_events()] == [512, -512]


def test_what_is_copied_across_names_both_blocks(sim: Any) -> None:
    host = torch.ones(100)
    x = host.to("sim")
    back = x.cpu()
    pinned = host.pin_memory()
    y = pinned.to("sim")
    copies = [(event.source, event.block, event.pinned) for event in sim.recorded_memory_events() if not event.bytes]
    on_host, on_sim, again, pin, other = sim.memory_blocks([host, x, back, pinned, y])
    assert copies == [(on_host, on_sim, False), (on_sim, again, False), (pin, other, True)]


def test_a_number_is_never_used_again_and_foreign_memory_has_its_address(sim: Any) -> None:
    import numpy as np

    numbers = set()
    for _ in range(50):
        numbers |= set(sim.memory_blocks([torch.empty(10), torch.empty(10, device="sim")]))
    assert len(numbers) == 100
    foreign = np.zeros(5, dtype="float32")
    assert sim.memory_blocks([torch.from_numpy(foreign)]) == [-foreign.ctypes.data]
    x = torch.empty(10, device="sim")
    assert len(set(sim.memory_blocks([x, x.view(2, 5), x.detach()]))) == 1
    assert sim.memory_blocks([torch.empty(3, device="meta"), torch.empty(0, device="sim")]) == [0, 0]


def test_events_name_the_last_mark_and_their_device(sim: Any) -> None:
    first = torch.empty(1, device="sim")
    sim.mark_memory_events(7)
    other = torch.empty(2, device="sim:1")
    del first
    assert [(event.bytes, event.mark) for event in sim.recorded_memory_events()] == [(4, 0), (-4, 7)]
    assert [(event.bytes, event.mark) for event in sim.recorded_memory_events("sim:1")] == [(8, 7)]
    del other


def test_nothing_is_written_down_before_and_after_and_a_new_recording_forgets(sim: Any) -> None:
    x = torch.empty(10, device="sim")
    sim.record_memory_events(False)
    del x
    assert [event.bytes for event in sim.recorded_memory_events()] == [40]
    waiting = torch.empty(3, device="sim")
    sim.record_memory_events()
    waiting.zero_()
    y = waiting + 1
    assert taken(sim) == [("aten::add", 12)]
    del y


def test_a_failed_request_leaves_no_event(sim: Any) -> None:
    sim.set_memory_limit(sim.memory_allocated())
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(10, device="sim")
    assert sim.recorded_memory_events() == []


def test_each_thread_has_its_own_operation_and_the_sum_stays_right(sim: Any) -> None:
    def add() -> None:
        x = torch.zeros(100, device="sim")
        for _ in range(200):
            x = x + 1

    def multiply() -> None:
        y = torch.zeros(50, device="sim")
        for _ in range(200):
            y = y * 2

    threads = [threading.Thread(target=work) for work in (add, multiply)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = taken(sim)
    assert made.count(("aten::add", 400)) == made.count(("aten::mul", 200)) == 200
    assert len(made) == 402
    assert sum(event.bytes for event in sim.recorded_memory_events()) == 0
