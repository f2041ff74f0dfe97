"""What `diffopt forecast` prints in a process of its own: its table, and nothing of the libraries that it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERPRETER = sys.executable  # read while tests are collected: the libraries must not be imported already


def test_a_forecast_prints_its_table_and_nothing_on_stderr() -> None:
    budgets = ROOT / "examples" / "full-size-budgets.recipes.toml"
    ran = subprocess.run(
        [INTERPRETER, "-m", "pytest_diffopt", "forecast", str(budgets), "--recipe", "flux-nf4"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("Peak memory in GiB")
