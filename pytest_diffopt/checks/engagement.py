"""engagement: compiled code really ran, for the code that the recipe meant, in every call.

Not fooled by: nothing compiled at all; a frame skipped whole; a recipe whose limit is exhausted so that the rest runs
eager in silence; a hook or a held reference that still calls the uncompiled forward; a regional compile that matched only
some classes of blocks; a factory that compiled one of two denoisers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, region_name, shortened
from pytest_diffopt.observation.observation import DISABLED
from pytest_diffopt.preparation.compilation import outermost
from pytest_diffopt.recipe import FACTORY

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import RegionRuns

NAME = "engagement"


@dataclass(frozen=True)
class _Target:
    """What is meant to be compiled.

    Attributes:
        name: as the recipe calls it. owner: its component; empty for a function of none.
        regions: paths of the modules and methods in the component that are compiled, or the function.
    """

    name: str
    owner: str
    regions: frozenset[str]
    by_blocks: bool = False


@dataclass
class _Found:
    """What is said of one target.

    Attributes:
        reused: calls in which a cache left nothing to compute.
        unknown: why it cannot be judged.
    """

    problems: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    engaged: int = 0
    reused: int = 0
    unknown: str = ""


def judge(given: Evidence) -> Verdict:
    """See the module."""
    targets = _targets(given)
    found = [_of_target(given, target) for target in targets]
    problems = [problem for one in found for problem in one.problems]
    evidence = [line for one in found for line in one.evidence]
    if not targets:
        problems.append("the factory compiled nothing")
    alike = _alike_but_uncompiled(given, targets)
    if any(one.component == FACTORY for one in given.recipe.compilation):
        problems += alike  # a recipe that names its components has left this one out on purpose
    runs, reused = sum(one.engaged for one in found), sum(one.reused for one in found)
    owners = {target.owner for target in targets}
    frames = [f for f in given.observation.compiles.frames if f.component in owners and f.outcome == "compiled"]
    graphs, operations = sum(f.graphs for f in frames), sum(f.operations for f in frames)
    figures: dict[str, Any] = {"engaged_calls": runs, "graphs": graphs, "operations": operations}
    if problems:
        evidence = [note for note in given.observation.notes if note.startswith(DISABLED)] + evidence
        return given.failed(NAME, "; ".join(problems), evidence=shortened(evidence), **figures)
    if unknown := [one.unknown for one in found if one.unknown]:
        return given.unverified(NAME, "; ".join(unknown), **figures)
    names = ", ".join(dict.fromkeys(target.name for target in targets))
    return given.passed(
        NAME,
        f"compiled code ran in all {counted(runs, 'call')} of {names} "
        f"({counted(graphs, 'graph')}, {counted(operations, 'operation')})"
        + (f", and a cache answered {reused} more" if reused else "")
        + "".join(f"; {one}" for one in (*alike, *_refused(given, targets), *_without_graphs(given))),
        **figures,
    )


def _targets(given: Evidence) -> list[_Target]:
    """What the recipe compiles; all that is compiled where its factory does it."""
    compilations = given.recipe.compilation
    regions = [region for region in given.observation.compiles.regions if region.call in given.own_calls]
    targets: list[_Target] = []
    for one in compilations:
        if one.component == FACTORY:
            found = {record.name: set(record.compiled) for record in given.observation.components}
            for region in regions:  # a wrapper that is kept elsewhere shows by its runs alone
                found.setdefault(region.component or region.region, set()).add(region.region)
            owners = {record.name for record in given.observation.components}
            targets += [
                _Target(name, name if name in owners else "", frozenset(compiled))
                for name, compiled in found.items()
                if compiled
            ]
            continue
        record = given.component(one.owner)
        if record is None:  # a function that is no component's
            named = {r.region for r in regions if not r.component and r.region.rpartition(".")[2] == one.component}
            targets.append(_Target(one.component, "", frozenset(named)))
            continue
        others = {other.part for other in compilations if other.owner == one.owner and other.part and other != one}
        own = {path for path in record.compiled if _is_in(path, one.part)}
        if not one.part:
            own -= {path for path in own if any(_is_in(path, other) for other in others)}
        targets.append(_Target(one.component, one.owner, frozenset(own), one.scope == "repeated_blocks"))
    return targets


def _is_in(path: str, part: str) -> bool:
    return not part or path == part or path.startswith(part + ".")


def _of_target(given: Evidence, target: _Target) -> _Found:
    """Whether its compiled code ran whenever it was called."""
    name, found = target.name, _Found()
    if not target.regions and target.owner:
        found.problems.append(f"nothing in {name} is compiled")
        return found
    record = given.component(target.owner)
    regions = [
        r
        for r in given.observation.compiles.regions
        if r.component == target.owner and r.region in target.regions and r.call in given.own_calls
    ]
    entries, found.engaged = sum(r.entries for r in regions), sum(r.engaged for r in regions)
    expected = _expected(given, target)
    for path in record.disabled if record is not None else ():
        found.evidence.append(f"{name}{'.' if path else ''}{path}: its forward is marked with torch.compiler.disable")
    if entries == 0 and not target.owner:
        found.unknown = f"{name} is compiled, and nothing called it while the pipeline ran"
        return found
    if entries == 0:
        found.problems.append(_never_called(name))
        if record is None or not record.disabled:
            found.evidence.append(_who_calls_instead(given, target, expected))
        return found
    needed = entries
    if any(one.component == target.owner for one in given.recipe.caching):
        computed = _computed(given, target)
        needed = min(entries, computed) if computed is not None else entries
        found.reused = entries - found.engaged
    if found.engaged < needed:
        missed = f"{needed - found.engaged} of {counted(needed, 'call')} of {name} ran eager"
        found.problems.append(f"compiled code of {name} never ran" if found.engaged == 0 else missed)
        found.evidence += _why_eager(name, regions)
    elif expected is not None and entries < expected:
        found.problems.append(
            f"{name} ran {expected} times in the eager reference, but only {entries} calls were compiled"
        )
        found.evidence.append(
            f"{name}: the other {expected - entries} go past the compiled call, to the forward itself"
        )
    limits = [f for f in given.observation.compiles.limits if f.component == target.owner]
    if limits and not found.problems:
        found.problems.append(f"part of {name} runs eager: the {limits[0].limit} is exhausted")
    for limit in limits:
        where = region_name(target.owner, limit.region, limit.place)
        found.evidence.append(f"{where}  {limit.place.file}:{limit.place.line}")
    if target.by_blocks and record is not None and record.siblings_not_compiled:
        missed_classes = ", ".join(record.siblings_not_compiled)
        found.problems.append(f"regional compile missed blocks of {name}: {missed_classes}")
        found.evidence.append(f"{name}: name every class of blocks in its _repeated_blocks")
    return found


def _never_called(name: str) -> str:
    return f"compiled code of {name} never ran: its compiled call was never entered"


def _who_calls_instead(given: Evidence, target: _Target, expected: int | None) -> str:
    name = target.name
    if expected:
        return (
            f"{name} ran {expected} times in the eager reference: the pipeline calls the uncompiled forward, "
            f"by a hook or a reference held from before"
        )
    if any(output.component == target.owner for output in given.observation.outputs):
        owner = target.owner
        return (
            f"the pipeline calls other methods of {owner}, such as encode or decode: compile what it calls, "
            f'component = "{owner}.decode"'
        )
    return f"{name} was called by no other way either: compile what the pipeline calls"


def _why_eager(name: str, regions: list[RegionRuns]) -> list[str]:
    reasons: dict[str, int] = {}
    for region in regions:
        missed = region.entries - region.engaged
        for reason in region.reasons if missed else ():
            reasons[reason] = reasons.get(reason, 0) + missed
    return [f"{name}: {reason}" for reason in reasons] or [
        f"{name}: {regions[0].place} ran no graph that was made from it"
    ]


def _expected(given: Evidence, target: _Target) -> int | None:
    """How often the compiled modules ran in the eager reference, over all calls; None where it does not say."""
    counts = _executions(given, target.owner)
    if counts is None:
        return None
    entered = outermost(
        target.regions
    )  # parts of a compiled module are traced with it, and never entered by themselves
    return sum(count for region, count in counts.items() if region in entered)


def _computed(given: Evidence, target: _Target) -> int | None:
    """In how many calls of a component with a cache the parts that it decides on were computed, by the reference."""
    counts = _executions(given, target.owner)
    if counts is None or "" not in target.regions:
        return _expected(given, target)
    hooked = {path for cache in given.observation.caches if cache.component == target.owner for path in cache.paths}
    return max((count for region, count in counts.items() if region in hooked), default=None)


def _executions(given: Evidence, component: str) -> dict[str, int] | None:
    """Path in a component → how often it ran in the eager reference; None where that does not say."""
    reference = given.reference
    if reference is None or reference.failure is not None:
        return None
    counts: dict[str, int] = {}
    for one in reference.executions:
        if one.component == component and one.call in given.own_calls:
            counts[one.region] = counts.get(one.region, 0) + one.count
    return counts or None


def _alike_but_uncompiled(given: Evidence, targets: list[_Target]) -> list[str]:
    """The second of two denoisers: it is of the class of a compiled component and stays uncompiled.

    An encoder of that class is none: it has another name, and does not run in every step.
    """
    compiled = {target.owner for target in targets}
    records = given.observation.components
    runs = {record.name: (_executions(given, record.name) or {}).get("", 0) for record in records}
    found = []
    for record in records:
        ran = runs[record.name]
        if not ran or record.compiled or record.name in compiled:
            continue
        twins = [other.name for other in records if other.name in compiled and other.kind == record.kind]
        once = len(given.own_calls)
        if any(_unnumbered(record.name) == _unnumbered(twin) or min(ran, runs[twin]) > once for twin in twins):
            found.append(f"{record.name} (same class) ran {counted(ran, 'time')} uncompiled")
    return found


def _refused(given: Evidence, targets: list[_Target]) -> list[str]:
    """Regional compilation that is the tool's alone: diffusers' own method refuses the model."""
    return [
        f"diffusers' compile_repeated_blocks() refuses {record.kind.rpartition('.')[2]}, whose class names no "
        f"_repeated_blocks: they were found by their lists"
        for target in targets
        if target.by_blocks and (record := given.component(target.owner)) is not None and record.names_no_blocks
    ]


_RECORD_GRAPHS = ("reduce-overhead", "max-autotune")


def _without_graphs(given: Evidence) -> list[str]:
    """Modes that record CUDA graphs on a GPU, where nothing records them."""
    if given.observation.accelerator not in ("sim", "cpu"):
        return []
    asked = [
        f"mode = {one.mode}" if one.mode in _RECORD_GRAPHS else "triton.cudagraphs"
        for one in given.recipe.compilation
        if one.backend == "inductor"
        and (one.mode in _RECORD_GRAPHS or dict(one.options or {}).get("triton.cudagraphs"))
    ]
    return [f"no CUDA graph ran, which {one} records on a GPU" for one in dict.fromkeys(asked)]


def _unnumbered(name: str) -> str:
    return re.sub(r"_?\d+$", "", name)
