"""The manifest of layers: every Linear-like layer of a component, what its weight really holds, and its bytes.

A class name proves nothing (bitsandbytes' layers are ``torch.nn.Linear`` too, and a layer of theirs may never have been
quantized), so the format is read off the stored tensors: their dtype, their count, and the inner tensors beside them.
How, each backend says in `pytest_diffopt.quantization_backends`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_diffopt.observation.observation import Layer, OtherParameters
from pytest_diffopt.preparation.compilation import named_modules
from pytest_diffopt.preparation.linear_layers import backend_of, is_linear_like, is_quantized_class
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.quantization_backends.backend import UNQUANTIZED, Backend, Stored, bytes_of, parts_of

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: Any) -> str:
    """``torch.bfloat16`` → ``"bfloat16"``; ``""`` for None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def kind_of(value: object) -> str:
    """The full name of an object's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def weight_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module's weights are made of, by name: parameters, buffers, the inner tensors of quantization.

    Where a parameter is a wrapper (torchao's, quanto's), the tensors inside it. bitsandbytes keeps more than the parameter:
    absmax and code tables in ``quant_state``, and for 8-bit ``SCB`` and a second reference to the weight itself, ``CB``,
    in the layer's ``state``.
    """
    libraries = list({backend.library: backend for backend in BACKENDS.values()}.values())
    keep_beside = [backend for backend in libraries if type(backend).beside is not Backend.beside]
    keep_in_layers = [backend for backend in libraries if type(backend).of_layer is not Backend.of_layer]
    modules = list(module.named_modules())  # once: this is looked at after every part of a call
    held = [(path, getattr(inner, kind)) for kind in ("_parameters", "_buffers") for path, inner in modules]
    seen: set[int] = set()
    for path, tensors in held:
        for key, tensor in tensors.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = f"{path}.{key}" if path else key
            for inner, part in parts_of(tensor):
                yield f"{name}.{inner}" if inner else name, part
            for backend in keep_beside:
                yield from backend.beside(name, tensor)
    for path, layer in modules:
        for backend in keep_in_layers:
            if backend.is_layer(layer):
                yield from backend.of_layer(path, layer)


def is_quantized_embedding(module: Any) -> bool:
    """Whether a module is a quantized table of embeddings: no Linear layer, but its weight counts as quantized."""
    return is_quantized_class(module) and hasattr(module, "num_embeddings")


def read_layer(component: str, path: str, module: Any) -> Layer:
    """What a Linear-like layer, or a quantized embedding, holds, read off its tensors."""
    import torch

    weight = getattr(module, "weight", None)
    linear = is_linear_like(module)
    in_features = int(module.in_features if linear else module.num_embeddings)
    out_features = int(module.out_features if linear else module.embedding_dim)
    backend = backend_of(module)
    held = backend.read(module, in_features * out_features) if backend is not None else None
    if held is None:
        held = Stored(
            "",
            bytes_of(weight) if isinstance(weight, torch.Tensor) else 0,
            dtype=dtype_name(getattr(weight, "dtype", None)),
            compute_dtype=dtype_name(getattr(module, "compute_dtype", None)),
        )
    return Layer(
        component=component,
        path=path,
        kind=kind_of(module),
        format=held.format,
        dtype=held.dtype,
        compute_dtype=held.compute_dtype,
        in_features=in_features,
        out_features=out_features,
        weight_bytes=held.weight_bytes,
        state_bytes=held.state_bytes,
        double_quantized=held.double_quantized,
        linear=linear,
        library=backend.library if backend is not None else "",
        activations=held.activations,
        granularity=held.granularity,
    )


def manifest(component: str, module: torch.nn.Module) -> tuple[tuple[Layer, ...], tuple[OtherParameters, ...]]:
    """The layers of a component, and the rest of its parameters summed by dtype.

    A tensor that two modules share is counted once.
    """
    from torch.nn.parameter import is_lazy

    layers: list[Layer] = []
    quantized_weights = set()
    for path, inner in named_modules(module):
        if is_linear_like(inner) or is_quantized_embedding(inner):
            layer = read_layer(component, path, inner)
            layers.append(layer)
            if layer.format not in ("", UNQUANTIZED):
                quantized_weights.add(id(inner.weight))
        backend = backend_of(inner)
        if backend is not None:
            owned = (one for one in inner.parameters(recurse=False) if backend.owns(inner, one))
            quantized_weights |= {id(one) for one in owned}
    rest: dict[str, list[tuple[str, int, int]]] = {}
    for name, parameter in module.named_parameters():
        if id(parameter) in quantized_weights or not parameter.dtype.is_floating_point or is_lazy(parameter):
            continue
        rest.setdefault(dtype_name(parameter.dtype), []).append((name, parameter.numel(), bytes_of(parameter)))
    others = tuple(
        OtherParameters(
            component=component,
            dtype=dtype,
            count=len(found),
            bytes=sum(size for _, _, size in found),
            examples=tuple(name for name, _, _ in found),
        )
        for dtype, found in sorted(rest.items())
    )
    return tuple(layers), others
