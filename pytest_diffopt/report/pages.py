"""What pages say and what happens: the table of their blocks, a report to paste into an issue, and their recipes as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.options import Settings
from pytest_diffopt.report.tables import folded, lines_of, new_table, width_of

if TYPE_CHECKING:
    from pytest_diffopt.documentation.judging import BlockVerdict

BLOCK_PROPERTY = "diffopt_block"
"""What :func:`block_row` makes, with the page, the line and the heading of the block."""

Row = Mapping[str, Any]

_STATUSES = ("failed", "unverified", "skipped", "expected", "passed")
_COLORS = {"failed": "red", "unverified": "yellow", "skipped": "yellow", "expected": "cyan", "passed": "green"}


def block_row(verdict: BlockVerdict) -> dict[str, Any]:
    """What is known of a block, as plain data that crosses processes.

    Returns:
        ``status``, ``sentence``, ``parts`` (of its recipe, in words), ``toml``, ``verdicts`` (as `Verdict.to_dict`),
        ``notes``, ``code`` (its text), ``error`` (the last lines of its traceback), ``accelerator`` and ``versions``.
    """
    from pytest_diffopt.documentation.live_recipe import described

    run = verdict.run
    return {
        "status": verdict.status,
        "sentence": verdict.sentence,
        "parts": described(verdict.recipe) if verdict.recipe is not None else "",
        "toml": verdict.toml,
        "verdicts": [one.to_dict() for one in verdict.verdicts],
        "notes": list(verdict.notes),
        "code": verdict.block.source,
        "error": list(run.raised.traceback[-12:]) if run is not None and run.raised is not None else [],
        "accelerator": run.accelerator if run is not None else "",
        "versions": dict(run.versions) if run is not None else {},
    }


def block_of(report: pytest.TestReport) -> Row | None:
    """What the report of a block carries; None for other tests, and for the reports in which a block does not count."""
    row = dict(report.user_properties or ()).get(BLOCK_PROPERTY)
    if not isinstance(row, dict) or not (report.when == "call" or (report.when == "setup" and not report.passed)):
        return None
    missed = report.failed and row["status"] in ("skipped", "passed", "unverified")
    return {**row, "status": "failed"} if missed else row


class PageReport:
    """Gathers what the reports of blocks carry, from this process or from workers, prints it and writes the files."""

    def __init__(self, settings: Settings, config: pytest.Config) -> None:
        self.settings = settings
        self.writes = not hasattr(config, "workerinput")
        self.rows: list[Row] = []
        self.problems: list[str] = []

    # pytest's hooks

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.add(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.writes:
            self.write()
        if (self.problems or self.strict_line()) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.rows:
            terminalreporter.section("documentation pages")
            width, color = width_of(terminal=bool(terminalreporter.isatty)), terminalreporter.hasmarkup
            for line in table_lines(self.rows, width=width, color=color):
                terminalreporter.write_line(line)
            terminalreporter.write_line(summary(self.rows))
        for line in (*self.problems, self.strict_line()):
            if line:
                terminalreporter.write_line(line, red=True, bold=True)

    # what they delegate to

    def add(self, report: pytest.TestReport) -> None:
        """Take what a block's report carries; reports of other tests carry nothing."""
        if (row := block_of(report)) is not None:
            self.rows.append(row)

    def write(self) -> None:
        """Write the files that were asked for; one that cannot be written any more fails the run, and says so."""
        from pytest_diffopt.whole_files import write_whole

        for option, path, text in (
            ("--diffopt-docs-extract", self.settings.docs_extract, recipes_text),
            ("--diffopt-docs-report", self.settings.docs_report, markdown),
        ):
            if path is not None:
                try:
                    write_whole(Path(path), text(self.rows))
                except OSError as error:
                    self.problems.append(f"{option}: {path!r} cannot be written: {error.strerror}")

    def strict_line(self) -> str:
        """Why ``--diffopt-strict`` fails the run; empty where it does not."""
        skipped = sum(row["status"] == "skipped" for row in self.rows)
        if not (skipped and self.settings.strict):
            return ""
        return f"diffopt: --diffopt-strict fails this run: {skipped} block{'' if skipped == 1 else 's'} skipped"


def table_lines(rows: Sequence[Row], *, width: int, color: bool) -> list[str]:
    """The table of blocks, a row each, in ``width`` columns."""
    from rich.text import Text

    places = [f"{row['page']}:{row['line']}" for row in rows]
    parts = [row.get("parts", "") or "-" for row in rows]
    table = new_table()
    place_width = min(max(20, width // 4), max(map(len, ["block", *places])))
    table.add_column("block", width=place_width)
    table.add_column("recipe", overflow="fold", max_width=max(16, width // 4))
    table.add_column("verdict", no_wrap=True)
    table.add_column("reason", overflow="fold", ratio=1)
    for row, place, recipe in zip(rows, places, parts, strict=True):
        status = Text(row["status"], style=_COLORS[row["status"]])
        table.add_row(Text(folded(place, place_width)), Text(recipe), status, Text(_one_line(row["sentence"])))
    return lines_of(table, width=width, color=color)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def summary(rows: Sequence[Row]) -> str:
    """``12 blocks: 2 failed, 10 passed``."""
    counts = [(sum(row["status"] == status for row in rows), status) for status in _STATUSES]
    said = ", ".join(f"{count} {status}" for count, status in counts if count)
    return f"{len(rows)} block{'' if len(rows) == 1 else 's'}: {said}"


def recipes_text(rows: Sequence[Row]) -> str:
    """A recipe file of all recipes that were read off the blocks."""
    texts = [row["toml"].rstrip() for row in rows if row.get("toml")]
    head = "# Read off the code blocks of documentation pages by pytest-diffopt."
    return "\n\n\n".join([head, *texts]) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """A report for the maintainer of the pages, to be pasted into an issue: what does not hold, where, and with what."""
    versions: Mapping[str, str] = next((row["versions"] for row in rows if row.get("versions")), {})
    accelerator = next((row["accelerator"] for row in rows if row.get("accelerator")), "")
    pages = list(dict.fromkeys(row["page"] for row in rows))
    lines = [
        "# Code blocks of documentation pages",
        "",
        f"{summary(rows)}, in {', '.join(f'`{page}`' for page in pages)}.",
    ]
    if versions:
        with_versions = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines += ["", f"Run unmodified, on the device `{accelerator}`, with {with_versions}."]
    lines += ["", "| block | recipe | verdict | reason |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = (f"{row['page']}:{row['line']}", row.get("parts", ""), row["status"], row["sentence"])
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    for row in rows:
        if row["status"] in ("failed", "unverified") and row.get("code"):
            lines += _finding(row)
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|") or "-"


def _finding(row: Row) -> list[str]:
    heading = f" · {row['heading']}" if row["heading"] else ""
    lines = ["", f"## `{row['page']}:{row['line']}`{heading}", "", "What it says:", "", *_fenced(row["code"], "python")]
    lines += ["", "What happens:", ""]
    for verdict in row["verdicts"]:
        if verdict["status"] != "passed":
            lines.append(f"- **{verdict['check']}** {verdict['status']}: {_one_line(verdict['sentence'])}")
            lines += [f"  - `{_one_line(line)}`" for line in verdict["evidence"]]
    if row["error"]:
        lines += ["", *_fenced("\n".join(row["error"]), "text")]
    lines += ["", *(f"- {note}" for note in row["notes"])] if row["notes"] else []
    return lines


def _fenced(text: str, language: str) -> list[str]:
    longest = max((len(run) for line in text.splitlines() for run in [line.strip()] if set(run) == {"`"}), default=0)
    marks = "`" * max(3, longest + 1, 4 if "```" in text else 3)
    return [f"{marks}{language}", text.rstrip(), marks]
