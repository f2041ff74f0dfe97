"""Quantization backends, a file each: what a recipe may say of it, how it is done, and how its layers are recognized.

Importing this package imports neither torch nor a quantization library; each backend imports its own where it needs it.
"""

from __future__ import annotations

from pytest_diffopt.quantization_backends.backend import Backend
from pytest_diffopt.quantization_backends.bitsandbytes import EIGHT_BIT, FOUR_BIT
from pytest_diffopt.quantization_backends.gguf import GGUF
from pytest_diffopt.quantization_backends.layerwise_casting import LAYERWISE_CASTING
from pytest_diffopt.quantization_backends.quanto import QUANTO
from pytest_diffopt.quantization_backends.torchao import TORCHAO

__all__ = ["BACKENDS", "DISTRIBUTIONS"]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (FOUR_BIT, EIGHT_BIT, TORCHAO, QUANTO, GGUF, LAYERWISE_CASTING)
}
"""By the names that recipes use."""

DISTRIBUTIONS = tuple(
    dict.fromkeys(backend.distribution for backend in BACKENDS.values() if backend.distribution is not None)
)
"""Packages whose versions decide what a backend does."""
