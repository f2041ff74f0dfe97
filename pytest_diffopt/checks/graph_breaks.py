"""graph_breaks: none, except where the contract allows them; each named with its place, its reason and what to try.

Not fooled by: fullgraph, which stops at the first break (a second run finds the others); a frame that Dynamo gave up
whole, which torch's own counters do not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, placed, region_name, shortened

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import GraphBreak

NAME = "graph_breaks"


def judge(given: Evidence) -> Verdict:
    """See the module."""
    compiles = given.observation.compiles
    breaks, allowed = _breaks(given)
    counting = [b for b in breaks if b not in allowed]
    crashes = [f for f in compiles.frames if f.outcome == "failed"]
    figures: dict[str, Any] = {
        "breaks": len(breaks),
        "allowed_breaks": len(allowed),
        "skipped_frames": sum(b.skipped_frame for b in breaks),
        "limit": given.limits.max_graph_breaks,
    }
    evidence = shortened(grouped(counting))
    if len(counting) > given.limits.max_graph_breaks:
        lost = sum(b.skipped_frame for b in counting)
        gave_up = f", {counted(lost, 'frame')} given up whole" if lost else ""
        return given.failed(
            NAME,
            f"{counted(len(counting), 'graph break')}{gave_up}, {given.limits.max_graph_breaks} allowed",
            evidence=evidence,
            **figures,
            places=placed((b.component, b.place, b.reason) for b in counting),
        )
    if crashes and given.observation.failure is None:  # else it is that which ended the run
        return given.failed(
            NAME,
            f"{counted(len(crashes), 'frame')} fell back to eager: {crashes[0].reason}",
            evidence=[f"{region_name(f.component, f.region, f.place)}  {f.place.file}:{f.place.line}" for f in crashes],
            **figures,
            places=placed((f.component, f.place, f.reason) for f in crashes),
        )
    if not compiles.graphs:
        return given.unverified(NAME, "no graph was compiled, so nothing can be said of its breaks", **figures)
    sentence = f"no graph break in {counted(compiles.graphs, 'graph')}"
    if breaks:
        in_hooks = f"{len(allowed)} in allowed files" if allowed else ""
        others = f"{len(counting)} within the {given.limits.max_graph_breaks} allowed" if counting else ""
        sentence = f"{counted(len(breaks), 'graph break')}: {', '.join(part for part in (in_hooks, others) if part)}"
        evidence = shortened(grouped(breaks))
    return given.passed(NAME, sentence, evidence=evidence, **figures)


def _breaks(given: Evidence) -> tuple[list[GraphBreak], list[GraphBreak]]:
    """(all of the preparation and the recipe's own calls, those of them that are excused)."""
    found = given.observation.compiles.graph_breaks
    breaks = [b for b in found if (b.component or b.region) and b.call in given.compiling_calls]
    whole = {entry.component for entry in given.recipe.compilation if entry.fullgraph}
    # where fullgraph is promised no file is excused: Dynamo raises at a hook's break too
    return breaks, [b for b in breaks if b.component not in whole and is_allowed(b, given.limits.allowed_break_files)]


def places(given: Evidence) -> list[tuple[str, str]]:
    """Where each break is that makes the check fail, and its reason: what two failures may have in common."""
    breaks, allowed = _breaks(given)
    counting = [b for b in breaks if b not in allowed]
    if len(counting) <= given.limits.max_graph_breaks:
        return []
    return [(f"{b.component} {b.place.file}:{b.place.line}", b.reason) for b in counting]


def is_allowed(found: GraphBreak, files: tuple[str, ...]) -> bool:
    """Whether a break stands in one of the allowed files, given as path suffixes or file names."""
    return any(found.place.file == file or found.place.file.endswith("/" + file) for file in files)


def grouped(breaks: list[GraphBreak]) -> list[str]:
    """Equal breaks together, as lines: where and how often, why, and what Dynamo advises."""
    counts: dict[tuple[str, str], list[GraphBreak]] = {}
    for found in breaks:
        counts.setdefault((f"{found.place.file}:{found.place.line}", found.reason), []).append(found)
    lines = []
    for (where, reason), group in counts.items():
        first = group[0]
        times = f"  {len(group)}×" if len(group) > 1 else ""
        gave_up = "  the whole frame runs eager" if first.skipped_frame else ""
        lines.append(f"{region_name(first.component, first.region, first.frame)}  {where}{times}  {reason}{gave_up}")
        if first.hint:
            lines.append(f"  {first.hint}")
    return lines
