"""recompiles: within budget, none after warm-up, the limit never exhausted; each with the guard that failed.

Not fooled by: the first compile counted as a recompile; recompiles at each step, prompt or size that a single call cannot
show; caches that an earlier test left; the limit exhausted, after which code runs eager and nothing is reported any more.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, placed, region_name, shortened
from pytest_diffopt.checks.guards import ATTRIBUTE, advice
from pytest_diffopt.observation.observation import PREPARING

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import FrameAttempt

NAME = "recompiles"


def judge(given: Evidence) -> Verdict:
    """See the module."""
    compiles, limits = given.observation.compiles, given.limits
    recompiles, exhausted, late = _found(given)
    figures: dict[str, Any] = {
        "recompiles": len(recompiles),
        "after_warmup": len(late),
        "limit_exhausted": len(exhausted),
        "max_recompiles": limits.max_recompiles,
        "max_recompiles_after_warmup": limits.max_recompiles_after_warmup,
    }
    if exhausted:
        first = exhausted[0]
        return given.failed(
            NAME,
            f"the {first.limit} is exhausted: {region_name(first.component, first.region, first.place)} "
            f"runs eager from call {first.call} on, after {counted(len(recompiles), 'recompile')}",
            evidence=[*shortened(grouped([*recompiles, *exhausted])), *advice([*recompiles, *exhausted], given.recipe)],
            **figures,
            places=_placed([*recompiles, *exhausted]),
        )
    if len(late) > limits.max_recompiles_after_warmup:
        return given.failed(
            NAME,
            f"{len(late)} after warm-up, {limits.max_recompiles_after_warmup} allowed",
            evidence=[*shortened(grouped(late)), *advice(late, given.recipe)],
            **figures,
            places=_placed(late),
        )
    if limits.max_recompiles is not None and len(recompiles) > limits.max_recompiles:
        return given.failed(
            NAME,
            f"{len(recompiles)} in all, {limits.max_recompiles} allowed",
            evidence=[*shortened(grouped(recompiles)), *advice(recompiles, given.recipe)],
            **figures,
            places=_placed(recompiles),
        )
    if over := _over_budget(given, recompiles):
        return given.failed(
            NAME,
            _of_one_code(over, limits.recompiles_per_code or 0),
            evidence=[*shortened(grouped(over)), *advice(over, given.recipe)],
            **figures,
            places=_placed(over),
        )
    if not compiles.graphs:
        return given.unverified(NAME, "no graph was compiled, so nothing can be said of recompiles", **figures)
    calls = len([c for c in given.observation.calls if c.kind == "call" and c.index >= limits.warmup_calls])
    if calls == 0:
        return given.unverified(
            NAME, f"no call came after the warm-up: call.calls must be more than {limits.warmup_calls}", **figures
        )
    warm = f"{counted(len(recompiles) - len(late), 'recompile')} during warm-up" if recompiles else "none at all"
    if prepared := sum(f.graphs for f in compiles.frames if f.call == PREPARING and f.outcome == "compiled"):
        warm += f"; {counted(prepared, 'graph')} compiled while it was prepared"
    return given.passed(
        NAME,
        f"none after warm-up in {counted(calls, 'call')} ({warm})" if not late else f"{len(recompiles)}, within budget",
        evidence=shortened(grouped(recompiles)),
        **figures,
    )


def _found(given: Evidence) -> tuple[list[FrameAttempt], list[FrameAttempt], list[FrameAttempt]]:
    """(recompiles that count, frames that met the limit, the recompiles after warm-up)."""
    compiles = given.observation.compiles
    own = [f for f in compiles.frames if f.call in given.compiling_calls and f.recompile] + _compiled_anew(given)
    recompiles = [f for f in own if f.outcome != "limit" and _counts(given, f)]
    exhausted = [f for f in compiles.limits if f.call in given.compiling_calls]
    return recompiles, exhausted, [f for f in recompiles if f.call >= given.limits.warmup_calls]


def places(given: Evidence) -> list[tuple[str, str]]:
    """Where each recompile is that makes the check fail, and its guard: what two failures may have in common."""
    recompiles, exhausted, late = _found(given)
    if not exhausted:
        if len(late) > given.limits.max_recompiles_after_warmup:
            recompiles = late
        elif given.limits.max_recompiles is None or len(recompiles) <= given.limits.max_recompiles:
            recompiles = _over_budget(given, recompiles)
    frames = [*recompiles, *exhausted]
    return [(f"{f.place.file}:{f.place.line}", _generalised(f.guards[0]) if f.guards else f.outcome) for f in frames]


def _compiled_anew(given: Evidence) -> list[FrameAttempt]:
    """Compiles after warm-up that no guard caused, in components that had run before: what was compiled had been dropped,
    or every call makes code of its own."""
    started: dict[str, int] = {}
    for region in given.observation.compiles.regions:
        started[region.component] = min(region.call, started.get(region.component, region.call))
    return [
        replace(frame, guards=("none: nothing compiled was there any more, or the code is new at each call",))
        for frame in given.observation.compiles.frames
        if not frame.recompile
        and frame.outcome == "compiled"
        and frame.component
        and frame.call in given.own_calls
        and frame.call >= given.limits.warmup_calls
        and started.get(frame.component, frame.call) < frame.call
    ]


def _counts(given: Evidence, frame: FrameAttempt) -> bool:
    """Whether it compiles again what was compiled before.

    Two components of one class share their code: the first compile of the second is none. Blocks of one class share it
    too, and there every compile beyond the first is what a regional compile wants to avoid.
    """
    if frame not in given.observation.compiles.frames:
        return True  # compiled anew
    scopes = {entry.component: entry.scope for entry in given.recipe.compilation}
    if scopes.get(frame.component, "module") != "module" or frame.resumed:
        return True
    before = [f for f in given.observation.compiles.frames if f.place == frame.place and f is not frame]
    earlier = given.observation.compiles.frames.index(frame)
    return any(
        (f.component, f.region) == (frame.component, frame.region)
        and given.observation.compiles.frames.index(f) < earlier
        for f in before
    )


def _over_budget(given: Evidence, recompiles: list[FrameAttempt]) -> list[FrameAttempt]:
    """Recompiles during warm-up beyond what one code object may need."""
    budget = given.limits.recompiles_per_code
    if budget is None:
        return []
    regional = {entry.component for entry in given.recipe.compilation if entry.scope == "repeated_blocks"}
    over: list[FrameAttempt] = []
    for group in _by_code(recompiles):
        # Dynamo makes a size or a number dynamic after it changed once, but never what a module holds
        fixed = [f for f in group if f.component not in regional and f.guards and ATTRIBUTE.match(f.guards[0])]
        if len(group) > budget or fixed:
            over += group if len(group) > budget else fixed
    return over


def _by_code(frames: list[FrameAttempt]) -> list[list[FrameAttempt]]:
    groups: dict[tuple[str, int, str], list[FrameAttempt]] = {}
    for frame in frames:
        groups.setdefault((frame.place.file, frame.place.line, frame.place.function), []).append(frame)
    return list(groups.values())


def _of_one_code(over: list[FrameAttempt], budget: int) -> str:
    most = max(map(len, _by_code(over)))
    if most > budget:
        return f"{most} of the same code during warm-up, {budget} allowed"
    return f"{len(over)} during warm-up by what a module holds, none allowed: Dynamo never makes that dynamic"


def _placed(frames: list[FrameAttempt]) -> list[dict[str, Any]]:
    return placed((f.component, f.place, _generalised(f.guards[0]) if f.guards else f.outcome) for f in frames)


def grouped(frames: list[FrameAttempt]) -> list[str]:
    """Recompiles of the same code by the same guard together, as lines."""
    counts: dict[tuple[str, str, str], int] = {}
    for frame in frames:
        guard = frame.guards[0] if frame.guards else "no guard known"
        name = region_name(frame.component, frame.region, frame.place)
        where = f"{frame.place.file}:{frame.place.line}"
        counts[name, where, _generalised(guard)] = counts.get((name, where, _generalised(guard)), 0) + 1
    return [f"{name}  {where}  {count}×  guard {guard}" for (name, where, guard), count in counts.items()]


def _generalised(guard: str) -> str:
    """The guard with the value that it compared with left open, so that equal causes stand together."""
    return re.sub(r"== (-?[\d.]+(?:e-?\d+)?|'[^']*'|\"[^\"]*\")$", "== …", guard)
