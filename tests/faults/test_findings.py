"""What an independent tester found: ways to fool a check, and false alarms, that the first faults did not have."""

from __future__ import annotations

import functools
import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Quantization, Recipe, check

from .conftest import WIDTH, Block, Healthy, Judge, TwoPart, assert_all_pass, inputs

DTYPES = ("float32", "bfloat16")
Pair = namedtuple("Pair", ["a", "b"])


def times(factor: float) -> Callable[..., Any]:
    def backend(graph: Any, example_inputs: Any) -> Any:
        return lambda *given: tuple(result * factor for result in graph(*given))

    return backend


# Ways to fool a check.


def compiles_itself() -> nn.Module:
    model = Healthy()
    model.compile(backend=times(1.5))
    return model


def compiles_its_forward() -> nn.Module:
    model = Healthy()
    model.forward = torch.compile(model.forward, backend=times(1.5))  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("factory", [compiles_itself, compiles_its_forward])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_factory_that_compiles_wrongly_is_not_compared_with_itself(
    judge: Judge, factory: Callable[[], nn.Module], compiled: bool
) -> None:
    assert judge(factory, compiled=compiled)["parity"].status == "failed"


def test_a_factory_that_returns_the_same_object_again_is_judged_right(judge: Judge) -> None:
    healthy = functools.lru_cache(Healthy)
    for _ in range(2):
        assert_all_pass(judge(healthy))
    assert judge(functools.lru_cache(Healthy), backend=times(1.1))["parity"].status == "failed"


class Imaginary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wrong = 1.5 if torch.compiler.is_compiling() else 1.0
        return torch.complex(self.layer(x), self.layer(x).relu() * wrong)


class OneChannelOfMany(Healthy):
    """A large channel beside small ones; the small ones are lost when compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.ones(WIDTH, device=x.device)
        scale[0] = 10_000.0
        if torch.compiler.is_compiling():
            scale[1:] = 0.0
        return super().forward(x) * scale.to(x.dtype)


class BetweenTheSamples(Healthy):
    """More elements than are kept; what is wrong stands between those that are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = super().forward(x).repeat(1, 4).repeat(256, 1)
        pattern = torch.ones(wide.shape[1], device=x.device)
        if torch.compiler.is_compiling():
            pattern[1::2] = 1.5
        return wide * pattern


class DrawsAndErrs(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wrong = 1.05 if torch.compiler.is_compiling() else 1.0
        return super().forward(x) * wrong + 0.1 * torch.randn(x.shape, device=x.device)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (Imaginary, "float32"),
        *((model, dtype) for model in (OneChannelOfMany, BetweenTheSamples, DrawsAndErrs) for dtype in DTYPES),
    ],
)
def test_an_error_where_few_look_is_found(judge: Judge, model: type[nn.Module], dtype: str) -> None:
    verdict = judge(model, dtype=dtype, call=Call(inputs=inputs(32, 32, 32)))["parity"]
    assert verdict.status == "failed"
    assert "did not run" not in verdict.sentence


def test_an_output_that_is_random_and_ignores_its_input_is_found(judge: Judge) -> None:
    class OnlyDraws(Healthy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.randn(x.shape, device=x.device) + 0 * super().forward(x)

    verdict = judge(OnlyDraws)["parity"]
    assert verdict.status == "failed"
    assert "ignores its inputs" in verdict.sentence


class PromptLostButEmbedsReturned(TwoPart):
    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        embeds = self.embed(prompt)
        always = torch.linspace(0, 1, WIDTH, device=embeds.device).repeat(4, 1)
        return {"embeds": embeds, "images": self.denoise(always)}


def test_a_second_output_that_is_alive_does_not_excuse_the_images(judge: Judge) -> None:
    factory = lambda: PromptLostButEmbedsReturned(Healthy(), Healthy())  # noqa: E731
    assert "ignores its inputs" in judge(factory, component="denoiser", call=Call())["parity"].sentence


class ResetsDynamo(TwoPart):
    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        return super().__call__(prompt, num_inference_steps)


def test_code_compiled_anew_in_every_call_counts_though_no_guard_failed(judge: Judge) -> None:
    verdict = judge(lambda: ResetsDynamo(Healthy(), Healthy()), component="denoiser", call=Call())["recompiles"]
    assert (verdict.status, verdict.sentence) == ("failed", "2 after warm-up, 0 allowed")


class SwapsALayer(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.second, nn.Linear) or type(self.second) is not nn.Linear:
            self.second = nn.Linear(WIDTH, WIDTH, device=x.device)
        return super().forward(x)


def test_a_layer_that_a_call_swaps_is_named(judge: Judge) -> None:
    nf4 = Quantization("bitsandbytes_4bit", components=["model"], kwargs={"bnb_4bit_quant_type": "nf4"})
    verdict = judge(SwapsALayer, quantization=nf4, compiled=False)["quantization"]
    assert verdict.status == "failed"
    assert "model.second was changed by a call: it is a plain Linear in float32 after it" in verdict.text


class InSequential(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.rest = nn.Sequential(*(Other() for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.rest(x)  # type: ignore[no-any-return]


class Other(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


def test_blocks_in_a_sequential_are_missed_like_those_in_a_list(judge: Judge) -> None:
    verdict = judge(InSequential, scope="repeated_blocks")["engagement"]
    assert verdict.sentence == "regional compile missed blocks of model: Other"


# False alarms.


class Masked(Healthy):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.softmax(super().forward(x) + mask, -1)


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)  # type: ignore[no-any-return]


class Sums(Healthy):
    def forward(self, x: Pair) -> torch.Tensor:
        return super().forward(x.a) + x.b


class Logs(Healthy):
    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * sigma.log()


def mask() -> torch.Tensor:
    return torch.zeros(4, WIDTH).masked_fill(torch.arange(WIDTH) > 40, float("-inf"))


X = inputs(4)[0]["x"]
HEALTHY: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a mask with infinities": (Masked, {"x": X, "mask": mask()}),
    "integers only": (Embeds, {"ids": torch.arange(12).reshape(3, 4)}),
    "a named tuple": (Sums, {"x": Pair(X, X + 1)}),
    "a number that must stay positive": (Logs, {"x": X, "sigma": torch.full((4, 1), 3.0)}),
    "a slice of a larger tensor": (Healthy, {"x": torch.randn(4, 2 * WIDTH)[:, ::2]}),
    "an expanded tensor": (Healthy, {"x": torch.randn(1, WIDTH).expand(4, WIDTH)}),
    "a parameter": (Healthy, {"x": nn.Parameter(X)}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_inputs_of_many_kinds_are_no_fault(judge: Judge, name: str) -> None:
    model, given = HEALTHY[name]
    assert_all_pass(judge(model, call=Call(inputs=given), fullgraph=model is not Sums))


def test_inputs_that_a_callable_draws_are_the_same_for_recipe_and_reference(judge: Judge) -> None:
    assert_all_pass(judge(Healthy, call=Call(inputs=lambda: {"x": torch.randn(4, WIDTH)})))


class Coder(nn.Module):
    """An autoencoder whose forward calls its own encode and decode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).relu()  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


def test_recording_leaves_no_guard_in_compiled_code(judge: Judge) -> None:
    assert_all_pass(judge(lambda: TwoPart(Healthy(), Coder()), component="denoiser", call=Call(), fullgraph=True))


def patched() -> nn.Module:
    model = Healthy()
    model.forward = types.MethodType(lambda self, x: self.first(x).sigmoid(), model)  # type: ignore[method-assign]
    return model


class ReturnsItsBuffer(Healthy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4, WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        self.seen.copy_(x)
        return super().forward(x), self.seen


class MyLinear(nn.Linear):
    pass


def subclassed() -> nn.Module:
    model = Healthy()
    model.first = MyLinear(WIDTH, WIDTH)
    return model


def test_further_healthy_models_pass(judge: Judge) -> None:
    assert_all_pass(judge(patched, fullgraph=True))
    assert_all_pass(judge(ReturnsItsBuffer))
    nf4 = Quantization("bitsandbytes_4bit", components=["model"], kwargs={"bnb_4bit_quant_type": "nf4"})
    assert_all_pass(judge(subclassed, quantization=nf4, compiled=False))


class ToBytes(Healthy):
    """An image in whole bytes, its sum added up in another order when compiled: a step of one here and there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        y = (y * 1000.0) / 1000.0 if torch.compiler.is_compiling() else y
        return (y.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def test_one_step_of_a_byte_image_is_rounding(judge: Judge) -> None:
    assert_all_pass(judge(ToBytes, call=Call(inputs=inputs(256, 256, 256))))


# Errors that used to escape, or to say too little.


def test_an_exit_in_a_factory_is_the_recipes_failure_with_its_place(judge: Judge) -> None:
    def leaves() -> nn.Module:
        raise SystemExit(3)

    verdict = judge(leaves)["engagement"]
    assert "the recipe did not run: SystemExit: 3 (while preparing)" in verdict.sentence
    assert "test_findings.py:" in verdict.text


def test_recipes_of_one_content_keep_their_own_names() -> None:
    from pytest_diffopt.checks.session import Session

    session = Session()
    first = Recipe("first", Healthy, call=Call(inputs=inputs()))
    session.judge_all(first)
    assert session.observe(first.replace(name="second")).name == "second"


def test_what_is_no_recipe_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="check: found str; it takes a Recipe"):
        check("tiny-flux")  # type: ignore[arg-type]


def test_what_keeps_dynamo_from_compiling_is_named(judge: Judge) -> None:
    with torch._dynamo.config.patch(disable=True):
        verdict = judge(Healthy)["engagement"]
    assert verdict.status == "failed"
    assert "nothing compiles: torch._dynamo.config.disable is set" in verdict.text
