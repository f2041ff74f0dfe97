"""Which combinations of a matrix are left out, and why: said at the end of a run, and where tests are only collected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_diffopt.matrix import Matrix

NAMES_SHOWN = 6
"""Combinations that a line names; the rest are counted."""

_TO_CONTROLLER = "diffopt_left_out"
"""Under which a worker of pytest-xdist hands it over, as plain JSON."""

LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()
"""``FILE::TABLE`` → the lines about it."""


def note_left_out(config: pytest.Config, source: str, matrix: Matrix) -> None:
    """Keep what is to be said of a matrix; nothing where none of its combinations is left out."""
    if matrix.left_out:
        reasons: dict[str, list[str]] = {}
        for one in matrix.left_out:
            reasons.setdefault(one.reason, []).append(one.recipe)
        every = len(matrix.left_out) + len(matrix.valid)
        key = f"{source}::{matrix.name}"
        config.stash.setdefault(LEFT_OUT, {})[key] = left_out_lines(key, every, reasons)


def left_out_lines(source: str, every: int, reasons: Mapping[str, Iterable[str]]) -> list[str]:
    """How many of a matrix's combinations are left out; then a line for each reason, and which.

    Args:
        source: the file and the table.
        every: how many combinations there are.
        reasons: reason → the names of combinations.
    """
    counts = {reason: list(names) for reason, names in reasons.items()}
    lines = [f"{source}: {sum(map(len, counts.values()))} of {every} combinations left out: they are no valid recipes"]
    for reason, names in counts.items():
        rest = len(names) - NAMES_SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        lines.append(f"  {', '.join(names[:NAMES_SHOWN])}{more}: {reason}")
    return lines


class CombinationsReport:
    """Says it, whichever process collected the file."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def pytest_report_collectionfinish(self, config: pytest.Config) -> list[str]:
        return self.lines(config) if config.getoption("collectonly") else []

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[_TO_CONTROLLER] = session.config.stash.get(LEFT_OUT, {})

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        self.found |= (getattr(node, "workeroutput", None) or {}).get(_TO_CONTROLLER, {})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        lines = [] if config.getoption("collectonly") else self.lines(config)
        if lines:
            terminalreporter.section("combinations left out")
        for line in lines:
            terminalreporter.write_line(line)

    def lines(self, config: pytest.Config) -> list[str]:
        """What is known here and from workers, each matrix once."""
        own: dict[str, list[str]] = config.stash.get(LEFT_OUT, {})
        found = {**self.found, **own}
        return [line for lines in found.values() for line in lines]
