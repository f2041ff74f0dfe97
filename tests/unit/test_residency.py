"""Whose bytes they are, told from events and marks that are written by hand."""

from __future__ import annotations

import random
from typing import cast

import pytest
import torch
from torch import nn

from pytest_diffopt.accelerators import Accelerator
from pytest_diffopt.accelerators.allocation_events import AllocationEvent as Event
from pytest_diffopt.observation.observation import Owner, Residency
from pytest_diffopt.observation.residency import POINTS, Mark, ResidencyLedger, attribute, weights_of

A, B = Owner("a", "weights"), Owner("b", "weights")
A_WORKS, OTHER, BEFORE = Owner("a", "working"), Owner("", "other"), Owner("", "before")
HOST = 900  # a block of the host


def mark(phase: str = "call 0", component: str = "", **weights: int) -> Mark:
    """``a=3``: the block 3 holds a weight of a."""
    return Mark(phase, component, {block: name for name, block in weights.items()})


def last(residency: Residency) -> dict[Owner, int]:
    return residency.at(residency.positions[-1])


def test_what_a_running_component_takes_is_its_working_memory_and_else_it_is_other() -> None:
    found = attribute([Event(1, 10, "aten::mm", 0), Event(2, 5, "", 1)], [mark(component="a"), mark()], 7)
    assert last(found) == {A_WORKS: 10, BEFORE: 7, OTHER: 5}


def test_a_weight_is_its_components_from_the_moment_it_was_taken() -> None:
    found = attribute([Event(1, 10, "", 0), Event(2, 5, "", 0)], [mark("loading"), mark("call 0", a=1)], 0)
    assert found.at(1) == {A: 10}
    assert last(found) == {A: 10, OTHER: 5}


def test_each_phase_says_how_much_of_a_component_was_there_at_once() -> None:
    marks = [mark("loading"), mark(component="a", a=1), mark(a=2), mark("call 1", component="a"), mark("call 2")]
    moves = [Event(1, 10, "", 0), Event(2, 5, "", 1), Event(1, -10, "", 2), Event(2, -5, "", 2), Event(3, 4, "", 3)]
    phases = attribute(moves, marks, 0).phases
    assert [phase.weights for phase in phases] == [{"a": 10}, {"a": 15}, {}, {}]  # what was there already counts
    assert [phase.working for phase in phases] == [{}, {}, {"a": 4}, {"a": 4}]


def test_each_phase_says_what_was_there_while_a_component_ran() -> None:
    marks = [
        mark("loading"),
        mark(component="a"),
        mark(a=1),
        mark(component="b"),
        mark(b=2),
        mark("call 1", component="b"),
        mark("call 1", a=HOST),
    ]
    of_a = [Event(1, 10, "", 1), Event(3, 4, "aten::addmm", 1), Event(3, -4, "", 1), Event(4, 1, "aten::copy_", 1)]
    of_b = [Event(5, 3, "aten::randn", 2), Event(2, 6, "", 3), Event(6, 2, "aten::convolution", 3)]
    later = [Event(1, -10, "", 5), Event(7, 1, "aten::add", 5)]
    _, first, second = attribute([*of_a, *of_b, *later], marks, 0).phases
    assert first.at_work == {"a": 4, "b": 6}  # of b, what a had left and the pipeline took between as well
    assert first.products == {"a": 1, "b": 1}
    assert first.beside == {"b": {"a": 10}}
    assert (second.at_work, second.products, second.beside) == ({"b": 7}, {}, {})


def test_a_weight_that_something_keeps_after_its_parameter_has_left_is_still_its_components() -> None:
    marks = [mark(component="a"), mark(a=1), mark("call 1", component="b"), mark("call 1", a=HOST)]
    assert last(attribute([Event(1, 10, "", 0), Event(2, 3, "", 2)], marks, 0)) == {A: 10, Owner("b", "working"): 3}


def test_a_weight_that_comes_and_goes_inside_a_forward_is_known_by_where_it_was_copied_from() -> None:
    marks = [mark("loading", a=HOST), mark(component="a")]
    onload = [Event(1, 10, "aten::copy_", 1), Event(1, 0, "aten::copy_", 1, source=HOST)]
    found = attribute([*onload, Event(1, -10, "", 1)], marks, 0)
    assert found.at(1) == {A: 10}
    working = attribute([onload[0], Event(1, 0, "aten::copy_", 1, source=HOST + 1)], marks, 0)
    assert last(working) == {A_WORKS: 10}


def test_a_weight_that_went_to_the_host_is_known_there_when_it_returns() -> None:
    there_and_back = [
        Event(1, 10, "", 0),
        Event(HOST, 0, "aten::copy_", 1, source=1),
        Event(1, -10, "", 1),
        Event(2, 10, "aten::copy_", 1),
        Event(2, 0, "aten::copy_", 1, source=HOST),
    ]
    assert last(attribute(there_and_back, [mark("loading"), mark(a=1)], 0)) == {A: 10}


def test_a_weight_that_is_first_found_on_the_host_was_one_on_the_device_too() -> None:
    quantized = [Event(1, 10, "", 0), Event(HOST, 0, "aten::copy_", 0, source=1), Event(1, -10, "", 0)]
    assert attribute(quantized, [mark("loading"), mark("", a=HOST)], 0).at(1) == {A: 10}


def test_a_copy_of_a_weight_within_the_device_is_one_to_work_with() -> None:
    cast = [Event(1, 10, "", 0), Event(2, 5, "", 1), Event(2, 0, "aten::copy_", 1, source=1)]
    assert last(attribute(cast, [mark("loading"), mark(component="a", a=1)], 0)) == {A: 10, A_WORKS: 5}


def test_pinned_memory_that_nobody_knows_sends_weights_while_a_component_runs() -> None:
    events = [Event(1, 10, "", 0), Event(1, 0, "aten::copy_", 0, HOST, pinned=True)]
    assert last(attribute(events, [mark(component="a")], 0)) == {A: 10}
    assert last(attribute(events, [mark()], 0)) == {OTHER: 10}


def test_an_address_that_is_used_again_is_another_block() -> None:
    again = [Event(1, 10, "", 0), Event(1, -10, "", 1), Event(1, 4, "", 1), Event(HOST, 0, "", 1, source=1)]
    found = attribute([*again, Event(2, 4, "", 1), Event(2, 0, "", 1, source=HOST)], [mark(a=1), mark()], 0)
    assert last(found) == {OTHER: 8}


def test_what_was_there_before_shrinks_when_it_is_given_back() -> None:
    assert attribute([Event(5, -30, "", 0)], [mark()], 100).bytes == ((100,), (70,))


class _TellsEvents:
    """A device that wrote these events down."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events

    def start_allocation_events(self) -> bool:
        return True

    def mark_allocation_events(self, mark: int) -> None:
        pass

    def allocation_events(self) -> list[Event]:
        return self.events

    def stop_allocation_events(self) -> None:
        pass


@pytest.mark.parametrize(("before", "rows"), [(0, ((0,), (5,))), (100, ((0, 100), (0, 70), (5, 70)))])
def test_memory_of_others_that_goes_is_told_only_where_it_counts(
    before: int, rows: tuple[tuple[int, ...], ...]
) -> None:
    device = _TellsEvents([Event(900, -30, "", 0), Event(1, 5, "aten::mm", 0), Event(900, 0, "", 0, source=1)])
    ledger = ResidencyLedger(cast("Accelerator", device))
    ledger.open(before)
    assert ledger.is_open
    ledger.close()
    assert not ledger.is_open
    assert ledger.record is not None
    assert ledger.record.bytes == rows


def test_each_phase_has_its_peak_and_what_ran_then() -> None:
    marks = [mark("loading"), mark(""), mark("call 0"), mark("call 0", "a"), mark(""), mark("call 1"), mark("call 2")]
    events = [
        Event(1, 10, "aten::copy_", 0),
        Event(9, 90, "aten::clone", 1),
        Event(9, -90, "", 1),
        Event(2, 5, "aten::mm", 3),
        Event(2, -5, "", 3),
        Event(3, 5, "aten::add", 3),
        Event(3, -5, "", 5),
    ]
    loading, first, second, third = attribute(events, marks, 1).phases
    assert (loading.phase, loading.peak_bytes, loading.component, loading.operation) == (
        "loading",
        11,
        "",
        "aten::copy_",
    )
    assert (first.phase, first.peak_bytes, first.component, first.operation) == ("call 0", 16, "a", "aten::mm")
    assert (first.first, first.last, first.peak_at) == (3, 6, 4)
    # what was there when the phase began was made by nothing in it
    assert (second.peak_bytes, second.component, second.operation, second.peak_at) == (16, "", "", 6)
    assert (third.first, third.last, third.peak_bytes) == (7, 7, 11)


def long_run(blocks: int) -> tuple[list[Event], list[Mark], list[int]]:
    """Events in ten phases, their marks, and what is live after each."""
    drawn = random.Random(0)
    marks = [mark(f"call {at // 2}", "ab"[at % 2]) for at in range(20)]
    events, live, heights = [], list[tuple[int, int]](), [50]
    for at in range(blocks):
        if live and drawn.random() < 0.5:
            block, size = live.pop(drawn.randrange(len(live)))
            events.append(Event(block, -size, "", at * 20 // blocks))
        else:
            live.append((at + 1, drawn.randrange(1, 1000)))
            events.append(Event(*live[-1], "aten::mm", at * 20 // blocks))
        heights.append(heights[-1] + events[-1].bytes)
    return events, marks, heights


@pytest.mark.parametrize("blocks", [0, 1, 100, POINTS - 1, POINTS, 5_000])
def test_a_timeline_is_short_and_keeps_each_peak_and_each_boundary_and_its_sums_are_exact(blocks: int) -> None:
    events, marks, heights = long_run(blocks)
    found = attribute(events, marks, 50)
    assert min(POINTS, blocks) * 0.9 <= len(found.positions) <= POINTS
    assert [sum(row) for row in found.bytes] == [heights[position] for position in found.positions]
    for phase in found.phases:
        assert {phase.first, phase.last, phase.peak_at} <= set(found.positions)
        assert phase.peak_bytes == max(heights[phase.first : phase.last + 1]) == heights[phase.peak_at]
        assert sum(found.at(phase.peak_at).values()) == phase.peak_bytes
    assert max(map(sum, found.bytes)) == max(heights)
    assert found.positions == tuple(sorted(set(found.positions)))


class _Held:
    def __init__(self, **held: object) -> None:
        vars(self).update(held)


def test_weights_are_found_wherever_the_libraries_keep_them() -> None:
    absmax, away = torch.zeros(3), torch.zeros(6)
    layer: nn.Module = nn.Linear(2, 5)
    layer.weight.quant_state = _Held(absmax=absmax)  # type: ignore[union-attr]
    layer.register_buffer("table", torch.zeros(7))
    layer.register_parameter("gone", nn.Parameter(torch.zeros(8, device="meta")))
    layer._hf_hook = _Held(hooks=[_Held(weights_map=_Held(dataset={"gone": away}))])  # type: ignore[assignment]
    found = [tensor.numel() for _, tensor in weights_of(nn.Sequential(layer, nn.LazyLinear(3)))]
    assert sorted(found) == [3, 5, 6, 7, 10]


def test_what_a_run_held_goes_to_json_and_back() -> None:
    from pytest_diffopt import Observation
    from pytest_diffopt.observation.observation import MemoryRecord

    events, marks, _ = long_run(30)
    record = MemoryRecord(50, 60, 60, residency=attribute(events, marks, 50))
    seen = Observation({"name": "r"}, "hash", "sim", "sim", {}, memory=record)
    assert Observation.from_json(seen.to_json()) == seen
