"""Stand-ins for CUDA's kernels: results as the libraries describe them, and no more memory than CUDA takes."""

from __future__ import annotations

import inspect
from typing import Any

import bitsandbytes  # noqa: F401 - registers the operators
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pytest_diffopt.forecasting.cuda_kernels import GEMM_4BIT_FEW_ROWS, KERNELS
from tests.unit.live_bytes import LiveBytes

F16, BF16, F32, I8 = torch.float16, torch.bfloat16, torch.float32, torch.int8


def made(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CASES: dict[str, tuple[Any, ...]] = {
    "int8_vectorwise_quant": (((512, 3072), F16), 0.0),
    "int8_linear_matmul": (((512, 3072), I8), ((1024, 3072), I8)),
    "int8_mm_dequant": (((512, 1024), torch.int32), ((512,), F32), ((1024,), F32), BF16),
    "int8_scaled_mm": (((512, 3072), I8), ((1024, 3072), I8), ((512,), F32), ((1024,), F32), None, BF16),
    "quantize_blockwise": (((512, 3072), F32), ((256,), F32), 256),
    "dequantize_blockwise": (((4096,), torch.uint8), ((16,), F32), ((256,), F32), 256, F32),
    "quantize_4bit": (((512, 3072), BF16), 64, "nf4", torch.uint8),
    "dequantize_4bit": (((512 * 3072 // 2, 1), torch.uint8), ((24576,), F32), 64, "nf4", (512, 3072), BF16),
    "gemv_4bit": (((1, 3072), BF16), ((512 * 1536, 1), torch.uint8), (512, 3072), ((24576,), F32), ((16,), F32), 64),
    "gemm_4bit": (((2, 9, 3072), BF16), ((512 * 1536, 1), torch.uint8), (512, 3072), ((24576,), F32), 64, "nf4"),
}


def arguments(name: str) -> list[Any]:
    """The case's arguments; (shape, dtype) is a tensor."""
    return [
        made(*one) if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], torch.dtype) else one
        for one in CASES[name]
    ]


def described(result: Any) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    results = result if isinstance(result, tuple) else (result,)
    return [None if one is None else (tuple(one.shape), one.dtype) for one in results]


@pytest.mark.parametrize("name", CASES)
def test_a_stand_in_gives_what_the_library_says_that_its_operator_gives(name: str) -> None:
    given = arguments(name)
    expected = getattr(torch.ops.bitsandbytes, name).default(*given)
    assert described(KERNELS[f"bitsandbytes::{name}"](*given)) == described(expected)


@pytest.mark.parametrize("name", ["int8_vectorwise_quant", "int8_double_quant"])
def test_where_outliers_are_looked_for_only_their_number_differs_from_the_librarys_description(name: str) -> None:
    stand_in = KERNELS[f"bitsandbytes::{name}"](made((512, 3072), F16), 6.0)
    with FakeTensorMode(shape_env=ShapeEnv()):
        fake = getattr(torch.ops.bitsandbytes, name).default(torch.empty((512, 3072), dtype=F16), 6.0)
    assert described(stand_in)[:-1] == described(fake)[:-1]
    assert described(stand_in)[-1] == ((0,), torch.int64)


def test_a_product_with_outliers_gives_the_dtype_of_its_activations() -> None:
    given = (
        made((512, 3072), BF16),
        made((512, 3072), I8),
        made((1024, 3072), I8),
        made((512,), F32),
        made((1024,), F32),
    )
    output, outliers = KERNELS["bitsandbytes::int8_mixed_scaled_mm"](*given)
    assert described((output, outliers)) == [((512, 1024), BF16), ((0,), BF16)]


@pytest.mark.parametrize("name", KERNELS)
def test_a_stand_in_has_its_operators_signature(name: str) -> None:
    namespace, _, plain = name.partition("::")
    operator = getattr(getattr(torch.ops, namespace), plain).default
    taken = [(one.name, one.default_value) for one in operator._schema.arguments]
    had = [
        (one.name, None if one.default is inspect.Parameter.empty else one.default)
        for one in inspect.signature(KERNELS[name]).parameters.values()
    ]
    assert had == taken


def peak(name: str, *given: Any) -> int:
    """The most bytes at once that a stand-in makes."""
    with LiveBytes() as live:
        KERNELS[f"bitsandbytes::{name}"](*given)
    return int(live.peak)


@pytest.mark.parametrize(("dtype", "bytes_each"), [(F16, 6), (BF16, 8)])
def test_an_int8_product_is_there_in_int32_while_it_is_dequantized(dtype: torch.dtype, bytes_each: int) -> None:
    given = (
        made((512, 3072), dtype),
        made((512, 3072), I8),
        made((1024, 3072), I8),
        made((512,), F32),
        made((1024,), F32),
    )
    assert peak("int8_mixed_scaled_mm", *given) == 512 * 1024 * bytes_each


def test_looking_for_outliers_takes_a_copy_and_a_bit_mask_of_bytes() -> None:
    numbers = 512 * 3072
    results = numbers + 512 * 4
    assert peak("int8_vectorwise_quant", made((512, 3072), F16), 0.0) == results
    assert peak("int8_vectorwise_quant", made((512, 3072), F16), 6.0) == results + 3 * numbers


def test_an_inner_dimension_that_cublaslt_does_not_take_is_multiplied_in_float32() -> None:
    assert peak("int8_linear_matmul", made((8, 30), I8), made((16, 30), I8)) == 8 * 16 * 4 * 2 + (8 * 30 + 16 * 30) * 4


@pytest.mark.parametrize(("rows", "weight_bytes"), [(GEMM_4BIT_FEW_ROWS, 0), (GEMM_4BIT_FEW_ROWS + 1, 512 * 3072 * 2)])
def test_a_four_bit_weight_is_dequantized_for_more_than_a_few_rows(rows: int, weight_bytes: int) -> None:
    packed, absmax = made((512 * 1536, 1), torch.uint8), made((24576,), F32)
    took = peak("gemm_4bit", made((rows, 3072), BF16), packed, (512, 3072), absmax, 64, "nf4")
    assert took == weight_bytes + rows * 512 * 2


def test_quantizing_a_weight_takes_its_result_alone() -> None:
    assert (
        peak("quantize_4bit", made((512, 3072), BF16), 64, "nf4", torch.uint8) == 512 * 3072 // 2 + 512 * 3072 // 64 * 4
    )


@pytest.mark.parametrize(("memory_format", "copies"), [(torch.contiguous_format, 0), (torch.channels_last, 1)])
def test_a_group_norm_is_contiguous_and_copies_an_input_that_is_not(
    memory_format: torch.memory_format, copies: int
) -> None:
    tensor = made((4, 64, 32, 32), BF16).to(memory_format=memory_format)
    weight = made((64,), BF16)
    given = (tensor, weight, weight, 4, 64, 1024, 32, 1e-5)
    with LiveBytes() as live:
        out, mean, rstd = KERNELS["aten::native_group_norm"](*given)
    assert out.is_contiguous()
    assert described((out, mean, rstd)) == described(torch.ops.aten.native_group_norm(*given))
    assert live.peak == (1 + copies) * tensor.nbytes + 2 * 4 * 32 * 2
