"""What a recipe's ``known_faults`` make of its verdicts: a fault of a library is expected with its cause, and only with it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pytest_diffopt.collection.baselines import NAME as BASELINE
from pytest_diffopt.recipe import DOES_NOT_RUN

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe


def known_fault(recipe: Recipe, verdict: Verdict, observation: Observation | None) -> str:
    """The cause, where a failed verdict is one that the recipe expects; else empty."""
    if verdict.status != "failed" or verdict.check == BASELINE:
        return ""
    key, told = _expected(recipe, verdict, observation)
    cause = recipe.known_faults.get(key, "")
    return f"known fault: {cause}" if cause and cause in told else ""


def against_known_faults(recipe: Recipe, verdict: Verdict, observation: Observation | None) -> Verdict:
    """The verdict, failed where a known fault is mended, or told apart from it where it fails with another cause."""
    if verdict.check == BASELINE:  # a fault is recorded as anything else is
        return verdict
    if (cause := recipe.known_faults.get(DOES_NOT_RUN)) and observation is not None and observation.failure is None:
        return _mended(verdict, DOES_NOT_RUN, cause, "the recipe runs")
    key, _ = _expected(recipe, verdict, observation)
    cause = recipe.known_faults.get(key)
    if cause is None or verdict.status == "unverified" or known_fault(recipe, verdict, observation):
        return verdict
    if verdict.status == "passed":
        return verdict if key == DOES_NOT_RUN else _mended(verdict, key, cause, "the check passes")
    other = f"known_faults.{key} expects {cause!r}, which this is not"
    return dataclasses.replace(verdict, evidence=(*verdict.evidence, other))


def _expected(recipe: Recipe, verdict: Verdict, observation: Observation | None) -> tuple[str, str]:
    """(which of the known faults the verdict is about, what was said where its cause must stand)."""
    failure = observation.failure if observation is not None else None
    if verdict.check == "forecast":  # which needs no run of the recipe
        return verdict.check, verdict.text
    if DOES_NOT_RUN in recipe.known_faults and (failure is not None or observation is None):
        return DOES_NOT_RUN, f"{verdict.text}\n{failure.error}: {failure.message}" if failure else verdict.text
    return verdict.check, verdict.text


def _mended(verdict: Verdict, key: str, cause: str, now: str) -> Verdict:
    return dataclasses.replace(
        verdict,
        status="failed",
        sentence=f"{now}, though known_faults.{key} expects {cause!r}",
        evidence=(f"if a library has mended it, take known_faults.{key} out of the recipe", *verdict.evidence),
    )
