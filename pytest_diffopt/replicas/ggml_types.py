"""GGML's types: which one a file's name means, and arrays quantized into them.

The ``gguf`` package quantizes the simple types. The K-quants, superblocks of 256 weights, it reads alone; they are written
here the plain way, each block's scales from its extremes: valid blocks, of less quality than llama.cpp searches for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import ReplicaError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

WRITTEN_BY = 1
"""Changed with what is written."""

_SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32")
_K = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_RAISED = {"Q2_K": "Q3_K", "Q3_K": "Q4_K", "Q4_K": "Q5_K", "Q5_K": "Q6_K"}
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""As llama.cpp does it, where a row is no multiple of 256."""

_NAME = re.compile(r"[-_.](Q\d_K(?:_[SML])?|Q\d_[01]|BF16|F16|F32)\.gguf$", re.IGNORECASE)


def of_file_name(filename: str) -> tuple[str, bool]:
    """The type that a file's name says, and whether some of its tensors get the next one (``…_M``, ``…_L``).

    Raises:
        ReplicaError: it says none that can be written.
    """
    found = _NAME.search(filename)
    word = found[1].upper() if found else ""
    kind = re.sub(r"_[SML]$", "", word)
    if kind not in (*_SIMPLE, *_K):
        raise ReplicaError(
            f"{filename!r} names no type that a replica is written in; it ends like '-Q4_K_S.gguf', with one of "
            f"{', '.join((*_K, *_SIMPLE))}."
        )
    return kind, word.endswith(("_M", "_L"))


def stored(array: Array, kind: str, *, raised: bool = False) -> tuple[Array, Any]:
    """The array in a type, as bytes where it is quantized, and that type: another where its rows are too short.

    Args:
        raised: take the next type with more bits.
    """
    import gguf

    kind = _RAISED.get(kind, kind) if raised else kind
    if kind in _K and array.shape[-1] % gguf.QK_K:
        kind = _FALLBACK[kind]
    of = gguf.GGMLQuantizationType[kind]
    if array.shape[-1] % gguf.GGML_QUANT_SIZES[of][0]:
        kind, of = "F16", gguf.GGMLQuantizationType.F16
    return (k_quantized(array, kind) if kind in _K else gguf.quants.quantize(array, of)), of


def k_quantized(array: Array, kind: str) -> Array:
    """Float rows of a multiple of 256 as bytes of a K-quant, (…, rows, bytes)."""
    import gguf
    import numpy as np

    blocks = np.ascontiguousarray(array, dtype=np.float32).reshape(-1, gguf.QK_K)
    made = {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}[kind](blocks)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    assert made.shape[-1] == size
    return made.reshape(*array.shape[:-1], array.shape[-1] // gguf.QK_K * size)


def _halves(values: Array) -> Array:
    """(n,) floats as (n, 2) bytes of float16."""
    import numpy as np

    return values.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _inverse(values: Array) -> Array:
    import numpy as np

    return np.divide(1.0, values, out=np.zeros_like(values), where=values != 0)


def _scale_and_minimum(blocks: Array, group: int, levels: int, steps: int) -> tuple[Array, ...]:
    """Weights as ``d * scale * q - dmin * minimum``: d, dmin (n,), scale, minimum (n, groups), q (n, groups, group)."""
    import numpy as np

    parts = blocks.reshape(len(blocks), -1, group)
    low = np.minimum(parts.min(-1), 0)
    wide = (parts.max(-1) - low) / levels
    d = (wide.max(-1) / steps).astype(np.float16).astype(np.float32)
    dmin = (-low.min(-1) / steps).astype(np.float16).astype(np.float32)
    scale = np.clip(np.rint(wide * _inverse(d)[:, None]), 0, steps).astype(np.uint8)
    minimum = np.clip(np.rint(-low * _inverse(dmin)[:, None]), 0, steps).astype(np.uint8)
    step = d[:, None] * scale
    offset = dmin[:, None] * minimum
    q = np.clip(np.rint((parts + offset[..., None]) * _inverse(step)[..., None]), 0, levels).astype(np.uint8)
    return d, dmin, scale, minimum, q


def _scale(blocks: Array, group: int, lowest: int, highest: int, steps: int) -> tuple[Array, ...]:
    """Weights as ``d * scale * q``: d (n,), scale (n, groups) in −steps … steps − 1, q (n, groups, group)."""
    import numpy as np

    parts = blocks.reshape(len(blocks), -1, group)
    widest = np.maximum(parts.max(-1) / highest, parts.min(-1) / lowest)
    d = (widest.max(-1) / (steps - 1)).astype(np.float16).astype(np.float32)
    scale = np.clip(np.rint(widest * _inverse(d)[:, None]), -steps, steps - 1).astype(np.int8)
    step = d[:, None] * scale
    q = np.clip(np.rint(parts * _inverse(step)[..., None]), lowest, highest).astype(np.int8)
    return d, scale, q


def _packed(q: Array, shifts: tuple[int, ...], width: int) -> Array:
    """(n, 256) small numbers, ``width`` at a time for each shift, into bytes: the inverse of how they are read."""
    import numpy as np

    parts = q.reshape(len(q), -1, len(shifts), width).astype(np.uint8)
    packed = np.zeros((len(q), parts.shape[1], width), np.uint8)
    for at, shift in enumerate(shifts):
        packed |= parts[:, :, at] << np.uint8(shift)
    return packed.reshape(len(q), -1)


def _q2(blocks: Array) -> Array:
    import numpy as np

    d, dmin, scale, minimum, q = _scale_and_minimum(blocks, 16, 3, 15)
    scales = scale | (minimum << np.uint8(4))
    packed = _packed(q.reshape(len(q), -1), (0, 2, 4, 6), 32)
    return np.concatenate([scales, packed, _halves(d), _halves(dmin)], axis=-1)


def _q3(blocks: Array) -> Array:
    import numpy as np

    d, scale, q = _scale(blocks, 16, -4, 3, 32)
    q = (q.reshape(len(q), -1) + 4).astype(np.uint8)
    scales = (scale.astype(np.int16) + 32).astype(np.uint8)
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << np.uint8(4))
    high = _packed(scales >> np.uint8(4), (0, 2, 4, 6), 4)
    mask = _packed(q >> np.uint8(2), tuple(range(8)), 32)
    packed = _packed(q & 3, (0, 2, 4, 6), 32)
    return np.concatenate([mask, packed, low, high, _halves(d)], axis=-1)


def _six_bits(scale: Array, minimum: Array) -> Array:
    """8 scales and 8 minima of six bits each in 12 bytes."""
    import numpy as np

    low = (scale[:, :4] & 63) | ((scale[:, 4:] >> np.uint8(4)) << np.uint8(6))
    middle = (minimum[:, :4] & 63) | ((minimum[:, 4:] >> np.uint8(4)) << np.uint8(6))
    high = (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << np.uint8(4))
    return np.concatenate([low, middle, high], axis=-1)


def _q4(blocks: Array) -> Array:
    import numpy as np

    d, dmin, scale, minimum, q = _scale_and_minimum(blocks, 32, 15, 63)
    packed = _packed(q.reshape(len(q), -1), (0, 4), 32)
    return np.concatenate([_halves(d), _halves(dmin), _six_bits(scale, minimum), packed], axis=-1)


def _q5(blocks: Array) -> Array:
    import numpy as np

    d, dmin, scale, minimum, q = _scale_and_minimum(blocks, 32, 31, 63)
    q = q.reshape(len(q), -1)
    high = _packed(q >> np.uint8(4), tuple(range(8)), 32)
    packed = _packed(q & 15, (0, 4), 32)
    return np.concatenate([_halves(d), _halves(dmin), _six_bits(scale, minimum), high, packed], axis=-1)


def _q6(blocks: Array) -> Array:
    import numpy as np

    d, scale, q = _scale(blocks, 16, -32, 31, 128)
    q = (q.reshape(len(q), -1).astype(np.int16) + 32).astype(np.uint8)
    low = _packed(q & 15, (0, 4), 64)
    high = _packed(q >> np.uint8(4), (0, 2, 4, 6), 32)
    return np.concatenate([low, high, scale.view(np.uint8), _halves(d)], axis=-1)
