"""However a factory spells torch.compile, what is compiled is found, run in the reference without it, and judged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Recipe, Verdict, check

from .conftest import Block, Healthy, TwoPart, assert_all_pass

Backend = Any


def wrong(graph: Any, inputs: Any) -> Any:
    """A compiler whose code is off by half."""

    def call(*args: Any) -> Any:
        return tuple(out * 1.5 if isinstance(out, torch.Tensor) else out for out in graph(*args))

    return call


class Parts(nn.Module):
    """Blocks, a part with a name, and a method that a pipeline calls beside ``forward``."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.decoder = Healthy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.decoder(x)  # type: ignore[no-any-return]

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x) * 2  # type: ignore[no-any-return]


class Pipeline(TwoPart):
    """Runs a denoiser in steps, and another one's ``decode`` at the end."""

    def __init__(self) -> None:
        super().__init__(Healthy(), Parts())
        self.components["vae"] = Parts()
        self.kept: dict[str, Any] = {}

    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        run = self.kept.get("denoiser", self.components["denoiser"])
        return run(x)  # type: ignore[no-any-return]

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        vae: Any = self.components["vae"]
        return {"images": vae.decode(super().__call__(prompt, num_inference_steps)["images"])}


def in_place(pipeline: Pipeline, backend: Backend) -> None:
    pipeline.components["denoiser"].compile(backend=backend)


def wrapped(pipeline: Pipeline, backend: Backend) -> None:
    pipeline.components["denoiser"] = torch.compile(pipeline.components["denoiser"], backend=backend)


def by_forward(pipeline: Pipeline, backend: Backend) -> None:
    denoiser = pipeline.components["denoiser"]
    denoiser.forward = torch.compile(denoiser.forward, backend=backend)  # type: ignore[method-assign]


def by_a_partial(pipeline: Pipeline, backend: Backend) -> None:
    denoiser = pipeline.components["denoiser"]
    denoiser.forward = functools.partial(torch.compile(denoiser.forward, backend=backend))  # type: ignore[method-assign]


def in_the_class(pipeline: Pipeline, backend: Backend) -> None:
    class Decorated(Parts):
        forward = torch.compile(Parts.forward, backend=backend)

    pipeline.components["denoiser"].__class__ = Decorated


def kept_wrapper(pipeline: Pipeline, backend: Backend) -> None:
    pipeline.kept["denoiser"] = torch.compile(pipeline.components["denoiser"], backend=backend)


def kept_forward(pipeline: Pipeline, backend: Backend) -> None:
    pipeline.kept["denoiser"] = torch.compile(pipeline.components["denoiser"].forward, backend=backend)


def kept_function(pipeline: Pipeline, backend: Backend) -> None:
    denoiser = pipeline.components["denoiser"]

    @torch.compile(backend=backend)
    def step(x: torch.Tensor) -> torch.Tensor:
        return denoiser(x)  # type: ignore[no-any-return]

    pipeline.kept["denoiser"] = step


def a_loop_over_blocks(pipeline: Pipeline, backend: Backend) -> None:
    blocks: Any = pipeline.components["denoiser"].blocks
    for block in blocks:
        block.compile(backend=backend)


def wrapped_blocks(pipeline: Pipeline, backend: Backend) -> None:
    blocks: Any = pipeline.components["denoiser"].blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend=backend)


def a_part(pipeline: Pipeline, backend: Backend) -> None:
    denoiser: Any = pipeline.components["denoiser"]
    denoiser.decoder = torch.compile(denoiser.decoder, backend=backend)


def a_method(pipeline: Pipeline, backend: Backend) -> None:
    vae: Any = pipeline.components["vae"]
    vae.decode = torch.compile(vae.decode, backend=backend)


def a_method_of_the_pipeline(pipeline: Pipeline, backend: Backend) -> None:
    pipeline.denoise = torch.compile(pipeline.denoise, backend=backend)  # type: ignore[method-assign]


SPELLINGS = (
    *(in_place, wrapped, by_forward, by_a_partial, in_the_class, kept_wrapper, kept_forward, kept_function),
    *(a_loop_over_blocks, wrapped_blocks, a_part, a_method, a_method_of_the_pipeline),
)


def judged(factory: Callable[..., Any], compilation: Any, **fields: Any) -> dict[str, Verdict]:
    recipe = Recipe("spelled", factory, compilation=compilation, call=Call(), **fields)
    return {verdict.check: verdict for verdict in check(recipe)}


def made(spell: Callable[[Pipeline, Backend], None], backend: Backend) -> Callable[[], Pipeline]:
    def factory() -> Pipeline:
        pipeline = Pipeline()
        spell(pipeline, backend)
        return pipeline

    return factory


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda one: one.__name__)
def test_every_spelling_is_found_and_a_healthy_one_passes(spell: Callable[[Pipeline, Backend], None]) -> None:
    assert_all_pass(judged(made(spell, "eager"), "factory"))


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda one: one.__name__)
def test_what_it_compiles_wrongly_is_found(spell: Callable[[Pipeline, Backend], None]) -> None:
    verdicts = judged(made(spell, wrong), "factory")
    assert verdicts["engagement"].status == "passed"
    assert verdicts["parity"].status == "failed"


def test_a_factory_that_compiles_nothing_is_found() -> None:
    verdict = judged(Pipeline, "factory")["engagement"]
    assert (verdict.status, verdict.sentence) == ("failed", "the factory compiled nothing")


@pytest.mark.parametrize("target", ["vae.decode", "vae.decoder", "denoiser.blocks.1", "denoiser.decoder.first"])
def test_a_recipe_compiles_a_part_or_a_method(target: str) -> None:
    healthy = judged(Pipeline, Compilation(target, backend="eager", fullgraph=True))
    assert_all_pass(healthy)
    assert f"calls of {target} (" in healthy["engagement"].sentence
    assert judged(Pipeline, Compilation(target, backend=wrong))["parity"].status == "failed"


def test_a_part_that_is_never_called_is_found() -> None:
    verdict = judged(Pipeline, Compilation("vae.blocks.0", backend="eager"))["engagement"]
    assert verdict.status == "failed"
    assert "compiled code of vae.blocks.0 never ran" in verdict.sentence


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("vae.decod", "did you mean 'decode'? vae (Parts) has no part or method 'decod'"),
        ("vaee.decode", "the pipeline has: denoiser, encoder, vae"),
    ],
)
def test_what_is_not_there_is_named(target: str, said: str) -> None:
    verdict = judged(Pipeline, Compilation(target, backend="eager"))["engagement"]
    assert verdict.status == "failed"
    assert said in verdict.text


def test_a_factory_gets_its_own_object_back_as_it_was() -> None:
    pipeline = Pipeline()
    vae: Any = pipeline.components["vae"]
    judged(lambda: pipeline, [Compilation("vae.decode", backend="eager"), Compilation("denoiser", backend="eager")])
    assert "decode" not in vars(vae)
    assert pipeline.components["denoiser"]._compiled_call_impl is None


class Stages(TwoPart):
    """Two denoisers that take turns."""

    def __init__(self, *compiled: str) -> None:
        super().__init__(Healthy(), Block())
        self.components |= {"denoiser_2": Block()}
        for name in compiled:
            self.components[name].compile(backend="eager")
        self.step = 0

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        x = self.embed(prompt)
        for step in range(num_inference_steps):
            x = x + 0.1 * self.components["denoiser" if step < 2 else "denoiser_2"](x)
        return {"images": x}


def test_a_factory_that_compiled_one_of_two_denoisers_is_found() -> None:
    verdict = judged(lambda: Stages("denoiser"), "factory")["engagement"]
    assert verdict.status == "failed"
    assert "denoiser_2 (same class) ran 3 times uncompiled" in verdict.sentence
    assert_all_pass(judged(lambda: Stages("denoiser", "denoiser_2"), "factory"))


def test_a_recipe_that_names_one_of_two_denoisers_passes_and_says_so() -> None:
    verdict = judged(Stages, Compilation("denoiser", backend="eager"))["engagement"]
    assert verdict.status == "passed"
    assert "denoiser_2 (same class) ran 3 times uncompiled" in verdict.sentence


def test_a_recipe_names_its_own_reference() -> None:
    class Halved(Pipeline):
        def denoise(self, x: torch.Tensor) -> torch.Tensor:
            return super().denoise(x) * 0.5

    compilation = Compilation("denoiser", backend="eager")
    assert_all_pass(judged(Pipeline, compilation, reference=Pipeline))
    assert judged(Pipeline, compilation, reference=Halved)["parity"].status == "failed"
    assert judged(Halved, (), reference=Pipeline)["parity"].status == "failed"
    assert_all_pass(judged(Pipeline, (), reference=Pipeline))
