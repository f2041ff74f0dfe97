"""Skips of ours are reported at the item that is skipped, not at the line that raises."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from pytest_diffopt.report.rows import VERDICT_PROPERTY

_SKIPPED: pytest.StashKey[str] = pytest.StashKey()


def skip(item: pytest.Item, reason: str) -> NoReturn:
    """Skip, reported at the item's own place."""
    item.stash[_SKIPPED] = reason
    pytest.skip(reason)


def unverified(item: pytest.Item, name: str, why: str, *, strict: bool) -> NoReturn:
    """End a test that could not be judged: skipped in a category of its own, or failed where the run is strict.

    Args:
        name: of the marker or fixture that could not. why: the sentence, and further lines that say where.
    """
    text = f"{item.name} · {name}: unverified: {why}"
    if strict:
        pytest.fail(text, pytrace=False)
    sentence, *evidence = why.splitlines()
    verdict = {
        "check": name,
        "recipe": item.name,
        "status": "unverified",
        "sentence": sentence,
        "figures": {},
        "evidence": [line.strip() for line in evidence],
    }
    item.user_properties.append((VERDICT_PROPERTY, verdict))
    skip(item, f"unverified: {name}: {sentence}")


def place_skip(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put the item's own place into the report of a skip of ours."""
    if report.skipped and (reason := item.stash.get(_SKIPPED, None)) is not None:
        path, line, _ = item.reportinfo()
        report.longrepr = (os.fspath(path), (line or 0) + 1, f"Skipped: {reason}")
