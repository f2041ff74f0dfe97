"""An observation is plain data, JSON in and out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Observation, Recipe, Verdict, observe
from pytest_diffopt.observation.outputs import OutputRecorder, leaves


@pytest.fixture(scope="module")
def observation() -> Observation:
    recipe = Recipe(
        "linear",
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        compilation=Compilation("model", backend="eager"),
        call=Call(inputs=[{"input": torch.ones(2, 8)}]),
    )
    return observe(recipe)


def test_json_round_trip_is_exact(observation: Observation) -> None:
    text = observation.to_json()
    assert Observation.from_json(text) == observation
    assert json.loads(text)["schema_version"] == 1


def test_another_schema_version_is_refused_by_name(observation: Observation) -> None:
    data = json.loads(observation.to_json()) | {"schema_version": 99}
    with pytest.raises(ValueError, match="found schema version 99; this release reads 1"):
        Observation.from_json(json.dumps(data))


def test_what_ran_is_written_down(observation: Observation) -> None:
    assert [call.kind for call in observation.calls] == ["call", "call", "call", "sensitivity"]
    assert observation.compiles.graphs == 1
    assert observation.layers[0].parameters == 64
    assert observation.versions["torch"] == torch.__version__
    assert observation.accelerator in ("sim", "cpu") or torch.accelerator.is_available()


def test_values_survive_encoding() -> None:
    recorder = OutputRecorder()
    value = torch.randn(3, 5, dtype=torch.float64)
    recorder.record("", {"a": value, "b": [value.float(), 3]})
    outputs = {o.leaf: o for o in recorder.outputs()}
    assert list(outputs) == ["a", "b.0", "b.1"]
    assert np.array_equal(outputs["a"].array(), value.reshape(-1).numpy())
    assert np.array_equal(outputs["b.0"].array().astype(np.float32), value.float().reshape(-1).numpy())


def test_a_large_output_is_sampled_evenly() -> None:
    recorder = OutputRecorder()
    recorder.record("", torch.arange(1 << 20, dtype=torch.float32))
    (output,) = recorder.outputs()
    assert output.stride == 4
    assert output.array()[:3].tolist() == [0, 4, 8]


def test_every_kind_of_result_is_found() -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (2, 2))
    found = dict(leaves((torch.ones(1), {"k": np.zeros(2)}, [image], "text", None, 2.5)))
    assert list(found) == ["0", "1.k", "2.0", "5"]


def test_a_verdict_goes_to_json_and_back() -> None:
    verdict = Verdict("parity", "r", "failed", "why", {"n": 1}, ("where", "what to try"))
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
    assert verdict.text == "r · parity: why\n  where\n  what to try"
