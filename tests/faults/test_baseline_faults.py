"""Faults of a whole library: they are in a recipe and in its reference alike, and a baseline knows what that returned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Recipe
from pytest_diffopt.baseline.judging import Baselines
from pytest_diffopt.baseline.key import key_of
from pytest_diffopt.baseline.record import Record, record_of
from pytest_diffopt.baseline.store import Store, made_entry, read_all
from pytest_diffopt.checks.session import Session
from pytest_diffopt.checks.verdict import Verdict

from .conftest import WIDTH, inputs

SOURCE = "a.recipes.toml"


def recorded(recipe: Recipe, session: Session | None = None) -> tuple[Any, Record, Verdict]:
    """The key and the record of a recipe, as the check `baseline` makes them, and the verdict of parity."""
    session = session or Session()
    evidence = session.evidence(recipe)
    assert evidence.observation.failure is None
    key = key_of(recipe, evidence.observation, session.accelerator)
    return key, record_of(evidence.observation, reference=evidence.reference), session.judge(recipe, "parity")


def test_a_fault_of_a_whole_library_passes_parity_and_is_found_in_the_component_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        "flux",
        "tiny-flux",
        dtype="bfloat16",
        compilation=Compilation("transformer", backend="eager", scope="repeated_blocks"),
        call=Call(calls=1, num_inference_steps=1),
    )
    key, before, _ = recorded(recipe)
    Store(tmp_path).record(SOURCE, "flux", made_entry(key, before))
    assert before.outputs is not None
    assert [one.component for one in before.outputs] == ["text_encoder"] * 2 + [
        "text_encoder_2",
        "transformer",
        "vae",
        "",
    ]
    assert (tmp_path / "a" / "flux.json").stat().st_size < 12_000

    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)  # sums are added in other orders
    try:
        key, again, parity = recorded(recipe)
    finally:
        torch.set_num_threads(threads)
    assert parity.status == "passed"
    verdict = Baselines("base", read_all(tmp_path)).judge(SOURCE, "flux", key, again)
    assert verdict.status == "passed", verdict.text
    assert verdict.evidence[0].startswith(
        "6 outputs of the eager reference are as recorded: none moved by more than 0.00"
    )
    assert verdict.evidence[0].endswith(", in float32)")

    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda *args, **more: 1.01 * gelu(*args, **more))
    key, faulty, parity = recorded(recipe)
    assert parity.status == "passed", parity.text
    verdict = Baselines("base", read_all(tmp_path)).judge(SOURCE, "flux", key, faulty)
    assert verdict.status == "failed"
    assert verdict.sentence == "1 thing not as recorded: 1 worse"
    assert verdict.evidence[0].startswith(
        "worse: change of the eager reference's output in transformer, step 0, the first to change (up to 1.5e-05 of its "
        "size is rounding): 0 recorded, 0.00"
    )


class Scaled(nn.Module):
    """A layer whose result is wrong by a scale in one dtype, compiled or not."""

    def __init__(self, wrong_in: torch.dtype | None = None, scale: float = 1.01) -> None:
        super().__init__()
        self.layer, self.wrong_in, self.scale = nn.Linear(WIDTH, WIDTH), wrong_in, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y * self.scale if y.dtype == self.wrong_in else y


def test_a_fault_that_only_the_narrow_dtype_has_is_found_in_a_baseline_too() -> None:
    from pytest_diffopt.baseline.comparison import differences

    def moved(wrong_in: torch.dtype, dtype: str, scale: float) -> list[str]:
        healthy, again, faulty = (
            recorded(Recipe("r", lambda one=one: Scaled(one, scale), dtype=dtype, call=Call(inputs=inputs(64))))[1]
            for one in (None, None, wrong_in)
        )
        assert healthy.outputs == again.outputs
        # the same recipe: closures that are made again are other models
        found = differences(healthy, dataclasses.replace(faulty, recipe=healthy.recipe), "sim")
        assert {one.direction for one in found if "eager reference" in one.what} <= {"worse"}
        return [one.line for one in found if "eager reference" in one.what]

    (line,) = moved(torch.bfloat16, "bfloat16", 1.01)
    assert line.startswith("worse: change of the eager reference's output in the pipeline, the first to change: its ")
    (line,) = moved(torch.float64, "float32", 1.0001)  # where the values are computed in
    assert line.endswith(" is rounding): 0 recorded, 0.0001 now")


def test_a_model_that_draws_random_numbers_keeps_no_outputs() -> None:
    class Draws(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(1, device=x.device)

    assert recorded(Recipe("r", Draws, call=Call(inputs=inputs(4, 4))))[1].outputs == ()
