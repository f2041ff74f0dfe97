"""The main job, as a user runs it: the example's recipes, through Inductor, in a process of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "flux.recipes.toml"


@pytest.mark.xdist_group("inductor")
def test_the_examples_recipes_hold(run_pytest: Callable[..., pytest.RunResult], pytester: pytest.Pytester) -> None:
    shutil.copy(EXAMPLE, pytester.path / EXAMPLE.name)
    result = run_pytest(EXAMPLE.name, "--diffopt-device=cpu")
    result.assert_outcomes(passed=15)
    result.stdout.fnmatch_lines(
        [
            "*optimization recipes*",
            "flux-nf4 *3 passed*",
            "flux-nf4-compile *6 passed*",
            "flux-nf4-compile-offload *1 unverified: memory, 6 passed*",
            "*15 passed, 1 unverified*",
        ]
    )
