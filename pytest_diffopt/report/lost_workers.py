"""Workers of pytest-xdist that ended before their time: what each took with it, and what was never run, as failed verdicts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from pytest_diffopt.report.rows import RECIPE_PROPERTY, ROW_PROPERTY, VERDICT_PROPERTY, KnownRecipes, row_of

TRIES = 2
"""How many workers a recipe may take with it before the rest of its checks fail untried."""

_PATIENCE_SECONDS = 2.0
"""How long a worker's exit status is waited for, once its connection is gone."""

_OUT_OF_MEMORY = "signal 9 is what a kernel sends a process when memory runs out: its log (dmesg) says whether it did"


class LostWorkers:
    """Listens in the controller, and says of each check that was lost with a worker why it has no other verdict.

    Args:
        recipes: what is known of the recipes of items.

    Attributes:
        ends: how each worker that was lost ended, and while it did what, in words, in order.
    """

    def __init__(self, config: pytest.Config, recipes: KnownRecipes | None = None) -> None:
        self.ends: list[str] = []
        self._recipe_of = (recipes if recipes is not None else KnownRecipes()).of
        self._config = config
        self._expected: dict[str, None] = {}
        self._collected: set[str] = set()
        self._begun: set[str] = set()
        self._judged: set[str] = set()
        self._told: set[str] = set()
        self._unrun: list[str] = []
        self._node: Any = None
        self._end = "a worker was lost"

    # pytest's and xdist's hooks

    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self._collected.add(node.gateway.id)
        self._expected.update(dict.fromkeys(ids))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begun.add(nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._told.add(report.nodeid)
        if report.when == "call":
            self._judged.add(report.nodeid)

    def pytest_testnodedown(self, node: Any, error: object) -> None:
        if error is not None and error != "keyboard-interrupt":
            self._lost(node, f"worker {node.gateway.id} {how_ended(exit_status(node.gateway), error)}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched: Any) -> None:
        self.ends[-1:] = [self._sentence(crashitem)]
        if (recipe := self._recipe_of(crashitem)) is None:
            return
        write_failure(report, recipe, self.ends[-1])
        for nodeid in getattr(sched, "given_up", ()):
            if nodeid not in self._told:
                self._report(nodeid, f"not run, since the recipe ended {TRIES} workers: {self.ends[-1]}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.USAGE_ERROR):
            return  # with -x or Ctrl-C it is meant that checks are not run
        missing = [nodeid for nodeid in self._expected if nodeid not in self._told]
        checks = [nodeid for nodeid in missing if self._recipe_of(nodeid) is not None]
        self._unrun = [nodeid for nodeid in missing if nodeid not in checks]
        why = f"{self.ends[-1]}, and no worker took its place" if self.ends else "no worker ran it"
        for nodeid in checks:
            self._report(nodeid, f"not run: {why}")
        nothing = bool(self.ends) and not self._expected
        if (checks or nothing) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.lines(terminalreporter.config.args):
            terminalreporter.write_line(line, yellow=True)

    # what they delegate to

    def lines(self, asked: Sequence[str]) -> list[str]:
        """How workers ended, and which tests beside recipes' checks were not run; nothing of a run without recipes.

        Args:
            asked: what pytest was to collect.
        """
        if not self.ends or (self._expected and not any(map(self._recipe_of, self._expected))):
            return []
        lines = [f"diffopt: {end}" for end in self.ends]
        if not self._expected:
            lines.append(f"diffopt: no worker lived to collect anything, so nothing was run of: {' '.join(asked)}")
        if self._unrun:
            lines.append(f"diffopt: {len(self._unrun)} other tests were not run: {' '.join(self._unrun)}")
        return lines

    def _lost(self, node: Any, end: str) -> None:
        self._node, self._end = node, end
        held = node.gateway.id in self._collected
        self.ends.append(f"{end} {'when it ran nothing' if held else 'while it collected'}, and took no check with it")

    def _sentence(self, nodeid: str) -> str:
        recipe = self._recipe_of(nodeid)
        item = f"{recipe['recipe']} · {recipe['check']}" if recipe else nodeid
        if nodeid not in self._begun:
            return f"{self._end} before it ran {item}"
        if nodeid not in self._judged:
            return f"{self._end} while it ran {item}"
        return f"{self._end} after the verdict of {item}, before it began anything else"

    def _report(self, nodeid: str, sentence: str) -> None:
        recipe = self._recipe_of(nodeid)
        assert recipe is not None
        report = pytest.TestReport(nodeid, ("", None, ""), {}, "failed", "", "call")
        report.node = self._node  # type: ignore[attr-defined]
        write_failure(report, recipe, sentence)
        self._config.hook.pytest_runtest_logreport(report=report)


def write_failure(report: pytest.TestReport, recipe: dict[str, str], sentence: str) -> None:
    """Make of a report a failed verdict with that sentence, as a check's own report has it.

    Args:
        recipe: what :class:`KnownRecipes` has of the report's node id.
    """
    from pytest_diffopt.checks.verdict import Verdict

    alone = f"without other workers: python -m pytest -n 0 '{recipe['source']}'"
    evidence = (*([_OUT_OF_MEMORY] if "(signal 9)" in sentence else []), alone)
    verdict = Verdict(recipe["check"], recipe["recipe"], "failed", sentence, {}, evidence)
    report.when = "call"
    report.outcome = "failed"
    report.location = (recipe["source"].partition("::")[0], None, f"{verdict.recipe} · {verdict.check}")
    report.longrepr = verdict.text
    report.user_properties = [
        (RECIPE_PROPERTY, recipe),
        (VERDICT_PROPERTY, verdict.to_dict()),
        (ROW_PROPERTY, row_of(None, [verdict], source=recipe["source"])),
    ]


def how_ended(status: int | None, error: object) -> str:
    """A process's end in words: ``"was killed (signal 9)"``.

    Args:
        status: its exit status, negative for a signal; None where it is not known.
        error: what xdist says.
    """
    if status is None:
        return f"was lost ({(str(error).splitlines() or ['its connection ended'])[0]})"
    if status >= 0:
        return f"ended by itself (exit status {status})"
    verb = "was killed" if -status in (signal.SIGTERM, getattr(signal, "SIGKILL", 9)) else "crashed"
    return f"{verb} (signal {-status})"


def exit_status(gateway: Any) -> int | None:
    """The exit status of a worker's process, where execnet started it as one of its own; None where nobody can tell."""
    if gateway.spec.ssh or gateway.spec.vagrant_ssh or gateway.spec.socket:
        return None  # a process here would be the connection's
    found: list[int | None] = []

    def wait() -> None:
        found.append(gateway._io.wait())

    waiting = threading.Thread(target=wait, name="diffopt-exit-status", daemon=True)
    waiting.start()
    waiting.join(_PATIENCE_SECONDS)
    return found[0] if found else None
