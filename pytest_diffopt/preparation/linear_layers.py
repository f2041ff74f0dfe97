"""Which modules are layers that quantization is about, by their class and shape; what they hold is another question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_diffopt.quantization_backends import BACKENDS

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.quantization_backends.backend import Backend


def is_linear_like(module: torch.nn.Module) -> bool:
    """A layer that multiplies by a matrix: torch's Linear, and any class of its shape in a quantization library."""
    import torch

    if isinstance(module, torch.nn.Linear):
        return True
    if "weight" not in module._parameters:  # a wrapper that shows the sizes of the layer inside it
        return False
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def of_adapters(module: torch.nn.Module) -> tuple[str, ...]:
    """Paths of what adapters have put into a model, as peft's LoRA layers do; the layer that they wrap is its own."""
    return tuple(
        f"{path}.{name}".lstrip(".")
        for path, inner in module.named_modules()
        if hasattr(inner, "base_layer")
        for name in (*getattr(inner, "adapter_layer_names", ()), *getattr(inner, "other_param_names", ()))
        if hasattr(inner, name)
    )


def is_in(path: str, owners: tuple[str, ...]) -> bool:
    """Whether a path is one of some, or lies in one."""
    return any(path == owner or path.startswith(owner + ".") for owner in owners)


def backend_of(module: Any) -> Backend | None:
    """The backend one of whose layers a module is; its weight may still be plain.

    Of two backends of one library the first: they read its layers alike.
    """
    return next((backend for backend in BACKENDS.values() if backend.is_layer(module)), None)


def is_quantized_class(module: object) -> bool:
    """Whether a module is a layer of a quantization backend; its weight may still be plain."""
    return backend_of(module) is not None
