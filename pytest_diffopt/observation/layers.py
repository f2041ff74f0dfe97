"""The manifest of layers: every Linear-like layer of a component, what its weight really holds, and its bytes.

A class name proves nothing (bitsandbytes' layers are ``torch.nn.Linear`` too, and a layer of theirs may never have been
quantized), so the format is read off the stored tensors: their dtype, their count, and the inner tensors beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_diffopt.observation.observation import Layer, OtherParameters
from pytest_diffopt.preparation.linear_layers import is_linear_like, is_quantized_class

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: Any) -> str:
    """``torch.bfloat16`` → ``"bfloat16"``; ``""`` for None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def kind_of(value: object) -> str:
    """The full name of an object's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's own elements; 0 for a lazy parameter that has no shape yet."""
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return 0
    return tensor.numel() * tensor.element_size()


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


def weight_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module's weights are made of, by name: parameters, buffers, the inner tensors of quantization.

    bitsandbytes keeps more than the parameter: absmax and code tables in ``quant_state``, and for 8-bit ``SCB`` and a second
    reference to the weight itself, ``CB``, in the layer's ``state``.
    """
    import torch

    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        yield name, tensor
        for inner in _state_tensors(getattr(tensor, "quant_state", None)):
            yield f"{name}.quant_state", inner
        for attribute in ("CB", "SCB"):
            if isinstance(beside := getattr(tensor, attribute, None), torch.Tensor):
                yield f"{name}.{attribute}", beside
    for path, layer in module.named_modules():
        if is_quantized_class(layer) and (state := getattr(layer, "state", None)) is not None:
            for attribute, beside in vars(state).items():
                if isinstance(beside, torch.Tensor):
                    yield f"{path}.state.{attribute}", beside


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
    count = in_features * out_features
    state_bytes, form, double, compute = 0, "", False, dtype_name(getattr(module, "compute_dtype", None))
    stored = int(tensor_bytes(weight)) if isinstance(weight, torch.Tensor) else 0
    state = getattr(weight, "quant_state", None)
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if state is not None:
        state_bytes = sum(tensor_bytes(tensor) for tensor in _state_tensors(state))
        double = bool(getattr(state, "nested", False))
        # Packed, two weights to a byte: whatever the storage's dtype, n weights take n/2 bytes (rounded up)
        form = str(getattr(state, "quant_type", "")) if stored == (count + 1) // 2 else "unquantized"
    elif isinstance(scales, torch.Tensor) and isinstance(weight, torch.Tensor) and weight.dtype == torch.int8:
        state_bytes = tensor_bytes(scales)
        form = "int8" if stored == count else "unquantized"
    elif is_quantized_class(module):
        form = "unquantized"
    return Layer(
        component=component,
        path=path,
        kind=kind_of(module),
        format=form,
        dtype=dtype_name(getattr(weight, "dtype", None)),
        compute_dtype=compute,
        in_features=in_features,
        out_features=out_features,
        weight_bytes=stored,
        state_bytes=state_bytes,
        double_quantized=double,
        linear=linear,
    )


def manifest(component: str, module: torch.nn.Module) -> tuple[tuple[Layer, ...], tuple[OtherParameters, ...]]:
    """The layers of a component, and the rest of its parameters summed by dtype.

    A tensor that two modules share is counted once.
    """
    from torch.nn.parameter import is_lazy

    layers: list[Layer] = []
    quantized_weights = set()
    for path, inner in module.named_modules():
        if is_linear_like(inner) or is_quantized_embedding(inner):
            layer = read_layer(component, path, inner)
            layers.append(layer)
            if layer.format not in ("", "unquantized"):
                quantized_weights.add(id(inner.weight))
    rest: dict[str, list[tuple[str, int, int]]] = {}
    for name, parameter in module.named_parameters():
        if id(parameter) in quantized_weights or not parameter.dtype.is_floating_point or is_lazy(parameter):
            continue
        rest.setdefault(dtype_name(parameter.dtype), []).append((name, parameter.numel(), tensor_bytes(parameter)))
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
