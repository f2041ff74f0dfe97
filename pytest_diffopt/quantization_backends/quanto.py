"""optimum-quanto: ``QLinear`` layers whose weight is a quantized tensor once they are frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.quantization_backends.backend import (
    UNQUANTIZED,
    Backend,
    Stored,
    bytes_of,
    groups,
    kind_name,
    list_of_names,
    one_of,
    parts_of,
)

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.observation.observation import Layer
    from pytest_diffopt.recipe import Quantization

_FORMATS = {"int8": "int8", "int4": "int4", "int2": "int2", "float8": "float8_e4m3fn"}
_BITS = {"int8": 8, "int4": 4, "int2": 2, "float8_e4m3fn": 8}


class _Quanto(Backend):
    name = library = "quanto"
    distribution = "optimum-quanto"
    imports = ("optimum.quanto",)
    rules = {"weights_dtype": one_of(*_FORMATS), "modules_to_not_convert": list_of_names}

    def config(self, quantization: Quantization, *, of_diffusers: bool) -> Any:
        import diffusers
        import transformers

        weights = quantization.kwargs.get("weights_dtype", "int8")
        skipped = list(self.named_out(quantization)) or None
        if of_diffusers:
            return diffusers.QuantoConfig(weights_dtype=weights, modules_to_not_convert=skipped)
        return transformers.QuantoConfig(weights=weights, modules_to_not_convert=skipped)

    def quantize(
        self, component: torch.nn.Module, paths: list[str], quantization: Quantization, device: torch.device
    ) -> None:
        from optimum.quanto import QLinear, qtypes

        weights = qtypes["q" + _FORMATS[quantization.kwargs.get("weights_dtype", "int8")]]
        for path in paths:
            layer: Any = component.get_submodule(path).to(device)
            new = QLinear.from_module(layer, weights=weights)
            new.freeze()
            new.requires_grad_(False)
            new.train(layer.training)
            parent, _, last = path.rpartition(".")
            if not path:
                raise PreparationError("quantization: the component is itself a Linear layer; put it inside a module")
            setattr(component.get_submodule(parent), last, new.to(device))

    def is_layer(self, module: Any) -> bool:
        return any(base.__module__.startswith("optimum.quanto.") for base in type(module).__mro__)

    def read(self, module: Any, count: int) -> Stored | None:
        weight = getattr(module, "weight", None)
        data, kind = getattr(weight, "_data", None), getattr(weight, "_qtype", None)
        if weight is None:
            return Stored(UNQUANTIZED, 0)
        if data is None or kind is None or not hasattr(type(weight), "__tensor_flatten__"):
            return Stored(UNQUANTIZED, bytes_of(weight), dtype=kind_name(weight.dtype))  # never frozen
        stored, everything = bytes_of(data), bytes_of(weight)
        form = kind.name.removeprefix("q")
        inner = next(parts_of(data))[1].dtype
        # what is stored decides, not what the tensor says of itself
        if 8 * stored != count * int(kind.bits) or (kind.bits == 8 and kind_name(inner) != form):
            form = UNQUANTIZED
        activations = getattr(module, "activation_qtype", None)
        group = getattr(weight, "_group_size", None)
        return Stored(
            form,
            stored,
            everything - stored,
            dtype=kind_name(inner),
            activations="" if activations is None else activations.name.removeprefix("q"),
            granularity=f"PerGroup({group})" if group and group != module.in_features else "PerRow",
        )

    def widen(self, layer: Any, wide: torch.dtype) -> None:
        import torch

        if getattr(layer, "activation_qtype", None) is not None:
            raise NotImplementedError("quanto quantizes the activations in every product: no yardstick")
        weight = layer.weight
        if hasattr(type(weight), "__tensor_flatten__"):
            whole = hasattr(weight, "_scale") and not hasattr(weight, "_shift")
            # eight bits: not rounded to the narrow dtype, as in quanto's own product
            values = weight._data.to(wide) * weight._scale.to(wide) if whole else weight.dequantize().to(wide)
            layer.weight = torch.nn.Parameter(values, requires_grad=False)
            layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)

    def kwargs_of(self, component: torch.nn.Module, layers: list[Any]) -> dict[str, Any] | None:
        words = {form: word for word, form in _FORMATS.items()}
        for layer in layers:
            held = self.read(layer, layer.in_features * layer.out_features)
            if held is not None and held.format in words:
                return {"weights_dtype": words[held.format]}
        return None

    def wrong(self, quantization: Quantization, layer: Layer) -> str:
        wanted = _FORMATS[quantization.kwargs.get("weights_dtype", "int8")]
        if layer.format != wanted:
            return f"in {layer.format}, not {wanted}"
        if layer.activations:
            return f"quantizes activations to {layer.activations}, though weights alone were asked for"
        return "" if layer.state_bytes else "its scales are missing"

    def most_bytes(self, layer: Layer) -> int:
        """The weight, and for each row or group a scale and a shift of at most 4 bytes each."""
        return layer.parameters * _BITS.get(layer.format, 8) // 8 + 8 * groups(layer)


QUANTO = _Quanto()
