"""A pytest plugin: ``--verdict-log=PATH`` writes what became of every check as JSON, for `compatibility.py` to read.

It runs in the environment of one row, beside whatever versions are installed there, so it imports nothing but pytest and
the names of the properties that it reads.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_diffopt.report.rows import RECIPE_PROPERTY, VERDICT_PROPERTY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--verdict-log", metavar="PATH", help="write what became of every check as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--verdict-log")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's workers send their reports to the one that writes
        config.pluginmanager.register(VerdictLog(Path(path)), "verdict-log")


class VerdictLog:
    """One entry a check: ``{"recipe", "check", "status", "sentence"}``; what does not collect is an entry as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, str]] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            name = report.nodeid.rpartition("/")[2]
            self.entries.append({"recipe": name, "check": "collection", "status": "failed", "sentence": _last(report)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        carried: dict[str, Any] = dict(report.user_properties or ())
        about = carried.get(RECIPE_PROPERTY)
        if about is None or (report.when != "call" and report.passed):
            return
        verdict = carried.get(VERDICT_PROPERTY)
        status = verdict["status"] if verdict is not None and report.when == "call" else report.outcome
        if hasattr(report, "wasxfail"):
            status = "known"
        sentence = verdict["sentence"] if verdict is not None else "" if report.passed else _last(report)
        self.entries.append(
            {"recipe": about["recipe"], "check": about["check"], "status": status, "sentence": sentence}
        )

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        text = json.dumps({"exit_status": int(exitstatus), "checks": self.entries}, indent=1)
        new = self.path.with_suffix(".new")
        new.write_text(text + "\n", encoding="utf-8")
        os.replace(new, self.path)


def _last(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The last line that says something of why it failed or was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = [line.strip() for line in report.longreprtext.splitlines() if line.strip()]
    return lines[-1] if lines else ""
