"""A dry pipeline counts what the computed one does, to the byte: every placement, in two sizes of what is real."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.simulated.dry_and_wet import SIZES, cases

pytest.importorskip("diffusers")
pytest.importorskip("bitsandbytes")

CASES = [
    pytest.param(replica, str(case), str(real_bytes), marks=pytest.mark.xdist_group(f"dry {replica}"))
    for replica in SIZES
    for case in cases(replica)
    for real_bytes in case.real_bytes
]


@cache
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


@pytest.mark.parametrize(("replica", "case", "real_bytes"), CASES)
def test_dry_and_computed_count_the_same(replica: str, case: str, real_bytes: str) -> None:
    row = measured(replica)[case]
    assert row[real_bytes] == row["wet"]
    assert row["wet"]["called"]["kernels"] > 100


@pytest.mark.parametrize(
    "replica", [pytest.param(replica, marks=pytest.mark.xdist_group(f"dry {replica}")) for replica in SIZES]
)
def test_no_size_in_these_pipelines_depends_on_values(replica: str) -> None:
    assert {name: row["guesses"] for name, row in measured(replica).items() if row["guesses"]} == {}
