"""The gate: whether a run lets a release pass, said in its last line and by its exit status; and what the run records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.collection import left_out
from pytest_diffopt.collection.baselines import BASELINES, NAME, OUTSIDE, directory_of
from pytest_diffopt.errors import BaselineError
from pytest_diffopt.options import Settings
from pytest_diffopt.report.pages import block_of
from pytest_diffopt.report.rows import RECIPE_PROPERTY, RECORD_PROPERTY, distinct_recipes, merged

if TYPE_CHECKING:
    from pytest_diffopt.report.terminal import RecipeReport

PASSED, FAILED, NO_GATE = "GATE PASSED", "GATE FAILED", "NOT A GATE (no --diffopt-strict)"
_SHOWN = 6
"""Checks that were left out and are named at the end of a run; reports name them all."""
_GREEN, _YELLOW, _RED = ({"green": True}, {"yellow": True}, {"red": True})


@dataclass(frozen=True)
class Outcome:
    """What the gate says.

    Attributes:
        passed: whether nothing failed; of a strict run, whether the release may pass.
        sentence: ``GATE PASSED``, ``GATE FAILED``, or that the run is no gate, with the counts.
        problems: a sentence each, of what is no test's failure.
        others_failed: the node ids of failed tests without a recipe, and of files that were not collected.
        left_out: the node ids of checks that were not run, as the user asked.
    """

    passed: bool
    sentence: str
    problems: tuple[str, ...] = ()
    others_failed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """What a run gave verdicts on.

    Attributes:
        statuses: how often each status of a verdict came. recipes: how many recipes had one.
        blocks: how often each status of a documentation page's block came. pages: how many pages had one.
    """

    statuses: Mapping[str, int] = field(default_factory=dict)
    recipes: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)
    pages: int = 0

    def count(self, status: str) -> int:
        """Verdicts and blocks of a status."""
        return self.statuses.get(status, 0) + self.blocks.get(status, 0)

    @property
    def passed(self) -> str:
        """``"4 verdicts of 2 recipes and 12 blocks of 1 page passed"``."""
        parts = []
        if self.recipes:
            parts.append(f"{counted(self.statuses.get('passed', 0), 'verdict')} of {counted(self.recipes, 'recipe')}")
        if self.pages:
            parts.append(f"{counted(self.blocks.get('passed', 0), 'block')} of {counted(self.pages, 'page')}")
        return f"{' and '.join(parts)} passed" if parts else "no recipe was run"


def outcome_of(
    judged: Judged,
    *,
    exit_status: int,
    others_failed: int = 0,
    strict: bool = False,
    left_out: int = 0,
    problems: tuple[str, ...] = (),
) -> Outcome:
    """Judge a run.

    Args:
        judged: what it gave verdicts on.
        exit_status: as pytest would end. others_failed: tests and collections without a recipe that failed.
        strict: whether what was not judged fails the gate. left_out: checks that were not run, as the user asked.
        problems: with the baselines.
    """
    failed = [f"{judged.statuses['failed']} failed"] if judged.statuses.get("failed") else []
    failed += [f"{counted(judged.blocks['failed'], 'block')} failed"] if judged.blocks.get("failed") else []
    failed += [f"{counted(others_failed, 'other test')} failed"] if others_failed else []
    missed = [f"{judged.count(name)} {name}" for name in ("unverified", "skipped") if judged.count(name)]
    missed += [f"{counted(left_out, 'check')} left out"] if left_out else []
    wrong = [*failed, *(missed if strict else [])]
    wrong += [f"{counted(len(problems), 'problem')} with baselines"] if problems else []
    ended = {2: "interrupted", 3: "an internal error", 4: "a wrong command line", 5: "nothing ran"}.get(exit_status)
    wrong += [ended] if ended else []
    if wrong or exit_status:
        return Outcome(False, f"{FAILED}: {', '.join(wrong or ['the run failed'])}; {judged.passed}", problems)
    known = judged.count("known") + judged.count("expected")
    rest = [judged.passed, *([f"{known} known to fail"] if known else []), *missed]
    return Outcome(True, f"{PASSED if strict else NO_GATE}: {', '.join(rest)}", problems)


def counted(number: int, what: str) -> str:
    """``"1 recipe"``, ``"2 recipes"``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class Gate:
    """Listens to a run, records what it is told to, and judges it; not in a worker of pytest-xdist.

    Attributes:
        outcome: known once the session has finished.
    """

    def __init__(self, config: pytest.Config, settings: Settings, report: RecipeReport) -> None:
        self._config = config
        self._settings = settings
        self._report = report
        self._others_failed: set[str] = set()
        self._blocks: dict[str, tuple[str, str]] = {}  # node id of a block → its page, its status
        self._records: dict[str, dict[str, Any]] = {}  # node id of a recipe → its key, its record, its file
        self._recorded: list[str] = []
        self.outcome: Outcome | None = None

    @property
    def is_asked_for(self) -> bool:
        """Whether the run is a gate: it is strict, or held against baselines."""
        return self._settings.strict or (BASELINES in self._config.stash and not self._settings.update_baseline)

    @property
    def _may_fail(self) -> bool:
        return self.is_asked_for or bool(self.outcome and self.outcome.problems)

    # pytest's hooks

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._others_failed.add(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.add(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        left_out.take_from_worker(self._config, node)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._config.option.collectonly:
            return
        self.finish(int(session.exitstatus))
        closed = self.outcome is not None and not self.outcome.passed
        if closed and self._may_fail and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
        yield  # what is said here comes last
        for line, color in self.lines():
            terminalreporter.write_line(line, bold=True, **color)

    # what they delegate to

    def add(self, report: pytest.TestReport) -> None:
        """Take what a test's report carries for the gate."""
        if (block := block_of(report)) is not None:
            self._blocks[report.nodeid] = (block["page"], block["status"])
        carried: dict[str, Any] = dict(report.user_properties) if report.user_properties else {}
        about = carried.get(RECIPE_PROPERTY)
        if about is None or report.when == "teardown":  # no verdict comes with a teardown
            if report.failed:
                self._others_failed.add(report.nodeid)
        elif about["check"] == NAME and report.when == "call" and RECORD_PROPERTY in carried:
            self._records[about["source"]] = carried[RECORD_PROPERTY]

    def finish(self, exit_status: int) -> None:
        """Record, where the run records, and judge it."""
        rows = merged(self._report.rows)
        problems = tuple(self._record(rows) if self._settings.update_baseline else self._strays())
        left = self._config.stash.get(left_out.LEFT_OUT, [])
        judged = Judged(
            Counter(status for row in rows for status in row["statuses"].values()),
            distinct_recipes(rows),
            Counter(status for _, status in self._blocks.values()),
            len({page for page, _ in self._blocks.values()}),
        )
        outcome = outcome_of(
            judged,
            exit_status=exit_status,
            others_failed=len(
                self._others_failed - {name for name, (_, how) in self._blocks.items() if how == "failed"}
            ),
            strict=self._settings.strict,
            left_out=len(left),
            problems=problems,
        )
        self.outcome = replace(outcome, others_failed=tuple(sorted(self._others_failed)), left_out=tuple(left))

    def fail(self, why: str) -> None:
        """Close the gate for something that went wrong after it was judged, e.g. a report that could not be written."""
        if self.outcome is not None:
            counts = self.outcome.sentence.partition(": ")[2]
            self.outcome = replace(self.outcome, passed=False, sentence=f"{FAILED}: {why}; {counts}")

    def lines(self) -> list[tuple[str, dict[str, bool]]]:
        """The last lines of a run, each with its colour."""
        if self.outcome is None:
            return []
        lines = [(f"baseline: {line}", _GREEN) for line in self._recorded]
        lines += [(f"baseline: {line}", _RED) for line in self.outcome.problems]
        if not self.is_asked_for:
            return lines
        strict = self._settings.strict
        if left := self.outcome.left_out:
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            lines.append((f"left out: {', '.join(left[:_SHOWN])}{more}", _RED if strict else _YELLOW))
        color = _RED if not self.outcome.passed else _GREEN if strict else _YELLOW
        return [*lines, (self.outcome.sentence, color)]

    def _record(self, rows: list[dict[str, Any]]) -> list[str]:
        """Write what was observed of each recipe that has nothing failed; returns what is wrong."""
        from pytest_diffopt.baseline.store import Recorded, Store, entry_of

        if BASELINES not in self._config.stash:
            return []
        baselines = self._config.stash[BASELINES]
        sources = self._config.stash.get(left_out.SOURCES, {})
        failed = {
            row["source"]: [check for check, status in row["statuses"].items() if status == "failed"] for row in rows
        }
        done: list[Recorded] = []
        problems: list[str] = []
        with Store(directory_of(self._config)).locked() as store:
            for node_id, plain in self._records.items():
                source, recipe = plain["file"], plain["name"]
                if checks := failed.get(node_id):
                    problems.append(f"{recipe} is not recorded: its {' and '.join(checks)} failed")
                    continue
                entry = entry_of(plain)
                was = baselines.renamed_from(source, entry.record, sources.get(source, []))
                try:
                    done.append(store.record(source, recipe, entry, moved_from=was))
                except BaselineError as error:
                    problems.append(f"{error}; it stays as it is, and {recipe} is not recorded")
                except OSError as error:
                    problems.append(f"{recipe} is not recorded: {error.strerror or error}; what was there stands")
        self._recorded = _told(done, baselines.directory)
        return problems + self._strays({one.was for one in done})

    def _strays(self, moved: Collection[str] = ()) -> list[str]:
        """A sentence for each baseline that nothing was held against, and should have been; not for those that moved."""
        if BASELINES not in self._config.stash:
            return []
        root: Path = self._config.rootpath
        sources = self._config.stash.get(left_out.SOURCES, {})
        found = self._config.stash[BASELINES].strays(
            sources,
            lambda source: source.startswith(OUTSIDE) or (root / source).is_file(),
            all_wanted=self._settings.strict and not self._settings.update_baseline,
        )
        return [sentence for name, sentence in found.items() if name not in moved]


def _told(done: list[Any], directory: str) -> list[str]:
    counts = Counter(one.how for one in done)
    told = [f"{counts[how]} {how}" for how in ("new", "changed", "moved", "as before") if counts[how]]
    return [f"{counted(len(done), 'recipe')} recorded in {directory}: {', '.join(told)}"] if done else []
