"""Faults that change what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Contract, Offloading, Quantization, Recipe, Verdict, check
from pytest_diffopt.checks.parity import percent, scale_shown
from pytest_diffopt.checks.session import Session

from .conftest import WIDTH, Healthy, Judge, TwoPart, assert_all_pass, inputs

Tensors = tuple[torch.Tensor, ...]


def backend(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A backend that runs the graph as it is, and changes what comes out."""

    def compile_graph(graph: Any, example_inputs: Any) -> Callable[..., Tensors]:
        return lambda *given: tuple(change(result) for result in graph(*given))

    return compile_graph


def one_element(result: torch.Tensor) -> torch.Tensor:
    changed = result.clone()
    changed.view(-1)[7] += 0.05 * result.abs().max()
    return changed


def not_written(result: torch.Tensor) -> torch.Tensor:
    """Memory that nobody wrote to but at its beginning, in the block where the right numbers had been just before."""
    kept, found, place = [], result, 0
    for _ in range(500):
        if found.data_ptr() == place:
            break
        kept.append(found)
        right = result.clone()
        place = right.data_ptr()
        del right
        found = torch.empty_like(result)
    found[:1] = result[:1]
    return found


FAULTS = {
    "not written": backend(not_written),
    "scaled": backend(lambda result: result * 1.003),
    "shifted": backend(lambda result: result + 0.02),
    "one element": backend(one_element),
    "zeroed": backend(torch.zeros_like),
    "not finite": backend(lambda result: result * float("nan")),
    "transposed rows": backend(lambda result: result.flip(0)),
    "noise": backend(lambda result: result + 0.02 * torch.sin(1000 * result)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_result_is_found(judge: Judge, fault: str, dtype: str) -> None:
    call = Call(inputs=inputs(32, 32, 32))
    verdict = judge(Healthy, backend=FAULTS[fault], dtype=dtype, call=call)["parity"]
    assert verdict.status == "failed", verdict.text


def test_a_scale_that_is_a_little_wrong_is_named_as_one_below_the_rounding(judge: Judge) -> None:
    call = Call(inputs=inputs(256, 256, 256))
    verdict = judge(Healthy, backend=FAULTS["scaled"], dtype="bfloat16", call=call)["parity"]
    assert verdict.status == "failed"
    assert "scaled by 1.00" in verdict.sentence


def test_the_tolerance_that_would_have_been_required_is_stated(judge: Judge) -> None:
    verdict = judge(Healthy, backend=FAULTS["scaled"])["parity"]
    required = verdict.figures["required_multiple"]
    assert f"a parity_multiple of {required:.3g} would have been required, 3 is set" in verdict.text
    generous = judge(Healthy, backend=FAULTS["scaled"], contract=Contract(parity_multiple=1.1 * required))["parity"]
    assert generous.status == "passed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_faithful_backend_passes(judge: Judge, dtype: str) -> None:
    assert_all_pass(judge(Healthy, dtype=dtype, call=Call(inputs=inputs(32, 32, 32))))


class Reassociated(nn.Module):
    """The same sum, added up in another order when it is compiled: honest rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if torch.compiler.is_compiling():
                half = WIDTH // 2
                left = x[:, :half] @ layer.weight[:, :half].T
                x = x + torch.tanh(layer.bias + left + x[:, half:] @ layer.weight[:, half:].T)
            else:
                x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_order_of_additions_is_no_fault(judge: Judge, dtype: str) -> None:
    assert_all_pass(judge(Reassociated, dtype=dtype, call=Call(inputs=inputs(32, 32, 32))))


class Enlarges(Reassociated):
    """A decoder: whatever its few inputs are off by, its many outputs are off by together."""

    def __init__(self, seed: int, share: float = 0.0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.layers = self.layers[:4]
        self.narrow, self.wide = nn.Linear(WIDTH, 8), nn.Linear(8, 2048)
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.wide(self.narrow(super().forward(x)))
        return y * (1 + self.share) if torch.compiler.is_compiling() else y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_elements_that_round_together_are_no_fault(judge: Judge, dtype: str) -> None:
    for seed in (0, 4):
        verdict = judge(lambda seed=seed: Enlarges(seed), dtype=dtype, call=Call(inputs=inputs(2, 2, 2)))["parity"]
        assert verdict.status == "passed", verdict.text


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.0001), ("float16", 0.001), ("bfloat16", 0.01)])
def test_a_systematic_error_of_elements_that_round_together_is_found(judge: Judge, dtype: str, share: float) -> None:
    model = lambda: Enlarges(0, share)  # noqa: E731
    verdict = judge(model, dtype=dtype, call=Call(inputs=inputs(2, 2, 2)))["parity"]
    assert verdict.status == "failed", verdict.text


class NotFinite(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / torch.zeros_like(x)


class Constant(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0 + 1


class IgnoresInput(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.linspace(0, 1, x.numel(), device=x.device).reshape(x.shape))


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (NotFinite, "is not finite (NaN or infinity)"),
        (Constant, "is constant"),
        (IgnoresInput, "ignores its inputs"),
    ],
)
def test_two_dead_outputs_do_not_agree(judge: Judge, model: type[nn.Module], cause: str) -> None:
    verdict = judge(model)["parity"]
    assert verdict.status == "failed"
    assert cause in verdict.sentence


class PromptIsLost(TwoPart):
    def embed(self, prompt: str) -> torch.Tensor:
        return super().embed("always the same")


def test_a_pipeline_that_ignores_its_prompt_is_found(judge: Judge) -> None:
    verdict = judge(lambda: PromptIsLost(Healthy(), Healthy()), component="denoiser", call=Call())["parity"]
    assert verdict.status == "failed"
    assert "ignores its inputs" in verdict.sentence


def reusing_backend(graph: Any, example_inputs: Any) -> Callable[..., Tensors]:
    """Returns the same buffer from every call, as CUDA graphs do."""
    kept: dict[int, torch.Tensor] = {}

    def run(*given: Any) -> Tensors:
        results = []
        for index, result in enumerate(graph(*given)):
            kept.setdefault(index, torch.empty_like(result)).copy_(result)
            results.append(kept[index])
        return tuple(results)

    return run


def test_an_output_whose_buffer_the_next_call_overwrites_is_found(judge: Judge) -> None:
    verdict = judge(Healthy, backend=reusing_backend)["parity"]
    assert verdict.status == "failed"
    assert "was overwritten by a later call" in verdict.sentence


class EncodesTwice(TwoPart):
    """Holds what its encoder made of the prompt while it encodes another."""

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        wanted, unwanted = self.embed(prompt), self.embed("rain")
        x = 2 * wanted - unwanted
        for _ in range(num_inference_steps):
            x = x + 0.1 * self.denoise(x)
        return {"images": x}


class KeepsABuffer(Healthy):
    """Writes each result into a buffer of its own, eager too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("out", torch.zeros(4, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out.copy_(super().forward(x))  # type: ignore[operator, no-any-return]


def test_an_output_that_the_next_run_of_its_component_overwrites_is_named(judge: Judge) -> None:
    call = Call()

    def of(encoder: type[nn.Module], backend: Any) -> Any:
        made = lambda: EncodesTwice(encoder(), Healthy())  # noqa: E731
        return judge(made, component="encoder", call=call, backend=backend)["parity"]

    verdict = of(Healthy, reusing_backend)
    assert verdict.status == "failed"
    assert "encoder, step 0 of call 0" in verdict.sentence
    assert "was overwritten by a later run" in verdict.sentence
    assert of(Healthy, "eager").status == "passed"
    assert "overwritten" not in of(KeepsABuffer, "eager").text  # as the eager model does


class UpdatesItsArgument(nn.Module):
    """Keeps what it saw in a dict that the caller gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        y = self.layer(x) + cache["seen"]
        cache["seen"] = y
        return y


class CopiesItsArgument(UpdatesItsArgument):
    """When compiled, works on a copy: the caller's dict stays as it was."""

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().forward(x, dict(cache) if torch.compiler.is_compiling() else cache)


def test_in_place_updates_that_get_lost_are_found(judge: Judge) -> None:
    call = Call(inputs=inputs(4, 4, 4, cache={"seen": torch.ones(4, WIDTH)}))
    verdict = judge(CopiesItsArgument, call=call)["parity"]
    assert verdict.status == "failed"
    assert "inputs after the call.cache.seen" in verdict.sentence
    assert_all_pass(judge(UpdatesItsArgument, call=call))


def test_the_first_component_to_differ_is_named(judge: Judge) -> None:
    factory = lambda: TwoPart(Healthy(), Healthy())  # noqa: E731
    verdict = judge(factory, component="denoiser", call=Call(), backend=FAULTS["scaled"])["parity"]
    assert verdict.status == "failed"
    assert verdict.sentence.startswith("denoiser, step 0 of call 0 is the first to differ")


NF4 = Quantization("bitsandbytes_4bit", kwargs={"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("dtype", "quantization", "pipeline"),
    [
        ("float32", None, False),
        ("bfloat16", None, False),
        ("float16", None, False),
        ("bfloat16", NF4, False),
        ("float32", None, True),
        ("bfloat16", NF4, True),
    ],
)
def test_an_error_of_the_size_that_a_verdict_states_fails_and_half_of_it_passes(
    judge: Judge, dtype: str, quantization: Quantization | None, pipeline: bool
) -> None:
    fields: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "call": Call(inputs=inputs(32, 32, 32))}
    if pipeline:
        fields |= {"component": "denoiser", "call": Call()}
    factory = (lambda: TwoPart(Healthy(), Healthy())) if pipeline else Healthy
    healthy = judge(factory, **fields)["parity"]
    assert healthy.status == "passed", healthy.text
    scale, error = healthy.figures["detects"], healthy.figures["detects_error"]
    where = "denoiser" if pipeline else "output"
    assert healthy.figures["detects_in"] == where
    assert healthy.figures["components"][where]["detects"] == scale
    assert healthy.sentence.endswith(
        f"; would have caught a scale that is off by {percent(scale)}, or any error of {percent(error)}, "
        f"in what comes out of {where}"
    )
    assert 0 < scale <= error < 0.2

    def status(change: Callable[[torch.Tensor], torch.Tensor]) -> str:
        return judge(factory, backend=backend(change), **fields)["parity"].status

    assert status(lambda result: result * (1 + 1.01 * scale)) == "failed"
    assert status(lambda result: result * (1 - 1.01 * scale)) == "failed"
    rms = lambda result: result.float().square().mean().sqrt().to(result.dtype)  # noqa: E731
    assert status(lambda result: result + 1.01 * error * rms(result)) == "failed"
    if not pipeline:  # where several steps add up, less than what is stated may be caught
        assert status(lambda result: result * (1 + scale / 2)) == "passed"


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.00412, "0.42%"), (0.004, "0.40%"), (0.0213, "2.2%"), (0.3, "30%"), (1.234e-6, "0.00013%"), (2.0, "200%")],
)
def test_a_share_is_rounded_up_and_written_out(share: float, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("gain", "shown"), [(0.003, "1.0030"), (-1.9e-7, "0.99999981"), (4e-8, "1.000000040"), (0.0, "1.00"), (0.5, "1.50")]
)
def test_a_scale_is_written_so_that_it_differs_from_one(gain: float, shown: str) -> None:
    assert scale_shown(gain) == shown


class Averages(nn.Module):
    """A decoder in whose output a small offset of its input is large, and rounding is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.layer.weight.copy_((1 + torch.arange(WIDTH)[:, None] / WIDTH).expand(WIDTH, WIDTH) / WIDTH)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


class ThreePart(TwoPart):
    """Decodes what its denoiser made."""

    def __init__(self) -> None:
        super().__init__(Healthy(), Healthy())
        self.components["vae"] = Averages()

    def __call__(self, prompt: str, num_inference_steps: int = 1) -> dict[str, torch.Tensor]:
        return {"images": self.components["vae"](self.denoise(self.embed(prompt)))}


def small_offset(result: torch.Tensor) -> torch.Tensor:
    return result + 0.006 * result.float().square().mean().sqrt().to(result.dtype)


def test_a_component_whose_error_is_first_seen_behind_it_is_the_one_that_is_blamed() -> None:
    def judged(*compilation: Compilation, dtype: str = "bfloat16") -> Verdict:
        recipe = Recipe("r", ThreePart, dtype=dtype, compilation=compilation, call=Call(num_inference_steps=1))
        return next(one for one in check(recipe) if one.check == "parity")

    faulty = Compilation("denoiser", backend=backend(small_offset))
    verdict = judged(faulty)
    detects = percent(verdict.figures["components"]["denoiser"]["detects"])
    assert verdict.status == "failed"
    assert verdict.sentence.startswith(
        "denoiser is the first to differ: seen in vae, step 0 of call 0, where the code is that of the reference too, by "
    )
    assert verdict.sentence.endswith(f"; in denoiser itself a scale off by less than {detects} is not seen")
    assert verdict.figures["components"]["denoiser"]["excess"] <= 1
    both = judged(faulty, Compilation("vae", backend="eager"))
    assert both.sentence.startswith("denoiser or vae is the first to differ: seen in vae, step 0 of call 0, by ")
    alone = judged(
        Compilation("denoiser", backend="eager"), Compilation("vae", backend=FAULTS["scaled"]), dtype="float32"
    )
    assert alone.sentence.startswith("vae, step 0 of call 0 is the first to differ: by ")
    assert judged(Compilation("denoiser", backend="eager"), Compilation("vae", backend="eager")).status == "passed"


class Inside(nn.Module):
    """A residual stack with an error of a share of one branch, where it is compiled."""

    def __init__(self, share: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = torch.nn.functional.gelu(self.first(x))
        if torch.compiler.is_compiling():
            branch = branch * (1 + self.share)
        return x + 0.2 * self.second(branch)


@pytest.mark.parametrize("quantization", [None, NF4])
def test_a_fault_that_bfloat16_hides_is_found_in_float32_and_its_healthy_twin_passes(
    judge: Judge, quantization: Quantization | None
) -> None:
    fields: dict[str, Any] = {
        "dtype": "bfloat16",
        "quantization": quantization,
        "call": Call(inputs=inputs(32, 32, 32)),
    }
    sharp = Contract(parity_dtype="float32")
    for share in (0.01, 0.001):
        assert (
            judge(lambda one=share: Inside(one), **fields)["parity"].status == "passed"
        )  # what is wrong with bfloat16
        verdicts = judge(lambda one=share: Inside(one), contract=sharp, **fields)
        assert verdicts["parity"].status == "failed"
        assert verdicts["parity"].sentence.startswith("the output, call 0 is the first to differ: ")
        assert verdicts["parity"].sentence.endswith("; judged in float32")
        assert verdicts["parity"].evidence[-1].startswith("as the recipe has it: 8 tensors equal within 0.0")
        assert {verdict.status for name, verdict in verdicts.items() if name != "parity"} == {"passed"}
    twin = judge(Inside, contract=sharp, **fields)
    assert_all_pass(twin)
    assert twin["parity"].sentence.endswith("; judged in float32")
    assert twin["parity"].figures["parity_dtype"] == "float32"
    assert twin["parity"].figures["detects"] < 1e-5
    assert twin["parity"].figures["yardstick"] == "against float64"


def test_in_float32_the_same_code_is_compiled_and_offloaded() -> None:
    compiled: list[tuple[torch.dtype, int]] = []

    def counting(graph: Any, example_inputs: Any) -> Any:
        compiled.append((example_inputs[0].dtype, len(graph.graph.nodes)))
        return graph

    def judged(share: float, contract: Contract) -> Verdict:
        recipe = Recipe(
            "r",
            lambda: TwoPart(Healthy(), Inside(share)),
            dtype="bfloat16",
            compilation=Compilation("denoiser", backend=counting),
            offloading=Offloading("model"),
            contract=contract,
            call=Call(num_inference_steps=1, calls=2),
        )
        session = Session()
        found = session.judge(recipe, "parity")
        if contract.parity_dtype and not share:  # the other checks read the recipe as it is
            assert all(output.dtype == "bfloat16" for output in session.evidence(recipe).observation.outputs)
            assert session.judge(recipe, "memory").status != "failed"
        return found

    sharp = Contract(parity_dtype="float32")
    assert judged(0.001, Contract()).status == "passed"
    found = judged(0.001, sharp)
    assert found.status == "failed"
    assert found.sentence.startswith("denoiser, step 0 of call 0 is the first to differ: ")
    compiled.clear()
    assert judged(0.0, sharp).status == "passed"
    # as it is, without offloading, and in float32; each time the same code
    assert [dtype for dtype, _ in compiled] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert len({nodes for _, nodes in compiled}) == 1


def test_a_fault_that_only_the_narrow_dtype_has_is_found_with_parity_dtype_too(judge: Judge) -> None:
    narrow = backend(lambda result: result * 1.1 if result.dtype == torch.bfloat16 else result)
    fields: dict[str, Any] = {"dtype": "bfloat16", "call": Call(inputs=inputs(32, 32, 32))}
    verdict = judge(Healthy, backend=narrow, contract=Contract(parity_dtype="float32"), **fields)["parity"]
    assert verdict.status == "failed"
    assert "judged in float32" not in verdict.sentence


class NarrowInside(Healthy):
    """Multiplies in bfloat16, whatever it is asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.bfloat16())


def test_what_cannot_run_in_a_wider_dtype_is_unverified_with_the_reason(judge: Judge) -> None:
    call = Call(inputs=inputs(32, 32, 32))
    sharp = Contract(parity_dtype="float32")
    verdict = judge(NarrowInside, dtype="bfloat16", call=call, contract=sharp)["parity"]
    assert verdict.status == "unverified"
    assert verdict.sentence.startswith("cannot be judged in float32, where it ends with RuntimeError: ")
    verdict = judge(Healthy, quantization=NF4, dtype="bfloat16", call=call, contract=Contract(parity_dtype="float64"))[
        "parity"
    ]
    assert verdict.status == "unverified"
    assert verdict.sentence == (
        "cannot be judged in float64: layers of bitsandbytes_4bit do not multiply in float64; 'float32' is possible"
    )
    assert (
        judge(Healthy, dtype="float32", call=call, contract=Contract(parity_dtype="float64"))["parity"].status
        == "passed"
    )


def test_layers_that_stay_narrow_are_named(judge: Judge) -> None:
    int8 = Quantization("bitsandbytes_8bit", skip_modules=["second"])
    fields: dict[str, Any] = {"dtype": "bfloat16", "quantization": int8, "call": Call(inputs=inputs(32, 32, 32))}
    verdict = judge(Healthy, contract=Contract(parity_dtype="float32"), **fields)["parity"]
    assert verdict.status == "passed", verdict.text
    assert verdict.evidence == ("model: 1 layer stays as before: bitsandbytes' 8-bit layers multiply in float16",)


class AnotherShape(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y[:1] if torch.compiler.is_compiling() else y


class AnotherDtype(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.double() if torch.compiler.is_compiling() else y


def test_another_shape_or_dtype_is_found(judge: Judge) -> None:
    assert "has shape [1, 64], [4, 64] in the eager reference" in judge(AnotherShape)["parity"].sentence
    assert "is float64, float32 in the eager reference" in judge(AnotherDtype)["parity"].sentence
