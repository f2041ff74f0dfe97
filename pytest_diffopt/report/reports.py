"""``--diffopt-report``: what a run carries is gathered, made one model at its end, and written as was asked for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.collection.session import SETTINGS
from pytest_diffopt.report.gathering import REPORTED, Carried, carried_by
from pytest_diffopt.report.html import EMBEDDED, PICTURED
from pytest_diffopt.report.junit import flattened
from pytest_diffopt.whole_files import why_not_writable, write_whole

if TYPE_CHECKING:
    from pytest_diffopt.report.gate import Gate
    from pytest_diffopt.report.run import Run

_WORKER_INPUT = "diffopt_reports"


@dataclass(frozen=True)
class Target:
    """A report that was asked for.

    Attributes:
        given: as the user wrote it. path: what it means.
        by_pytest_html: whether pytest-html writes it, with what we put in.
    """

    given: str
    path: Path
    by_pytest_html: bool = False

    @property
    def suffix(self) -> str:
        return self.path.suffix


def configure(config: pytest.Config, gate: Gate | None) -> None:
    """Listen to the run, where it is not a worker's; a worker is told whether pictures are asked for.

    Raises:
        pytest.UsageError: a report cannot be written, or two are of one path.
    """
    told = getattr(config, "workerinput", {}).get(_WORKER_INPUT, {})
    config.stash[PICTURED], config.stash[EMBEDDED] = bool(told.get("pictured")), bool(told.get("embedded"))
    config.stash[REPORTED] = bool(told.get("reported"))
    if hasattr(config, "workerinput"):
        return
    found = targets(config)
    config.stash[REPORTED] = bool(found) or _on_github()
    config.stash[PICTURED] = any(one.suffix in (".json", ".html") for one in found)
    for place, one in enumerate(found):
        if one.suffix == ".html" and _takes_html(config, one.path):
            found[place] = dataclasses.replace(one, by_pytest_html=True)
            config.stash[EMBEDDED] = True
            break
    config.pluginmanager.register(Reports(config, found, gate), "diffopt-reports")


def hand_to_worker(config: pytest.Config, node: Any) -> None:
    """Tell a worker of pytest-xdist what a report will need of it; the report itself is none of its business."""
    node.workerinput[_WORKER_INPUT] = {
        "pictured": config.stash[PICTURED],
        "embedded": config.stash[EMBEDDED],
        "reported": config.stash[REPORTED],
    }


def targets(config: pytest.Config) -> list[Target]:
    """The reports that were asked for, named from where pytest was started, and in an ini file from its own folder.

    Raises:
        pytest.UsageError: one cannot be written, or two are of one path.
    """
    from_line = config.getoption("diffopt_report", default=None) is not None
    where = "--diffopt-report" if from_line else "diffopt_report"
    folder = config.invocation_params.dir if from_line or config.inipath is None else config.inipath.parent
    found: list[Target] = []
    taken: dict[object, str] = {}
    if (junit := getattr(config.option, "xmlpath", None)) is not None:
        taken |= dict.fromkeys(_identities(config.invocation_params.dir / junit), f"--junitxml={junit}")
    for given in config.stash[SETTINGS].report:
        path = folder / Path(given).expanduser()
        if why := why_not_writable(path):
            raise pytest.UsageError(f"{where}: {given!r} cannot be written: {why}")
        same = [taken[identity] for identity in _identities(path) if identity in taken]
        if same:
            raise pytest.UsageError(f"{where}: {given!r} and {same[0]!r} are one file; each report takes its own")
        taken |= dict.fromkeys(_identities(path), given)
        found.append(Target(given, path))
    return found


def _identities(path: Path) -> list[object]:
    """What two spellings of one file have in common: where links lead, and the file itself where it is there."""
    known: list[object] = [os.path.normcase(os.path.realpath(path))]
    if path.is_file():
        status = path.stat()
        known.append((status.st_dev, status.st_ino))
    return known


def _takes_html(config: pytest.Config, path: Path) -> bool:
    """Let pytest-html write the page, where it is there and writes no other."""
    if not config.pluginmanager.has_plugin("html") or not hasattr(config.option, "htmlpath"):
        return False
    if asked := config.option.htmlpath:
        theirs = config.invocation_params.dir / Path(os.path.expandvars(asked)).expanduser()
        return os.path.realpath(theirs) == os.path.realpath(path)
    config.option.htmlpath = str(path)
    config.option.self_contained_html = True
    return True


class Reports:
    """Gathers what the reports of items carry, and writes it at the end.

    Args:
        found: the reports that were asked for.
        gate: what judges the run.
    """

    def __init__(self, config: pytest.Config, found: list[Target], gate: Gate | None) -> None:
        self.targets = found
        self.items: list[Carried] = []
        self.problems: list[str] = []
        self._config = config
        self._gate = gate
        self._started = datetime.now(timezone.utc)
        self._begun = time.monotonic()
        self._pending: dict[str, Carried] = {}
        self._exit_status = 0
        self._written: list[str] = []
        self._theirs: Any = None  # pytest-html's report

    # pytest's hooks

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.add(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._exit_status = int(session.exitstatus)
        if self.targets and not session.config.option.collectonly:
            self.write()
            if self.problems and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_report_title(self, report: Any) -> None:
        self._theirs = report

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        if any(target.by_pytest_html for target in self.targets):
            from pytest_diffopt.report.page import in_pytest_html

            run = self.run()
            prefix.append(in_pytest_html(run))
            if self._theirs is not None:  # the title alone stands above what pytest-html tells of the environment
                self._theirs.title = f"{self._theirs.title} · {run.gate.sentence}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for path in self._written:
            terminalreporter.write_line(f"diffopt: report written: {path}")
        for problem in self.problems:
            terminalreporter.write_line(problem, red=True, bold=True)
        if _on_github() and self.items:
            terminalreporter.ensure_newline()
            for command in self.workflow_commands():
                terminalreporter.write_line(command)

    # what they delegate to

    def add(self, report: pytest.TestReport) -> None:
        """Take what an item's report carries, and flatten it where pytest's own JUnit report reads it, at the teardown."""
        if (carried := carried_by(report)) is not None:
            self.items.append(carried)
            self._pending[report.nodeid] = carried
        if report.when == "teardown" and (carried := self._pending.pop(report.nodeid, None)) is not None:
            self._flatten(report, carried)

    def _flatten(self, report: pytest.TestReport, carried: Carried) -> None:
        if getattr(self._config.option, "xmlpath", None):
            report.user_properties = flattened(report.user_properties, carried)

    def run(self) -> Run:
        """The model of the run, as far as it has come."""
        from pytest_diffopt.report.run import GateRecord, run_of

        outcome = self._gate.outcome if self._gate is not None else None
        if outcome is not None:
            gate = GateRecord(**dataclasses.asdict(outcome))
        else:
            gate = GateRecord(passed=False, sentence="the run has not ended")
        gate = gate.model_copy(update={"strict": self._config.stash[SETTINGS].strict})
        return run_of(
            self.items,
            gate,
            version=importlib.metadata.version("pytest-diffopt"),
            started=self._started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - self._begun,
        )

    def write(self) -> None:
        """Write every report; one that cannot be written any more fails the gate, which the others then say."""
        run = self.run()
        ours = [target for target in self.targets if not target.by_pytest_html]
        failed = [target for target in ours if not self._wrote(target, run)]
        if failed and self._gate is not None:
            self._gate.fail(f"{len(failed)} report{'' if len(failed) == 1 else 's'} could not be written")
            run = self.run()
            for target in ours:
                if target not in failed:
                    self._wrote(target, run)
        self._written = [target.given for target in ours if target not in failed]

    def _wrote(self, target: Target, run: Run) -> bool:
        try:
            write_whole(target.path, _writer(target.suffix)(run))
        except OSError as error:
            self.problems.append(f"--diffopt-report: {target.given!r} cannot be written: {error.strerror}")
            return False
        return True

    def workflow_commands(self) -> list[str]:
        """GitHub's annotations of the run, a workflow command each."""
        from pytest_diffopt.report.annotations import Repository, annotations_of

        root = self._config.rootpath
        top = Path(os.environ.get("GITHUB_WORKSPACE") or root)
        inside = root.resolve().is_relative_to(top.resolve())
        paths = tuple(Path(entry) for entry in sys.path if entry)
        repository = Repository(root, top if inside else root, paths)
        return [one.command for one in annotations_of(self.run(), repository.found, repository.shown)]


def _on_github() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"


def _writer(suffix: str) -> Callable[[Run], str]:
    if suffix == ".json":
        from pytest_diffopt.report.run import to_json

        return to_json
    if suffix == ".md":
        from pytest_diffopt.report.markdown import markdown

        return markdown
    if suffix == ".xml":
        from pytest_diffopt.report.junit import junit_xml

        return junit_xml
    from pytest_diffopt.report.page import page

    return page
