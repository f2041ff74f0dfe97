"""Which modules are layers that quantization is about, by their class and shape; what they hold is another question."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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


def is_quantized_class(module: object) -> bool:
    """Whether a module is of a quantization library's class, or of one derived from it; its weight may still be plain."""
    return any(base.__module__.split(".")[0] == "bitsandbytes" for base in type(module).__mro__)
