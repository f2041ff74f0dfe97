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


CONTROL = """
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from pytest_diffopt.replicas import families


def sd():
    pipe = families()["tiny-sd"].build()
    control = ControlNetModel.from_unet(pipe.unet)
    return StableDiffusionControlNetPipeline(**pipe.components, controlnet=control, requires_safety_checker=False)


def edges(height, width, call):
    return Image.new("RGB", (width, height), (60 * call, 0, 0))
"""


def test_pictures_are_written_in_a_recipe_file_and_differ_by_call(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    from PIL import Image

    folder = pytester.mkdir("controlled")
    (folder / "controlled.py").write_text(CONTROL)
    Image.new("RGB", (96, 96), "white").save(folder / "white.png")
    (folder / "a.recipes.toml").write_text(
        """
[recipe.control]
pipeline = "controlled:sd"
offloading = { strategy = "model" }
call = { num_inference_steps = 2, sizes = [[96, 96]], kwargs = { image = "control" } }

[recipe.by-call]
extends = "control"
call = { inputs = [{ image = "white.png" }, { image = "controlled:edges", guidance_scale = 2.0 }, {}] }

[recipe.wrong]
extends = "control"
call = { kwargs = { image = "contrl" } }
"""
    )
    wrong = run_pytest("-p", "no:cacheprovider", "controlled")
    wrong.stdout.fnmatch_lines(["*recipe.wrong.call.kwargs.image: found 'contrl'; did you mean 'control'[?]*"])
    text = (folder / "a.recipes.toml").read_text()
    (folder / "a.recipes.toml").write_text(text[: text.index("[recipe.wrong]")])
    result = run_pytest("-p", "no:cacheprovider", "controlled")
    assert result.parseoutcomes()["passed"] == 6, result.stdout.str()


@pytest.mark.usefixtures("fresh_python")
def test_collecting_a_recipe_file_does_not_import_torch(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makefile(
        ".recipes.toml", a='[recipe.a]\npipeline = "tiny-flux"\ncompilation = { component = "transformer" }\n'
    )
    pytester.makeconftest("import sys\ndef pytest_unconfigure(): print('TORCH', 'torch' in sys.modules)")
    result = run_pytest("--collect-only", "-q")
    result.stdout.fnmatch_lines(["a.recipes.toml::a::engagement", "TORCH False"])
