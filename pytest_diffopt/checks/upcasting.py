"""The sharper test of ``contract.parity_dtype``: the same recipe in a wider dtype, where rounding hides less.

The components, the compilation and the offloading stay what they are, and so do the formats that weights are quantized to;
plain weights, activations and the dtype that quantized layers multiply in become wider. What cannot is named.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from pytest_diffopt.errors import UnverifiableError
from pytest_diffopt.part import CONFIG, with_every_mistake
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.recipe import Recipe

if TYPE_CHECKING:
    from pytest_diffopt.observation.observation import Layer, Observation

_NARROW = ("float16", "bfloat16")


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class _InFloat64(Recipe):
    """A recipe in a dtype that a recipe does not take: nobody runs a pipeline in it but to measure."""

    dtype: Literal["float64"] | None = None  # type: ignore[assignment]


def upcast(recipe: Recipe, dtype: str) -> Recipe:
    """The recipe in a wider dtype.

    Raises:
        UnverifiableError: it quantizes, and its layers do not multiply in that dtype.
    """
    quantizations = []
    for one in recipe.quantizations:
        backend = BACKENDS[one.backend]
        if dtype == "float64":
            raise UnverifiableError(f"layers of {one.backend} do not multiply in float64; 'float32' is possible")
        kwargs: dict[str, Any] = dict(one.kwargs)
        if backend.compute_key in kwargs:
            kwargs[backend.compute_key] = dtype
        quantizations.append(type(one)(**{**one.given(), "kwargs": kwargs}))
    if dtype == "float32":
        return recipe.replace(dtype=dtype, quantization=quantizations or None)
    kept = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return _InFloat64(**{**kept, "dtype": dtype})


def what_stays(observation: Observation) -> list[str]:
    """What an upcast recipe still computes in fewer bits, a line for each component and reason."""
    counts: dict[tuple[str, str], int] = {}
    for layer in observation.layers:
        if why := _narrow(layer):
            counts[layer.component, why] = counts.get((layer.component, why), 0) + 1
    lines = [
        f"{component}: {count} {'layer stays' if count == 1 else 'layers stay'} as before: {why}"
        for (component, why), count in counts.items()
    ]
    return lines + [
        f"{other.component}: {other.count:,} parameters stay in {other.dtype}"
        for other in observation.other_parameters
        if other.dtype in _NARROW
    ]


def _narrow(layer: Layer) -> str:
    """Why a quantized layer multiplies in fewer bits than the rest; empty where it does not."""
    if layer.format == "int8" and layer.library == "bitsandbytes":
        return "bitsandbytes' 8-bit layers multiply in float16"
    if layer.activations:
        return f"{layer.library} quantizes the activations to {layer.activations}"
    computes = layer.compute_dtype or layer.dtype
    return f"{layer.library} multiplies in {computes}" if layer.format and computes in _NARROW else ""
