"""Calls that are made for their time alone, and what a baseline makes of them on a device that is taken for a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Recipe, observe
from pytest_diffopt.accelerators import Accelerator
from pytest_diffopt.baseline.latency import latency_of
from pytest_diffopt.checks.session import Session

SEEN: list[int] = []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


class Counts(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.append(1)
        return super().forward(x)


CALL = Call(inputs=[{"x": torch.ones(2, 64)}])


def test_timed_calls_are_made_and_change_nothing_else() -> None:
    SEEN.clear()
    plain = observe(Recipe("r", Counts, call=CALL), accelerator="cpu")
    made = len(SEEN)
    SEEN.clear()
    timed = observe(Recipe("r", Counts, call=CALL), accelerator="cpu", timed_calls=4)
    assert len(SEEN) == made + 4
    assert len(timed.timed_seconds) == 4
    assert min(timed.timed_seconds) > 0
    assert plain.timed_seconds == ()
    assert [call.kind for call in timed.calls] == [call.kind for call in plain.calls]
    assert timed.outputs == plain.outputs


def test_a_session_times_a_recipe_and_its_eager_reference() -> None:
    recipe = Recipe("r", Net, compilation=Compilation("model", backend="eager"), call=CALL)
    session = Session(Accelerator("cpu", "cpu"), timed_calls=3)
    evidence = session.evidence(recipe)
    assert evidence.reference is not None
    found: Any = latency_of(evidence.observation, evidence.reference)
    assert found.cold.value > 1  # it compiled
    assert found.steady.low <= found.steady.value <= found.steady.high


def test_timed_calls_that_fail_are_a_note_and_no_failure() -> None:
    class Tires(Net):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Tires.runs += 1
            if Tires.runs > made:
                raise RuntimeError("enough")
            return super().forward(x)

    made = 10**9
    recipe = Recipe("r", Tires, call=CALL)
    observe(recipe, accelerator="cpu", precise=False)
    made, Tires.runs = Tires.runs, 0
    seen = observe(recipe, accelerator="cpu", precise=False, timed_calls=2)
    assert seen.failure is None
    assert seen.timed_seconds == ()
    assert "the timed calls ended with RuntimeError: enough" in seen.notes


@pytest.mark.diffopt_requires_gpu(backends=["cuda"])
def test_on_a_gpu_a_compiled_model_has_a_latency() -> None:
    from pytest_diffopt.accelerators import select

    recipe = Recipe("r", Net, compilation=Compilation("model"), call=CALL)
    evidence = Session(select("cuda"), timed_calls=5).evidence(recipe)
    assert evidence.reference is not None
    assert latency_of(evidence.observation, evidence.reference) is not None
