"""Known faults: what a recipe expects of its verdicts, and what it says when a library is mended or breaks otherwise."""

from __future__ import annotations

import pytest

from pytest_diffopt import Observation, Recipe, Verdict
from pytest_diffopt.checks.session import CHECKS
from pytest_diffopt.checks.verdict import Status
from pytest_diffopt.collection.known_faults import against_known_faults, known_fault
from pytest_diffopt.errors import RecipeError
from pytest_diffopt.observation.observation import Failure
from pytest_diffopt.recipe import _FAULTY, DOES_NOT_RUN

RAN = Observation({"name": "r"}, "hash", "sim", "sim", {})
RAISED = Observation(
    {"name": "r"}, "hash", "sim", "sim", {}, failure=Failure("call 0", "RuntimeError", "no data; moved")
)


def recipe(**known: str) -> Recipe:
    return Recipe("r", "tiny-flux", known_faults=known)


def verdict(status: Status, sentence: str = "vae has not left the accelerator", check: str = "memory") -> Verdict:
    return Verdict(check, "r", status, sentence)


def test_a_check_that_fails_with_the_named_cause_is_expected() -> None:
    expecting = recipe(memory="vae has not left")
    assert known_fault(expecting, verdict("failed"), RAN) == "known fault: vae has not left"
    assert against_known_faults(expecting, verdict("failed"), RAN) == verdict("failed")


def test_another_cause_is_a_failure_that_says_so() -> None:
    expecting = recipe(memory="grows")
    assert known_fault(expecting, verdict("failed"), RAN) == ""
    told = against_known_faults(expecting, verdict("failed"), RAN)
    assert (told.status, told.sentence) == ("failed", "vae has not left the accelerator")
    assert told.evidence == ("known_faults.memory expects 'grows', which this is not",)


def test_a_fault_that_is_mended_fails_with_what_to_do() -> None:
    told = against_known_faults(recipe(memory="vae has not left"), verdict("passed"), RAN)
    assert (told.status, told.sentence) == (
        "failed",
        "the check passes, though known_faults.memory expects 'vae has not left'",
    )
    assert told.evidence == ("if a library has mended it, take known_faults.memory out of the recipe",)
    assert known_fault(recipe(memory="vae has not left"), verdict("passed"), RAN) == ""


def test_other_checks_of_the_recipe_are_judged_as_ever() -> None:
    expecting = recipe(memory="vae has not left")
    for status in ("passed", "failed", "unverified"):
        other = verdict(status, check="parity")
        assert against_known_faults(expecting, other, RAN) == other
        assert known_fault(expecting, other, RAN) == ""


def test_what_could_not_be_judged_stays_unverified() -> None:
    assert against_known_faults(recipe(memory="x"), verdict("unverified"), RAN).status == "unverified"


def test_a_recipe_that_does_not_run_for_the_named_cause_is_expected_in_every_check_that_fails() -> None:
    expecting = recipe(run="no data; moved")
    for check in ("memory", "parity"):
        failed = verdict("failed", "the recipe did not run: RuntimeError: no data", check)
        assert known_fault(expecting, failed, RAISED) == "known fault: no data; moved"
    layers = verdict("passed", "5 layers", "quantization")
    assert against_known_faults(expecting, layers, RAISED) == layers
    assert known_fault(recipe(run="out of memory"), verdict("failed"), RAISED) == ""


def test_a_recipe_that_runs_again_fails_every_check_until_it_is_taken_out() -> None:
    told = against_known_faults(recipe(run="no data"), verdict("passed"), RAN)
    assert (told.status, told.sentence) == ("failed", "the recipe runs, though known_faults.run expects 'no data'")


def test_a_forecast_has_a_fault_of_its_own_and_none_of_the_recipes_run() -> None:
    takes_more = verdict("failed", "flux.1-dev peaks at 17.00 GiB: 16.00 GiB allowed", "forecast")
    assert known_fault(recipe(forecast="peaks at 17"), takes_more, None) == "known fault: peaks at 17"
    both = recipe(run="no data", forecast="peaks at 18")
    assert known_fault(both, takes_more, None) == ""
    assert against_known_faults(both, takes_more, None).evidence == (
        "known_faults.forecast expects 'peaks at 18', which this is not",
    )
    fits = verdict("passed", "it fits", "forecast")
    assert against_known_faults(recipe(run="no data"), fits, None) == fits
    assert against_known_faults(recipe(run="no data"), takes_more, None) == takes_more


def test_they_change_nothing_of_what_is_observed() -> None:
    assert recipe(memory="x").content_hash == recipe().content_hash
    assert recipe(memory="x") != recipe()


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"memroy": "x"}, "known_faults.memroy: found an unknown key; did you mean 'memory'?"),
        ({"memory": ""}, "known_faults.memory: found ''; a part of what the verdict says"),
        ({"run": 3}, "known_faults.run: found 3; a part of what the verdict says"),
    ],
)
def test_a_mistake_in_them_is_named(known: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**known)
    assert message in str(caught.value)


def test_every_check_can_have_one() -> None:
    assert set(_FAULTY) == {DOES_NOT_RUN, *CHECKS}
