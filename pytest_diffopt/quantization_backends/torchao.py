"""torchao: configs of its ``quantize_`` by name, each with its own arguments; weights are tensor subclasses in plain Linears.

diffusers and transformers take config objects alone today. The short names that they took before (``"int8wo"``) are
written down as the configs that they meant.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_diffopt.part import Mistake, refused
from pytest_diffopt.quantization_backends.backend import (
    UNQUANTIZED,
    Backend,
    Rule,
    Stored,
    bytes_of,
    dtype_name,
    granularity_size,
    groups,
    kind_name,
    list_of_names,
    one_of,
    true_or_false,
)

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.observation.observation import Layer
    from pytest_diffopt.recipe import Quantization

INT8_WO, INT8_DQ = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"
INT4_WO = "Int4WeightOnlyConfig"
FLOAT8_WO, FLOAT8_DQ = "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"
INTX_WO, INT8_DQ_INTX = "IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"

SHORT_NAMES = {
    "int8wo": INT8_WO,
    "int8_weight_only": INT8_WO,
    "int8dq": INT8_DQ,
    "int8_dynamic_activation_int8_weight": INT8_DQ,
    "int4wo": INT4_WO,
    "int4_weight_only": INT4_WO,
    "float8wo": FLOAT8_WO,
    "float8_weight_only": FLOAT8_WO,
    "float8dq": FLOAT8_DQ,
    "float8_dynamic_activation_float8_weight": FLOAT8_DQ,
}


def _granularity(*kinds: str) -> Rule:
    """``"PerRow"``, ``"PerGroup(128)"``, … , or torchao's own objects."""
    shown = [f"{kind}(128)" if kind == "PerGroup" else "PerAxis(0)" if kind == "PerAxis" else kind for kind in kinds]
    allowed = f"allowed: {', '.join(map(repr, shown))}"

    def rule(value: object) -> object:
        written = _granularity_name(value)
        whole = re.fullmatch(r"PerTensor|PerRow|PerGroup\([1-9]\d*\)|PerAxis\(0\)", written)
        if not whole or written.split("(")[0] not in kinds:
            raise refused(value, allowed)
        return written

    return rule


def _granularity_name(value: Any) -> str:
    if type(value).__module__.startswith("torchao."):
        of = getattr(value, "group_size", getattr(value, "axis", None))
        return type(value).__name__ + (f"({of})" if of is not None else "")
    return value.removesuffix("()") if isinstance(value, str) else ""


def _word(value: Any) -> object:
    """An enum's member by its value or name, as a word."""
    if type(value).__module__.startswith("torchao."):
        return value.value if isinstance(value.value, str) else value.name
    return value


_INTS = one_of(*(f"int{bits}" for bits in range(1, 9)), prepare=dtype_name)
_FLOAT8 = one_of("float8_e4m3fn", "float8_e5m2", prepare=dtype_name)
_MAPPING = one_of("SYMMETRIC", "ASYMMETRIC", prepare=_word)
_ROW_OR_TENSOR = _granularity("PerRow", "PerTensor")

CONFIGS: dict[str, dict[str, Rule]] = {
    INT8_WO: {
        "granularity": _granularity("PerRow", "PerTensor", "PerGroup"),
        "set_inductor_config": true_or_false,
    },
    INT8_DQ: {
        "granularity": _ROW_OR_TENSOR,
        "act_mapping_type": _MAPPING,
        "reduce_range": true_or_false,
        "set_inductor_config": true_or_false,
    },
    INT4_WO: {
        "group_size": one_of(32, 64, 128, 256),
        "int4_packing_format": one_of("plain", "preshuffled", "plain_int32", "tile_packed_to_4d", prepare=_word),
        "int4_choose_qparams_algorithm": one_of("tinygemm", "hqq", prepare=_word),
        "int4_tile_packed_ntile": one_of(8, 16),
        "set_inductor_config": true_or_false,
    },
    FLOAT8_WO: {
        "weight_dtype": _FLOAT8,
        "granularity": _granularity("PerRow", "PerTensor", "PerGroup"),
        "set_inductor_config": true_or_false,
    },
    FLOAT8_DQ: {
        "activation_dtype": _FLOAT8,
        "weight_dtype": _FLOAT8,
        "granularity": _ROW_OR_TENSOR,
        "set_inductor_config": true_or_false,
    },
    INTX_WO: {"weight_dtype": _INTS, "granularity": _granularity("PerGroup", "PerAxis"), "mapping_type": _MAPPING},
    INT8_DQ_INTX: {
        "weight_dtype": _INTS,
        "weight_granularity": _granularity("PerGroup", "PerAxis"),
        "weight_mapping_type": _MAPPING,
        "act_mapping_type": _MAPPING,
    },
}
"""The configs that a recipe can name, as torchao 0.18 has them, and what each takes."""

_FORMATS: dict[str, tuple[str, str, str]] = {  # weights, activations, granularity unless another is asked for
    INT8_WO: ("int8", "", "PerRow"),
    INT8_DQ: ("int8", "int8", "PerRow"),
    INT4_WO: ("int4", "", "PerGroup(128)"),
    FLOAT8_WO: ("float8_e4m3fn", "", "PerRow"),
    FLOAT8_DQ: ("float8_e4m3fn", "float8_e4m3fn", "PerTensor"),
    INTX_WO: ("int8", "", "PerRow"),
    INT8_DQ_INTX: ("int8", "int8", "PerGroup(32)"),
}


class _TorchAo(Backend):
    name = library = "torchao"
    distribution = "torchao"
    imports = ("torchao.quantization",)
    required = {"quant_type": f"a config's name: {', '.join(map(repr, CONFIGS))}"}
    rules = {
        "quant_type": one_of(*CONFIGS, prepare=lambda value: SHORT_NAMES.get(str(value), value)),
        "modules_to_not_convert": list_of_names,
        **{key: rule for rules in CONFIGS.values() for key, rule in rules.items()},
    }

    def rules_of(self, kwargs: Mapping[str, Any]) -> Mapping[str, Rule]:
        given = kwargs.get("quant_type")
        name = SHORT_NAMES.get(given, given) if isinstance(given, str) else None
        own = CONFIGS.get(name) if name is not None else None
        if own is None:
            return self.rules
        return {"quant_type": self.rules["quant_type"], **own, "modules_to_not_convert": list_of_names}

    def together(self, kwargs: Mapping[str, Any]) -> Iterator[Mistake]:
        if kwargs.get("int4_choose_qparams_algorithm") == "hqq":
            packed = kwargs.get("int4_packing_format", "plain")
            if packed != "tile_packed_to_4d":
                allowed = "torchao has hqq for int4_packing_format = 'tile_packed_to_4d' alone"
                yield Mistake(("int4_choose_qparams_algorithm",), f"'hqq' with {packed!r}", allowed)

    def ao_config(self, kwargs: Mapping[str, Any]) -> Any:
        """torchao's config object."""
        import torch
        import torchao.quantization as ao

        made: dict[str, Any] = {}
        for key, value in kwargs.items():
            if key in ("quant_type", "modules_to_not_convert"):
                continue
            if key.endswith("granularity"):
                kind, _, of = value.partition("(")
                made[key] = getattr(ao, kind)(*([int(of[:-1])] if of else []))
            elif key.endswith("_dtype"):
                made[key] = getattr(torch, value)
            elif key.endswith("mapping_type"):
                made[key] = ao.MappingType[value]
            else:
                made[key] = value
        return getattr(ao, kwargs["quant_type"])(**made)

    def config(self, quantization: Quantization, *, of_diffusers: bool) -> Any:
        import diffusers
        import transformers

        library: Any = diffusers if of_diffusers else transformers
        skipped = list(self.named_out(quantization)) or None
        return library.TorchAoConfig(self.ao_config(quantization.kwargs), modules_to_not_convert=skipped)

    def quantize(
        self, component: torch.nn.Module, paths: list[str], quantization: Quantization, device: torch.device
    ) -> None:
        from torchao.quantization import quantize_

        for path in paths:
            quantize_(component.get_submodule(path).to(device), self.ao_config(quantization.kwargs))

    def kept_plain(self, component: torch.nn.Module, quantization: Quantization) -> tuple[str, ...]:
        """Layers whose sizes the config's kernels cannot do: torchao leaves them, and says so in its log alone."""
        import torch

        name = quantization.kwargs["quant_type"]
        group = int(quantization.kwargs.get("group_size", 128)) if name == INT4_WO else 0
        return tuple(
            path
            for path, layer in component.named_modules()
            if isinstance(layer, torch.nn.Linear)
            and (
                (group and layer.in_features % group)
                or (name == FLOAT8_DQ and (layer.in_features % 16 or layer.out_features % 16))
            )
        )

    def is_layer(self, module: Any) -> bool:
        return _is_torchao(getattr(module, "_parameters", {}).get("weight"))

    def read(self, module: Any, count: int) -> Stored | None:
        return _read(module.weight, count)

    def widen(self, layer: Any, wide: torch.dtype) -> None:
        import torch

        weight = layer.weight
        if _activations(weight):
            raise NotImplementedError(
                "torchao quantizes the activations in every product, and wider ones into other steps: no yardstick"
            )
        values = weight.dequantize(output_dtype=wide) if _takes_dtype(type(weight)) else weight.dequantize().to(wide)
        layer.weight = torch.nn.Parameter(values, requires_grad=False)

    def kwargs_of(self, component: torch.nn.Module, layers: list[Any]) -> dict[str, Any] | None:
        found = [held for layer in layers if (held := _read(layer.weight, layer.in_features * layer.out_features))]
        if not found:
            return None
        for name, (weights, activations, usual) in _FORMATS.items():
            one = found[0]
            unpacked = one.format.removesuffix(" in int8")
            of_kind = (name in (INTX_WO, INT8_DQ_INTX)) == (one.format != unpacked)
            if not of_kind or bool(activations) != bool(one.activations):
                continue
            if name not in (INTX_WO, INT8_DQ_INTX) and weights.split("_")[0] != unpacked.split("_")[0]:
                continue
            kwargs: dict[str, Any] = {"quant_type": name}
            if unpacked != weights:
                kwargs["weight_dtype"] = unpacked
            if one.granularity != usual:
                size = granularity_size(one.granularity)
                key = "weight_granularity" if name == INT8_DQ_INTX else "granularity"
                per_row = "PerAxis(0)" if name in (INTX_WO, INT8_DQ_INTX) else "PerRow"
                if name == INT4_WO:
                    kwargs["group_size"] = size
                else:
                    kwargs[key] = per_row if one.granularity == "PerRow" else one.granularity
            if name == INT4_WO and (packing := _PACKING.get(one_class(layers))) is not None:
                kwargs["int4_packing_format"] = packing
            return kwargs
        return None

    def wrong(self, quantization: Quantization, layer: Layer) -> str:
        kwargs = quantization.kwargs
        name = kwargs["quant_type"]
        weights, activations, granularity = _FORMATS[name]
        weights = kwargs.get("weight_dtype", weights)
        if name in (INTX_WO, INT8_DQ_INTX):
            weights += " in int8"
        if layer.format != weights:
            return f"in {layer.format}, not {weights} ({name})"
        activations = kwargs.get("activation_dtype", activations)
        if layer.activations != activations:
            how = (
                f"quantizes activations to {layer.activations}"
                if layer.activations
                else "leaves activations as they are"
            )
            meant = f"quantizes them to {activations}" if activations else "leaves them"
            return f"{how}, though {name} {meant}"
        if name == INT4_WO:
            granularity = f"PerGroup({kwargs.get('group_size', 128)})"
        granularity = kwargs.get("granularity", kwargs.get("weight_granularity", granularity))
        if granularity == "PerAxis(0)" or granularity_size(granularity) == layer.in_features:
            granularity = "PerRow"  # a group that is a whole row
        if layer.granularity != granularity and not (granularity == "PerTensor" and layer.out_features == 1):
            return f"its scales are {layer.granularity}, not {granularity}"
        return "" if layer.state_bytes else "its scales are missing"

    def most_bytes(self, layer: Layer) -> int:
        """The weight, and for each row or group a scale and a zero point of at most 4 bytes each."""
        bits = 4 if layer.format == "int4" else 8
        return (layer.parameters * bits + 7) // 8 + 8 * groups(layer) + 64


_PACKING = {
    "Int4PreshuffledTensor": "preshuffled",
    "Int4PlainInt32Tensor": "plain_int32",
    "Int4TilePackedTo4dTensor": "tile_packed_to_4d",
}


def one_class(layers: list[Any]) -> str:
    """The class of the first layer's weight."""
    return type(layers[0].weight).__name__


def _is_torchao(weight: object) -> bool:
    bases = type(weight).__mro__
    return hasattr(type(weight), "__tensor_flatten__") and any(b.__module__.split(".")[0] == "torchao" for b in bases)


def _takes_dtype(tensor_class: Any) -> bool:
    return "output_dtype" in inspect.signature(tensor_class.dequantize).parameters


def _activations(weight: Any) -> str:
    """The format into which a weight's products quantize activations; ``""`` where they do not."""
    how = getattr(weight, "act_quant_kwargs", None)
    if how is not None:
        return kind_name(how.float8_dtype) if hasattr(how, "float8_dtype") else "int8"
    if getattr(weight, "activation_quantization", None) is not None:
        return "int8"
    dtype = getattr(weight, "activation_dtype", None)  # of int4 weights: bfloat16 is none
    return kind_name(dtype) if dtype is not None and dtype.itemsize == 1 else ""


def _read(weight: Any, count: int) -> Stored | None:
    import torch

    data = getattr(weight, "qdata", None)
    if not isinstance(data, torch.Tensor):
        return Stored(UNQUANTIZED, bytes_of(weight), dtype=kind_name(weight.dtype))
    stored = bytes_of(data)
    target = getattr(weight, "target_dtype", None)
    if target is not None and data.dtype == torch.int8 and stored == count:
        form = f"{kind_name(target)} in int8"  # a byte a weight, whatever it says
    elif stored == count and data.dtype.itemsize == 1 and (data.dtype == torch.int8 or data.is_floating_point()):
        form = kind_name(data.dtype)
    elif 2 * stored == count:
        form = "int4"
    else:
        form = UNQUANTIZED
    return Stored(
        form,
        stored,
        bytes_of(weight) - stored,
        dtype=kind_name(data.dtype),
        activations=_activations(weight),
        granularity=_granularity_of(weight),
    )


def _granularity_of(weight: Any) -> str:
    block = getattr(weight, "block_size", None)
    if block is None:
        return ""
    rows, columns = weight.shape[-2:]
    if block[-1] < columns:
        return f"PerGroup({block[-1]})"
    return "PerTensor" if block[-2] == rows and rows > 1 else "PerRow"


TORCHAO = _TorchAo()
