"""Skips of ours are reported at the item that is skipped, not at the line that raises."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

_SKIPPED: pytest.StashKey[str] = pytest.StashKey()


def skip(item: pytest.Item, reason: str) -> NoReturn:
    """Skip, reported at the item's own place."""
    item.stash[_SKIPPED] = reason
    pytest.skip(reason)


def place_skip(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put the item's own place into the report of a skip of ours."""
    if report.skipped and (reason := item.stash.get(_SKIPPED, None)) is not None:
        path, line, _ = item.reportinfo()
        report.longrepr = (os.fspath(path), (line or 0) + 1, f"Skipped: {reason}")
