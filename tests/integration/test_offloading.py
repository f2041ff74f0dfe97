"""Offloading hooks on live pipelines: put on, used, taken off again; and the order in which a recipe applies its parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Offloading, Quantization, Recipe, check
from pytest_diffopt.accelerators import Accelerator, select
from pytest_diffopt.preparation import offloading
from pytest_diffopt.preparation.pipeline import prepared

WIDTH = 64


class Stack(nn.Module):
    """Three blocks in a list, a layer before them, and a weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3))
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = x + block(x)
        return x * self.scale + self.shift


class Pair:
    """A pipeline of two components."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.components = {"first": Stack().eval(), "second": Stack().eval()}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.components["second"](self.components["first"](x))
        return result


STRATEGIES = {
    "model": Offloading("model"),
    "model, one": Offloading("model", components=["second"]),
    "sequential": Offloading("sequential"),
    "leaf": Offloading("group", offload_type="leaf_level"),
    "leaf, stream": Offloading("group", offload_type="leaf_level", use_stream=True, non_blocking=True),
    "leaf, record": Offloading("group", offload_type="leaf_level", use_stream=True, record_stream=True),
    "leaf, pinned on the fly": Offloading("group", use_stream=True, low_cpu_mem_usage=True),
    "block": Offloading("group", offload_type="block_level", num_blocks_per_group=1),
    "block, by two": Offloading("group", offload_type="block_level", num_blocks_per_group=2),
    "block, stream": Offloading("group", offload_type="block_level", use_stream=True),
    "disk": Offloading("group", offload_type="leaf_level", offload_to_disk_path="offloaded"),
}


@pytest.fixture(scope="module")
def device() -> Iterator[Accelerator]:
    found = select()
    with found.in_use():
        yield found


def hooks_of(module: nn.Module) -> list[str]:
    return [
        name
        for name, inner in module.named_modules()
        if hasattr(inner, "_hf_hook") or getattr(getattr(inner, "_diffusers_hook", None), "hooks", None)
    ]


@pytest.mark.parametrize("name", STRATEGIES)
def test_hooks_come_off_and_leave_the_modules_as_they_were(
    name: str, device: Accelerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    pair, x = Pair(), torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = pair(x)
    before = {key: value.clone() for key, value in pair.components["second"].state_dict().items()}
    with torch.no_grad(), device.in_use():
        put_on = offloading.offload(pair, pair.components, STRATEGIES[name], device.device)
        assert hooks_of(pair.components["second"])
        on_device = pair(x.to(device.device))
        put_on.after_call()
        assert on_device.device == device.device
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert bool(written) == (name == "disk")
        offloading.take_off(pair, pair.components)
        put_on.clean_up()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert hooks_of(pair.components["first"]) == hooks_of(pair.components["second"]) == []
    after = pair.components["second"].state_dict()
    assert {value.device.type for value in after.values()} == {"cpu"}
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    pair.components["first"].to("cpu")  # one that was not offloaded stays where it was placed
    torch.testing.assert_close(pair(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(on_device.cpu(), expected, rtol=0, atol=0 if device.is_simulated else 1e-5)


class Fails(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("name", ["model", "sequential", "leaf, stream", "block, stream"])
def test_hooks_come_off_after_a_call_that_raised(name: str, device: Accelerator) -> None:
    pair = Pair()
    pair.components["second"] = Fails().eval()
    with torch.no_grad(), device.in_use():
        offloading.offload(pair, pair.components, STRATEGIES[name], device.device)
        with pytest.raises(RuntimeError, match="in the middle"):
            pair(torch.ones(2, WIDTH, device=device.device))
        offloading.take_off(pair, pair.components)
    for module in pair.components.values():
        assert hooks_of(module) == []
        assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def test_components_that_are_not_offloaded_are_placed_on_the_device(device: Accelerator) -> None:
    pair = Pair()
    with device.in_use():
        offloading.offload(pair, pair.components, Offloading("group", components=["second"]), device.device)
    assert {parameter.device for parameter in pair.components["first"].parameters()} == {device.device}
    assert {parameter.device.type for parameter in pair.components["second"].parameters()} == {"cpu"}


def model_recipe(**fields: Any) -> Recipe:
    return Recipe("stack", Stack, call=Call(inputs=[{"x": torch.ones(2, WIDTH)}]), **fields)


NF4 = Quantization("bitsandbytes_4bit", components=["model"], kwargs={"bnb_4bit_quant_type": "nf4"})
COMPILED = Compilation("model", scope="repeated_blocks", backend="eager")


@pytest.mark.parametrize(
    "order",
    [
        ("quantization", "offloading", "compilation"),
        ("quantization", "compilation", "offloading"),
        ("compilation", "quantization", "offloading"),
        ("offloading", "quantization", "compilation"),
    ],
)
def test_parts_are_applied_in_the_order_that_the_recipe_says(
    order: tuple[str, ...], device: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_diffopt.preparation import compilation, quantization

    applied: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            applied.append(name)
            return function(*args, **kwargs)

        return noted

    for module, function, part in (
        (quantization, "quantize_in_place", "quantization"),
        (offloading, "offload", "offloading"),
        (compilation, "compile_components", "compilation"),
    ):
        monkeypatch.setattr(module, function, noting(part, getattr(module, function)))
    recipe = model_recipe(
        quantization=NF4,
        offloading=Offloading("model"),
        compilation=Compilation("model", backend="eager"),
        order=order,
    )
    with prepared(recipe, device) as live:
        assert quantization.has_quantized_layers(live.components.values())
        assert hooks_of(live.components["model"])
        live.run(live.arguments(0))
    assert tuple(applied) == order


@pytest.mark.parametrize(
    "order", [("quantization", "offloading", "compilation"), ("quantization", "compilation", "offloading")]
)
def test_either_order_of_hooks_and_compilation_is_judged(order: tuple[str, ...]) -> None:
    recipe = model_recipe(
        offloading=Offloading("model"), compilation=Compilation("model", backend="eager"), order=order
    )
    verdicts = check(recipe)
    assert {verdict.status for verdict in verdicts} == {"passed"}, "\n".join(v.text for v in verdicts)


def test_a_reference_has_the_usual_order_so_that_recipes_share_it() -> None:
    usual = model_recipe(offloading=Offloading("model"), compilation=Compilation("model", backend="eager"))
    other = usual.replace(order=("quantization", "compilation", "offloading"))
    assert usual.content_hash != other.content_hash
    assert usual.without("offloading").content_hash == other.without("offloading").content_hash
