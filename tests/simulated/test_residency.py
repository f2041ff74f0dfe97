"""Whose bytes are on the device: the ledger beside the device's own counters."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Offloading, Recipe, observe
from pytest_diffopt.accelerators.simulated import SimulatedGpu
from pytest_diffopt.observation import residency as ledgers
from pytest_diffopt.observation.observation import MemoryRecord, Observation, Owner, Residency


class Encoder(nn.Module):
    """4 KiB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 16, bias=False), nn.GELU(), nn.Linear(16, 32, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


class Denoiser(Encoder):
    """64 KiB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 256, bias=False), nn.GELU(), nn.Linear(256, 32, bias=False))


class Pipeline:
    """Two components, called in turn; it has no offloading of its own."""

    def __init__(self) -> None:
        self.encoder, self.denoiser = Encoder(), Denoiser()
        self.components = {"encoder": self.encoder, "denoiser": self.denoiser}
        self.device = torch.device("cpu")

    def __call__(self, prompt: str = "", num_inference_steps: int = 2, **_: Any) -> Any:
        x = self.encoder(torch.full((4, 32), float(len(prompt)), device="cuda"))
        for _ in range(num_inference_steps):
            x = self.denoiser(x)
        return SimpleNamespace(images=x)


class Leaves(Pipeline):
    """Takes its components to the device for a call, and back."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for module in self.components.values():
            module.to("cuda")
        result = super().__call__(*args, **kwargs)
        self.before_leaving()
        for module in self.components.values():
            module.to("cpu")
        return result

    def before_leaving(self) -> None: ...


class KeepsAWeight(Leaves):
    """After a call the encoder's first weight stays on the device, in an object beside the parameters."""

    def before_leaving(self) -> None:
        self.kept = self.encoder.layers[0].weight.data


class MadeThere(Pipeline):
    """The encoder's weights are made on the device for its call, copied from nowhere, and dropped after it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = {parameter: parameter.data for parameter in self.encoder.parameters()}
        for parameter in kept:
            parameter.data = torch.ones(parameter.shape, device="cuda")
        handle = self.encoder.register_forward_hook(lambda *_: self._drop(kept))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            handle.remove()

    def _drop(self, kept: dict[Any, torch.Tensor]) -> None:
        for parameter, data in kept.items():
            parameter.data = data


class RaisesInside(Pipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        super().__call__(*args, **kwargs)
        torch.empty(1 << 40, dtype=torch.uint8, device="cuda")


def watched(factory: Callable[[], Any], **parts: Any) -> Observation:
    call = parts.pop("call", Call(prompts=["a", "bc"], calls=2, num_inference_steps=2))
    return observe(Recipe("r", factory, call=call, **parts), accelerator="sim", precise=False)


def memory_of(seen: Observation) -> tuple[MemoryRecord, Residency]:
    assert seen.memory is not None
    assert seen.memory.residency is not None
    return seen.memory, seen.memory.residency


def highest(residency: Residency, owner: Owner, phase: str) -> int:
    (span,) = (one for one in residency.phases if one.phase == phase)
    return max(
        residency.at(position).get(owner, 0) for position in residency.positions if span.first <= position <= span.last
    )


ENCODER, DENOISER = Owner("encoder", "weights"), Owner("denoiser", "weights")
OFFLOADINGS = [
    None,
    Offloading("model"),
    Offloading("sequential"),
    Offloading("group", offload_type="leaf_level"),
    Offloading("group", offload_type="leaf_level", use_stream=True),
    Offloading("group", offload_type="leaf_level", use_stream=True, low_cpu_mem_usage=True),
]


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("offloading", OFFLOADINGS)
def test_the_ledgers_peaks_and_ends_are_the_devices_own(
    offloading: Offloading | None, caching: bool, gpu: SimulatedGpu
) -> None:
    gpu.set_caching_allocator(caching)
    foreign = torch.zeros(100, device="cuda")
    memory, residency = memory_of(watched(Pipeline, offloading=offloading))
    assert [phase.phase for phase in residency.phases] == ["loading", "call 0", "call 1"]
    result = 4 * 4 * 32  # of the first call, which the observation holds: its memory check leaves that out
    peaks = [memory.load_peak_bytes, *(call.peak_bytes + result * call.call for call in memory.calls)]
    assert [phase.peak_bytes for phase in residency.phases] == peaks
    assert sum(residency.at(residency.phases[0].last).values()) == memory.loaded_bytes
    assert sum(residency.at(0).values()) == memory.before_bytes >= foreign.nbytes
    for phase in residency.phases:
        assert sum(residency.at(phase.peak_at).values()) == phase.peak_bytes


def test_a_call_peaks_in_the_component_and_the_operation_that_needs_the_most() -> None:
    _, residency = memory_of(watched(Pipeline))
    for phase in residency.phases[1:]:
        assert (phase.component, phase.operation) == ("denoiser", "aten::gelu")
        held = residency.at(phase.peak_at)
        assert held[DENOISER] == 2 * 4 * 32 * 256
        assert held[ENCODER] == 2 * 4 * 32 * 16
        assert held[Owner("denoiser", "working")] >= 2 * 4 * 4 * 256  # what comes in and what goes out


@pytest.mark.parametrize("offloading", OFFLOADINGS[1:])
def test_weights_are_their_components_also_where_they_come_and_go_inside_its_call(offloading: Offloading) -> None:
    _, residency = memory_of(watched(Pipeline, offloading=offloading))
    for call, (owner, layer) in itertools.product(("call 0", "call 1"), ((ENCODER, 2048), (DENOISER, 32768))):
        assert highest(residency, owner, call) in (layer, 2 * layer)
        working = Owner(owner.component, "working")
        assert highest(residency, working, call) < layer + 4 * 4 * 256 * 2  # no weight among it


def test_a_weight_that_is_kept_alive_beside_the_parameters_is_named() -> None:
    healthy, at_end = memory_of(watched(Leaves))
    assert ENCODER not in at_end.at(at_end.phases[-1].last)
    memory, residency = memory_of(watched(KeepsAWeight))
    assert memory.calls[-1].residency == healthy.calls[-1].residency == {"encoder": 0, "denoiser": 0}
    assert residency.at(residency.phases[-1].last)[ENCODER] == 4 * 32 * 16


def test_a_weight_that_is_there_for_one_call_of_its_component_only_is_seen_when_that_ends() -> None:
    _, residency = memory_of(watched(MadeThere))
    assert highest(residency, ENCODER, "call 0") == 2 * 2 * 4 * 32 * 16  # beside those that wait on the device


def test_a_run_that_ends_in_an_exception_tells_what_it_held() -> None:
    seen = watched(RaisesInside)
    assert seen.failure is not None
    assert seen.failure.error == "OutOfMemoryError"
    _, residency = memory_of(seen)
    assert [phase.phase for phase in residency.phases] == ["loading", "call 0"]
    assert residency.at(residency.phases[-1].last)[DENOISER] == 4 * 2 * 32 * 256


def test_a_model_is_the_component_that_runs() -> None:
    call = Call(inputs=[{"x": torch.ones(4, 32)}], calls=1)
    _, residency = memory_of(watched(Denoiser, call=call))
    assert (residency.phases[1].component, residency.phases[1].operation) == ("model", "aten::gelu")


def test_compiled_components_are_known_and_nothing_more_is_traced() -> None:
    parts = {"compilation": [Compilation("denoiser", backend="eager", fullgraph=True)]}
    seen = watched(Pipeline, **parts)
    memory, residency = memory_of(seen)
    assert residency.phases[1].component == "denoiser"
    assert residency.phases[1].peak_bytes == memory.calls[0].peak_bytes
    assert seen.compiles.graph_breaks == ()
    assert seen.compiles.recompiles == ()
    assert seen.compiles.graphs == 1


def test_the_device_writes_nothing_down_after_a_run(gpu: SimulatedGpu) -> None:
    watched(Pipeline)
    before = len(gpu.recorded_memory_events())
    x = torch.zeros(10, device="cuda")
    assert len(gpu.recorded_memory_events()) == before > 0
    del x


def test_the_ledger_does_not_change_the_bytes_that_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with_ledger, _ = memory_of(watched(Pipeline, offloading=Offloading("sequential")))
    monkeypatch.setattr(ledgers.ResidencyLedger, "open", lambda self, before_bytes: None)
    without = watched(Pipeline, offloading=Offloading("sequential")).memory
    assert without is not None
    assert without.residency is None
    assert without.calls == with_ledger.calls  # what was copied, and what was on other devices, included
    assert without.load_peak_bytes == with_ledger.load_peak_bytes
