"""What a recipe requires: where it is not installed the recipe is skipped and says why; nothing else of it is a mistake."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest

RECIPES = f"""
[recipe.there]
pipeline = "models:Model"
call = {{ inputs = "models:inputs" }}
requires = ["pytest=={version("pytest")}"]

[recipe.missing]
pipeline = "tiny-flux"
compilation.component = "transformer"
compilation.backend = "a-backend-of-that-library"
requires = "a-library-that-nobody-has>=2"

[recipe.too-old]
extends = "there"
requires = ["pytest>=1", "pytest>=1000"]
"""

MODELS = """
import torch


class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 8)


def inputs():
    return {"input": torch.randn(2, 8)}
"""

OVER = """
import pytest_diffopt


@pytest_diffopt.recipes("a.recipes.toml")
def test_it(recipe):
    assert recipe.name == "there"
"""


@pytest.fixture
def files(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.path.joinpath("a.recipes.toml").write_text(RECIPES, encoding="utf-8")
    pytester.makepyfile(models=MODELS, test_over=OVER)
    return pytester


def test_a_recipe_whose_library_is_missing_is_skipped_with_the_reason(
    files: pytest.Pytester, run_pytest: RunPytest
) -> None:
    result = run_pytest("a.recipes.toml", "test_over.py", "-rs", "-p", "no:cacheprovider", "--diffopt-device=cpu")
    assert result.ret == pytest.ExitCode.OK
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["skipped"], outcomes.get("failed", 0)) == (3, 9, 0)
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED * a.recipes.toml:*: needs a-library-that-nobody-has, which is not installed",
            f"SKIPPED * a.recipes.toml:*: needs pytest>=1000; {version('pytest')} is installed",
            "SKIPPED * test_over.py:*: needs a-library-that-nobody-has, which is not installed",
        ]
    )


def test_a_strict_run_fails_on_it(files: pytest.Pytester, run_pytest: RunPytest) -> None:
    result = run_pytest("a.recipes.toml", "-k", "missing", "--diffopt-strict", "--diffopt-device=cpu")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*--diffopt-strict fails this run: * skipped*"])


def test_its_mistakes_that_need_no_library_are_told_all_the_same(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    text = '[recipe.wrong]\npipeline = "tiny-flux"\ndtype = "float64"\nrequires = ["torchao > > 1", "nobody-has-it"]\n'
    pytester.path.joinpath("a.recipes.toml").write_text(text, encoding="utf-8")
    result = run_pytest("a.recipes.toml")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(
        [
            "*recipe.wrong.dtype: found 'float64'*",
            "*recipe.wrong.requires[[]0]: found 'torchao > > 1'; a package and its versions, 'torchao>=0.18', or a list *",
        ]
    )
