"""Faults: small modules, each with something wrong, and a healthy twin; what a check must say of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Recipe, Verdict, check

Verdicts = dict[str, Verdict]
Judge = Callable[..., Verdicts]
WIDTH = 64


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_frozen(frozen_libraries: Callable[[], None]) -> None:
    frozen_libraries()


def inputs(*sizes: int, **more: Any) -> list[dict[str, Any]]:
    """A model's inputs, one dict a call: ``x`` of shape (size, 64), seeded."""
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(size, WIDTH, generator=generator), **more} for size in sizes or (4, 4, 4)]


class Healthy(nn.Module):
    """Two layers and nothing wrong with them; faults derive from it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class StepCounter(Healthy):
    """A Python int on the module that forward reads and changes."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return super().forward(x) * (1 + 1 / self.step)


class Block(nn.Module):
    """A block with enough layers to count as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


class TwoPart:
    """A pipeline of two components, called with a prompt, that runs its denoiser once a step."""

    def __init__(self, encoder: nn.Module, denoiser: nn.Module) -> None:
        self.components = {"encoder": encoder, "denoiser": denoiser}

    def embed(self, prompt: str) -> torch.Tensor:
        numbers = [float(ord(letter)) / 128 for letter in prompt.ljust(WIDTH)[:WIDTH]]
        encoder = self.components["encoder"]
        hooks = [getattr(module, "_hf_hook", None) for module in encoder.modules()]
        placed = [hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None]
        # as diffusers finds out where an offloaded pipeline runs
        device = placed[0] if placed else next(encoder.parameters()).device
        dtype = next((one.dtype for one in encoder.parameters() if one.is_floating_point()), torch.float32)
        encoded: torch.Tensor = encoder(torch.tensor([numbers] * 4, device=device, dtype=dtype))
        return encoded

    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.components["denoiser"](x)
        return result

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        x = self.embed(prompt)
        for _ in range(num_inference_steps):
            x = x + 0.1 * self.denoise(x)
        return {"images": x}


@pytest.fixture
def judge() -> Judge:
    """Judge a factory's model, compiled with the backend ``eager`` unless told otherwise; verdicts by check."""

    def run(
        factory: Callable[[], Any],
        *,
        call: Call | None = None,
        component: str = "model",
        compiled: bool = True,
        quantization: Any = None,
        dtype: str | None = None,
        contract: Any = None,
        dynamo: dict[str, Any] | None = None,
        **compilation: Any,
    ) -> Verdicts:
        fields: dict[str, Any] = {"dynamo": dynamo or {}}
        if contract is not None:
            fields["contract"] = contract
        recipe = Recipe(
            name="fault",
            pipeline=factory,
            dtype=dtype,
            quantization=quantization,
            compilation=Compilation(component, **{"backend": "eager", **compilation}) if compiled else (),
            call=call if call is not None else Call(inputs=inputs()),
            **fields,
        )
        return {verdict.check: verdict for verdict in check(recipe)}

    return run


def assert_all_pass(verdicts: Verdicts) -> None:
    """Every verdict of a healthy recipe is a pass."""
    assert {v.status for v in verdicts.values()} == {"passed"}, "\n".join(v.text for v in verdicts.values())
