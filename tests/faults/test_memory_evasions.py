"""Ways around the memory check: leaks that few calls show, memory that no counter shows, work done elsewhere."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Contract, Offloading, Quantization
from pytest_diffopt.accelerators import Accelerator, select

from .conftest import WIDTH, TwoPart
from .test_memory_faults import MODEL, WIDE_BYTES, Wide, failed_with, judged

AMPLE = Contract(max_memory="1GiB")


@pytest.fixture(scope="module", autouse=True)
def device() -> Accelerator:
    """These verdicts need a device that counts its memory."""
    return select()


Kept = Callable[["Keeper", torch.Tensor], Any]


class Keeper(TwoPart):
    """Does something with what it is about to return; ``calls`` were made before."""

    def __init__(self, does: Kept) -> None:
        super().__init__(Wide(), Wide())
        self.does, self.calls, self.prompt = does, 0, ""
        self.kept: Any = []

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        self.prompt = prompt
        result = super().__call__(prompt, num_inference_steps)
        self.does(self, result["images"])
        self.calls += 1
        return result


def keeps(does: Kept) -> Callable[[], Keeper]:
    return lambda: Keeper(does)


def when(condition: Callable[[Keeper], bool], numbers: int = 4) -> Kept:
    return lambda self, x: self.kept.append(x.new_zeros(numbers)) if condition(self) else None


def ring(size: int) -> Kept:
    def does(self: Keeper, x: torch.Tensor) -> None:
        self.kept = collections.deque([*self.kept, x.clone()], maxlen=size)

    return does


def at_call(number: int) -> Kept:
    def does(self: Keeper, x: torch.Tensor) -> None:
        if self.calls == number:
            self.kept = x.new_zeros(4)

    return does


LEAKS: dict[str, Kept] = {
    "at every second call, the odd ones": when(lambda self: self.calls % 2 == 1),
    "at every third call, the first one": when(lambda self: self.calls % 3 == 0, numbers=2048),
    "only with the first prompt": when(lambda self: "red" in self.prompt),
    "its own results": lambda self, x: self.kept.append(x),
    "a view of each result": lambda self, x: self.kept.append(x[:1]),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_that_the_recipes_own_calls_hardly_show_is_found(leak: str) -> None:
    failed_with(judged(keeps(LEAKS[leak]), None, contract=AMPLE), "memory grows by", "a call, over 6 repeated calls")


BOUNDED: dict[str, Kept] = {
    "a ring of nine results": ring(9),
    "something made at the second call": at_call(1),
    "the last result": lambda self, x: setattr(self, "kept", x),
}


@pytest.mark.parametrize("bounded", BOUNDED)
def test_what_is_kept_within_bounds_is_no_leak(bounded: str) -> None:
    assert judged(keeps(BOUNDED[bounded]), None, contract=AMPLE).status == "passed"


def sends_its_history(self: Keeper, x: torch.Tensor) -> None:
    self.kept.append(torch.zeros(1 << 16))
    torch.cat([part.to(x.device) for part in self.kept])


def test_a_peak_that_grows_while_nothing_more_stays_is_found() -> None:
    verdict = judged(keeps(sends_its_history), None, contract=AMPLE)
    failed_with(verdict, "the peak of a call grows by ", "though no more stays after it")


class KeepsAWeightOnce(TwoPart):
    """After one call a weight of the encoder stays; by the next it has left."""

    def __init__(self, call: int) -> None:
        super().__init__(Wide(), Wide())
        self.call, self.calls = call, 0

    def embed(self, prompt: str) -> torch.Tensor:
        self.kept = None
        result = super().embed(prompt)
        if self.calls == self.call:
            self.kept = self.components["encoder"].first.weight.data  # type: ignore[union-attr, assignment]
        self.calls += 1
        return result


@pytest.mark.parametrize("call", [0, 1])
def test_what_stays_after_one_of_the_calls_is_found(call: int) -> None:
    verdict = judged(lambda: KeepsAWeightOnce(call))
    failed_with(verdict, f"1.00 MiB stay on the accelerator after call {call}, though every parameter has left")
    failed_with(verdict, f"after call {call}: ", "encoder weights 1.00 MiB")


class OnePartOnTheHost(TwoPart):
    """Takes its encoder back to the host, computes there, and sends the result."""

    def embed(self, prompt: str) -> torch.Tensor:
        from accelerate.hooks import remove_hook_from_module

        where = select().device
        remove_hook_from_module(self.components["encoder"], recurse=True)
        self.components["encoder"].to("cpu")
        return super().embed(prompt).to(where)


@pytest.mark.parametrize("offloading", [MODEL, None])
def test_a_component_that_computes_on_the_host_is_named(offloading: Offloading | None, device: Accelerator) -> None:
    if not device.is_simulated:
        pytest.skip("only the simulated device tells whose memory came and went")
    verdict = judged(lambda: OnePartOnTheHost(Wide(), Wide()), offloading, contract=AMPLE)
    failed_with(verdict, "encoder ran with none of its weights on the accelerator: it computed on the host")
    assert "denoiser ran with none" not in verdict.text


class Deep(nn.Module):
    """Eight equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


class AllAtOnce(TwoPart):
    """Brings the whole denoiser before its first layer runs."""

    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        self.components["denoiser"].to(x.device)
        return super().denoise(x)


def test_layers_that_were_to_come_in_turn_and_come_at_once_are_found() -> None:
    leaves = Offloading("group", offload_type="leaf_level")
    verdict = judged(lambda: AllAtOnce(Deep(), Deep()), leaves)
    failed_with(verdict, "all 130.00 KiB of denoiser were on the accelerator at once, though its layers come in turn")
    assert "of encoder were on the accelerator at once" not in verdict.text
    assert judged(lambda: TwoPart(Deep(), Deep()), leaves).status == "passed"


class NoReference(Keeper):
    """Does not run where nothing is offloaded."""

    def embed(self, prompt: str) -> torch.Tensor:
        if next(self.components["encoder"].parameters()).device.type != "cpu":
            raise RuntimeError("too large to run without offloading")
        return super().embed(prompt)


def test_what_needs_no_reference_fails_without_one() -> None:
    leaks = lambda: NoReference(LEAKS["its own results"])  # noqa: E731
    failed_with(judged(leaks), "memory grows by 1.00 KiB a call")
    nothing_kept = lambda: NoReference(lambda self, x: None)  # noqa: E731
    failed_with(judged(nothing_kept, contract=Contract(max_memory=1000)), "1000 B allowed")
    verdict = judged(nothing_kept)
    assert verdict.status == "unverified"
    assert "too large to run without offloading" in verdict.sentence


def takes(much: int) -> Kept:
    return lambda self, x: x.new_zeros(much, dtype=torch.uint8) if self.calls == 0 else None


def test_a_limit_holds_in_the_first_call_too() -> None:
    contract = Contract(max_memory="6MiB")
    kept = judged(keeps(takes(8 << 20)), None, contract=contract)
    failed_with(kept, "the peak of the first call is 12.0", "6.00 MiB")
    assert judged(keeps(takes(1 << 20)), None, contract=contract).status == "passed"


def test_a_limit_is_held_to_the_byte() -> None:
    nothing = keeps(lambda self, x: None)
    peak = judged(nothing, None, contract=AMPLE).figures["call_peak_bytes"]
    assert judged(nothing, None, contract=Contract(max_memory=peak)).status == "passed"
    failed_with(judged(nothing, None, contract=Contract(max_memory=peak - 1)), "allowed (1 B more)")


def test_a_peak_that_is_reset_by_a_function_taken_before_is_found(device: Accelerator) -> None:
    if not device.is_simulated:
        pytest.skip("the counter of a real device is all there is")
    reset = torch.cuda.reset_peak_memory_stats

    def hides(self: Keeper, x: torch.Tensor) -> None:
        del self.kept
        self.kept = x.new_zeros(8 << 20, dtype=torch.uint8)
        self.kept = None
        reset()

    failed_with(judged(keeps(hides), None, contract=Contract(max_memory="8MiB")), "the peak of a call is 12.0")


def test_memory_that_comes_and_goes_on_another_device_is_found_after_a_reset(device: Accelerator) -> None:
    if not device.is_simulated:
        pytest.skip("a machine may have one device only")

    def visits(self: Keeper, x: torch.Tensor) -> None:
        torch.zeros(1024, device="cuda:1")
        torch.cuda.reset_peak_memory_stats(1)

    failed_with(judged(keeps(visits), None, contract=AMPLE), "4.00 KiB on another device of the same kind")


class KeepsASmallCopy(nn.Module):
    """A large quantized layer, a small one, and a dense copy of the small one's weight."""

    keeps = True

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(WIDTH * 2, WIDTH * 2), nn.Linear(WIDTH * 2, WIDTH * 32)
        self.copy: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.keeps and self.copy is None:
            self.copy = (torch.zeros(WIDTH * 2, WIDTH * 2, device=x.device, dtype=x.dtype),)
        result: torch.Tensor = self.large(self.small(x.repeat(1, 2)))
        return result


class KeepsNoSmallCopy(KeepsASmallCopy):
    keeps = False


def test_a_dense_copy_of_a_small_layer_beside_a_large_one_is_found() -> None:
    nf4 = Quantization("bitsandbytes_4bit", components=["model"], kwargs={"bnb_4bit_quant_type": "nf4"})
    fields: dict[str, Any] = {
        "quantization": nf4,
        "dtype": "bfloat16",
        "call": Call(inputs=[{"x": torch.ones(4, WIDTH)}]),
    }
    failed_with(
        judged(KeepsASmallCopy, None, **fields), "KiB stay on the accelerator after the call beside the weights"
    )
    assert judged(KeepsNoSmallCopy, None, **fields).status == "passed"


def test_a_models_own_inputs_are_not_what_it_left() -> None:
    large = Call(inputs=[{"x": torch.ones(WIDE_BYTES // 4 // WIDTH, WIDTH)}], calls=3)
    verdict = judged(Wide, None, call=large, contract=AMPLE)
    assert (verdict.status, verdict.figures["left_bytes"]) == ("passed", 0)


class KeepsAGraph(Keeper):
    """Runs without torch.no_grad() and keeps what it returned: all that the gradients would need stays with it."""

    def __init__(self, grad: bool) -> None:
        super().__init__(lambda self, x: None)
        self.grad = grad

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(self.grad):
            wide = self.embed(prompt).repeat(256, 1)
            for _ in range(num_inference_steps):
                wide = wide + 0.1 * self.denoise(wide)
        self.kept = wide[:1]
        with torch.no_grad():
            return {"images": wide[:1].clone()}


def test_what_an_autograd_graph_keeps_is_named() -> None:
    verdict = judged(lambda: KeepsAGraph(True), contract=AMPLE)
    failed_with(verdict, "stay on the accelerator after", "an autograd graph is kept", "without torch.no_grad()")
    assert "autograd" not in judged(lambda: KeepsAGraph(False), contract=AMPLE).text


def test_what_another_pipelines_module_takes_is_named() -> None:
    def made() -> Keeper:
        class UNet(Wide):
            pass

        return Keeper(lambda self, x: setattr(self, "kept", UNet().to(x.device)))

    failed_with(judged(made, contract=AMPLE), "2.02 MiB are weights of a UNet that is none of this pipeline's")


def test_what_the_cache_of_a_component_keeps_is_found() -> None:
    from diffusers import FluxPipeline
    from diffusers.hooks import FirstBlockCacheConfig

    from pytest_diffopt.observation.holders import holders
    from pytest_diffopt.replicas import ensure

    def caches() -> list[Any]:
        return [one for one in holders({"transformer": pipe.transformer}, "cpu") if one.kind == "cache"]

    pipe = FluxPipeline.from_pretrained(ensure("tiny-flux"))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    pipe.maybe_free_model_hooks = lambda: None  # which begins the cache anew
    pipe("a cat", height=32, width=32, num_inference_steps=2, max_sequence_length=32)
    (found,) = caches()
    assert found.name == "transformer"
    assert found.bytes > 0
    pipe.transformer._reset_stateful_cache()
    assert caches() == []


# The host's memory.

HOST_LEAKS: dict[str, Kept] = {
    "a tensor a call": lambda self, x: self.kept.append(torch.zeros(100_000)),
    "its results, on the host": lambda self, x: self.kept.append(x.cpu().repeat(64, 1)),
    "at every second call": lambda self, x: self.kept.append(torch.zeros(100_000)) if self.calls % 2 else None,
}
ON_THE_HOST: dict[str, Kept] = {
    "one": lambda self, x: setattr(self, "kept", torch.zeros(100_000)),
    "once": lambda self, x: self.kept or self.kept.append(torch.zeros(100_000)),
    "the last few": lambda self, x: setattr(self, "kept", [*self.kept, torch.zeros(100_000)][-3:]),
    "none": lambda self, x: torch.zeros(1_000_000).sum(),
}


@pytest.fixture
def counts(device: Accelerator) -> None:
    if not device.is_simulated:
        pytest.skip("only the simulated device counts what torch takes of the host")


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("leak", HOST_LEAKS)
def test_a_leak_on_the_host_is_found(leak: str) -> None:
    verdict = judged(keeps(HOST_LEAKS[leak]), contract=AMPLE)
    failed_with(verdict, "memory of the host grows by ", "something keeps tensors on the host")


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("kept", ON_THE_HOST)
def test_what_is_kept_on_the_host_within_bounds_is_no_leak(kept: str) -> None:
    assert judged(keeps(ON_THE_HOST[kept]), contract=AMPLE).status == "passed"


@pytest.mark.usefixtures("counts")
def test_a_limit_of_the_host_is_held_to_the_byte_and_counts_what_waits_there() -> None:
    nothing = keeps(lambda self, x: None)
    taken = judged(nothing, contract=Contract(max_host_memory="1GiB")).figures["host_peak_bytes"]
    assert taken >= 2 * WIDE_BYTES  # both components wait there
    assert judged(nothing, contract=Contract(max_host_memory=taken)).status == "passed"
    failed_with(judged(nothing, contract=Contract(max_host_memory=taken - 1)), "the peak on the host is", "allowed")
    busy = keeps(lambda self, x: torch.zeros(4_000_000).sum())  # gone at the end of each call
    failed_with(judged(busy, contract=Contract(max_host_memory=taken)), "the peak on the host is")
