"""Peaks out of what happened to memory: pure functions of the ledger's events and marks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from pytest_diffopt.forecasting.record import Estimate, LiveTensors, Phase, PhaseForecast
from pytest_diffopt.observation.residency import owners_of

if TYPE_CHECKING:
    from pytest_diffopt.accelerators.allocation_events import AllocationEvent
    from pytest_diffopt.observation.residency import Mark

LOAD, PLACE, CALL = "loading", "placing", "call "
"""Names of phases in a ledger's marks; a call's ends with its number, from 0."""


@dataclass(frozen=True)
class Peaks:
    """What the events say.

    Attributes:
        phases: a peak for each component in each phase, in the order in which they first were.
        at: index of the event that made the highest peak as expected; -1 where nothing was allocated.
        floors: phase → its highest peak with no workspace of kernels.
    """

    phases: tuple[PhaseForecast, ...]
    at: int
    floors: Mapping[Phase, int]

    @property
    def floor_bytes(self) -> int:
        """The highest peak with no workspace of kernels: less cannot be enough."""
        return max(self.floors.values(), default=0)

    @property
    def total(self) -> Estimate:
        """The peak over everything."""
        peaks = [one.peak for one in self.phases] or [Estimate(0, 0, 0)]
        return Estimate(
            max(peak.low for peak in peaks), max(peak.expected for peak in peaks), max(peak.high for peak in peaks)
        )

    @property
    def highest(self) -> PhaseForecast | None:
        """The phase and component of the peak as expected."""
        return max(self.phases, key=lambda one: one.peak.expected, default=None)


def peaks_of(events: Sequence[AllocationEvent], marks: Sequence[Mark]) -> Peaks:
    """The peaks of each phase, component by component; everything that is live counts, whoever holds it."""
    live = highest = 0  # without workspaces, which come and go within an event
    at = -1
    workspaces: set[int] = set()
    born: set[int] = set()
    found: dict[tuple[Phase, str, int], list[int]] = {}
    operations: dict[tuple[Phase, str, int], str] = {}
    floors: dict[Phase, int] = {}
    for index, event in enumerate(events):
        if event.bytes < 0 and event.block in workspaces:
            workspaces.discard(event.block)
            continue
        if event.low or event.high:
            now = [live + event.low, live + event.bytes, live + event.high]
            workspaces.add(event.block)
        elif event.bytes < 0:
            now = [live] * 3  # what is given back was there when it was
            if event.block in born:  # and what was there before everything belongs to others
                born.discard(event.block)
                live += event.bytes
        else:
            born.add(event.block)
            live += event.bytes
            now = [live] * 3
        key = _phase_of(marks[event.mark])
        if key is None:
            continue
        floors[key[0]] = max(floors.get(key[0], 0), live)
        if now[1] > highest:
            highest, at = now[1], index
        peak = found.setdefault(key, [0, -1, 0])
        if now[1] > peak[1]:
            operations[key] = event.operation if event.bytes > 0 else ""
        peak[:] = map(max, peak, now)
    phases = tuple(
        PhaseForecast(phase, component, Estimate(*peak), call, operations.get((phase, component, call), ""))
        for (phase, component, call), peak in found.items()
    )
    return Peaks(phases, at, floors)


def load_of_any_order(events: Sequence[AllocationEvent], marks: Sequence[Mark]) -> Estimate:
    """The peak of loading: in the order in which the components were loaded as expected, in the best and in the worst.

    A component that takes more while it loads than it keeps does so on top of those that are loaded already. What the
    libraries load in the order of a set differs between processes.
    """
    live = highest = 0
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    tops: dict[str, int] = {}
    for event in events:
        mark = marks[event.mark]
        if mark.phase != LOAD:
            continue
        begins.setdefault(mark.component, live)
        tops[mark.component] = max(tops.get(mark.component, 0), live, live + event.bytes)
        live += event.bytes
        ends[mark.component] = live
        highest = max(highest, live)
    kept = {name: ends[name] - begins[name] for name in ends}
    passing = {name: max(tops[name] - begins[name] - kept[name], 0) for name in ends}
    # what passes is least on top of others where the components that have most of it come first
    best = before = 0
    for name in sorted(kept, key=lambda one: -passing[one]):
        best = max(best, before + kept[name] + passing[name])
        before += kept[name]
    worst = sum(kept.values()) + max(passing.values(), default=0)
    return Estimate(min(best, highest), highest, max(worst, highest))


def with_load(peaks: Peaks, load: Estimate) -> Peaks:
    """The same, where the peak of loading, which is that of one of its components, has this range."""
    loads = [one for one in peaks.phases if one.phase == "load"]
    highest = max(loads, key=lambda one: one.peak.expected, default=None)
    phases = tuple(
        # the best order may spare every component, and the worst is the highest one's
        replace(
            one,
            peak=replace(
                one.peak,
                low=min(one.peak.low, load.low),
                high=max(one.peak.high, load.high) if one is highest else one.peak.high,
            ),
        )
        if one.phase == "load"
        else one
        for one in peaks.phases
    )
    return replace(peaks, phases=phases, floors={**peaks.floors, **({"load": load.low} if loads else {})})


def with_unknown_sizes(peaks: Peaks) -> Peaks:
    """The same, where of some sizes in calls the most was taken: nobody knows the least, only what is resident."""
    phases = tuple(replace(one, peak=replace(one.peak, low=0)) if one.phase == "call" else one for one in peaks.phases)
    return replace(peaks, phases=phases, floors={**peaks.floors, "call": 0})


def live_at(
    events: Sequence[AllocationEvent], marks: Sequence[Mark], at: int, paths: Mapping[int, str]
) -> tuple[LiveTensors, ...]:
    """What is alive right after event ``at``, by module, the largest first.

    Args:
        paths: block → the parameter that lies in it, by its path in its component.
    """
    owners = owners_of(events, marks)
    born: dict[int, int] = {}
    for index, event in enumerate(events[: at + 1]):
        if event.bytes > 0:
            born[event.block] = index
        elif event.bytes < 0:
            born.pop(event.block, None)
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for block, index in born.items():
        event, owner, mark = events[index], owners[index], marks[events[index].mark]
        kind = "workspace" if event.low or event.high else "weights" if owner.kind == "weights" else "working"
        if kind == "weights":
            path = paths[block].rpartition(".")[0] if block in paths else mark.module
            key = (owner.component, stars(path), kind, "")
        else:
            key = (owner.component, stars(mark.module), kind, event.operation)
        group = groups.setdefault(key, [0, 0])
        group[0] += event.bytes
        group[1] += 1
    alive = [
        LiveTensors(component, module, cast("Literal['weights', 'working', 'workspace']", kind), operation, held, count)
        for (component, module, kind, operation), (held, count) in groups.items()
    ]
    return tuple(sorted(alive, key=lambda one: (-one.bytes, one.component, one.module, one.operation)))


def read_by_the_host(
    events: Sequence[AllocationEvent], marks: Sequence[Mark], read: Iterable[int]
) -> tuple[tuple[str, str, int], ...]:
    """(component, operation that made it, bytes of its block) of what the host was given and is no weight, each once.

    Args:
        read: blocks that nobody computed and the host got a copy of, those of weights among them.
    """
    owners = owners_of(events, marks)
    births = {event.block: index for index, event in enumerate(events) if event.bytes > 0}
    found: dict[tuple[str, str, int], None] = {}
    for block in read:
        index = births.get(block)
        if index is not None and owners[index].kind != "weights" and marks[events[index].mark].phase.startswith(CALL):
            found[(marks[events[index].mark].component, events[index].operation, events[index].bytes)] = None
    return tuple(found)


def stars(path: str) -> str:
    """``"blocks.3.attn.0.proj"`` → ``"blocks.*.attn.*.proj"``: repeated blocks are one."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


def _phase_of(mark: Mark) -> tuple[Phase, str, int] | None:
    if mark.phase == LOAD:
        return "load", mark.component, 0
    if mark.phase == PLACE:
        return "place", mark.component, 0
    if mark.phase.startswith(CALL):
        return "call", mark.component, int(mark.phase.removeprefix(CALL))
    return None
