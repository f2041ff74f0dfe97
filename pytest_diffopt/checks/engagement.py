"""engagement: compiled code really ran, for the code that the recipe meant, in every call.

Not fooled by: nothing compiled at all; a frame skipped whole; a recipe whose limit is exhausted so that the rest runs
eager in silence; a hook or a held reference that still calls the uncompiled forward; a regional compile that matched only
some classes of blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, region_name, shortened
from pytest_diffopt.observation.observation import DISABLED
from pytest_diffopt.preparation.compilation import outermost

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import RegionRuns
    from pytest_diffopt.recipe import Compilation

NAME = "engagement"


def judge(given: Evidence) -> Verdict:
    """See the module."""
    problems: list[str] = []
    evidence: list[str] = []
    runs = graphs = operations = 0
    for compilation in given.recipe.compilation:
        found, more, entries = _of_component(given, compilation)
        problems += found
        evidence += more
        runs += entries
        frames = [f for f in given.observation.compiles.frames if f.component == compilation.component]
        graphs += sum(f.graphs for f in frames if f.outcome == "compiled")
        operations += sum(f.operations for f in frames if f.outcome == "compiled")
    if problems:
        evidence = [note for note in given.observation.notes if note.startswith(DISABLED)] + evidence
    figures: dict[str, Any] = {"engaged_calls": runs, "graphs": graphs, "operations": operations}
    if problems:
        return given.failed(NAME, "; ".join(problems), evidence=shortened(evidence), **figures)
    names = ", ".join(given.compiled_components)
    return given.passed(
        NAME,
        f"compiled code ran in all {counted(runs, 'call')} of {names} "
        f"({counted(graphs, 'graph')}, {counted(operations, 'operation')})",
        **figures,
    )


def _of_component(given: Evidence, compilation: Compilation) -> tuple[list[str], list[str], int]:
    """(problems, evidence, engaged entries) of one compiled component."""
    name = compilation.component
    record = given.component(name)
    paths = set(record.compiled) if record is not None else set()
    if not paths:
        return [f"nothing in {name} is compiled"], [], 0
    regions = [
        r
        for r in given.observation.compiles.regions
        if r.component == name and r.region in paths and r.call in given.own_calls
    ]
    entries, engaged = sum(r.entries for r in regions), sum(r.engaged for r in regions)
    problems: list[str] = []
    evidence: list[str] = []
    expected = _expected(given, name, paths)
    for path in record.disabled if record is not None else ():
        evidence.append(f"{name}{'.' if path else ''}{path}: its forward is marked with torch.compiler.disable")
    if entries == 0:
        problems.append(f"compiled code of {name} never ran: its compiled call was never entered")
        if record is not None and record.disabled:
            return problems, evidence, 0
        evidence.append(
            f"{name} ran {expected} times in the eager reference: the pipeline calls the uncompiled forward, "
            f"by a hook or a reference held from before"
            if expected
            else f"the pipeline calls other methods of {name}, such as encode or decode: compile what it calls"
            if any(o.component == name for o in given.observation.outputs)
            else f"{name} was called by no other way either: compile what the pipeline calls"
        )
        return problems, evidence, 0
    if engaged < entries:
        sentence = f"{entries - engaged} of {counted(entries, 'call')} of {name} ran eager"
        problems.append(f"compiled code of {name} never ran" if engaged == 0 else sentence)
        reasons: dict[str, int] = {}
        for region in regions:
            missed = region.entries - region.engaged
            for reason in region.reasons if missed else ():
                reasons[reason] = reasons.get(reason, 0) + missed
        evidence += [f"{name}: {reason}" for reason in reasons]
        if not reasons:
            evidence.append(f"{name}: {_where(regions[0])} ran no graph that was made from it")
    elif expected is not None and entries < expected:
        problems.append(f"{name} ran {expected} times in the eager reference, but only {entries} calls were compiled")
        evidence.append(f"{name}: the other {expected - entries} go past the compiled call, to the forward itself")
    limits = [f for f in given.observation.compiles.limits if f.component == name]
    if limits and not problems:
        problems.append(f"part of {name} runs eager: the {limits[0].limit} is exhausted")
    for limit in limits:
        evidence.append(f"{region_name(name, limit.region, limit.place)}  {limit.place.file}:{limit.place.line}")
    if compilation.scope == "repeated_blocks" and record is not None and record.siblings_not_compiled:
        missed_classes = ", ".join(record.siblings_not_compiled)
        problems.append(f"regional compile missed blocks of {name}: {missed_classes}")
        evidence.append(f"{name}: name every class of blocks in its _repeated_blocks")
    return problems, evidence, engaged


def _where(region: RegionRuns) -> str:
    return str(region.place)


def _expected(given: Evidence, component: str, paths: set[str]) -> int | None:
    """How often the compiled modules ran in the eager reference, over all calls; None where it does not say."""
    reference = given.reference
    if reference is None or reference.failure is not None:
        return None
    if reference.content_hash == given.observation.content_hash:
        return None
    calls = given.own_calls
    counts = [e for e in reference.executions if e.component == component]
    if not counts:
        return None
    entered = set(outermost(paths))  # parts of a compiled module are traced with it, and never entered by themselves
    return sum(e.count for e in counts if e.region in entered and e.call in calls)
