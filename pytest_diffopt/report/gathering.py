"""What the report of one item carries of its recipe, wherever it ran: read once, for all that a run says in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from pytest_diffopt.report.rows import (
    RECIPE_PROPERTY,
    RECORD_PROPERTY,
    RESIDENCY_PROPERTY,
    ROW_PROPERTY,
    VERDICT_PROPERTY,
    Row,
    row_of,
)

REPORTED = pytest.StashKey[bool]()
"""Whether anything is written of this run that needs the records of recipes."""


@dataclass(frozen=True)
class Carried:
    """One check of one recipe, as plain data.

    Attributes:
        source: where the recipe stands: its node id, or that of a test. recipe: its name. check: or the test's name.
        status: ``failed``, ``unverified``, ``skipped``, ``known`` (a known fault, as expected) or ``passed``.
        sentence: of the verdict; where there is none, why the test did not pass.
        rows: the figures, see :func:`row_of`, each with this check's status.
        verdict, record: None where the item carries none.
        residencies: kind (``observed``, ``forecast``) → whose bytes were on the accelerator, see `Residency`.
        file, line: of the item, from the root of the tests, from 1; None where pytest does not know it.
    """

    source: str
    recipe: str
    check: str
    status: str
    sentence: str = ""
    rows: tuple[Row, ...] = ()
    verdict: Mapping[str, Any] | None = None
    record: Mapping[str, Any] | None = None
    residencies: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    line: int | None = None


def carried_by(report: pytest.TestReport) -> Carried | None:
    """What an item's report carries; None for other tests, and for the reports in which an item does not count.

    An item counts once: at its call, or where its setup did not let it get there.
    """
    properties: list[tuple[str, Any]] = list(report.user_properties or ())
    held = dict(properties)
    about = held.get(RECIPE_PROPERTY)
    if about is None or not (report.when == "call" or (report.when == "setup" and not report.passed)):
        return None
    rows = [row for name, row in properties if name == ROW_PROPERTY]
    rows = rows or [row_of(None, source=about["source"], recipe=about["recipe"])]
    verdict = held.get(VERDICT_PROPERTY)
    status: str = verdict["status"] if verdict else report.outcome
    if hasattr(report, "wasxfail") and status in (
        "failed",
        "skipped",
    ):  # whatever a mark expects, what passed has passed
        status = "known"
    file, line, _ = report.location
    return Carried(
        source=about["source"],
        recipe=about["recipe"],
        check=about["check"],
        status=status,
        sentence=verdict["sentence"] if verdict else _why(report),
        rows=tuple({**row, "statuses": {about["check"]: status}, "content": about.get("content")} for row in rows),
        verdict=verdict,
        record=held.get(RECORD_PROPERTY),
        residencies=held.get(RESIDENCY_PROPERTY, {}),
        file=file,
        line=None if line is None else line + 1,
    )


def _why(report: pytest.TestReport) -> str:
    """The reason of a skip, or the last line of a failure; empty of a pass."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    # not report.longreprtext: under pytest-xdist that begins with a line about the worker
    text = crash.message if crash is not None else report.longrepr or ""
    lines = [line for line in str(text).splitlines() if line.strip()]
    return lines[0].strip().removeprefix("Failed: ") if lines else ""  # as pytest.fail() has it
