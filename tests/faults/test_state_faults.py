"""Faults that leave a global changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config as fx_config

from pytest_diffopt.preparation.borrowed_state import differences, take_snapshot

from .conftest import Healthy, Judge, assert_all_pass


def leaving(change: Callable[[], Any]) -> Callable[[], Healthy]:
    def factory() -> Healthy:
        change()
        return Healthy()

    return factory


def set_limit() -> None:
    torch._dynamo.config.cache_size_limit = 10000  # type: ignore[attr-defined]


def set_duck_shape() -> None:
    fx_config.use_duck_shape = False


def set_callback() -> None:
    torch._dynamo.callback_handler.register_start_callback(lambda *arguments: None)


FAULTS: dict[str, Callable[[], Any]] = {
    "torch._dynamo.config.recompile_limit": set_limit,
    "torch.fx.experimental._config.use_duck_shape": set_duck_shape,
    "torch default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch grad mode": lambda: torch.set_grad_enabled(False),
    "torch.float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "torch.backends.cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "torch compiler callbacks": set_callback,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_global_left_changed_is_named_and_given_back(judge: Judge, name: str) -> None:
    before = take_snapshot()
    verdict = judge(leaving(FAULTS[name]))["state"]
    assert verdict.status == "failed"
    assert name in verdict.text
    assert "while preparing" in verdict.text
    assert differences(before, take_snapshot(), with_random=True) == []


class SetsInForward(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flip()
        return super().forward(x)


@torch.compiler.disable
def flip() -> None:
    torch.backends.cudnn.benchmark = True


def test_a_global_changed_by_a_call_is_named_with_its_phase(judge: Judge) -> None:
    verdict = judge(SetsInForward)["state"]
    assert verdict.sentence == "torch.backends.cudnn.benchmark was left changed, from False to True"


def seeding_backend(graph: Any, example_inputs: Any) -> Any:
    def run(*given: Any) -> Any:
        torch.manual_seed(3)
        return graph(*given)

    return run


def test_a_backend_that_seeds_the_global_generator_is_found(judge: Judge) -> None:
    verdict = judge(Healthy, backend=seeding_backend)["state"]
    assert verdict.status == "failed"
    assert "torch random" in verdict.text


class Draws(Healthy):
    """Randomness that the eager model draws too is the model's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0 * torch.rand(())


def test_randomness_that_the_reference_draws_too_is_no_fault(judge: Judge) -> None:
    assert judge(Draws)["state"].status == "passed"


def test_the_recipes_own_settings_are_no_fault(judge: Judge) -> None:
    before = take_snapshot()
    assert_all_pass(judge(Healthy, dynamo={"cache_size_limit": 1000, "capture_dynamic_output_shape_ops": True}))
    assert differences(before, take_snapshot(), with_random=True) == []


def test_state_is_given_back_after_a_raise(judge: Judge) -> None:
    def raising() -> Healthy:
        set_limit()
        raise ValueError("no such weights")

    before = take_snapshot()
    verdicts = judge(raising)
    assert verdicts["state"].status == "failed"
    assert "the recipe did not run: ValueError: no such weights (while preparing)" in verdicts["engagement"].sentence
    assert differences(before, take_snapshot(), with_random=True) == []
