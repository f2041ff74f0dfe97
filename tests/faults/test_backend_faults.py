"""Faults in layers of torchao, quanto, gguf and layerwise casting: plain, never packed, packed otherwise, unhooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Quantization

from .conftest import WIDTH, Healthy, Judge, TwoPart, assert_all_pass

pytest.importorskip("torchao")
pytest.importorskip("optimum.quanto")
pytest.importorskip("gguf")

QUIET = {"set_inductor_config": False}
INT8_WO = Quantization("torchao", ["model"], {"quant_type": "int8wo", **QUIET})
INT8_DQ = Quantization("torchao", ["model"], {"quant_type": "int8dq", **QUIET})
QUANTO = Quantization("quanto", ["model"], {"weights_dtype": "int8"})
CASTING = Quantization("layerwise_casting", ["model"], {"compute_dtype": "bfloat16"})
GGUF = Quantization("gguf", ["model"], {"file": "any.gguf", "compute_dtype": "bfloat16"})


def linear(width: int = WIDTH) -> nn.Linear:
    return nn.Linear(width, WIDTH).to(torch.bfloat16)


def ao(config: str = "Int8WeightOnlyConfig", **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchao.quantization as library

        layer = linear()
        library.quantize_(layer, getattr(library, config)(**kwargs, **(QUIET if "Intx" not in config else {})))
        return layer

    return make


def quanto(kind: str = "qint8", *, frozen: bool = True, **kwargs: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from optimum.quanto import QLinear, qtypes

        layer = QLinear.from_module(linear(), weights=qtypes[kind], **kwargs)
        if frozen:
            layer.freeze()
        layer.requires_grad_(False)
        return layer  # type: ignore[no-any-return]

    return make


def ggml(kind: str = "Q8_0", compute: torch.dtype = torch.bfloat16) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        from pytest_diffopt.replicas import ggml_types

        dense = linear()
        layer = GGUFLinear(WIDTH, WIDTH, bias=True, compute_dtype=compute)
        stored, of = ggml_types.stored(dense.weight.detach().float().numpy(), kind)
        layer.weight = GGUFParameter(torch.from_numpy(stored.copy()), quant_type=of)
        layer.bias = dense.bias
        return layer

    return make


def model(first: Callable[[], nn.Module], second: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        healthy = Healthy().to(torch.bfloat16)
        healthy.first, healthy.second = first(), second()  # type: ignore[assignment]
        return healthy.requires_grad_(False)

    return factory


def cast(change: Callable[[Any], object] = lambda model: None, **kwargs: Any) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        from diffusers.hooks import apply_layerwise_casting

        healthy = Healthy().to(torch.bfloat16).requires_grad_(False)
        dtypes = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16, **kwargs}
        apply_layerwise_casting(healthy, **dtypes)
        change(healthy)
        return healthy

    return factory


def judged(judge: Judge, factory: Callable[[], Any], quantization: Quantization) -> Any:
    return judge(factory, quantization=quantization, compiled=False, dtype="bfloat16")["quantization"]


HEALTHY = {
    "torchao int8wo": (model(ao(), ao()), INT8_WO),
    "torchao int8dq": (model(*[ao("Int8DynamicActivationInt8WeightConfig")] * 2), INT8_DQ),
    "quanto": (model(quanto(), quanto()), QUANTO),
    "gguf": (model(ggml(), ggml("Q4_0")), GGUF),
    "layerwise_casting": (cast(), CASTING),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_a_factory_quantized_itself_passes(judge: Judge, name: str) -> None:
    factory, quantization = HEALTHY[name]
    verdicts = judge(factory, quantization=quantization, compiled=False, dtype="bfloat16")
    assert_all_pass(verdicts)
    assert verdicts["quantization"].figures["layers"] == 2


@pytest.mark.parametrize("quantization", [INT8_WO, INT8_DQ, QUANTO, CASTING], ids=lambda one: str(one.backend))
def test_a_plain_model_from_a_factory_is_quantized_in_place(judge: Judge, quantization: Quantization) -> None:
    verdicts = judge(Healthy, quantization=quantization, compiled=False, dtype="bfloat16")
    assert_all_pass(verdicts)
    assert verdicts["quantization"].figures["layers"] == 2


def test_a_plain_model_has_no_file_and_says_so(judge: Judge) -> None:
    verdict = judged(judge, Healthy, GGUF)
    assert verdict.status == "failed"
    assert "gguf weights come out of a file while the pipeline is loaded" in verdict.text


@pytest.mark.parametrize(
    ("healthy", "quantization"),
    [(ao(), INT8_WO), (quanto(), QUANTO), (ggml(), GGUF)],
    ids=["torchao", "quanto", "gguf"],
)
def test_a_layer_left_plain_is_named(judge: Judge, healthy: Any, quantization: Quantization) -> None:
    verdict = judged(judge, model(healthy, linear), quantization)
    assert verdict.status == "failed"
    assert verdict.evidence == ("model.second: a plain Linear in bfloat16",)


@pytest.mark.parametrize(
    ("healthy", "backend", "kwargs"),
    [(ao(), "torchao", {"quant_type": "int8wo", **QUIET}), (quanto(), "quanto", {}), (None, "layerwise_casting", {})],
    ids=["torchao", "quanto", "layerwise_casting"],
)
def test_a_component_that_was_silently_left_out_is_named(judge: Judge, healthy: Any, backend: Any, kwargs: Any) -> None:
    def pipeline() -> TwoPart:
        quantized = cast()() if healthy is None else model(healthy, healthy)()
        return TwoPart(Widening(), quantized)

    quantization = Quantization(backend, ["encoder", "denoiser"], kwargs)
    verdict = judge(pipeline, quantization=quantization, compiled=False, dtype="bfloat16", call=Call())["quantization"]
    assert verdict.status == "failed"
    assert verdict.sentence == "encoder is not quantized at all (2 Linear layers left plain)"


class Widening(Healthy):
    """In bfloat16, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(torch.bfloat16))


def dense_inside() -> nn.Module:
    """Of torchao's class, and its values are as wide as ever."""
    layer = ao()()
    layer.weight.qdata = layer.weight.qdata.to(torch.int16)  # type: ignore[union-attr]
    return layer


def dense_in_gguf() -> nn.Module:
    layer: Any = ggml()()
    layer.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16), requires_grad=False)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    return layer  # type: ignore[no-any-return]


def too_long_in_gguf() -> nn.Module:
    """Twice the bytes of its type."""
    layer: Any = ggml()()
    kind, bare = layer.weight.quant_type, layer.weight.as_tensor()
    layer.weight = type(layer.weight)(torch.cat([bare, bare]), quant_type=kind)
    inner = type(layer).forward
    layer.forward = lambda x: inner(layer, x)[..., :WIDTH] if layer.bias is None else x
    return layer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("healthy", "never", "quantization"),
    [
        (ao(), dense_inside, INT8_WO),
        (quanto(), quanto(frozen=False), QUANTO),
        (ggml(), dense_in_gguf, GGUF),
        (ggml(), too_long_in_gguf, GGUF),
    ],
    ids=["torchao", "quanto not frozen", "gguf dense", "gguf too long"],
)
def test_a_layer_that_was_never_packed_is_named(judge: Judge, healthy: Any, never: Any, quantization: Any) -> None:
    verdict = judged(judge, model(healthy, never), quantization)
    assert verdict.status == "failed"
    assert "whose weight was never quantized" in verdict.text
    assert "model.second" in verdict.text


ASYMMETRIC = "Int8DynamicActivationInt8WeightConfig"


@pytest.mark.parametrize(
    ("healthy", "other", "quantization", "cause"),
    [
        (ao(ASYMMETRIC), ao(), INT8_DQ, "leaves activations as they are, though Int8Dynamic"),
        (ao(), ao(ASYMMETRIC), INT8_WO, "quantizes activations to int8, though Int8WeightOnlyConfig leaves them"),
        (ao(), ao("Float8WeightOnlyConfig"), INT8_WO, "in float8_e4m3fn, not int8"),
        (ao(), quanto(), INT8_WO, "in int8, not torchao"),
        (quanto(), ao(), QUANTO, "in int8, not quanto"),
        (quanto(), quanto("qfloat8_e4m3fn"), QUANTO, "in float8_e4m3fn, not int8"),
        (quanto(), quanto("qint4"), QUANTO, "in int4, not int8"),
        (ggml(), ggml(compute=torch.float32), GGUF, "computes in float32, not bfloat16"),
        (ggml(), ao(), GGUF, "in int8, not gguf"),
    ],
)
def test_another_format_than_promised_is_named(
    judge: Judge, healthy: Any, other: Any, quantization: Any, cause: str
) -> None:
    verdict = judged(judge, model(healthy, other), quantization)
    assert verdict.status == "failed"
    assert cause in verdict.text


def test_other_groups_than_promised_are_named(judge: Judge) -> None:
    import torchao.quantization as library

    quantization = Quantization("torchao", ["model"], {"quant_type": "int8wo", "granularity": "PerGroup(32)", **QUIET})
    groups = ao(granularity=library.PerGroup(32))
    assert judged(judge, model(groups, groups), quantization).status == "passed"
    verdict = judged(judge, model(groups, ao(granularity=library.PerGroup(16))), quantization)
    assert "its scales are PerGroup(16), not PerGroup(32)" in verdict.text


def with_its_forward_given_back(healthy: Any) -> None:
    del healthy.second.forward
    healthy.second.to(torch.bfloat16)


def cast_by_hand(healthy: Any) -> None:
    weight = healthy.second.weight.to(torch.float8_e4m3fn)
    fresh = linear()
    fresh.weight = nn.Parameter(weight, requires_grad=False)
    fresh.forward = lambda x: nn.functional.linear(x, fresh.weight.to(x.dtype), fresh.bias)  # type: ignore[method-assign]
    healthy.second = fresh


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (cast_by_hand, "a plain Linear in float8_e4m3fn"),
        (with_its_forward_given_back, "a plain Linear in bfloat16"),
        (lambda healthy: healthy.second.to(torch.bfloat16), "whose weight was never quantized"),
        (lambda healthy: setattr(healthy, "second", linear()), "a plain Linear in bfloat16"),
    ],
    ids=["cast by hand", "forward given back", "a hook on a wide weight", "replaced"],
)
def test_a_cast_without_its_hook_and_a_hook_without_its_cast_are_named(judge: Judge, change: Any, cause: str) -> None:
    verdict = judged(judge, cast(change), CASTING)
    assert verdict.status == "failed"
    assert "model.second: " in verdict.text
    assert cause in verdict.text


def test_another_storage_or_compute_dtype_is_named(judge: Judge) -> None:
    wider = Quantization("layerwise_casting", ["model"], {"storage_dtype": "float8_e5m2"})
    assert "stored in float8_e4m3fn, not float8_e5m2" in judged(judge, cast(), wider).text
    narrow = judged(judge, cast(compute_dtype=torch.float32), CASTING)
    assert "computes in float32, not bfloat16" in narrow.text


def test_patterns_keep_layers_plain_and_a_layer_that_they_keep_is_no_fault(judge: Judge) -> None:
    kwargs = {"compute_dtype": "bfloat16", "skip_modules_pattern": ["^second$"]}
    verdict = judged(judge, Healthy, Quantization("layerwise_casting", ["model"], kwargs))
    assert (verdict.status, verdict.figures["layers"], verdict.figures["left_plain"]) == ("passed", 1, 1)
    assert verdict.evidence == ("left plain, as the recipe or the library says: model.second in bfloat16",)


def test_a_layer_whose_sizes_the_kernels_cannot_do_is_left_and_told(judge: Judge) -> None:
    class Narrow(Healthy):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(WIDTH, 24)

    kwargs = {"quant_type": "float8dq", **QUIET}
    verdict = judged(judge, Narrow, Quantization("torchao", ["model"], kwargs))
    assert verdict.status == "passed", verdict.text
    assert verdict.evidence == ("left plain, as the recipe or the library says: model.second in bfloat16",)
