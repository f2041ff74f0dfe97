"""The table of versions that were run: made of results, and of the versions that are pinned."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compatibility() -> Any:
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "tools" / "compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compatibility"] = module
    spec.loader.exec_module(module)
    return module


def entry(compatibility: Any, changes: dict[str, str], checks: list[dict[str, str]], problem: str = "") -> Any:
    versions = {"torch": "2.13.0", "diffusers": "0.42.1", "pytest": "9.2.0", **changes}
    return compatibility.entry_of(compatibility.Row(changes), versions, "-k", {"checks": checks}, problem)


def test_what_a_row_changes_stands_out_and_what_broke_is_named(compatibility: Any) -> None:
    passed = {"recipe": "a", "check": "parity", "status": "passed", "sentence": ""}
    failed = {"recipe": "b|c", "check": "memory", "status": "failed", "sentence": ""}
    results = [
        entry(compatibility, {}, [passed]),
        entry(compatibility, {"torch": "2.14.1"}, [passed, failed]),
        entry(compatibility, {"pytest": "8.0.2"}, [], "no\nmatching distribution"),
    ]
    lines = compatibility.table_of(results).splitlines()
    assert lines[2] == "| 2.13.0 | 0.42.1 | - | - | - | 9.2.0 | 1 | 1 passed | nothing |"
    assert lines[3] == r"| **2.14.1** | 0.42.1 | - | - | - | 9.2.0 | 2 | 1 failed, 1 passed | `b\|c`: memory |"
    assert lines[4].endswith("| **8.0.2** | 0 | none | did not run: no matching distribution |")


def test_a_row_changes_its_lines_of_the_constraints_and_no_other(compatibility: Any) -> None:
    text = "torch==2.13.0\ndiffusers==0.42.1\nsafetensors==0.6\n"
    row = compatibility.Row({"diffusers": "0.40.0"}, ("safetensors",))
    assert compatibility.constraints_of(text, row) == "torch==2.13.0\ndiffusers==0.40.0\n"
    with pytest.raises(ValueError, match=r"constraints.txt has no line of nothing"):
        compatibility.constraints_of(text, compatibility.Row({"nothing": "1"}))
    every_line = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for known in compatibility.ROWS:
        assert compatibility.constraints_of(every_line, known)


def test_a_new_result_takes_the_place_of_the_old_one_in_the_order_of_the_rows(compatibility: Any) -> None:
    first, second = (entry(compatibility, dict(row.changes), []) for row in compatibility.ROWS[:2])
    gone = {**first, "row": "a row that is no more"}
    newer = {**first, "problem": "newer"}
    assert compatibility.merged([second, first, gone], [newer]) == [newer, second]


def test_the_page_has_the_table_of_the_recorded_results(compatibility: Any) -> None:
    page = compatibility.PAGE.read_text(encoding="utf-8")
    results = json.loads(compatibility.RESULTS.read_text(encoding="utf-8")) if compatibility.RESULTS.is_file() else []
    assert compatibility.with_table(page, compatibility.table_of(results)) == page
    with pytest.raises(ValueError, match="the page has no table to replace"):
        compatibility.with_table("nothing", "table")


def test_the_first_row_is_what_is_pinned(compatibility: Any) -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    results = json.loads(compatibility.RESULTS.read_text(encoding="utf-8")) if compatibility.RESULTS.is_file() else []
    for one in (one for one in results if not one["changes"]):
        assert {name: one["versions"][name] for name in compatibility.LIBRARIES} == {
            name: pinned[name] for name in compatibility.LIBRARIES
        }
