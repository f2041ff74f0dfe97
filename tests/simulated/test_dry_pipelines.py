"""A dry pipeline counts what the computed one does, to the byte: every placement, in two sizes of what is real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.simulated.dry_and_wet import SIZES, cases

ENTERS = False  # see conftest.py

pytest.importorskip("diffusers")
pytest.importorskip("bitsandbytes")


def measured(replica: str) -> dict[str, Any]:
    """What a process of its own measures."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.simulated.dry_and_wet", replica],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("replica", SIZES)  # one test a replica: its program runs once, whichever worker has it
def test_dry_and_computed_count_the_same_in_every_placement(replica: str) -> None:
    rows = measured(replica)
    assert set(rows) == {str(case) for case in cases(replica)}
    differing = {
        (name, real_bytes): (row[real_bytes], row["wet"])
        for case in cases(replica)
        for name, row in [(str(case), rows[str(case)])]
        for real_bytes in map(str, case.real_bytes)
        if row[real_bytes] != row["wet"]
    }
    assert differing == {}
    assert min(row["wet"]["called"]["kernels"] for row in rows.values()) > 100
    # and no size in these pipelines depends on values
    assert {name: row["guesses"] for name, row in rows.items() if row["guesses"]} == {}
