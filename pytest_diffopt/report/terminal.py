"""The end of a run in the terminal: the table of recipes, what was not verified, and whether that fails the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest

from pytest_diffopt.options import Settings
from pytest_diffopt.report.figures import mebibytes, number, seconds
from pytest_diffopt.report.gathering import carried_by
from pytest_diffopt.report.rows import (
    VERDICT_PROPERTY,
    Row,
    merged,
    verdict_text,
    worst,
)
from pytest_diffopt.report.tables import LOG_WIDTH, Column, fitting, lines_of, new_table

_NAME_WIDTH, _VERDICT_WIDTH = 32, 24
"""Columns that a recipe's name and verdict get before the titles of other columns do."""


class RecipeReport:
    """Gathers what the reports of items carry, from this process or from pytest-xdist's workers, and prints it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rows: list[Row] = []
        self.unverified: list[tuple[str, str, str]] = []
        self.skipped: list[tuple[str, str]] = []

    # pytest's hooks

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.add(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.strict_line() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.rows:
            return
        terminalreporter.section("optimization recipes")
        writer = terminalreporter.config.get_terminal_writer()
        width = writer.fullwidth if terminalreporter.isatty else max(writer.fullwidth, LOG_WIDTH)
        for line in table_lines(merged(self.rows), width=width, color=writer.hasmarkup):
            terminalreporter.write_line(line)
        for line in self.summary_lines():
            terminalreporter.write_line(line, yellow=True)
        if line := self.strict_line():
            terminalreporter.write_line(line, red=True, bold=True)

    # what they delegate to

    def add(self, report: pytest.TestReport) -> None:
        """Take what an item's report carries; reports of other tests carry nothing."""
        carried = carried_by(report)
        if carried is None:
            return
        self.rows += carried.rows
        if carried.status == "unverified":
            self.unverified.append((carried.recipe, carried.check, carried.sentence))
        if carried.status == "skipped":
            self.skipped.append((carried.recipe, carried.check))

    def summary_lines(self) -> list[str]:
        """What was not verified, counted, and each with its sentence."""
        if not self.unverified:
            return []
        lines = [f"{len(self.unverified)} unverified: nothing was judged there, so nothing passed"]
        return lines + [f"  {recipe} · {check}: {sentence}" for recipe, check, sentence in self.unverified]

    def strict_line(self) -> str:
        """Why ``--diffopt-strict`` fails the run; empty where it does not."""
        counts = [(len(self.unverified), "unverified"), (len(self.skipped), "skipped")]
        found = " and ".join(f"{number} {word}" for number, word in counts if number)
        return f"diffopt: --diffopt-strict fails this run: {found}" if found and self.settings.strict else ""


def status_of(report: pytest.TestReport) -> tuple[str, str, tuple[str, Mapping[str, bool]]] | None:
    """How pytest counts and shows an unverified verdict: in a category of its own, so that it looks like no pass."""
    if not report.skipped:
        return None
    verdict = dict(report.user_properties).get(VERDICT_PROPERTY)
    if not isinstance(verdict, dict) or verdict["status"] != "unverified":
        return None
    return "unverified", "u", ("UNVERIFIED", {"yellow": True})


def _latency(row: Row) -> str:
    return f"{seconds(row['cold_seconds'])} / {seconds(row['warm_seconds'])}"


def _peaks(row: Row) -> str:
    return f"{mebibytes(row['load_peak_bytes'])} / {mebibytes(row['peak_bytes'])}"


def _transfers(row: Row) -> str:
    return f"{mebibytes(row['h2d_bytes'])} / {mebibytes(row['d2h_bytes'])}"


def _forecast(row: Row) -> str:
    size = row.get("forecast_bytes")
    return "-" if size is None else f"{size / 2**30:.2f} {row['forecast_model']}"


_COLORS = {"failed": "red", "unverified": "yellow", "skipped": "yellow", "known": "cyan", "passed": "green"}
_Column = Column[Row]
_COLUMNS: tuple[_Column, ...] = (
    ("latency cold / warm (s)", _latency),
    ("peak memory load / call (MiB)", _peaks),
    ("forecast (GiB)", _forecast),
    ("transfers in / out (MiB)", _transfers),
    ("graphs", lambda row: number(row["graphs"])),
    ("breaks", lambda row: number(row["breaks"])),
    ("recompiles", lambda row: number(row["recompiles"])),
    ("required tolerance", lambda row: number(row["required_tolerance"])),
)


_LEAST_TELLING = tuple(_COLUMNS[place] for place in (3, 7, 0, 1, 4, 5, 6, 2))
_OF_MEMORY: dict[Callable[[Row], str], str] = {
    _peaks: "peak_bytes",
    _forecast: "forecast_bytes",
    _transfers: "h2d_bytes",
}


def table_lines(rows: Sequence[Row], *, width: int, color: bool) -> list[str]:
    """The table of recipes, a row each, in ``width`` columns. Memory has columns where it is known of any, and where
    the width does not do for all columns, the verdict stays."""
    from rich.text import Text

    names = [row["recipe"] for row in rows]
    columns = [
        column
        for column in _COLUMNS
        if column[1] not in _OF_MEMORY or any(row.get(_OF_MEMORY[column[1]]) for row in rows)
    ]
    table = new_table()
    names_width = min(max([len("recipe"), *(len(row["recipe"]) for row in rows)]), _NAME_WIDTH)
    columns = fitting(columns, rows, width - names_width - _VERDICT_WIDTH, _LEAST_TELLING)
    table.add_column("recipe", overflow="fold", width=min(names_width, width // 3))
    for title, _ in columns:
        table.add_column(title, justify="right")
    verdicts_width = max([len("verdict"), *(len(verdict_text(row["statuses"])) for row in rows)])
    table.add_column("verdict", overflow="fold", width=min(verdicts_width, max(_VERDICT_WIDTH, width * 3 // 8)))
    for row in rows:
        name = row["recipe"] if names.count(row["recipe"]) == 1 else row["source"] or row["recipe"]
        verdict = Text(verdict_text(row["statuses"]), style=_COLORS.get(worst(row["statuses"]), ""))
        table.add_row(Text(name), *(shown(row) for _, shown in columns), verdict)
    return lines_of(table, width=width, color=color)
