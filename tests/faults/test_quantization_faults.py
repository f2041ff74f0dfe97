"""Faults that leave a layer unquantized, or quantize it otherwise than promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Quantization, Recipe, observe

from .conftest import WIDTH, Healthy, Judge, TwoPart, assert_all_pass, inputs

NF4 = Quantization("bitsandbytes_4bit", components=["model"], kwargs={"bnb_4bit_quant_type": "nf4"})
INT8 = Quantization("bitsandbytes_8bit", components=["model"])


def four_bit(quant_type: str = "nf4", *, moved: bool = True, double: bool = False) -> nn.Module:
    layer = bnb.nn.Linear4bit(WIDTH, WIDTH, quant_type=quant_type, compress_statistics=double)
    return layer.to("cpu") if moved else layer  # the weight is quantized when the layer is moved


def model(first: Callable[[], nn.Module], second: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        healthy = Healthy()
        healthy.first, healthy.second = first(), second()  # type: ignore[assignment]
        return healthy

    return factory


def plain() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def judged(judge: Judge, factory: Callable[[], Any], quantization: Quantization = NF4, **more: Any) -> Any:
    return judge(factory, quantization=quantization, compiled=False, **more)["quantization"]


def test_a_plain_linear_among_quantized_ones_is_named(judge: Judge) -> None:
    verdict = judged(judge, model(four_bit, plain))
    assert verdict.status == "failed"
    assert verdict.sentence == "1 of 2 layers of model are not as promised"
    assert verdict.evidence == ("model.second: a plain Linear in float32",)


def test_a_quantized_class_whose_weight_never_was_is_named(judge: Judge) -> None:
    class NeverQuantized(bnb.nn.Linear4bit):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.weight = nn.Parameter(self.weight.data)  # one that moving to a device does not quantize

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    verdict = judged(judge, model(four_bit, lambda: NeverQuantized(WIDTH, WIDTH)))
    assert verdict.status == "failed"
    assert "model.second: a NeverQuantized whose weight was never quantized" in verdict.text


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        (lambda: four_bit("fp4"), "in fp4, not nf4"),
        (lambda: four_bit(double=True), "double-quantized, though not asked for"),
        (lambda: bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False).to("cpu"), "in int8, not bitsandbytes_4bit"),
    ],
)
def test_another_format_than_promised_is_named(judge: Judge, other: Callable[[], nn.Module], cause: str) -> None:
    verdict = judged(judge, model(four_bit, other))
    assert verdict.status == "failed"
    assert cause in verdict.text


def test_a_missing_double_quantization_is_named(judge: Judge) -> None:
    kwargs = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = Quantization("bitsandbytes_4bit", components=["model"], kwargs=kwargs)
    verdict = judged(judge, model(four_bit, four_bit), quantization)
    assert verdict.status == "failed"
    assert "not double-quantized" in verdict.text


def pipeline(encoder: Callable[[], nn.Module], denoiser: Callable[[], nn.Module]) -> Callable[[], TwoPart]:
    return lambda: TwoPart(encoder(), denoiser())


BOTH = Quantization("bitsandbytes_4bit", components=["encoder", "denoiser"], kwargs={"bnb_4bit_quant_type": "nf4"})
DENOISER = Quantization("bitsandbytes_4bit", components=["denoiser"], kwargs={"bnb_4bit_quant_type": "nf4"})


def test_a_component_that_was_silently_left_out_is_named(judge: Judge) -> None:
    verdict = judged(judge, pipeline(Healthy, model(four_bit, four_bit)), BOTH, call=Call())
    assert verdict.status == "failed"
    assert verdict.sentence == "encoder is not quantized at all (2 Linear layers left plain)"


def test_a_component_that_was_not_meant_is_named(judge: Judge) -> None:
    verdict = judged(judge, pipeline(model(four_bit, plain), model(four_bit, four_bit)), DENOISER, call=Call())
    assert verdict.status == "failed"
    assert "encoder.first is quantized, though not among the components meant" in verdict.sentence


def test_another_dtype_than_promised_for_the_rest_is_named(judge: Judge) -> None:
    verdict = judged(judge, model(four_bit, four_bit), dtype="bfloat16")
    assert verdict.status == "failed"
    assert "of model in float32, not bfloat16" in verdict.sentence


@pytest.mark.parametrize("kept", ["table", "other"])
def test_a_parameter_that_its_class_keeps_in_float32_is_no_fault_and_another_is(judge: Judge, kept: str) -> None:
    class Kept(Healthy):
        _keep_in_fp32_modules: ClassVar = [kept]

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = four_bit(), four_bit()  # type: ignore[assignment]
            self.to(torch.bfloat16)
            self.table = nn.Parameter(torch.ones(1, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * self.table.to(x.dtype))

    verdict = judged(judge, Kept, dtype="bfloat16")
    if kept == "table":
        assert verdict.status == "passed", verdict.text
    else:
        assert verdict.sentence == "1 parameter of model in float32, not bfloat16 (table)"


def test_a_layer_in_the_skip_list_may_stay_plain_and_must(judge: Judge) -> None:
    skipping = Quantization(
        "bitsandbytes_4bit", components=["model"], kwargs={"bnb_4bit_quant_type": "nf4"}, skip_modules=["second"]
    )
    assert judged(judge, model(four_bit, plain), skipping).status == "passed"
    assert "named in skip_modules" in judged(judge, model(four_bit, four_bit), skipping).sentence


def test_what_a_factory_quantized_itself_passes(judge: Judge) -> None:
    verdicts = judge(model(four_bit, four_bit), quantization=NF4, compiled=False)
    assert_all_pass(verdicts)
    assert verdicts["quantization"].figures["layers"] == 2
    assert 4.5 <= verdicts["quantization"].figures["bits_per_weight"] < 4.7


@pytest.mark.parametrize("quantization", [NF4, INT8])
def test_a_plain_model_from_a_factory_is_quantized_in_place(judge: Judge, quantization: Quantization) -> None:
    verdicts = judge(Healthy, quantization=quantization, compiled=False, dtype="bfloat16")
    assert_all_pass(verdicts)


def test_a_layer_that_its_class_keeps_in_float32_is_not_quantized_in_place() -> None:
    class Kept(Healthy):
        _keep_in_fp32_modules: ClassVar = ["first"]

    recipe = Recipe("kept", pipeline=Kept, quantization=NF4, call=Call(inputs=inputs()))
    layers = {layer.path: layer.format for layer in observe(recipe, accelerator="cpu", precise=False).layers}
    assert layers == {"first": "", "second": "nf4"}


def test_quantized_and_compiled_together_pass(judge: Judge) -> None:
    kwargs = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    quantization = Quantization("bitsandbytes_4bit", components=["model"], kwargs=kwargs)
    assert_all_pass(judge(Healthy, quantization=quantization, dtype="bfloat16", fullgraph=True))


def test_a_component_that_is_not_there_is_named(judge: Judge) -> None:
    absent = Quantization("bitsandbytes_4bit", components=["unet"])
    verdict = judged(judge, Healthy, absent)
    assert verdict.status == "failed"
    assert "found 'unet'; the pipeline has: model" in verdict.text


# A LoRA: peft wraps the layers of a model and puts small ones beside them.


def with_lora(factory: Callable[[], nn.Module]) -> Callable[[], Any]:
    def made() -> Any:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
        return inject_adapter_in_model(config, factory())

    return made


def test_the_layers_of_an_adapter_are_not_meant_to_be_quantized(judge: Judge) -> None:
    healthy = judge(with_lora(model(four_bit, four_bit)), quantization=NF4, compiled=False)
    assert_all_pass(healthy)
    assert healthy["quantization"].sentence.startswith("2 layers of model in nf4")
    verdict = judged(judge, with_lora(model(four_bit, plain)))
    assert verdict.status == "failed"
    assert verdict.evidence == ("model.second.base_layer: a plain Linear in float32",)


def test_in_place_the_layers_of_an_adapter_stay_as_they_are() -> None:
    def linear(path: str) -> str:
        return next(layer.format for layer in found.layers if layer.path == path)

    found = observe(Recipe("r", with_lora(Healthy), call=Call(inputs=inputs()), quantization=NF4))
    assert found.failure is None, found.failure
    assert linear("first.base_layer") == linear("second.base_layer") == "nf4"
    assert linear("first.lora_A.default") == linear("first.lora_B.default") == ""
