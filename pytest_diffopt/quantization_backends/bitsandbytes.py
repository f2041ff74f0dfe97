"""bitsandbytes: ``bitsandbytes_4bit`` (nf4, fp4) and ``bitsandbytes_8bit`` (LLM.int8())."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.quantization_backends.backend import (
    UNQUANTIZED,
    Backend,
    Stored,
    bytes_of,
    dtype_name,
    implied,
    kind_name,
    list_of_names,
    not_negative,
    one_of,
    true_or_false,
)

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.observation.observation import Layer
    from pytest_diffopt.recipe import Quantization

_DTYPE_KEYS = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")

SMALLEST_BLOCK = 32
"""Weights that share one ``absmax``, at the least: the formats say 64, and more scales are a promise not kept."""


class _BitsAndBytes(Backend):
    library = "bitsandbytes"
    distribution = "bitsandbytes"
    imports = ("bitsandbytes",)
    skip_key = "llm_int8_skip_modules"
    forecasts = True
    flag: ClassVar[str]

    def library_kwargs(self, quantization: Quantization) -> dict[str, Any]:
        """Dtypes as objects, and the flag that names the format set."""
        import torch

        kwargs: dict[str, Any] = dict(quantization.kwargs)
        for key in _DTYPE_KEYS:
            if isinstance(kwargs.get(key), str):
                kwargs[key] = getattr(torch, kwargs[key])
        kwargs[self.flag] = True
        if quantization.skip_modules:
            kwargs["llm_int8_skip_modules"] = [
                *kwargs.get("llm_int8_skip_modules", []),
                *quantization.skip_modules,
            ]
        return kwargs

    def config(self, quantization: Quantization, *, of_diffusers: bool) -> Any:
        import diffusers
        import transformers

        library: Any = diffusers if of_diffusers else transformers
        return library.BitsAndBytesConfig(**self.library_kwargs(quantization))

    def quantize(
        self, component: torch.nn.Module, paths: list[str], quantization: Quantization, device: torch.device
    ) -> None:
        kwargs = self.library_kwargs(quantization)
        for path in paths:
            layer: Any = component.get_submodule(path)
            new = self._layer(layer, kwargs)
            new.bias = layer.bias
            new.train(layer.training)
            parent, _, last = path.rpartition(".")
            if not path:
                raise PreparationError("quantization: the component is itself a Linear layer; put it inside a module")
            # The weight is quantized when the layer is moved.
            setattr(component.get_submodule(parent), last, new.to(device))

    def _layer(self, layer: Any, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def is_layer(self, module: Any) -> bool:
        weight = getattr(module, "_parameters", {}).get("weight")
        bases = (*type(module).__mro__, *type(weight).__mro__)
        return any(base.__module__.split(".")[0] == "bitsandbytes" for base in bases)

    def read(self, module: Any, count: int) -> Stored | None:
        import torch

        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            return Stored(UNQUANTIZED, 0)
        stored = bytes_of(weight)
        dtype, compute = kind_name(weight.dtype), getattr(module, "compute_dtype", None)
        state_bytes, form, double = 0, UNQUANTIZED, False
        state = getattr(weight, "quant_state", None)
        scales = getattr(weight, "SCB", None)
        if scales is None:
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if state is not None:
            state_bytes = sum(bytes_of(tensor) for tensor in _state_tensors(state))
            double = bool(getattr(state, "nested", False))
            # Packed, two weights to a byte: whatever the storage's dtype, n weights take n/2 bytes (rounded up)
            form = str(getattr(state, "quant_type", "")) if stored == (count + 1) // 2 else UNQUANTIZED
        elif isinstance(scales, torch.Tensor) and weight.dtype == torch.int8:
            state_bytes = bytes_of(scales)
            form = "int8" if stored == count else UNQUANTIZED
        return Stored(form, stored, state_bytes, dtype, "" if compute is None else kind_name(compute), double)

    def beside(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        for inner in _state_tensors(getattr(tensor, "quant_state", None)):
            yield f"{name}.quant_state", inner
        for attribute in ("CB", "SCB"):
            if isinstance(found := getattr(tensor, attribute, None), torch.Tensor):
                yield f"{name}.{attribute}", found

    def of_layer(self, path: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        if (state := getattr(layer, "state", None)) is not None:
            for attribute, found in vars(state).items():
                if isinstance(found, torch.Tensor):
                    yield f"{path}.state.{attribute}", found

    def widen(self, layer: Any, wide: torch.dtype) -> None:
        import torch

        if hasattr(getattr(layer, "weight", None), "quant_state"):
            state = layer.weight.quant_state
            if wide != torch.float64:
                layer.compute_dtype = wide
                if state is not None:
                    state.dtype = wide
            elif state is not None:  # its kernels do not multiply in it: the values of the weight do
                from bitsandbytes.functional import dequantize_4bit

                state.dtype = torch.float32
                values = dequantize_4bit(layer.weight.data, state).to(wide)
                layer.weight = torch.nn.Parameter(values, requires_grad=False)
                layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)
        elif wide == torch.float64 and self.is_layer(layer) and isinstance(layer, torch.nn.Linear):
            raise NotImplementedError("8-bit layers multiply in float16")

    def most_bytes(self, layer: Layer) -> int:
        """4-bit: two weights to a byte, one float32 scale (``absmax``) a block, and a code table; double quantized, one
        byte a scale, with scales and a code table of its own. 8-bit: a byte a weight, one float32 scale (``SCB``) a row.
        """
        count = layer.parameters
        if layer.format == "int8":
            return count + 4 * layer.out_features
        blocks = math.ceil(count / SMALLEST_BLOCK)
        codes = 16 * 4
        if layer.double_quantized:
            return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / SMALLEST_BLOCK) + codes + 256 * 4 + 4
        return math.ceil(count / 2) + 4 * blocks + codes


class _FourBit(_BitsAndBytes):
    name = "bitsandbytes_4bit"
    flag = "load_in_4bit"
    compute_key = "bnb_4bit_compute_dtype"
    rules = {
        "load_in_4bit": implied,
        "bnb_4bit_quant_type": one_of("nf4", "fp4"),
        "bnb_4bit_compute_dtype": one_of("float32", "float16", "bfloat16", prepare=dtype_name),
        "bnb_4bit_use_double_quant": true_or_false,
        "llm_int8_skip_modules": list_of_names,  # so called under 4 bits too
        "bnb_4bit_quant_storage": one_of(
            "uint8", "int8", "float16", "bfloat16", "float32", "float64", prepare=dtype_name
        ),
    }

    def _layer(self, layer: Any, kwargs: dict[str, Any]) -> Any:
        import bitsandbytes as bnb
        import torch

        new: Any = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=kwargs.get("bnb_4bit_compute_dtype") or layer.weight.dtype,
            compress_statistics=bool(kwargs.get("bnb_4bit_use_double_quant", False)),
            quant_type=kwargs.get("bnb_4bit_quant_type", "fp4"),
            quant_storage=kwargs.get("bnb_4bit_quant_storage") or torch.uint8,
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data,
            requires_grad=False,
            compress_statistics=new.weight.compress_statistics,
            quant_type=new.weight.quant_type,
            quant_storage=new.weight.quant_storage,
            module=new,
        )
        return new

    def kwargs_of(self, component: torch.nn.Module, layers: list[Any]) -> dict[str, Any] | None:
        found = [layer for layer in layers if getattr(layer.weight, "quant_state", None) is not None]
        if not found:
            return None
        state = found[0].weight.quant_state
        kwargs: dict[str, Any] = {"bnb_4bit_quant_type": str(state.quant_type)}
        if (compute := getattr(found[0], "compute_dtype", None)) is not None:
            kwargs["bnb_4bit_compute_dtype"] = kind_name(compute)
        if getattr(state, "nested", False):
            kwargs["bnb_4bit_use_double_quant"] = True
        if (storage := kind_name(found[0].weight.dtype)) != "uint8":
            kwargs["bnb_4bit_quant_storage"] = storage
        return kwargs

    def wrong(self, quantization: Quantization, layer: Layer) -> str:
        if layer.format not in ("nf4", "fp4"):
            return f"in {layer.format}, not {self.name}"
        kwargs = quantization.kwargs
        wanted = kwargs.get("bnb_4bit_quant_type", "fp4")
        if layer.format != wanted:
            return f"in {layer.format}, not {wanted}"
        if bool(kwargs.get("bnb_4bit_use_double_quant", False)) != layer.double_quantized:
            return "double-quantized, though not asked for" if layer.double_quantized else "not double-quantized"
        compute = kwargs.get("bnb_4bit_compute_dtype")
        if compute is not None and layer.compute_dtype != compute:
            return f"computes in {layer.compute_dtype or 'whatever comes in'}, not {compute}"
        return "" if layer.state_bytes else "its inner tensors (absmax or SCB) are missing"


class _EightBit(_BitsAndBytes):
    name = "bitsandbytes_8bit"
    flag = "load_in_8bit"
    rules = {
        "load_in_8bit": implied,
        "llm_int8_threshold": not_negative,
        "llm_int8_skip_modules": list_of_names,
        "llm_int8_enable_fp32_cpu_offload": true_or_false,
        "llm_int8_has_fp16_weight": true_or_false,
    }

    def _layer(self, layer: Any, kwargs: dict[str, Any]) -> Any:
        import bitsandbytes as bnb

        new: Any = bnb.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            has_fp16_weights=bool(kwargs.get("llm_int8_has_fp16_weight", False)),
            threshold=float(kwargs.get("llm_int8_threshold", 6.0)),
            device="meta",
        )
        new.weight = bnb.nn.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=new.state.has_fp16_weights
        )
        return new

    def kwargs_of(self, component: torch.nn.Module, layers: list[Any]) -> dict[str, Any] | None:
        found = [layer for layer in layers if getattr(layer.weight, "quant_state", None) is None]
        found = [layer for layer in found if (held := self.read(layer, layer.weight.numel())) and held.format == "int8"]
        if not found:
            return None
        threshold = getattr(found[0].state, "threshold", None)
        return {} if threshold is None else {"llm_int8_threshold": float(threshold)}

    def wrong(self, quantization: Quantization, layer: Layer) -> str:
        if layer.format != "int8":
            return f"in {layer.format}, not {self.name}"
        return "" if layer.state_bytes else "its inner tensors (absmax or SCB) are missing"


def _state_tensors(state: Any) -> Iterator[torch.Tensor]:
    """The inner tensors of a bitsandbytes quantization state, nested ones too."""
    import torch

    if state is None:
        return
    for name in ("absmax", "code", "offset"):
        value = getattr(state, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    nested = getattr(state, "state2", None)
    if nested is not None:
        yield from _state_tensors(nested)


FOUR_BIT, EIGHT_BIT = _FourBit(), _EightBit()
