"""Faults of host syncs: each way in which a denoising step makes the host wait for the GPU, and its healthy twin."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Contract, Offloading, Quantization, Recipe, Verdict, observe
from pytest_diffopt.accelerators import select
from pytest_diffopt.accelerators.simulated import SyncRecording
from pytest_diffopt.checks.session import Session

from .conftest import WIDTH, Block, Healthy, inputs

STEPS = 3


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    held = Session(select("sim"))
    yield held
    held.release()


class Scheduler:
    """Steps as a flow does, with its sigmas on the host."""

    def __init__(self) -> None:
        self.sigmas: list[float] = []
        self.at = 0

    def set_timesteps(self, steps: int, device: Any) -> None:
        self.sigmas = [1 - step / steps for step in range(steps)] + [0.0]
        self.at = 0

    def step(self, noise: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        there = self.sigmas[self.at + 1] - self.sigmas[self.at]
        self.at += 1
        return sample + there * noise


class Loop:
    """A pipeline with a scheduler: an encoder, a denoiser that runs twice a step, a decoder."""

    def __init__(self, denoiser: nn.Module | None = None, scheduler: Any = None) -> None:
        self.components = {
            "encoder": Healthy(),
            "denoiser": denoiser or Healthy(),
            "decoder": Healthy(),
            "scheduler": scheduler or Scheduler(),
        }

    def before(self, x: torch.Tensor) -> None: ...

    def between(self, x: torch.Tensor, step: int) -> None: ...

    def after(self, x: torch.Tensor) -> None: ...

    def __call__(self, prompt: str, num_inference_steps: int = STEPS) -> dict[str, torch.Tensor]:
        parts: dict[str, Any] = self.components
        device = next(parts["encoder"].parameters()).device
        numbers = torch.tensor([[float(ord(letter)) / 128 for letter in prompt.ljust(WIDTH)[:WIDTH]]] * 4)
        x = parts["encoder"](numbers.to(device))
        parts["scheduler"].set_timesteps(num_inference_steps, device)
        self.before(x)
        for step in range(num_inference_steps):
            noise = parts["denoiser"](x) - 0.5 * parts["denoiser"](x + 1)
            x = parts["scheduler"].step(noise, x)
            self.between(x, step)
        self.after(x)
        return {"images": parts["decoder"](x)}


def judged(session: Session, pipeline: Callable[[], Any], allowed: int = 0, **fields: Any) -> Verdict:
    contract = Contract(max_host_syncs_per_step=allowed)
    if isinstance(pipeline(), nn.Module):
        fields.setdefault("call", Call(inputs=inputs(4, 4, 4)))
    else:
        fields.setdefault("call", Call(num_inference_steps=STEPS))
    return session.judge(Recipe("waits", pipeline, contract=contract, **fields), "host_syncs")


class Reads(Healthy):
    """Reads one number in its forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * 2 if y.abs().sum().item() > 1e9 else y


class AnyOf(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = x > 100
        if mask.any():
            x = x.clamp(max=100)
        return super().forward(x)


class MaskAsIndex(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + y[y > 0].mean()


class Copies(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.cpu().to(x.device))


class Prints(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print(x.mean(), file=io.StringIO())
        return super().forward(x)


class MakesTensors(Healthy):
    """A tensor of numbers is made on the host, and sent."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.tensor([0.5], device=x.device)


class Synchronizes(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        torch.cuda.synchronize()
        return y


class Hooked(Healthy):
    """The forward is in order; a hook of a layer is not."""

    def __init__(self) -> None:
        super().__init__()
        self.second.register_forward_hook(lambda _module, _args, output: output * float(output.sum() < 1e9))


class SeldomReads(Healthy):
    """Reads in one step of the last call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self.runs == 2 * STEPS * 2 + 5:
            x.sum().item()
        return super().forward(x)


class Remembers(Healthy):
    """Reads in the very first run, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale = self.first.weight.abs().max().item()
        return super().forward(x) / (1 + self.scale)


class Filled(Healthy):
    """No wait: a mask is filled, a tensor is made on the device, pinned memory is sent without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = torch.full((WIDTH,), 0.5).pin_memory()
        half = self.kept.to(x.device, non_blocking=True)
        x = x.masked_fill(x > 100, 100.0)
        x[x < -100] = -100.0
        return super().forward(x) * half + torch.full((1,), 0.5, device=x.device)


class ReadingScheduler(Scheduler):
    """Its sigmas are on the device, as some of diffusers' are: each step reads two of them."""

    def set_timesteps(self, steps: int, device: Any) -> None:
        super().set_timesteps(steps, device)
        self.sent = torch.tensor(self.sigmas, device=device)

    def step(self, noise: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        there = float(self.sent[self.at + 1]) - float(self.sent[self.at])
        self.at += 1
        return sample + there * noise


class SentScheduler(ReadingScheduler):
    """Its sigmas are on the device, and are used there."""

    def step(self, noise: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        there = self.sent[self.at + 1] - self.sent[self.at]
        self.at += 1
        return sample + there * noise


class ReadsBetween(Loop):
    def between(self, x: torch.Tensor, step: int) -> None:
        if step < STEPS - 1:  # after the last step nothing tells whether the loop goes on
            x.isnan().any().item()


class ReadsOutside(Loop):
    def before(self, x: torch.Tensor) -> None:
        x.isnan().any().item()

    def after(self, x: torch.Tensor) -> None:
        x.cpu()


FAULTS: dict[str, tuple[type[nn.Module], int, str]] = {
    "item": (Reads, 2, "if y.abs().sum().item() > 1e9"),
    "any": (AnyOf, 2, "if mask.any():"),
    "mask": (MaskAsIndex, 2, "return y + y[y > 0].mean()"),
    "copy": (Copies, 4, "x.cpu()"),
    "tensor": (MakesTensors, 2, "torch.tensor([0.5]"),
    "synchronize": (Synchronizes, 2, "torch.cuda.synchronize()"),
    "hook": (Hooked, 2, "float(output.sum() < 1e9)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wait_of_the_denoiser_fails_and_its_line_is_named(session: Session, name: str) -> None:
    model, times, text = FAULTS[name]
    found = judged(session, lambda: Loop(model()))
    assert found.status == "failed", found.text
    assert found.sentence == (
        f"the host waited {times} times for the GPU in step 0 of call 1, 0 allowed in a denoising step"
    )
    assert found.figures["in_steps"] == 2 * STEPS * times
    assert "denoiser " in found.evidence[0]
    assert "test_host_syncs_faults.py:" in found.evidence[0]
    assert text in found.evidence[0], found.text
    assert f"in {2 * STEPS} of {2 * STEPS} steps" in found.evidence[0]
    assert {place["component"] for place in found.figures["places"]} == {"denoiser"}
    assert judged(session, lambda: Loop(model()), allowed=times).status == "passed"


def test_a_print_waits_many_times(session: Session) -> None:
    found = judged(session, lambda: Loop(Prints()))
    assert found.status == "failed"
    assert found.figures["most_in_a_step"] > 2
    assert "print(x.mean(), file=io.StringIO())" in found.text


@pytest.mark.parametrize("model", [Healthy, Filled, Remembers], ids=lambda model: model.__name__)
def test_a_denoiser_that_does_not_wait_passes(session: Session, model: type[nn.Module]) -> None:
    found = judged(session, lambda: Loop(model()))
    assert found.status == "passed", found.text
    assert found.sentence == f"the host did not wait for the GPU in {2 * STEPS} denoising steps"


def test_what_the_first_call_reads_is_counted_where_there_is_no_other(session: Session) -> None:
    found = judged(session, lambda: Loop(Remembers()), call=Call(num_inference_steps=STEPS, calls=1))
    assert (found.status, found.figures["most_in_a_step"]) == ("failed", 1)


def test_a_wait_in_one_step_of_a_later_call_fails(session: Session) -> None:
    found = judged(session, lambda: Loop(SeldomReads()))
    assert found.status == "failed"
    assert "1 time for the GPU in step 2 of call 2" in found.sentence
    assert "1 wait in 1 of 6 steps" in found.evidence[0]


def test_a_wait_of_the_scheduler_is_the_schedulers(session: Session) -> None:
    found = judged(session, lambda: Loop(scheduler=ReadingScheduler()))
    assert found.status == "failed"
    assert found.figures["most_in_a_step"] == 2
    assert found.evidence[0].startswith("scheduler ")
    assert "float(self.sent[self.at + 1])" in found.evidence[0]
    assert judged(session, lambda: Loop(scheduler=SentScheduler())).status == "passed"


def test_a_wait_of_the_loop_between_the_components_counts(session: Session) -> None:
    found = judged(session, ReadsBetween)
    assert found.status == "failed"
    assert found.figures["most_in_a_step"] == 1
    assert "ReadsBetween.between" in found.evidence[0]


def test_waits_before_and_after_the_steps_are_told_and_not_judged(session: Session) -> None:
    found = judged(session, ReadsOutside)
    assert found.status == "passed"
    assert found.figures["outside_steps"] > judged(session, Loop).figures["outside_steps"]


def test_a_model_alone_is_one_step(session: Session) -> None:
    found = judged(session, Reads)
    assert found.status == "failed"
    assert found.sentence == "the host waited 1 time for the GPU in step 0 of call 1, 0 allowed in a denoising step"
    assert judged(session, Healthy).status == "passed"


NF4 = Quantization("bitsandbytes_4bit", components=["transformer"], kwargs={"bnb_4bit_quant_type": "nf4"})


@pytest.mark.parametrize(
    "quantization", [None, NF4], ids=["plain", "nf4"]
)  # its weights are tensors of a class of their own
def test_what_offloading_waits_for_is_apart(session: Session, quantization: Quantization | None) -> None:
    recipe = Recipe(
        "waits",
        "tiny-flux",
        quantization=quantization,
        offloading=Offloading("model"),
        call=Call(num_inference_steps=2, sizes=(32, 32), kwargs={"max_sequence_length": 32}),
        contract=Contract(max_host_syncs_per_step=0),
    )
    found = session.judge(recipe, "host_syncs")
    assert found.status == "passed", found.text
    assert found.figures["offloading"] > 100
    assert found.figures["in_steps"] == 0


class Copying(Loop):
    """Its loop steps a copy of its scheduler, as some of diffusers' pipelines do."""

    def __call__(self, prompt: str, num_inference_steps: int = STEPS) -> dict[str, torch.Tensor]:
        original = self.components["scheduler"]
        assert "noise" in inspect.signature(original.step).parameters
        self.components["scheduler"] = copy.deepcopy(original)
        try:
            result = super().__call__(prompt, num_inference_steps)
        finally:
            copied, self.components["scheduler"] = self.components["scheduler"], original
        assert (original.at, copied.at) == (0, STEPS)
        return result


def test_a_loop_over_a_copy_of_the_scheduler_has_a_step_for_each_run_of_the_denoiser(session: Session) -> None:
    found = judged(session, lambda: Copying(Reads()))
    assert (found.status, found.figures["most_in_a_step"], found.figures["steps"]) == ("failed", 1, 2 * 2 * STEPS)


@pytest.mark.parametrize("model", [Reads, Healthy], ids=lambda model: model.__name__)
def test_compiled_code_waits_as_eager_code_does(session: Session, model: type[nn.Module]) -> None:
    compiled = Compilation("denoiser", backend="eager")
    found = judged(session, lambda: Loop(model()), compilation=compiled)
    assert found.figures["most_in_a_step"] == (2 if model is Reads else 0), found.text
    if model is Reads:
        assert "denoiser " in found.evidence[0]
        assert "Reads.forward" in found.evidence[0]


def test_the_scheduler_is_as_it_was_after_the_run(session: Session) -> None:
    made: list[Loop] = []

    def factory() -> Loop:
        made.append(Loop())
        return made[-1]

    observe(Recipe("waits", factory, call=Call(num_inference_steps=STEPS)), accelerator=select("sim"))
    assert all("step" not in vars(one.components["scheduler"]) for one in made)


def test_whoever_records_around_a_recipe_goes_on_recording(session: Session) -> None:
    accelerator = select("sim")
    with accelerator.in_use():
        outer = SyncRecording()
        outer.start()
        found = observe(
            Recipe("waits", lambda: Loop(Reads()), call=Call(num_inference_steps=STEPS)), accelerator=accelerator
        )
        torch.ones((), device="cuda").item()
        outer.stop()
    assert found.host_syncs is not None
    assert found.host_syncs.per_step(1) == [2] * STEPS
    last = outer.syncs()[-1]
    assert last.place is not None
    assert last.place.function == "test_whoever_records_around_a_recipe_goes_on_recording"
    assert sum(sync.count for sync in outer.syncs()) > 3 * 2 * STEPS


class MovesItsBlock(Healthy):
    """Offloads a part by itself in each run: no library's hooks, and its own waits."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block.to(x.device)(super().forward(x))
        self.block.to("cpu")
        return y


def test_weights_that_a_model_moves_by_itself_count(session: Session) -> None:
    found = judged(session, lambda: Loop(MovesItsBlock()))
    assert found.status == "failed"
    assert found.figures["offloading"] == 0
    assert "MovesItsBlock.forward" in found.evidence[0]


def test_the_host_is_unverified(session: Session) -> None:
    host = Session(select("cpu"))
    found = judged(host, lambda: Loop(Reads()))
    assert (found.status, found.sentence) == ("unverified", "the recipe ran on the host, which waits for no GPU")
    host.release()
