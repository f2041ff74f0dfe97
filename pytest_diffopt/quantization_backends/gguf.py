"""gguf: weights out of a ``.gguf`` file, whose tensors have a type each; layers dequantize them in every product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.part import refused
from pytest_diffopt.quantization_backends.backend import (
    UNQUANTIZED,
    Backend,
    Stored,
    bytes_of,
    dtype_name,
    kind_name,
    one_of,
)

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.observation.observation import Layer
    from pytest_diffopt.recipe import Quantization


def _file(value: object) -> object:
    if not isinstance(value, str) or not value.casefold().endswith(".gguf"):
        raise refused(value, "a .gguf file: its path, or its address on the hub")
    return value


class _Gguf(Backend):
    name = library = "gguf"
    distribution = "gguf"
    imports = ("gguf",)
    required = {"file": "a .gguf file: its path, or its address on the hub"}
    rules = {"file": _file, "compute_dtype": one_of("float32", "float16", "bfloat16", prepare=dtype_name)}
    in_place = False
    compute_key = "compute_dtype"

    def config(self, quantization: Quantization, *, of_diffusers: bool) -> Any:
        import diffusers
        import torch

        if not of_diffusers:
            raise PreparationError("quantization: diffusers alone loads .gguf files into layers that stay quantized")
        compute = quantization.kwargs.get("compute_dtype", "float32")
        return diffusers.GGUFQuantizationConfig(compute_dtype=getattr(torch, compute))

    def quantize(
        self, component: torch.nn.Module, paths: list[str], quantization: Quantization, device: torch.device
    ) -> None:
        raise PreparationError(
            "quantization: gguf weights come out of a file while the pipeline is loaded; a factory loads them itself, "
            "and quantization stands first in the order"
        )

    def is_layer(self, module: Any) -> bool:
        ours = any(base.__module__.startswith("diffusers.quantizers.gguf.") for base in type(module).__mro__)
        weight = getattr(module, "_parameters", {}).get("weight")
        return ours or type(weight).__module__.startswith("diffusers.quantizers.gguf.")

    def read(self, module: Any, count: int) -> Stored | None:
        weight = getattr(module, "weight", None)
        if weight is None:
            return Stored(UNQUANTIZED, 0)
        stored, kind = bytes_of(weight), getattr(weight, "quant_type", None)
        compute = getattr(module, "compute_dtype", None)
        compute_name = "" if compute is None else kind_name(compute)
        if kind is None:
            return Stored(UNQUANTIZED, stored, dtype=kind_name(weight.dtype), compute_dtype=compute_name)
        needed = type_bytes(kind.name, count, module.in_features)
        return Stored(
            kind.name if stored == needed else UNQUANTIZED,
            stored,
            dtype=kind_name(weight.dtype),
            compute_dtype=compute_name,
        )

    def widen(self, layer: Any, wide: torch.dtype) -> None:
        import torch

        if wide == torch.float64:
            raise NotImplementedError("layers of .gguf files do not multiply in float64")
        layer.compute_dtype = wide

    def kwargs_of(self, component: torch.nn.Module, layers: list[Any]) -> dict[str, Any] | None:
        for layer in layers:
            held = self.read(layer, layer.in_features * layer.out_features)
            if held is not None and held.format != UNQUANTIZED:
                # which file it was nothing in the module says
                return {"compute_dtype": held.compute_dtype} if held.compute_dtype else {}
        return None

    def wrong(self, quantization: Quantization, layer: Layer) -> str:
        if layer.library != self.library:
            return f"in {layer.format} of {layer.library}, not out of a .gguf file"
        compute = quantization.kwargs.get("compute_dtype", "float32")
        return "" if layer.compute_dtype == compute else f"computes in {layer.compute_dtype}, not {compute}"

    def most_bytes(self, layer: Layer) -> int:
        return type_bytes(layer.format, layer.parameters, layer.in_features)


def type_bytes(name: str, count: int, row: int) -> int:
    """Bytes of ``count`` weights in rows of ``row`` in a GGML type; -1 where its blocks do not divide a row."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return -1 if row % block else count // block * size


def types_of_file(path: str, component: Any) -> dict[str, str]:
    """Parameter of a model → type of the tensor that the file has for it, by diffusers' own names and conversion.

    Read off the file, not off the model that was loaded of it.
    """
    from diffusers.loaders import single_file_model
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    checkpoint = load_gguf_checkpoint(path)
    if set(checkpoint) != set(component.state_dict()):
        name: Any = single_file_model._get_single_file_loadable_mapping_class(type(component))
        convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
        checkpoint = convert(config=dict(component.config), checkpoint=checkpoint)
    return {
        parameter: kind.name if (kind := getattr(tensor, "quant_type", None)) is not None else kind_name(tensor.dtype)
        for parameter, tensor in checkpoint.items()
    }


GGUF = _Gguf()
