"""Memory faults, run on the accelerator in use: each with its healthy twin."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Contract, Offloading, Quantization, Recipe, Verdict, check
from pytest_diffopt.accelerators import Accelerator, select
from pytest_diffopt.accelerators.simulated import set_memory_limit

from .conftest import WIDTH, Healthy, TwoPart, inputs

MODEL = Offloading("model")


@pytest.fixture(scope="module", autouse=True)
def device() -> Accelerator:
    """These verdicts need a device that counts its memory."""
    return select()


def judged(factory: Callable[[], Any], offloading: Offloading | None = MODEL, **fields: Any) -> Verdict:
    recipe = Recipe("fault", factory, offloading=offloading, **{"call": Call(), **fields})
    return next(verdict for verdict in check(recipe) if verdict.check == "memory")


def failed_with(verdict: Verdict, *words: str) -> None:
    assert verdict.status == "failed", verdict
    for word in words:
        assert word in verdict.text


class Wide(Healthy):
    """Healthy, with weights that are large beside its activations: 1 MiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 4096)
        self.second = nn.Linear(4096, WIDTH)


WIDE_BYTES = sum(4 * parameter.numel() for parameter in Wide().parameters())


def two(encoder: Callable[[], nn.Module] = Wide, denoiser: Callable[[], nn.Module] = Wide) -> Callable[[], TwoPart]:
    return lambda: TwoPart(encoder(), denoiser())


STRATEGIES = {
    "model": MODEL,
    "sequential": Offloading("sequential"),
    "group, leaves": Offloading("group", offload_type="leaf_level"),
    "group, leaves, stream": Offloading("group", offload_type="leaf_level", use_stream=True, record_stream=True),
    "group, leaves, pinned on the fly": Offloading("group", use_stream=True, low_cpu_mem_usage=True),
    "group, leaves, non-blocking": Offloading("group", offload_type="leaf_level", use_stream=True, non_blocking=True),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_lowers_the_peak_of_a_healthy_pipeline(name: str) -> None:
    recipe = Recipe("healthy", two(), offloading=STRATEGIES[name], call=Call())
    verdicts = check(recipe)
    assert {verdict.status for verdict in verdicts} == {"passed"}, "\n".join(v.text for v in verdicts)
    figures = next(verdict for verdict in verdicts if verdict.check == "memory").figures
    assert figures["call_peak_bytes"] <= figures["reference_call_peak_bytes"] - WIDE_BYTES // 2
    assert figures["left_bytes"] < 64


def test_groups_kept_on_disk_lower_the_peak_and_leave_nothing_on_the_device(tmp_path: Any) -> None:
    offloading = Offloading("group", offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "offloaded"))
    recipe = Recipe("disk", two(), offloading=offloading, call=Call())
    verdicts = check(recipe)
    assert {verdict.status for verdict in verdicts} == {"passed"}, "\n".join(v.text for v in verdicts)
    assert not (tmp_path / "offloaded").exists()  # each run wrote to a folder of its own, and deleted it


class Forgetful(TwoPart):
    """Offloads its encoder by itself, and forgets the denoiser."""

    def enable_model_cpu_offload(self, device: str) -> None:
        from accelerate import cpu_offload_with_hook

        self.components["denoiser"].to(device)
        _, self.hook = cpu_offload_with_hook(self.components["encoder"], execution_device=torch.device(device))

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        result = super().__call__(prompt, num_inference_steps)
        if hasattr(self, "hook"):
            self.hook.offload()
        return result


def test_a_component_that_never_leaves_is_named_with_the_weights_that_stay() -> None:
    verdict = judged(lambda: Forgetful(Wide(), Wide()))
    failed_with(
        verdict, "denoiser has not left the accelerator after the call", ": first.weight, first.bias, second.weight"
    )
    assert "encoder has not left" not in verdict.text


class KeepsItsWeight(Wide):
    """Keeps its weight in a state object at the first call, as an 8-bit layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.state = SimpleNamespace(weight=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.weight = self.first.weight.data
        return super().forward(x)


def test_a_state_object_that_keeps_a_weight_alive_is_found() -> None:
    verdict = judged(two(denoiser=KeepsItsWeight))
    failed_with(verdict, "1.00 MiB stay on the accelerator after the call, though every parameter has left")


class Leaks(Wide):
    """Keeps what went through it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.sum())
        return super().forward(x)


class KeepsTheLast(Leaks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        del self.seen[:-1]
        return result


class KeepsOneAPrompt(Wide):
    """A cache of two prompts' embeddings: it grows with the second prompt, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[float, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        self.seen[float(x.sum())] = result
        return result


@pytest.mark.parametrize("offloading", [MODEL, None])
def test_a_leak_of_a_few_bytes_a_call_is_found(offloading: Offloading | None) -> None:
    contract = Contract(max_memory="1GiB")
    verdict = judged(two(denoiser=Leaks), offloading, contract=contract)
    failed_with(verdict, "memory grows by 12 B a call, over 6 repeated calls")  # a float32 a step, three steps a call
    assert judged(two(denoiser=KeepsTheLast), offloading, contract=contract).status == "passed"
    assert judged(two(encoder=KeepsOneAPrompt), offloading, contract=contract).status == "passed"


class OnTheOtherDevice(Wide):
    """A part of the work on a second device of the same kind, where no one looks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = torch.device(x.device.type, 1)
        return super().forward((x.to(other) * 1).to(x.device))


class OnTheHost(Wide):
    """A tensor that is made on the host."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.ones(WIDTH, device="cpu"))


def test_a_tensor_on_the_wrong_device_is_found() -> None:
    failed_with(judged(two(denoiser=OnTheOtherDevice)), "2.00 KiB on another device of the same kind")
    failed_with(judged(two(denoiser=OnTheHost)), "Expected all tensors to be on the same device")


class StaysOnTheHost(TwoPart):
    """Says that it offloads, and never leaves the host: a low peak that proves nothing."""

    def enable_model_cpu_offload(self, device: str) -> None:
        for module in self.components.values():
            module.to("cpu")


def test_a_pipeline_that_never_ran_on_the_accelerator_is_no_saving() -> None:
    failed_with(
        judged(lambda: StaysOnTheHost(Wide(), Wide())), "less than encoder", "it did not run on the accelerator"
    )


class OnloadsTooLate(TwoPart):
    """Its hook brings the weights when the forward has begun to use them."""

    def enable_model_cpu_offload(self, device: str) -> None:
        for module in self.components.values():
            module.to("cpu")
            module.register_forward_pre_hook(lambda module, args: (args[0].to(device),))
            module.register_forward_hook(lambda module, args, result: module.to(device) and None)


def test_a_hook_that_onloads_too_late_fails_the_recipe() -> None:
    failed_with(
        judged(lambda: OnloadsTooLate(Wide(), Wide())), "the recipe did not run: RuntimeError: Expected all tensors"
    )


SHARED: dict[str, torch.Tensor] = {}


class SharesABuffer(Wide):
    """Takes its constant from a place that all models share."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = SHARED.setdefault(str(x.device), torch.zeros(1024, WIDTH, device=x.device))
        return super().forward(x) + shared[0]


def test_a_buffer_that_all_models_share_and_none_offloads_is_found() -> None:
    SHARED.clear()
    try:
        verdict = judged(two(SharesABuffer, SharesABuffer))
    finally:
        SHARED.clear()
    failed_with(verdict, "256.00 KiB stay on the accelerator after the call, though every parameter has left")


def tied() -> TwoPart:
    """Two components that hold the same weights."""
    encoder, denoiser = Wide(), Wide()
    denoiser.first = encoder.first
    return TwoPart(encoder, denoiser)


def test_weights_that_components_share_are_counted_once() -> None:
    verdict = judged(tied, None, contract=Contract(max_memory="1GiB"))
    assert verdict.status == "passed"
    assert verdict.figures["weights_bytes"] == WIDE_BYTES + 4 * (4096 * WIDTH + WIDTH)


def test_a_memory_limit_is_held_with_and_without_offloading() -> None:
    for offloading in (MODEL, None):
        failed_with(judged(two(), offloading, contract=Contract(max_memory="1MiB")), "1.00 MiB allowed")
        assert judged(two(), offloading, contract=Contract(max_memory="100MiB")).status == "passed"


def test_a_device_that_is_too_small_fails_the_recipe_with_the_devices_words(device: Accelerator) -> None:
    if not device.is_simulated:
        pytest.skip("a real device's memory cannot be made smaller")
    with device.in_use():
        set_memory_limit(torch.cuda.memory_allocated() + WIDE_BYTES)
        verdict = judged(two(), None, contract=Contract(max_memory="1GiB"))
    failed_with(verdict, "the recipe did not run: OutOfMemoryError: ", "out of memory")


class OffloadsItself(TwoPart):
    """Its factory put hooks on already: no reference has all of it on the device."""


def hooked_by_its_factory() -> TwoPart:
    from accelerate import cpu_offload

    pipeline = OffloadsItself(Wide(), Wide())
    for module in pipeline.components.values():
        cpu_offload(module, execution_device=select().device)
    return pipeline


def test_a_pipeline_that_offloads_itself_has_no_reference() -> None:
    verdict = judged(hooked_by_its_factory, Offloading("sequential"))
    assert verdict.status in ("unverified", "failed")
    assert "the run without offloading is no reference" in verdict.text or "did not run" in verdict.text


class KeepsADenseCopy(nn.Module):
    """A quantized layer, and beside it the weight that it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(512, 512)
        self.copies: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.keeps and not self.copies:
            self.copies.append(torch.zeros(512, 512, device=x.device, dtype=x.dtype))
        return self.layer(x.repeat(1, 512 // WIDTH))

    keeps = True


class KeepsNoCopy(KeepsADenseCopy):
    keeps = False


def test_a_dense_copy_beside_a_quantized_weight_is_found() -> None:
    nf4 = Quantization("bitsandbytes_4bit", components=["model"], kwargs={"bnb_4bit_quant_type": "nf4"})
    fields: dict[str, Any] = {"quantization": nf4, "dtype": "bfloat16", "call": Call(inputs=inputs())}
    failed_with(
        judged(KeepsADenseCopy, None, **fields), "512.", "KiB stay on the accelerator after the call beside the weights"
    )
    healthy = judged(KeepsNoCopy, None, **fields)
    assert healthy.status == "passed"
    assert "weights, as large as their formats say" in healthy.sentence


def test_on_the_host_nothing_is_measured() -> None:
    from pytest_diffopt.checks.session import Session

    recipe = Recipe("host", two(), offloading=MODEL, call=Call())
    verdict = Session(select("cpu")).judge(recipe, "memory")
    assert verdict.status == "unverified"
    assert "cpu, has no memory of its own" in verdict.sentence


class OneAfterTheOther(TwoPart):
    """Offloads by itself, each component as a whole; the one before is sent away first where they are a chain."""

    chain = True

    def enable_model_cpu_offload(self, device: str) -> None:
        from accelerate import cpu_offload_with_hook

        self.hooks: list[Any] = []
        for module in self.components.values():
            before = self.hooks[-1] if self.hooks and self.chain else None
            self.hooks.append(cpu_offload_with_hook(module, torch.device(device), prev_module_hook=before)[1])

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        result = super().__call__(prompt, num_inference_steps)
        for hook in getattr(self, "hooks", ()):
            hook.offload()
        return result


class BothAtOnce(OneAfterTheOther):
    chain = False


class EncodesInEachStep(BothAtOnce):
    """Its encoder runs again in each step: it is right to leave it there."""

    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.components["encoder"](super().denoise(x))
        return result


class Narrow(Healthy):
    """So small that its stay cannot be seen in the peak."""


@pytest.mark.parametrize("encoder", [Wide, Narrow], ids=["as large", "small beside the other"])
def test_a_component_that_is_idle_beside_a_later_one_is_found_by_residency(encoder: Any) -> None:
    ample = Contract(max_memory_ratio=1.5)
    verdict = judged(lambda: BothAtOnce(encoder(), Wide()), contract=ample)
    failed_with(verdict, "encoder was still there as a whole when denoiser ran, after its own last run")
    assert judged(lambda: OneAfterTheOther(encoder(), Wide()), contract=ample).status == "passed"


def test_a_component_that_runs_again_later_may_stay() -> None:
    verdict = judged(lambda: EncodesInEachStep(Wide(), Wide()))
    assert verdict.status == "passed", verdict


class CastAtUse(nn.Module):
    """Its weights stay on the host in another dtype; what it computes with is a copy that nobody keeps."""

    def __init__(self, computes_on_host: bool = False) -> None:
        super().__init__()
        self.model = Wide().double()
        self.computes_on_host = computes_on_host

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        where = torch.device("cpu") if self.computes_on_host else select().device
        weights = {name: tensor.float().to(where) for name, tensor in self.model.named_parameters()}
        found: torch.Tensor = torch.func.functional_call(self.model, weights, (x.float().to(where),))
        return found.to(select().device)


class HooksNothing(TwoPart):
    """Offloads by the means of its own modules."""

    def enable_sequential_cpu_offload(self, device: str) -> None:
        self.offloaded = True

    def embed(self, prompt: str) -> torch.Tensor:
        return super().embed(prompt).float()


def test_weights_that_come_out_of_a_cast_are_no_computation_on_the_host(device: Accelerator) -> None:
    if not device.is_simulated:
        pytest.skip("only the simulated device tells which operation took memory")

    def of(on_host: bool) -> Verdict:
        return judged(
            lambda: HooksNothing(CastAtUse(on_host), CastAtUse(on_host)),
            Offloading("sequential"),
            contract=Contract(max_memory="1GiB"),
        )

    healthy = of(False)
    assert "did not run" not in healthy.text
    assert "computed on the host" not in healthy.text
    failed_with(of(True), "encoder ran with none of its weights on the accelerator: it computed on the host")


class LoadsOnTheDevice(OneAfterTheOther):
    """Is made on the device first, and offloaded then."""

    def enable_model_cpu_offload(self, device: str) -> None:
        for module in self.components.values():
            module.to(device)
        for module in self.components.values():
            module.to("cpu")
        super().enable_model_cpu_offload(device)


def test_a_memory_limit_is_for_loading_too() -> None:
    limit = Contract(max_memory=int(1.5 * WIDE_BYTES))
    verdict = judged(lambda: LoadsOnTheDevice(Wide(), Wide()), contract=limit)
    failed_with(verdict, "the peak of loading is ", "offload before it is placed")
    assert judged(lambda: OneAfterTheOther(Wide(), Wide()), contract=limit).status == "passed"
