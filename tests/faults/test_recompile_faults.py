"""Faults that compile the same code again and again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Contract

from .conftest import WIDTH, Block, Healthy, Judge, StepCounter, TwoPart, assert_all_pass, inputs


def test_a_step_counter_recompiles_at_every_call(judge: Judge) -> None:
    verdict = judge(StepCounter)["recompiles"]
    assert verdict.status == "failed"
    assert verdict.sentence == "2 after warm-up, 0 allowed"
    assert "guard self.step == …" in verdict.text
    assert "pass it as a tensor" in verdict.text


def test_an_exhausted_limit_is_named_with_the_call_from_which_code_runs_eager(judge: Judge) -> None:
    verdict = judge(StepCounter, call=Call(inputs=inputs(), calls=12))["recompiles"]
    assert verdict.status == "failed"
    assert "the recompile_limit is exhausted: model/StepCounter.forward runs eager from call 8 on" in verdict.sentence


def test_a_raised_limit_does_not_make_recompiles_right(judge: Judge) -> None:
    verdict = judge(StepCounter, call=Call(inputs=inputs(), calls=12), dynamo={"cache_size_limit": 1000})["recompiles"]
    assert verdict.sentence == "11 after warm-up, 0 allowed"


class ResetsEachCall(TwoPart):
    """Counts the steps on the denoiser, from 0 in every call: the second call finds everything compiled."""

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        x = self.embed(prompt)
        denoiser: Any = self.components["denoiser"]
        for step in range(num_inference_steps):
            denoiser.step = step
            x = x + 0.1 * self.denoise(x)
        return {"images": x}


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_a_recompile_at_each_step_is_found_though_the_second_call_has_none(judge: Judge, steps: int) -> None:
    call = Call(num_inference_steps=steps)
    verdict = judge(lambda: ResetsEachCall(Healthy(), StepCounter()), component="denoiser", call=call)["recompiles"]
    assert verdict.status == "failed"
    assert "self.step" in verdict.text


class Scaled(Healthy):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x) * scale


def floats() -> Call:
    return Call(inputs=[{**one, "scale": 1.5 + k} for k, one in enumerate(inputs(4, 4, 4, 4, 4))])


def test_a_python_float_that_changes_recompiles_unless_dynamic(judge: Judge) -> None:
    assert judge(Scaled, call=floats())["recompiles"].sentence == "1 after warm-up, 0 allowed"
    assert judge(Scaled, call=floats(), dynamic=False)["recompiles"].sentence == "4 after warm-up, 0 allowed"
    assert_all_pass(judge(Scaled, call=floats(), dynamic=True))


def test_one_recompile_for_a_dynamic_number_can_be_promised(judge: Judge) -> None:
    verdict = judge(Scaled, call=floats(), contract=Contract(max_recompiles=1))["recompiles"]
    assert verdict.status == "passed"


def test_a_size_that_changes_with_each_call_recompiles_without_dynamic(judge: Judge) -> None:
    call = Call(inputs=inputs(4, 6, 8))
    verdict = judge(Healthy, call=call, dynamic=False)["recompiles"]
    assert verdict.status == "failed"
    assert "size mismatch" in verdict.text
    assert "dynamic = true" in verdict.text
    assert_all_pass(judge(Healthy, call=call, dynamic=True))


class SequenceTimesChannels(nn.Module):
    """Adds along two dimensions that may happen to be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + other.sum()


def test_sizes_that_coincide_recompile_by_duck_shaping(judge: Judge) -> None:
    def sized(*pairs: tuple[int, int]) -> Call:
        return Call(inputs=[{"x": torch.randn(a, WIDTH), "other": torch.randn(b)} for a, b in pairs])

    coinciding = sized((16, 16), (16, 16), (20, 16))
    verdict = judge(SequenceTimesChannels, call=coinciding, dynamic=True)["recompiles"]
    assert verdict.status == "failed"
    assert_all_pass(judge(SequenceTimesChannels, call=sized((20, 16), (20, 16), (24, 16)), dynamic=True))


class Named(Block):
    """A block with a name of its own that forward reads."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if self.name.endswith("0") else 1)


class NamedBlocks(nn.Module):
    _repeated_blocks = ("Named",)

    def __init__(self, names: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Named(f"block {index % names}") for index in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_string_that_differs_in_each_block_exhausts_the_limit(judge: Judge) -> None:
    verdict = judge(lambda: NamedBlocks(12), scope="repeated_blocks")["recompiles"]
    assert verdict.status == "failed"
    assert "the recompile_limit is exhausted" in verdict.sentence
    assert "self.name == …" in verdict.text


def test_a_string_that_differs_in_a_few_blocks_is_over_the_budget_of_regional_compile(judge: Judge) -> None:
    verdict = judge(lambda: NamedBlocks(4), scope="repeated_blocks")["recompiles"]
    assert verdict.status == "failed"
    assert verdict.sentence.startswith("3 of the same code during warm-up, 1 allowed")


@pytest.mark.parametrize("names", [1, 2])
def test_regional_compile_may_recompile_once_a_class(judge: Judge, names: int) -> None:
    assert_all_pass(judge(lambda: NamedBlocks(names), scope="repeated_blocks", fullgraph=True))


def test_two_components_of_one_class_are_no_recompile(judge: Judge) -> None:
    assert_all_pass(judge(lambda: TwoPart(Healthy(), Healthy()), component="denoiser", call=Call()))


def test_one_call_shows_nothing_of_recompiles(judge: Judge) -> None:
    verdict = judge(Healthy, call=Call(inputs=inputs(4), calls=1), contract=Contract(warmup_calls=2))["recompiles"]
    assert verdict.status == "unverified"


def test_compiled_code_of_an_earlier_test_does_not_count(judge: Judge) -> None:
    for _ in range(10):  # ten models of one class: without a reset the ninth would hit the limit
        verdict = judge(Healthy)["recompiles"]
    assert (verdict.status, verdict.sentence) == ("passed", "none after warm-up in 2 calls (none at all)")
