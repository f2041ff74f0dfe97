"""Recipe files that really run: tiny models, the eager backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest

pytest.importorskip("torch")

MODEL = """
import torch


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.inner(x))


class Counts(Toy):
    step = 0

    def forward(self, x):
        self.step += 1
        return super().forward(x) * self.step


def inputs():
    return {"x": torch.randn(2, 8, generator=torch.Generator().manual_seed(0))}


def toy():
    return Toy()


def counts():
    return Counts()


def raises():
    raise ValueError("no such weights")
"""

TEST = """
import toys
from pytest_diffopt import Call, Compilation, Recipe, assert_recipe, check, recipes


def recipe(name, factory):
    compilation = Compilation("model", backend="eager", fullgraph=True)
    return Recipe(name=name, pipeline=factory, compilation=compilation, call=Call(inputs=toys.inputs))


@recipes(recipe("healthy", toys.toy), recipe("faulty", toys.counts))
def test_observed(recipe, observation):
    assert observation.compiles.graphs >= 1
    assert not observation.compiles.recompiles
"""


def test_recipes_of_models_get_their_verdicts(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(toys=MODEL)
    pytester.makepyfile(test_toys=TEST)
    pytester.makefile(
        ".recipes.toml",
        models="""
[recipe.raises]
pipeline = "toys:raises"
compilation = { component = "model", backend = "eager" }
""",
    )
    result = run_pytest("-p", "no:cacheprovider")
    text = result.stdout.str()
    assert result.parseoutcomes()["passed"] == 1, text
    assert "no such weights" in text
    for row in (
        "test_toys.py::test_observed[[] * 1 passed",
        "test_toys.py::test_observed[[] * 1 failed: test_observed",
        "raises * 5 failed: engagement *",
    ):
        result.stdout.fnmatch_lines([row])


@pytest.mark.usefixtures("fresh_python")
def test_collecting_a_recipe_file_does_not_import_torch(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makefile(
        ".recipes.toml", a='[recipe.a]\npipeline = "tiny-flux"\ncompilation = { component = "transformer" }\n'
    )
    pytester.makeconftest("import sys\ndef pytest_unconfigure(): print('TORCH', 'torch' in sys.modules)")
    result = run_pytest("--collect-only", "-q")
    result.stdout.fnmatch_lines(["a.recipes.toml::a::engagement", "TORCH False"])
