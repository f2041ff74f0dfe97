"""The main job, as a user runs it: the example's recipes, through Inductor, in a process of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(run_pytest: Callable[..., pytest.RunResult], pytester: pytest.Pytester, name: str) -> pytest.RunResult:
    shutil.copy(EXAMPLES / name, pytester.path / name)
    return run_pytest(name, "--diffopt-device=sim")


@pytest.mark.xdist_group("inductor")
def test_the_examples_recipes_hold(run_pytest: Callable[..., pytest.RunResult], pytester: pytest.Pytester) -> None:
    result = run_example(run_pytest, pytester, "quantize-compile-offload.recipes.toml")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=25)
    result.stdout.fnmatch_lines(
        [
            "*optimization recipes*",
            "*peak memory*",
            "flux-nf4 *4 passed*",
            "flux-nf4-compile *7 passed*",
            "flux-nf4-compile-offload *7 passed*",
            "wan-nf4-compile-group-offload *7 passed*",
            "*25 passed*",
        ]
    )


def test_the_known_faults_of_libraries_fail_for_their_causes(
    run_pytest: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    result = run_example(run_pytest, pytester, "known-library-faults.recipes.toml")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=15, xfailed=24)
    result.stdout.fnmatch_lines(["int8-model *1 known: memory*"])
