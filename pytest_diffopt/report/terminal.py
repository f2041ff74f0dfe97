"""The end of a run in the terminal: the table of recipes, what was not verified, and whether that fails the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest

from pytest_diffopt.options import Settings
from pytest_diffopt.report.figures import mebibytes, number, seconds
from pytest_diffopt.report.gathering import Carried, carried_by
from pytest_diffopt.report.rows import (
    VERDICT_PROPERTY,
    Row,
    is_skipped,
    merged,
    names_of,
    skipped_lines,
    verdict_text,
    worst,
)
from pytest_diffopt.report.tables import (
    GAP,
    Column,
    fitting,
    folded,
    lines_of,
    longest_piece,
    new_table,
    room,
    shortened,
    width_of,
    widths,
)

_NAME_WIDTH, _VERDICT_WIDTH = 32, 24
"""Columns that a recipe's name and verdict get before the figures of least interest do."""


class RecipeReport:
    """Gathers what the reports of items carry, from this process or from pytest-xdist's workers, and prints it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rows: list[Row] = []
        self.unverified: list[tuple[str, str, str]] = []
        self.skipped: list[Carried] = []

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
        width, color = width_of(terminal=bool(terminalreporter.isatty)), terminalreporter.hasmarkup
        for line in table_lines(merged(self.rows), width=width, color=color):
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
            self.skipped.append(carried)

    def summary_lines(self) -> list[str]:
        """Which recipes were skipped, a line for each reason; and what was not verified, each with its sentence."""
        lines = skipped_lines(merged(self.rows), {one.source: one.sentence for one in self.skipped})
        if self.unverified:
            lines.append(f"{len(self.unverified)} unverified: nothing was judged there, so nothing passed")
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


def _host_syncs(row: Row) -> str:
    return number(row.get("host_syncs"))


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
    ("host syncs in a step", _host_syncs),
    ("graphs", lambda row: number(row["graphs"])),
    ("breaks", lambda row: number(row["breaks"])),
    ("recompiles", lambda row: number(row["recompiles"])),
    ("required tolerance", lambda row: number(row["required_tolerance"])),
)


_LEAST_TELLING = tuple(_COLUMNS[place] for place in (4, 3, 8, 0, 1, 5, 6, 7, 2))
_WHERE_KNOWN: dict[Callable[[Row], str], str] = {
    _host_syncs: "host_syncs",
    _peaks: "peak_bytes",
    _forecast: "forecast_bytes",
    _transfers: "h2d_bytes",
}


def table_lines(rows: Sequence[Row], *, width: int, color: bool) -> list[str]:
    """The table of recipes, a row each, in ``width`` columns; recipes that were skipped have none.

    Memory and host syncs have columns where they are known of any, and are not 0. Where the width does not do for all
    columns, the least telling go; names are shortened by what all begin with.
    """
    from rich.text import Text

    called = names_of((row["source"], row["recipe"]) for row in rows)
    shown = [(name, row) for name, row in zip(called, rows, strict=True) if not is_skipped(row["statuses"])]
    if not shown:
        return []
    names, rows = [name for name, _ in shown], [row for _, row in shown]
    common = ""
    if max(map(len, names)) > min(_NAME_WIDTH, width // 3):
        common, names = shortened(names)
    columns = [
        column
        for column in _COLUMNS
        if column[1] not in _WHERE_KNOWN or any(row.get(_WHERE_KNOWN[column[1]]) for row in rows)
    ]
    verdicts = [verdict_text(row["statuses"]) for row in rows]
    longest = [max(map(len, texts)) for texts in (["recipe", *names], ["verdict", *verdicts])]
    needs = [
        min(longest_piece(["recipe", *names]), width // 2),
        max(map(len, ["verdict", *" ".join(verdicts).split()])),
    ]
    wishes = [max(needs[0], min(longest[0], _NAME_WIDTH, width // 3)), max(needs[1], min(longest[1], _VERDICT_WIDTH))]
    columns = fitting(columns, rows, width - sum(wishes) - GAP, _LEAST_TELLING)
    figures = [room(column, rows) - GAP for column in columns]
    spare = width - sum(needs) - sum(figures) - GAP * (len(columns) + 1)
    texts, spare = _widened(needs, wishes, spare)
    texts, spare = _widened(texts, [texts[0], min(longest[1], width * 3 // 8)], spare)
    titles = [max([len(title), *(len(figure(row)) for row in rows)]) for title, figure in columns]
    figures = widths([*texts, *figures], [*texts, *titles], width)[2:]
    spare = width - sum(texts) - sum(figures) - GAP * (len(columns) + 1)
    (name_width, verdict_width), _ = _widened(texts, longest, spare)
    table = new_table()
    table.add_column("recipe", width=name_width)
    for (title, _), wide in zip(columns, figures, strict=True):
        table.add_column(title, justify="right", width=wide)
    table.add_column("verdict", overflow="fold", width=min(verdict_width, width - name_width - GAP))
    for name, row, verdict in zip(names, rows, verdicts, strict=True):
        told = Text(verdict, style=_COLORS.get(worst(row["statuses"]), ""))
        table.add_row(Text(folded(name, name_width)), *(figure(row) for _, figure in columns), told)
    about = [f"names begin with {common}"] if common else []
    return [*about, *lines_of(table, width=width, color=color)]


def _widened(widths: Sequence[int], wishes: Sequence[int], spare: int) -> tuple[list[int], int]:
    """(columns' widths, each as near to what it wishes as what is spare allows, the first one first; what is left)."""
    found = []
    for width, wish in zip(widths, wishes, strict=True):
        more = max(0, min(wish - width, spare))
        found.append(width + more)
        spare -= more
    return found, spare
