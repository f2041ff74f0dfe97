"""Faults that leave the uncompiled code running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call

from .conftest import WIDTH, Block, Healthy, Judge, StepCounter, TwoPart, assert_all_pass, inputs


class EntersDevice(Healthy):
    """A context manager that Dynamo gives the whole frame up for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.device("cpu"):
            return super().forward(x)


class BreaksInLoop(Healthy):
    """A break inside a loop: Dynamo skips the frame, and its counter of breaks stays 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.first(x)
            torch._dynamo.graph_break()
        return x


class LoopsOverLength(Healthy):
    """A loop over a length that only the tensor knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[: int(x.abs().sum().clamp(2, 3))]
        for _ in range(2):
            kept = self.first(kept)
            if kept.sum() > 1e9:
                kept = kept + 1
        return kept


class Disabled(Healthy):
    """A forward that Dynamo is told to leave alone."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class CompileDoesNothing(Healthy):
    """A model whose compile() was overridden by one that does nothing."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        return None


class Generates(Healthy):
    """A forward that yields: no frame of it can be compiled."""

    def forward(self, x: torch.Tensor) -> Any:
        return next(iter(self.parts(x)))

    @torch.compiler.disable
    def parts(self, x: torch.Tensor) -> Any:
        yield Healthy.forward(self, x)


class AllInAHelper(Healthy):
    """Everything happens in a function that is not compiled; the forward's own graph has no operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helper(self, x)


@torch.compiler.disable
def helper(model: Healthy, x: torch.Tensor) -> torch.Tensor:
    return model.second(model.first(x).relu())


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (EntersDevice, "Unsupported context manager"),
        (BreaksInLoop, "was skipped whole"),
        (Disabled, "model: its forward is marked with torch.compiler.disable"),
        (AllInAHelper, "AllInAHelper.forward"),
        (Generates, "was not traced"),
    ],
)
def test_code_that_is_never_compiled_fails_with_its_cause(judge: Judge, model: type[nn.Module], cause: str) -> None:
    verdict = judge(model)["engagement"]
    assert verdict.status == "failed"
    assert "compiled code of model never ran" in verdict.sentence
    assert cause in verdict.text


def test_a_loop_over_a_tensors_length_is_no_engagement(judge: Judge) -> None:
    verdicts = judge(LoopsOverLength)
    assert verdicts["graph_breaks"].status == "failed"


def test_a_compile_that_does_nothing_is_told_so(judge: Judge) -> None:
    verdict = judge(CompileDoesNothing)["engagement"]
    assert (verdict.status, verdict.sentence) == ("failed", "nothing in model is compiled")


@pytest.mark.parametrize(
    "factory",
    [
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True),
    ],
)
def test_torchs_own_modules_are_compiled_too(judge: Judge, factory: Callable[[], nn.Module]) -> None:
    name = "input" if isinstance(factory(), nn.Sequential) else "src"
    call = Call(inputs=[{name: torch.randn(4, WIDTH)}])
    assert_all_pass(judge(factory, call=call, fullgraph=True))


def test_a_mode_that_records_graphs_says_that_none_ran(judge: Judge) -> None:
    def sentence(**compilation: Any) -> str:
        verdict = judge(Healthy, backend="inductor", **compilation)["engagement"]
        assert verdict.status == "passed"
        return verdict.sentence

    assert "no CUDA graph ran, which mode = reduce-overhead records on a GPU" in sentence(mode="reduce-overhead")
    assert "CUDA graph" not in sentence()


def test_a_healthy_model_passes(judge: Judge) -> None:
    verdicts = judge(Healthy, fullgraph=True)
    assert_all_pass(verdicts)
    assert verdicts["engagement"].sentence == "compiled code ran in all 3 calls of model (1 graph, 3 operations)"


class HoldsForward(TwoPart):
    """Keeps the denoiser's forward from before it was compiled."""

    def __init__(self, encoder: nn.Module, denoiser: nn.Module) -> None:
        super().__init__(encoder, denoiser)
        self.held = denoiser.forward

    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.held(x)
        return result


class HoldsForwardLater(HoldsForward):
    """Calls the module at first, and what it held from the second step on."""

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        x = self.embed(prompt)
        for step in range(num_inference_steps):
            x = x + 0.1 * (TwoPart.denoise(self, x) if step == 0 else self.denoise(x))
        return {"images": x}


def test_a_held_forward_is_found(judge: Judge) -> None:
    verdict = judge(lambda: HoldsForward(Healthy(), Healthy()), component="denoiser", call=Call())["engagement"]
    assert verdict.status == "failed"
    assert "compiled code of denoiser never ran: its compiled call was never entered" in verdict.sentence
    assert "denoiser ran 9 times in the eager reference: the pipeline calls the uncompiled forward" in verdict.text


def test_a_forward_held_for_some_steps_is_found(judge: Judge) -> None:
    verdict = judge(lambda: HoldsForwardLater(Healthy(), Healthy()), component="denoiser", call=Call())["engagement"]
    assert verdict.status == "failed"
    assert "denoiser ran 9 times in the eager reference, but only 3 calls were compiled" in verdict.sentence


@pytest.mark.parametrize("component", ["denoiser", "encoder"])
def test_a_healthy_pipeline_passes(judge: Judge, component: str) -> None:
    assert_all_pass(judge(lambda: TwoPart(Healthy(), Healthy()), component=component, call=Call(), fullgraph=True))


class Blocks(nn.Module):
    """Two kinds of blocks, as in Flux."""

    _repeated_blocks = ("Block", "OtherBlock")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.others = nn.ModuleList(OtherBlock() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *self.others]:
            x = block(x)
        return x


class OtherBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class MissesOneClass(Blocks):
    _repeated_blocks = ("Block",)


class PassesBlocksBy(Blocks):
    """A root that calls its blocks' forward, as a hook may: their compiled calls are never entered."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.blocks, *self.others]:
            x = block.forward(x)
        return x


class SkipsSomeBlocks(Blocks):
    """The last block is called past its compiled call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = [*self.blocks, *self.others]
        for block in blocks[:-1]:
            x = block(x)
        return blocks[-1].forward(x)  # type: ignore[no-any-return]


def test_regional_compile_that_misses_a_class_of_blocks_is_found(judge: Judge) -> None:
    verdict = judge(MissesOneClass, scope="repeated_blocks")["engagement"]
    assert verdict.status == "failed"
    assert verdict.sentence == "regional compile missed blocks of model: OtherBlock"


def test_regional_compile_that_no_call_enters_is_found(judge: Judge) -> None:
    verdict = judge(PassesBlocksBy, scope="repeated_blocks")["engagement"]
    assert verdict.status == "failed"
    assert "never entered" in verdict.sentence


def test_a_block_called_past_its_compiled_call_is_found(judge: Judge) -> None:
    verdict = judge(SkipsSomeBlocks, scope="repeated_blocks")["engagement"]
    assert verdict.status == "failed"
    assert "model ran 18 times in the eager reference, but only 15 calls were compiled" in verdict.sentence


def test_healthy_regional_compile_passes(judge: Judge) -> None:
    assert_all_pass(judge(Blocks, scope="repeated_blocks", fullgraph=True))


def crashing_backend(graph: Any, example_inputs: Any) -> Any:
    raise RuntimeError("the compiler crashed")


def test_a_compiler_crash_is_the_recipes_failure_with_its_cause(judge: Judge) -> None:
    verdict = judge(Healthy, backend=crashing_backend)["engagement"]
    assert verdict.status == "failed"
    assert "the recipe did not run: BackendCompilerFailed" in verdict.sentence
    assert "the compiler crashed" in verdict.text


def test_a_suppressed_compiler_crash_is_found(judge: Judge) -> None:
    verdicts = judge(Healthy, backend=crashing_backend, dynamo={"suppress_errors": True})
    assert verdicts["engagement"].status == "failed"
    assert verdicts["graph_breaks"].status == "failed"
    assert "BackendCompilerFailed" in verdicts["engagement"].text


class Stands(Healthy):
    def __init__(self) -> None:
        super().__init__()
        torch.compiler.set_stance("force_eager")


def test_a_stance_that_forces_eager_is_found_and_given_back(judge: Judge) -> None:
    verdicts = judge(Stands)
    assert verdicts["engagement"].status == "failed"
    assert "stance" in verdicts["engagement"].text
    assert verdicts["state"].status == "failed"
    compiled = torch.compile(Healthy(), backend="eager", fullgraph=True)
    compiled(torch.zeros(1, WIDTH))  # would raise under force_eager with fullgraph, had the stance been left


def test_an_exhausted_limit_is_no_engagement(judge: Judge) -> None:
    verdict = judge(StepCounter, call=Call(inputs=inputs(), calls=12))["engagement"]
    assert verdict.status == "failed"
    assert "ran eager" in verdict.sentence
    assert "recompile_limit is exhausted" in verdict.text
