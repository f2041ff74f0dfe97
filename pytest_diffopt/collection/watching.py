"""What `compile_fullgraph` and `max_recompiles` say of what a test compiled, as a sentence and its evidence.

The judging is a pure function of the record; it needs neither a running pytest nor torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from pytest_diffopt.byte_sizes import human
from pytest_diffopt.markers import CompileFullgraph, MaxRecompiles, closest

if TYPE_CHECKING:
    from pytest_diffopt.observation.compilation import CompileWatch
    from pytest_diffopt.observation.memory import MemorySpan
    from pytest_diffopt.observation.observation import CompileRecord, FrameAttempt, GraphBreak, RegionRuns

_NOTHING = (
    "nothing was compiled in this test",
    "call what torch.compile returned in the test's own body: what was compiled before it is forgotten",
)
_MOST_LINES = 12


@dataclass(frozen=True)
class WatchMarkers:
    """The markers of one test that need a compile watch, parsed."""

    fullgraph: CompileFullgraph | None = None
    recompiles: MaxRecompiles | None = None

    @classmethod
    def of_test(cls, item: pytest.Item) -> WatchMarkers | None:
        """Those of a test, or None where it has none. Raises :class:`~pytest_diffopt.errors.MarkerError`."""
        found = cls(closest(item, CompileFullgraph), closest(item, MaxRecompiles))
        return None if found == cls() else found


def verdict_on_test(name: str, markers: WatchMarkers, record: CompileRecord) -> str | None:
    """The failure of a test, a block for each marker that does not hold; None where all hold."""
    blocks = []
    if markers.fullgraph is not None and (lines := fullgraph_failure(record)):
        blocks.append((CompileFullgraph.name, lines))
    if markers.recompiles is not None and (lines := recompiles_failure(record, markers.recompiles.limit)):
        blocks.append((MaxRecompiles.name, lines))
    text = [line for marker, (first, *rest) in blocks for line in (f"{name} · {marker}: {first}", *_indented(rest))]
    return "\n".join(text) or None


def fullgraph_failure(record: CompileRecord) -> list[str] | None:
    """The sentence and the evidence where not all is one graph a frame; None where it is."""
    if not record.frames and not record.regions:
        return list(_NOTHING)
    breaks = record.graph_breaks
    # A skipped frame that broke is told by its break, with the place; the others stand for themselves.
    skipped = [frame for frame in record.frames if frame.outcome == "skipped"]
    failed = [frame for frame in record.frames if frame.outcome == "failed"]
    entries, engaged = sum(run.entries for run in record.regions), sum(run.engaged for run in record.regions)
    counts = [
        _count(len(breaks), "graph break"),
        _count(len(skipped), "skipped frame"),
        _count(len(record.limits), "frame", "over the recompile limit"),
        _count(len(failed), "frame", "that did not compile"),
    ]
    if engaged < entries:
        counts.append(f"compiled code ran in {engaged} of {entries} calls")
    elif not engaged:
        counts.append("no compiled code ran")
    found = [text for text in counts if text]
    if not found:
        return None
    return [
        f"{', '.join(found)}; it allows one graph a frame, run at every call",
        *_grouped(map(_break_line, breaks)),
        *_grouped(_frame_line(frame) for frame in [*skipped, *failed, *record.limits] if not _told(frame, breaks)),
        *_region_lines(record.regions),
        *_hints(record),
    ]


def recompiles_failure(record: CompileRecord, limit: int) -> list[str] | None:
    """The sentence and the evidence where there were more recompiles than allowed; None where there were not.

    An exhausted limit fails too, since from there on the code runs eager and nothing counts any more; and so does a
    record in which nothing was compiled, since it proves nothing.
    """
    if not record.graphs:
        first, hint = _NOTHING
        attempts = _grouped(_frame_line(frame) for frame in record.frames if frame.outcome != "empty")
        return [first, *attempts, hint]
    recompiles, limits = record.recompiles, record.limits
    aside = [r for r in record.regions if r.engaged < r.entries and any("stance" in reason for reason in r.reasons)]
    if aside:
        missed = sum(region.entries - region.engaged for region in aside)
        return [f"a compiler stance hid recompiles: {_count(missed, 'call')} ran eager", *(str(r.place) for r in aside)]
    if len(recompiles) <= limit and not limits:
        return None
    sentence = f"{_count(len(recompiles), 'recompile') or 'no recompiles'}, {limit} allowed"
    if limits:
        names = " and ".join(dict.fromkeys(frame.limit or "recompile_limit" for frame in limits))
        sentence += f"; the {names} was exhausted, so that code ran eager from there on"
    return [
        sentence,
        *_grouped(_frame_line(frame) for frame in recompiles if frame.outcome != "limit"),
        *_grouped(map(_frame_line, limits)),
        "each guard names what changed between two calls: keep it constant, pass it as a tensor, or mark it dynamic",
    ]


def memory_failure(span: MemorySpan, limit_bytes: int) -> str | None:
    """The sentence where the accelerator held more than the limit, or nothing at all; None where it holds."""
    peak, kind = span.peak_bytes, span.accelerator.kind
    if peak == 0:
        return f"nothing was on {kind} in this test: put the pipeline there, or take the marker off"
    if peak <= limit_bytes:
        return None
    before = f", of which {human(span.before_bytes)} were there before the test" if span.before_bytes else ""
    return (
        f"the peak on {kind} was {human(peak)}{before}; {human(limit_bytes)} allowed ({peak - limit_bytes} bytes more)"
    )


@contextlib.contextmanager
def watched() -> Iterator[CompileWatch]:
    """An open compile watch, with every global of torch and its compiler given back, and nothing compiled before."""
    from pytest_diffopt.observation.compilation import CompileWatch
    from pytest_diffopt.preparation.borrowed_state import borrowed_state

    with borrowed_state(reset_compiler=True), CompileWatch() as watch:
        yield watch


def _count(number: int, noun: str, rest: str = "") -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}{rest and ' '}{rest}" if number else ""


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _grouped(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Lines in the order in which they first stand, each once, with how often it stood there."""
    counts: dict[tuple[str, str], int] = {}
    for line in lines:
        counts[line] = counts.get(line, 0) + 1
    shown = [f"{where}  {count}×  {what}" for (where, what), count in list(counts.items())[:_MOST_LINES]]
    return shown + ([f"and {len(counts) - _MOST_LINES} more places"] if len(counts) > _MOST_LINES else [])


def _label(component: str, region: str, function: str) -> str:
    return "/".join(part for part in (component, region) if part) or function


def _break_line(one: GraphBreak) -> tuple[str, str]:
    label = _label(one.component, one.region, one.frame.function)
    skipped = " (the whole frame was skipped)" if one.skipped_frame else ""
    return f"{label}  {one.place.file}:{one.place.line}", f"{one.reason}{skipped}"


def _frame_line(frame: FrameAttempt) -> tuple[str, str]:
    label = _label(frame.component, frame.region, frame.place.function)
    if frame.guards:
        what = f"guard {' and '.join(frame.guards)}"
    else:
        what = frame.reason or {"compiled": "recompiled", "empty": "recompiled to no operation"}.get(
            frame.outcome, frame.outcome
        )
    return f"{label}  {frame.place.file}:{frame.place.line}", what


def _told(frame: FrameAttempt, breaks: Iterable[GraphBreak]) -> bool:
    """Whether a break that is listed already is what the frame was skipped for."""
    return frame.outcome == "skipped" and any(one.skipped_frame and one.frame == frame.place for one in breaks)


def _region_lines(regions: Iterable[RegionRuns]) -> list[str]:
    totals: dict[tuple[str, str], list[int]] = {}
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for run in regions:
        key = _label(run.component, run.region, run.place.function), f"{run.place.file}:{run.place.line}"
        total = totals.setdefault(key, [0, 0])
        total[0] += run.entries
        total[1] += run.engaged
        reasons.setdefault(key, {}).update(dict.fromkeys(run.reasons))
    lines = []
    for key, (entries, engaged) in totals.items():
        if engaged < entries:
            why = f": {'; '.join(reasons[key])}" if reasons[key] else ""
            lines.append(f"{'  '.join(key)}  called {entries}×, compiled code ran {engaged}×{why}")
    return lines[:_MOST_LINES]


def _hints(record: CompileRecord) -> list[str]:
    hints = list(dict.fromkeys(one.hint for one in record.graph_breaks if one.hint))
    if hints:
        return hints[:3]
    return ["torch.compile(fullgraph=True) raises at the first of these, with Dynamo's own advice"]
