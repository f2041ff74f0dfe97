"""Peaks, told from events and marks that are written by hand."""

from __future__ import annotations

import random

import pytest

from pytest_diffopt.accelerators.allocation_events import AllocationEvent as Event
from pytest_diffopt.forecasting.peaks import (
    Peaks,
    live_at,
    load_of_any_order,
    peaks_of,
    read_by_the_host,
    stars,
    with_load,
    with_unknown_sizes,
)
from pytest_diffopt.forecasting.record import Estimate, LiveTensors, PhaseForecast
from pytest_diffopt.observation.residency import Mark


def mark(phase: str = "call 0", component: str = "", module: str = "", **weights: int) -> Mark:
    """``a=3``: the block 3 holds a weight of a."""
    return Mark(phase, component, {block: name for name, block in weights.items()}, module)


def exactly(size: int) -> Estimate:
    return Estimate(size, size, size)


def workspace(block: int, low: int, expected: int, high: int, at: int = 0) -> list[Event]:
    """A kernel's own memory: it comes, and goes at once."""
    taken = Event(block, expected, "aten::convolution", at, low=low, high=high)
    return [taken, Event(block, -expected, "aten::convolution", at)] if expected else [taken]


def test_nothing_that_happened_has_no_peak() -> None:
    peaks = peaks_of([], [])
    assert (peaks, peaks.total, peaks.highest) == (Peaks((), -1, {}), exactly(0), None)
    assert live_at([], [], -1, {}) == ()


def test_each_component_has_a_peak_in_each_phase_that_counts_what_was_there_before() -> None:
    marks = [mark("loading", "a"), mark("placing"), mark("call 0", "a"), mark("call 1", "b")]
    events = [
        Event(1, 10, "aten::copy_", 0),
        Event(2, 5, "aten::copy_", 1),
        Event(3, 7, "aten::mm", 2),
        Event(3, -7, "", 2),
        Event(4, 20, "aten::add", 3),
    ]
    assert peaks_of(events, marks).phases == (
        PhaseForecast("load", "a", exactly(10), 0, "aten::copy_"),
        PhaseForecast("place", "", exactly(15), 0, "aten::copy_"),
        PhaseForecast("call", "a", exactly(22), 0, "aten::mm"),
        PhaseForecast("call", "b", exactly(35), 1, "aten::add"),
    )


def test_what_happens_between_phases_counts_in_none_and_makes_no_peak() -> None:
    marks = [mark("call 0"), mark(""), mark("call 1")]
    events = [Event(1, 10, "", 0), Event(2, 90, "", 1), Event(2, -90, "", 1), Event(3, 1, "", 2)]
    peaks = peaks_of(events, marks)
    assert [one.peak for one in peaks.phases] == [exactly(10), exactly(11)]
    assert (peaks.at, peaks.floor_bytes) == (3, 11)


def test_a_workspace_has_a_range_and_is_not_there_before_or_after_it() -> None:
    events = [Event(1, 100, "", 0), *workspace(2, 10, 30, 60), Event(3, 20, "aten::add", 0)]
    peaks = peaks_of(events, [mark(component="vae")])
    assert peaks.total == Estimate(120, 130, 160)  # where the workspace is small, the tensor after it is the peak
    assert (peaks.at, peaks.floor_bytes) == (1, 120)
    assert peaks.highest == PhaseForecast("call", "vae", Estimate(120, 130, 160), 0, "aten::convolution")


def test_a_workspace_that_is_expected_to_take_nothing_widens_the_most_alone() -> None:
    events = [Event(1, 100, "aten::mm", 0), *workspace(2, 0, 0, 60), Event(1, -100, "", 0), Event(3, 90, "", 0)]
    peaks = peaks_of(events, [mark()])
    assert (peaks.total, peaks.at, peaks.floor_bytes) == (Estimate(100, 100, 160), 0, 100)


def test_what_is_given_back_was_there_when_the_phase_began() -> None:
    marks = [mark("loading"), mark("call 0", "a")]
    peaks = peaks_of([Event(1, 10, "aten::mm", 0), Event(1, -10, "", 1), Event(2, 4, "aten::add", 1)], marks)
    assert peaks.phases[1] == PhaseForecast("call", "a", exactly(10), 0, "")  # no operation of its own made it


def test_a_copy_into_a_block_takes_nothing() -> None:
    peaks = peaks_of([Event(1, 10, "aten::copy_", 0), Event(1, 0, "aten::copy_", 0, source=9)], [mark()])
    assert (peaks.total, peaks.at) == (exactly(10), 0)


def test_memory_of_others_that_goes_meanwhile_makes_nothing_smaller() -> None:
    theirs = [Event(900, -50, "", 0), Event(901, -7, "", 0)]
    assert peaks_of(theirs, [mark()]).total == exactly(0)
    events = [Event(1, 10, "", 0), *theirs, Event(2, 5, "", 0)]
    peaks = peaks_of(events, [mark()])
    assert (peaks.total, peaks.at, peaks.floor_bytes) == (exactly(15), 3, 15)
    assert sum(one.bytes for one in live_at(events, [mark()], peaks.at, {})) == 15


def test_the_first_of_two_equal_peaks_counts() -> None:
    again = [Event(1, 10, "aten::mm", 0), Event(1, -10, "", 0), Event(2, 10, "aten::add", 1)]
    peaks = peaks_of(again, [mark(component="a"), mark(component="b")])
    assert peaks.at == 0
    assert peaks.highest is not None
    assert (peaks.highest.component, peaks.highest.operation) == ("a", "aten::mm")


def test_the_total_has_each_bound_from_wherever_it_is_highest() -> None:
    marks = [mark("loading", "a"), mark("call 0", "vae")]
    events = [Event(1, 100, "", 0), Event(1, -100, "", 0), Event(2, 50, "", 1), *workspace(3, 1, 40, 90, at=1)]
    assert peaks_of(events, marks).total == Estimate(100, 100, 140)


def test_what_is_alive_is_grouped_by_module_and_by_what_made_it() -> None:
    marks = [
        mark("loading", "net", "", net=1),
        Mark("call 0", "net", {1: "net", 2: "net"}, "blocks.0.proj"),
        mark("call 0", "net", "blocks.1.proj"),
        mark("call 0", "", ""),
    ]
    events = [
        Event(1, 10, "aten::copy_", 0),
        Event(2, 20, "aten::copy_", 0),
        Event(3, 4, "aten::mm", 1),
        Event(4, 4, "aten::mm", 2),
        Event(5, 1, "aten::add", 2),
        Event(6, 9, "aten::cat", 2),
        Event(6, -9, "", 2),
        Event(7, 3, "aten::randn", 3),
        Event(8, 30, "aten::convolution", 2, low=1, high=99),
    ]
    alive = live_at(events, marks, 8, {1: "blocks.0.proj.weight", 2: "blocks.1.proj.weight"})
    assert alive == (
        LiveTensors("net", "blocks.*.proj", "weights", "", 30, 2),
        LiveTensors("net", "blocks.*.proj", "workspace", "aten::convolution", 30, 1),
        LiveTensors("net", "blocks.*.proj", "working", "aten::mm", 8, 2),
        LiveTensors("", "", "working", "aten::randn", 3, 1),
        LiveTensors("net", "blocks.*.proj", "working", "aten::add", 1, 1),
    )
    assert [one.count for one in live_at(events, marks, 0, {})] == [1]


def test_what_is_alive_at_the_peak_adds_up_to_it_whatever_happened() -> None:
    drawn = random.Random(0)
    for _ in range(20):
        marks = [mark(f"call {at // 3}", "ab"[at % 2], f"blocks.{at}.proj") for at in range(9)]
        events, live = list[Event](), list[tuple[int, int]]()
        for at in range(200):
            when = at * 9 // 200
            if live and drawn.random() < 0.45:
                block, size = live.pop(drawn.randrange(len(live)))
                events.append(Event(block, -size, "", when))
            elif drawn.random() < 0.1:
                events += workspace(1000 + at, 1, drawn.randrange(100), 200, when)
            else:
                live.append((at + 1, drawn.randrange(1, 100)))
                events.append(Event(*live[-1], drawn.choice(["aten::mm", "aten::add"]), when))
        peaks = peaks_of(events, marks)
        assert sum(one.bytes for one in live_at(events, marks, peaks.at, {})) == peaks.total.expected
        assert peaks.total.low <= peaks.total.expected <= peaks.total.high
        assert peaks.floor_bytes <= peaks.total.low


@pytest.mark.parametrize(
    ("path", "starred"),
    [
        ("blocks.3.attn.0.proj", "blocks.*.attn.*.proj"),
        ("0", "*"),
        ("12.linear1", "*.linear1"),
        ("layer2.conv_1", "layer2.conv_1"),
        ("a.1.2.3", "a.*.*.*"),
        ("", ""),
    ],
)
def test_numbers_of_repeated_blocks_are_stars_and_numbers_in_names_stay(path: str, starred: str) -> None:
    assert stars(path) == starred


def test_only_what_a_call_computed_and_is_no_weight_is_read_by_the_host() -> None:
    marks = [mark("loading", "a", a=1), mark("call 0", "a"), mark("call 0")]
    events = [
        Event(1, 10, "aten::copy_", 0),
        Event(2, 4, "aten::empty", 0),
        Event(3, 8, "aten::mean", 1),
        Event(4, 8, "aten::mean", 1),
        Event(5, 6, "aten::randn", 2),
    ]
    assert read_by_the_host(events, marks, [1, 2, 3, 4, 5, 99]) == (("a", "aten::mean", 8), ("", "aten::randn", 6))
    assert read_by_the_host(events, marks, []) == ()


def loading(*components: tuple[str, int, int]) -> tuple[list[Event], list[Mark]]:
    """(name, bytes that it keeps, bytes that it takes for a moment more), in the order in which they load."""
    events, marks = [], []
    for at, (name, kept, passing) in enumerate(components):
        marks.append(mark("loading", name))
        events += [
            Event(2 * at + 1, kept, "aten::copy_", at),
            Event(2 * at + 2, passing, "aten::empty", at),
            Event(2 * at + 2, -passing, "", at),
        ]
    return events, marks


def test_the_peak_of_loading_has_the_range_of_all_orders() -> None:
    first = load_of_any_order(*loading(("a", 10, 5), ("b", 4, 1)))
    second = load_of_any_order(*loading(("b", 4, 1), ("a", 10, 5)))
    assert first == Estimate(15, 15, 19)
    assert second == Estimate(15, 19, 19)
    assert load_of_any_order(*loading(("a", 10, 5))) == exactly(15)
    assert load_of_any_order([], []) == exactly(0)


def test_the_order_of_loading_may_be_what_makes_a_recipe_fit() -> None:
    events, marks = loading(("b", 4, 1), ("a", 10, 5))
    peaks = with_load(peaks_of(events, marks), load_of_any_order(events, marks))
    assert peaks.total == Estimate(15, 19, 19)
    assert peaks.floor_bytes == 15


def test_where_the_most_was_taken_nobody_knows_the_least_but_what_is_resident() -> None:
    marks = [mark("loading", "a"), mark("call 0", "a")]
    peaks = peaks_of([Event(1, 10, "", 0), Event(2, 90, "aten::nonzero", 1), Event(2, -90, "", 1)], marks)
    unsure = with_unknown_sizes(peaks)
    assert (unsure.total, unsure.floor_bytes) == (Estimate(10, 100, 100), 10)
