"""The example of budgets with full-size models: it is forecast in earnest, with no GPU and no weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest

pytest.importorskip("diffusers")
pytest.importorskip("bitsandbytes")

EXAMPLE = Path(__file__).parents[2] / "examples" / "full-size-budgets.recipes.toml"


def test_the_examples_recipes_stay_within_their_budgets_and_k_forecast_runs_nothing_else(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    shutil.copy(EXAMPLE, pytester.path)
    result = run_pytest("-p", "no:cacheprovider", "-k", "forecast")
    assert result.ret == 0, result.stdout.str()
    result.assert_outcomes(passed=3, deselected=18)
    result.stdout.fnmatch_lines(["*flux-nf4-compile-offload*"])
