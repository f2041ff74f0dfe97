"""What the last line of a run says: a gate that passed or failed, or that the run is none, and what it gave verdicts on."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.collection.baselines import BASELINES
from pytest_diffopt.collection.left_out import LEFT_OUT
from pytest_diffopt.options import Settings
from pytest_diffopt.report.gate import Gate, Judged, outcome_of
from pytest_diffopt.report.pages import BLOCK_PROPERTY
from pytest_diffopt.report.rows import RECIPE_PROPERTY, ROW_PROPERTY, VERDICT_PROPERTY, row_of
from pytest_diffopt.report.terminal import RecipeReport

UNVERIFIED = Judged(Counter(passed=4, unverified=3), 2)
CLEAN = Judged(Counter(passed=11, known=1), 2)


def test_only_a_strict_run_is_a_gate_that_passes_and_any_other_says_so_and_what_is_missing() -> None:
    assert outcome_of(CLEAN, exit_status=0, strict=True).sentence == (
        "GATE PASSED: 11 verdicts of 2 recipes passed, 1 known to fail"
    )
    loose = outcome_of(UNVERIFIED, exit_status=0, left_out=2)
    assert loose.passed
    assert loose.sentence == (
        "NOT A GATE (no --diffopt-strict): 4 verdicts of 2 recipes passed, 3 unverified, 2 checks left out"
    )
    strict = outcome_of(UNVERIFIED, exit_status=0, left_out=2, strict=True)
    assert (strict.passed, strict.sentence) == (
        False,
        "GATE FAILED: 3 unverified, 2 checks left out; 4 verdicts of 2 recipes passed",
    )


def test_what_fails_without_strict_fails_every_gate() -> None:
    judged = Judged(Counter(passed=1, failed=1), 1)
    for strict in (False, True):
        found = outcome_of(judged, exit_status=1, others_failed=2, problems=("a file is gone",), strict=strict)
        assert not found.passed
        assert found.sentence == (
            "GATE FAILED: 1 failed, 2 other tests failed, 1 problem with baselines; 1 verdict of 1 recipe passed"
        )


@pytest.mark.parametrize(
    ("judged", "exit_status", "said"),
    [
        (Judged(blocks=Counter(passed=12, expected=1), pages=2), 0, "12 blocks of 2 pages passed, 1 known to fail"),
        (Judged(blocks=Counter(passed=1), pages=1), 0, "1 block of 1 page passed"),
        (
            Judged(Counter(passed=7), 1, Counter(passed=3), 1),
            0,
            "7 verdicts of 1 recipe and 3 blocks of 1 page passed",
        ),
        (
            Judged(blocks=Counter(passed=3, failed=2, skipped=1), pages=1),
            1,
            "2 blocks failed, 1 skipped; 3 blocks of 1 page passed",
        ),
        (Judged(), 0, "no recipe was run"),
        (Judged(), 5, "nothing ran; no recipe was run"),
    ],
)
def test_a_run_of_pages_counts_blocks_and_one_of_neither_says_so(judged: Judged, exit_status: int, said: str) -> None:
    assert outcome_of(judged, exit_status=exit_status, strict=True).sentence.partition(": ")[2] == said


def item(recipe: str, source: str, check: str, content: str, status: str = "passed") -> pytest.TestReport:
    verdict = Verdict(check, recipe, status, f"what {check} says")  # type: ignore[arg-type]
    carried: list[tuple[str, Any]] = [
        (RECIPE_PROPERTY, {"source": source, "recipe": recipe, "check": check, "content": content}),
        (VERDICT_PROPERTY, verdict.to_dict()),
        (ROW_PROPERTY, row_of(None, [verdict], source=source)),
    ]
    return report(f"{source}::{check}", carried)


def report(nodeid: str, carried: list[tuple[str, Any]], outcome: Any = "passed") -> pytest.TestReport:
    return pytest.TestReport(nodeid, (nodeid, 0, ""), {}, outcome, None, "call", user_properties=carried)


def finished(settings: Settings, *reports: pytest.TestReport, baselines: bool = False, exit_status: int = 0) -> Gate:
    config: Any = SimpleNamespace(stash=pytest.Stash(), rootpath=None)
    config.stash[LEFT_OUT] = ["a.recipes.toml::flux::parity"]
    if baselines:
        config.stash[BASELINES] = SimpleNamespace(strays=lambda *_, **__: {})
    rows = RecipeReport(settings)
    gate = Gate(config, settings, rows)
    for one in reports:
        rows.add(one)
        gate.add(one)
    gate.finish(exit_status)
    return gate


TESTED = (
    item("flux", "a.recipes.toml::flux", "engagement", "1"),
    item("sd", "a.recipes.toml::sd", "engagement", "2"),
    item("flux", "tests/test_a.py::test_it[flux]", "test_it", "1"),
    item("sd", "tests/test_a.py::test_it[sd]", "test_it", "2"),
    item("sd", "b.recipes.toml::sd", "engagement", "3"),
)


def test_a_test_over_a_recipe_is_a_verdict_of_that_recipe_and_not_another_recipe() -> None:
    (left, line) = finished(Settings(baseline="base"), *TESTED, baselines=True).lines()
    assert left == ("left out: a.recipes.toml::flux::parity", {"yellow": True})
    sentence = "NOT A GATE (no --diffopt-strict): 5 verdicts of 3 recipes passed, 1 check left out"
    assert line == (sentence, {"yellow": True})


def test_a_run_that_is_asked_for_no_gate_says_nothing_of_one() -> None:
    assert finished(Settings(), *TESTED).lines() == []


def test_blocks_of_pages_are_counted_and_a_failed_one_is_no_other_test() -> None:
    rows = [{"page": "a.md", "line": 3, "status": "passed"}, {"page": "a.md", "line": 9, "status": "failed"}]
    blocks = [report(f"a.md::line-{row['line']}", [(BLOCK_PROPERTY, row)], outcome=row["status"]) for row in rows]
    gate = finished(Settings(strict=True), *blocks, exit_status=1)
    assert gate.outcome is not None
    assert gate.outcome.sentence == "GATE FAILED: 1 block failed, 1 check left out; 1 block of 1 page passed"
    assert gate.outcome.others_failed == ("a.md::line-9",)
    gate.fail("1 report could not be written")
    assert gate.outcome.sentence.startswith("GATE FAILED: 1 report could not be written; 1 block failed")
