"""A run that an exception ended: no check passes of it, one of them has the cause in full, and the others refer to that one.

Not fooled by: what a check counted before the exception, and finds in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.verdict import Verdict

if TYPE_CHECKING:
    from pytest_diffopt.checks.evidence import Evidence
    from pytest_diffopt.observation.observation import Failure

REFERS = "cause_in"
"""The figure of a verdict that names the one with the cause."""

STILL_JUDGED = ("graph_breaks", "recompiles", "quantization", "state")
"""Checks whose own findings hold of a run that did not end: what is wrong by then stays wrong."""


def guarded(check: str, judge: Callable[[Evidence], Verdict]) -> Callable[[Evidence], Verdict]:
    """A check that knows nothing of such runs, as one that does not pass of them."""

    def judged(given: Evidence) -> Verdict:
        failure = given.observation.failure
        if failure is None:
            return judge(given)
        if check in STILL_JUDGED:
            return of_unfinished(judge(given), failure)
        return of_unfinished(Verdict(check, given.recipe.name, "unverified", ""), failure)

    return judged


def of_unfinished(verdict: Verdict, failure: Failure) -> Verdict:
    """A verdict on a run that did not end, with the cause in full: below what failed by itself, or in its place."""
    place = _place(failure)
    cause: dict[str, Any] = {"crash": place} if place else {}
    if verdict.status == "failed":
        return replace(
            verdict,
            figures={**verdict.figures, **cause},
            evidence=(*verdict.evidence, *described(failure)),
            traceback=failure.traceback,
        )
    how = {"error": failure.error, "phase": failure.phase, "component": failure.component}
    return replace(
        verdict,
        status="failed",
        sentence=_sentence(failure),
        figures={**verdict.figures, **how, **cause},
        evidence=tuple(failure.lines),
        traceback=failure.traceback,
    )


def described(failure: Failure) -> list[str]:
    """What ended a run, a sentence, and where, a line each."""
    return [_sentence(failure), *(f"  {line}" for line in failure.lines)]


def is_the_crash(figures: Mapping[str, Any]) -> bool:
    """Whether the verdict with these figures says that the run did not end, and nothing else."""
    return "error" in figures


def referring(verdict: Verdict, failure: Failure, where: str) -> Verdict:
    """A verdict of :func:`of_unfinished` that refers to the one that has the cause, and says it no more.

    Args:
        where: the node id or the check that has it. What was added to the verdict since stays.
    """
    see = f"the recipe did not run: see {where}"
    cause = {*failure.lines, *described(failure)}
    kept = tuple(line for line in verdict.evidence if line not in cause)
    figures = {name: value for name, value in verdict.figures.items() if name != "crash"} | {REFERS: where}
    if is_the_crash(verdict.figures):
        return replace(verdict, sentence=see, figures=figures, evidence=kept, traceback=())
    return replace(verdict, figures=figures, evidence=(*kept, see), traceback=())


def with_cause_once(verdicts: Sequence[Verdict], failure: Failure | None) -> list[Verdict]:
    """The verdicts of a recipe: where its run did not end, the first has the cause and the others refer to it."""
    if failure is None or not verdicts:
        return list(verdicts)
    first, *rest = verdicts
    return [first, *(referring(one, failure, first.check) for one in rest)]


def _sentence(failure: Failure) -> str:
    return f"the recipe did not run: {failure} (while {failure.spoken_phase})"


def _place(failure: Failure) -> dict[str, Any]:
    """Where the user's own code raised it, as `evidence.placed` has places; empty where none of it did."""
    at = failure.raised_at
    if at is None:
        return {}
    named = {"component": failure.component, "file": at.file, "line": at.line, "function": at.function}
    return {**named, "why": str(failure), "count": 1}
