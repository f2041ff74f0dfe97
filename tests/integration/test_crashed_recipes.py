"""Recipes whose own code raises, as pytest runs them: where the cause stands, and that the run fails."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x).relu()

class Pipeline:
    def __init__(self):
        torch.manual_seed(0)
        self.components = {"denoiser": Net()}

    def __call__(self, prompt, num_inference_steps=2):
        x = self.components["denoiser"](torch.ones(2, 64))
        return {"images": save(x)}

def save(images):
    raise OSError("no room for the pictures")
"""
RECIPES = """
[recipe.net]
pipeline = "models:Pipeline"
compilation = { component = "denoiser", backend = "eager" }
"""
TEST = """
from pytest_diffopt import recipes

@recipes("net.recipes.toml")
def test_reads(observation):
    assert observation.outputs[5]
"""
CAUSE = "the recipe did not run: OSError: no room for the pictures (while running call 0)"
PLACES = [
    '  recipes/models.py:19, in Pipeline.__call__: return {"images": save(x)}',
    '  recipes/models.py:22, in save: raise OSError("no room for the pictures")',
]


@pytest.fixture
def folder(pytester: pytest.Pytester) -> pytest.Pytester:
    """With everything in a folder of its own, which nothing but the recipe file makes importable."""
    written = pytester.mkdir("recipes")
    for name, text in (("models.py", MODELS), ("test_net.py", TEST), ("net.recipes.toml", RECIPES)):
        (written / name).write_text(text.lstrip(), encoding="utf-8")
    return pytester


def test_one_check_alone_fails_with_the_whole_traceback(folder: pytest.Pytester, run_pytest: RunPytest) -> None:
    options = "-n 0 -vv -rN --diffopt-device=cpu --diffopt-baseline=b --diffopt-update-baseline"
    result = run_pytest(*options.split(), "-k", "engagement or test_reads")
    text = result.stdout.str()
    assert result.ret == 1, text
    result.stdout.fnmatch_lines([f"net · engagement: {CAUSE}"])
    result.assert_outcomes(failed=2, deselected=5)
    traceback = ["Traceback (most recent call last):", '  File "recipes/models.py", line 22, in save']
    # once for the check and once for the test that reads the observation
    assert all(text.count(line) == 2 for line in [CAUSE, *PLACES, *traceback])
    assert list(folder.path.glob("b/**/*.json")) == []


def test_all_checks_fail_and_refer_to_the_first_wherever_they_run(
    folder: pytest.Pytester, run_pytest: RunPytest
) -> None:
    reports = ("r.json", "r.md", "r.html", "r.xml")
    options = "-n 2 --diffopt-device=cpu --diffopt-strict recipes/net.recipes.toml"
    result = run_pytest(*options.split(), *(f"--diffopt-report={one}" for one in reports))
    text = result.stdout.str()
    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines(["GATE FAILED: 5 failed; 0 verdicts of 1 recipe passed"])
    assert all(text.count(line) == 1 for line in [CAUSE, *PLACES])
    assert "Traceback" not in text
    (recipe,) = json.loads((folder.path / "r.json").read_text(encoding="utf-8"))["recipes"]
    sentences = {verdict["check"]: verdict["sentence"] for verdict in recipe["verdicts"]}
    see = "the recipe did not run: see recipes/net.recipes.toml::net::engagement"
    assert sentences == {
        "engagement": CAUSE,
        **dict.fromkeys(("graph_breaks", "recompiles", "parity", "state"), see),
    }
    for one in reports:
        written = (folder.path / one).read_text(encoding="utf-8")
        assert written.count("Traceback (most recent call last):") == 1, one
