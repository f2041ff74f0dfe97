"""Stand-ins for CUDA's kernels: they allocate what those allocate, in that order, and compute nothing.

On a device that bitsandbytes does not know, its operators run step by step in Python, with tensors that CUDA never has:
a product of int8 in float32, for example. Registered in their place, these give CUDA's bytes. They take any device,
``meta`` too, read only metadata, and have the operators' own signatures.

torch itself has few that differ: a group norm on CUDA reads and writes contiguous tensors, where others keep channels last.

Sources: pytorch/pytorch, aten/src/ATen/native/group_norm.cpp, ``native_group_norm``, whose memory format depends on the
device; bitsandbytes-foundation/bitsandbytes, 0.50: bitsandbytes/backends/cuda/ops.py; for ``int8_mixed_scaled_mm`` and
``int8_scaled_mm``, which CUDA runs as every device does, bitsandbytes/backends/default/ops.py.

Outliers are taken as none. Columns with outliers would add their activations in half precision, and their weights in
int8 and twice in float32: for 1% of the columns, less than a tenth of the int8 weight of one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, dtype

GEMM_4BIT_FEW_ROWS = 4
"""With as many or fewer rows of activations a 4-bit product never dequantizes its weight first, and above 1536 it does on
every GPU. Between them GPUs differ, and the weight is taken to be dequantized, which is the most."""


def native_group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shape (N, C, ...) → the same, contiguous, and each group's mean and deviation; meanwhile a contiguous input."""
    import torch

    held = input.contiguous()
    out = torch.empty_like(held)
    mean, rstd = (torch.empty((N, group), device=input.device, dtype=input.dtype) for _ in ("mean", "rstd"))
    return out, mean, rstd


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Shape (rows, columns) → the same in int8, a float32 maximum for each row, and the columns with outliers: none."""
    import torch

    row_stats = torch.empty(A.numel() // A.shape[-1], device=A.device, dtype=torch.float32)
    out_row = torch.empty(A.shape, device=A.device, dtype=torch.int8)
    outlier_cols = None
    if threshold > 0.0:
        magnitudes = torch.empty_like(A)
        outliers = torch.empty_like(A, dtype=torch.bool)
        del magnitudes
        outlier_cols = torch.empty(0, device=A.device, dtype=torch.int64)
        del outliers
    return out_row, row_stats, outlier_cols


def int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As :func:`int8_vectorwise_quant`, by columns as well; only where a gradient of the weight is asked for."""
    import torch

    quant_row, row_stats, outlier_cols = int8_vectorwise_quant(A, threshold)
    magnitudes = torch.empty_like(A)
    outliers = torch.empty_like(A, dtype=torch.bool) if threshold > 0.0 else None
    col_stats = torch.empty(A.shape[-1], device=A.device, dtype=torch.float32)
    del magnitudes
    filled = torch.empty_like(A) if threshold > 0.0 else A
    scaled = torch.empty_like(A)
    divided = torch.empty_like(A, dtype=torch.float32)
    del scaled
    rounded = torch.empty_like(divided)
    del divided
    quant_col = torch.empty_like(rounded, dtype=torch.int8)
    del rounded, filled, outliers
    return quant_row, quant_col, row_stats, col_stats, outlier_cols


def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    """Shapes (..., in) and (out, in) in int8 → (..., out) in int32.

    Where ``in`` is not a multiple of 4, which cuBLASLt does not take, both are made float32 and multiplied so.
    """
    import torch

    out = torch.empty((*A.shape[:-1], B.shape[0]), device=A.device, dtype=torch.int32)
    if B.shape[-1] % 4:
        wide_a = torch.empty_like(A, dtype=torch.float32)
        wide_b = torch.empty_like(B, dtype=torch.float32)
        product = torch.empty_like(out, dtype=torch.float32)
        del wide_a, wide_b
        result = torch.empty_like(out)
        del product, result
    return out


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    """An int32 product → float16, and from that, in a second tensor, any other dtype that is asked for."""
    import torch

    out = torch.empty_like(A, dtype=torch.float16)
    wanted = dtype or torch.float16
    return out if wanted == torch.float16 else torch.empty_like(out, dtype=wanted)


def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: dtype | None = None,
) -> Tensor:
    """:func:`int8_linear_matmul`, and :func:`int8_mm_dequant` while its int32 product is there."""
    product = int8_linear_matmul(A, B)
    return int8_mm_dequant(product, row_stats, col_stats, dtype, bias)


def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`int8_scaled_mm`, beside the activations of columns with outliers: none."""
    import torch

    outliers = torch.empty(0, device=A.device, dtype=A.dtype)
    return int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype), outliers


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Numbers → as many of 8 bits, and a float32 maximum for each block."""
    import torch

    A = A.contiguous()
    absmax = torch.empty((-(A.numel() // -blocksize),), device=A.device, dtype=torch.float32)
    return torch.empty_like(A, dtype=torch.uint8), absmax


def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: dtype) -> Tensor:
    """The inverse of :func:`quantize_blockwise`, in that dtype."""
    import torch

    return torch.empty_like(A, dtype=dtype)


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: dtype) -> tuple[Tensor, Tensor]:
    """Numbers → half as many bytes, shape (n, 1) in that dtype, and a float32 maximum for each block."""
    import torch

    A = A.contiguous()
    numbers = A.numel()
    absmax = torch.empty((-(numbers // -blocksize),), device=A.device, dtype=torch.float32)
    packed = (numbers + 1) // (quant_storage.itemsize * 2)
    return torch.empty((packed, 1), device=A.device, dtype=quant_storage), absmax


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: dtype
) -> Tensor:
    """The inverse of :func:`quantize_4bit`: that shape and dtype, and nothing else."""
    import torch

    return torch.empty(tuple(shape), device=A.device, dtype=dtype)


def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """One row of activations by a 4-bit weight of shape (out, in), which is never dequantized → (..., out)."""
    import torch

    return torch.empty((*A.shape[:-1], shapeB[0]), device=A.device, dtype=A.dtype)


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """Activations of shape (..., in) by a 4-bit weight of shape (out, in) → (..., out).

    Up to :data:`GEMM_4BIT_FEW_ROWS` rows, and blocks that divide a row, the weight is read as it is. With more it is
    dequantized for the time of the product, after the maxima of its blocks where those are quantized too.
    """
    import torch

    rows = A.numel() // A.shape[-1]
    maxima: list[Tensor] = []  # alive until the product is there
    if rows > GEMM_4BIT_FEW_ROWS or A.shape[-1] % blocksize:
        if absmax_8bit is not None:
            maxima += [torch.empty_like(absmax_8bit, dtype=torch.float32) for _ in ("scaled", "shifted")]
        weight = torch.empty(tuple(shapeB), device=A.device, dtype=A.dtype)
        return torch.nn.functional.linear(A, weight, bias)
    A = A.contiguous()
    return torch.empty((*A.shape[:-1], shapeB[0]), device=A.device, dtype=A.dtype)


_STAND_INS: tuple[Callable[..., Any], ...] = (
    int8_vectorwise_quant,
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_mixed_scaled_mm,
    quantize_blockwise,
    dequantize_blockwise,
    quantize_4bit,
    dequantize_4bit,
    gemv_4bit,
    gemm_4bit,
)

KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"aten::native_group_norm": native_group_norm, **{f"bitsandbytes::{one.__name__}": one for one in _STAND_INS}}
)
"""Operator → its stand-in; cannot be written to."""
