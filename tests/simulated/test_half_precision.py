"""In half precision the GPU multiplies as tensor cores do: sums in float32, each result rounded once, no scratch charged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_diffopt.accelerators.simulated import SimulatedGpu

HALVES = [torch.float16, torch.bfloat16]
Function = Callable[..., torch.Tensor]
Inputs = Callable[[], list[Any]]


def n(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def converted(values: list[Any], *how: Any) -> list[Any]:
    return [value.to(*how) if isinstance(value, torch.Tensor) else value for value in values]


PRODUCTS: dict[str, tuple[Function, Inputs]] = {
    "mm": (torch.mm, lambda: [n(9, 301), n(301, 17)]),
    "mm, transposed": (lambda a, b: a.t() @ b.t(), lambda: [n(33, 9), n(17, 33)]),
    "mm, every second column": (lambda a, b: a[:, ::2] @ b[1:], lambda: [n(9, 64), n(33, 17)]),
    "mm, one row": (torch.mm, lambda: [n(1, 640), n(640, 320)]),
    "mm, to float16's smallest numbers": (torch.mm, lambda: [n(9, 33) * 1e-4, n(33, 17) * 1e-4]),
    "mm, to bfloat16's smallest numbers": (torch.mm, lambda: [n(9, 33) * 1e-20, n(33, 17) * 1e-20]),
    "mm, by nothing": (torch.mm, lambda: [n(3, 0), n(0, 4)]),
    "mm, of no rows": (torch.mm, lambda: [n(0, 5), n(5, 4)]),
    "bmm": (torch.bmm, lambda: [n(3, 9, 80), n(3, 80, 5)]),
    "bmm, no batch": (torch.bmm, lambda: [n(0, 9, 8), n(0, 8, 5)]),
    "addmm": (torch.addmm, lambda: [n(5), n(9, 80), n(80, 5)]),
    "addmm, scaled": (lambda c, a, b: torch.addmm(c, a, b, beta=0.3, alpha=1.7), lambda: [n(9, 5), n(9, 80), n(80, 5)]),
    "addmm, beta 0": (lambda c, a, b: torch.addmm(c, a, b, beta=0), lambda: [n(9, 5) / 0, n(9, 80), n(80, 5)]),
    "addmm, then gelu": (
        lambda c, a, b: torch._addmm_activation(c, a, b, use_gelu=True),
        lambda: [n(5), n(9, 80), n(80, 5)],
    ),
    "baddbmm, scaled": (
        lambda c, a, b: torch.baddbmm(c, a, b, beta=0.3, alpha=1.7),
        lambda: [n(2, 3, 5), n(2, 3, 40), n(2, 40, 5)],
    ),
    "addbmm, scaled": (
        lambda c, a, b: torch.addbmm(c, a, b, beta=0.3, alpha=1.7),
        lambda: [n(3, 5), n(2, 3, 40), n(2, 40, 5)],
    ),
    "mv": (torch.mv, lambda: [n(6, 80), n(80)]),
    "addmv, scaled": (lambda c, a, b: torch.addmv(c, a, b, beta=0.3, alpha=1.7), lambda: [n(6), n(6, 80), n(80)]),
    "dot": (torch.dot, lambda: [n(801), n(801)]),
    "vdot": (torch.vdot, lambda: [n(801), n(801)]),
    "matmul, broadcast": (torch.matmul, lambda: [n(2, 1, 4, 80), n(3, 80, 5)]),
    "einsum": (lambda a, b: torch.einsum("bik,bkj->bij", a, b), lambda: [n(2, 3, 40), n(2, 40, 5)]),
    "linear": (F.linear, lambda: [n(2, 4, 64), n(32, 64), n(32)]),
    "linear, no bias": (F.linear, lambda: [n(4, 64), n(32, 64)]),
    "conv1d": (F.conv1d, lambda: [n(2, 4, 16), n(6, 4, 3), n(6), 2, 1]),
    "conv2d": (F.conv2d, lambda: [n(2, 40, 9, 9), n(6, 40, 3, 3), n(6), 1, 1]),
    "conv2d, no bias, strided, dilated": (F.conv2d, lambda: [n(2, 4, 12, 12), n(6, 4, 3, 3), None, 2, 2, 2]),
    "conv2d, depthwise": (F.conv2d, lambda: [n(2, 4, 9, 9), n(4, 1, 3, 3), n(4), 1, 1, 1, 4]),
    "conv2d, channels last": (
        lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w),
        lambda: [n(2, 40, 9, 9), n(6, 40, 3, 3)],
    ),
    "conv2d, of a view": (lambda x, w: F.conv2d(x[:, ::2, 1:], w), lambda: [n(2, 8, 9, 9), n(6, 4, 3, 3)]),
    "conv2d, without a batch": (F.conv2d, lambda: [n(4, 9, 9), n(6, 4, 3, 3)]),
    "conv2d, of no images": (F.conv2d, lambda: [n(0, 4, 9, 9), n(6, 4, 3, 3), n(6)]),
    "conv3d": (F.conv3d, lambda: [n(1, 3, 6, 6, 6), n(4, 3, 3, 3, 3), n(4)]),
    "conv_transpose1d": (F.conv_transpose1d, lambda: [n(2, 4, 9), n(4, 6, 3), n(6), 2]),
    "conv_transpose2d": (F.conv_transpose2d, lambda: [n(2, 4, 9, 9), n(4, 6, 3, 3), n(6), 2, 1, 1]),
    "conv_transpose3d": (F.conv_transpose3d, lambda: [n(1, 2, 4, 4, 4), n(2, 3, 3, 3, 3)]),
}
ATTENTION: dict[str, tuple[Function, Inputs]] = {
    "attention": (F.scaled_dot_product_attention, lambda: [n(2, 4, 33, 16), n(2, 4, 33, 16), n(2, 4, 33, 16)]),
    "attention, across": (F.scaled_dot_product_attention, lambda: [n(2, 4, 33, 16), n(2, 4, 7, 16), n(2, 4, 7, 16)]),
    "attention, causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: [n(2, 4, 33, 16), n(2, 4, 33, 16), n(2, 4, 33, 16)],
    ),
    "attention, masked": (
        F.scaled_dot_product_attention,
        lambda: [n(2, 4, 33, 16), n(2, 4, 32, 16), n(2, 4, 32, 16), n(2, 1, 33, 32)],
    ),
    "attention, masked by booleans": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask > 0),
        lambda: [n(2, 4, 33, 16), n(2, 4, 32, 16), n(2, 4, 32, 16), n(2, 1, 33, 32)],
    ),
}
ALL = {**PRODUCTS, **ATTENTION}
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def half_inputs(inputs: Inputs, dtype: torch.dtype) -> list[Any]:
    return converted(inputs(), dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Including the sign of 0; one NaN is another."""
    assert a.dtype == b.dtype
    numbers = torch.equal(torch.nan_to_num(a).view(torch.int16), torch.nan_to_num(b).view(torch.int16))
    return numbers and torch.equal(a.isnan(), b.isnan())


@halves
@pytest.mark.parametrize("name", ALL)
def test_a_result_is_the_rounding_of_the_one_in_float32(name: str, dtype: torch.dtype) -> None:
    function, inputs = ALL[name]
    halved = half_inputs(inputs, dtype)
    result = function(*converted(halved, "cuda"))
    expected = function(*converted(halved, torch.float32)).to(dtype)
    assert (result.device.type, result.shape) == ("cuda", expected.shape)
    assert same_bits(result.cpu(), expected)


# --------------------------------------------------------------------------------------- against the exact result


def half_of_last_place(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half of the distance between numbers of that dtype there."""
    finfo = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=finfo.tiny)).exponent - 1
    return finfo.eps / 2 * torch.exp2(exponent.double())


def assert_rounded_once(result: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, terms: int) -> None:
    """At most half a unit in the last place off, besides what float32 may lose in a sum of so many terms.

    Args:
        magnitude: the sum of the terms' absolute values.
    """
    lost = magnitude * terms * torch.finfo(torch.float32).eps / 2
    error = (result.double() - exact).abs()
    worst = (error - lost - half_of_last_place(exact, result.dtype)).max().item()
    assert worst <= 0, (
        f"expected one rounding; {(error / half_of_last_place(exact, result.dtype)).max():.2f} times as much off"
    )


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Two factors, their exact product, its magnitude, and the number of terms."""
    a, b = n(96, 64).to(dtype), n(64, 48).to(dtype)
    return a, b, a.double() @ b.double(), a.double().abs() @ b.double().abs(), 64


@halves
def test_a_product_is_half_a_last_place_off_at_most(dtype: torch.dtype) -> None:
    a, b, exact, magnitude, terms = product(dtype)
    assert_rounded_once((a.cuda() @ b.cuda()).cpu(), exact, magnitude, terms)


@halves
def test_a_product_that_is_scaled_and_added_to_is_rounded_at_the_end(dtype: torch.dtype) -> None:
    a, b, exact, magnitude, terms = product(dtype)
    c = n(96, 48).to(dtype)
    result = torch.addmm(c.cuda(), a.cuda(), b.cuda(), beta=0.3, alpha=1.7).cpu()
    assert_rounded_once(result, 0.3 * c.double() + 1.7 * exact, 0.3 * c.double().abs() + 1.7 * magnitude, terms + 2)


@halves
def test_a_convolution_is_half_a_last_place_off_at_most(dtype: torch.dtype) -> None:
    x, w = n(2, 64, 8, 8).to(dtype), n(16, 64, 3, 3).to(dtype)
    exact, magnitude = F.conv2d(x.double(), w.double()), F.conv2d(x.double().abs(), w.double().abs())
    assert_rounded_once(F.conv2d(x.cuda(), w.cuda()).cpu(), exact, magnitude, 64 * 9)


def in_two_halves(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    middle = a.shape[1] // 2
    first, second = (part.float() for part in (a[:, :middle], a[:, middle:]))
    return (first @ b[:middle].float()).to(a.dtype) + (second @ b[middle:].float()).to(a.dtype)


def one_by_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    for k in range(a.shape[1]):
        total = total + a[:, k : k + 1] * b[k : k + 1]
    return total


@halves
@pytest.mark.parametrize("fault", [in_two_halves, one_by_one])
def test_a_kernel_that_rounds_between_does_not_pass(fault: Function, dtype: torch.dtype) -> None:
    a, b, exact, magnitude, terms = product(dtype)
    with pytest.raises(AssertionError, match="expected one rounding"):
        assert_rounded_once(fault(a, b), exact, magnitude, terms)
    assert not same_bits(fault(a, b), (a.float() @ b.float()).to(dtype))


@halves
def test_a_sum_that_is_rounded_before_it_is_added_to_does_not_pass(dtype: torch.dtype) -> None:
    a, b, exact, magnitude, terms = product(dtype)
    c = n(96, 48).to(dtype)
    rounded_twice = (a.float() @ b.float()).to(dtype) + c
    with pytest.raises(AssertionError, match="expected one rounding"):
        assert_rounded_once(rounded_twice, c.double() + exact, c.double().abs() + magnitude, terms + 1)


# ------------------------------------------------------------------------------------------------------ gradients

DIFFERENTIATED = [
    "mm",
    "mm, transposed",
    "bmm",
    "linear, no bias",
    *(one for one in PRODUCTS if one.startswith("conv")),
]


@halves
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_a_gradient_is_the_rounding_of_the_one_in_float32(name: str, dtype: torch.dtype) -> None:
    function, inputs = PRODUCTS[name]
    halved = half_inputs(inputs, dtype)

    def gradients(*how: Any) -> list[torch.Tensor]:
        given = converted(halved, *how)
        taken = [value.requires_grad_() for value in given if isinstance(value, torch.Tensor)]
        result = function(*given)
        grad = n(*result.shape).to(dtype).to(*how)
        return list(torch.autograd.grad(result, taken, grad))

    for by_gpu, by_host in zip(gradients("cuda"), gradients(torch.float32), strict=True):
        assert same_bits(by_gpu.cpu(), by_host.to(dtype))


@halves
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_attention_are_computed_in_float32_of_the_rounded_output(
    kernel: SDPBackend, causal: bool, dtype: torch.dtype
) -> None:
    q, k, v, grad = (
        value.to(dtype) for value in (n(2, 4, 32, 16), n(2, 4, 32, 17)[..., 1:], n(2, 4, 32, 16), n(2, 4, 32, 16))
    )
    on_gpu = [one.cuda().requires_grad_() for one in (q, k, v)]
    with sdpa_kernel(kernel):
        output = F.scaled_dot_product_attention(*on_gpu, is_causal=causal)
        found = torch.autograd.grad(output, on_gpu, grad.cuda())
    wide = [one.float() for one in (q, k, v)]
    by_host, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, causal)
    rounded = by_host.to(dtype).float()
    expected = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad.float(), *wide, rounded, sums, 0.0, causal
    )
    assert same_bits(output.cpu(), by_host.to(dtype))
    assert all(same_bits(a.cpu(), b.to(dtype)) for a, b in zip(found, expected, strict=True))


@halves
def test_a_masks_gradient_is_rounded_once_too(dtype: torch.dtype) -> None:
    given = [one.to(dtype) for one in (n(1, 2, 8, 16), n(1, 2, 24, 16), n(1, 2, 24, 16), n(1, 2, 8, 24))]
    grad, on_gpu = n(1, 2, 8, 16).to(dtype), [one.cuda() for one in given]
    output, *kept = torch.ops.aten._scaled_dot_product_efficient_attention(*on_gpu, True)
    found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad.cuda(), *on_gpu, output, *kept, 0.0, [True] * 4
    )
    exact = [one.double().requires_grad_() for one in given]
    result = F.scaled_dot_product_attention(*exact)
    expected = torch.autograd.grad(result, exact, grad.double())
    for a, b in [(output, result.detach()), *zip(found, expected, strict=True)]:
        assert a.dtype == dtype
        assert_rounded_once(a.cpu(), b, b.abs().max(), 24)


# ------------------------------------------------------------------------------------- where the result is written


@halves
def test_a_result_is_written_where_it_is_wanted(dtype: torch.dtype) -> None:
    a, b = n(9, 33).to(dtype), n(33, 17).to(dtype)
    expected = (a.float() @ b.float()).to(dtype)
    whole = torch.full((17, 20), 7.0, dtype=dtype, device="cuda")
    out = whole[:, 1:10].t()
    data, strides = out.data_ptr(), out.stride()
    returned = torch.mm(a.cuda(), b.cuda(), out=out)
    assert returned is out
    assert (out.data_ptr(), out.stride()) == (data, strides)
    assert same_bits(out.cpu(), expected)
    assert (whole[:, 0] == 7).all()
    assert (whole[:, 10:] == 7).all()


@halves
def test_an_empty_place_takes_the_results_size_in_silence_and_another_size_with_a_warning(dtype: torch.dtype) -> None:
    a, b = n(9, 33).to(dtype), n(33, 17).to(dtype)
    empty, other = (torch.empty(size, dtype=dtype, device="cuda") for size in (0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.mm(a.cuda(), b.cuda(), out=empty)
    with pytest.warns(UserWarning, match="was resized") as warned:
        torch.mm(a.cuda(), b.cuda(), out=other)
    assert len(warned) == 1
    for out in (empty, other):
        assert same_bits(out.cpu(), (a.float() @ b.float()).to(dtype))


@halves
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("addmm_", [(3, 5), (3, 40), (40, 5)]),
        ("baddbmm_", [(2, 3, 5), (2, 3, 40), (2, 40, 5)]),
        ("addbmm_", [(3, 5), (2, 3, 40), (2, 40, 5)]),
        ("addmv_", [(6,), (6, 40), (40,)]),
    ],
)
def test_a_tensor_that_a_product_is_added_to_in_place_is_rounded_once(
    name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    given = [n(*shape).to(dtype) for shape in shapes]
    on_gpu, wide = [one.cuda() for one in given], [one.float() for one in given]
    before = on_gpu[0].data_ptr()
    returned = getattr(on_gpu[0], name)(*on_gpu[1:], beta=0.3, alpha=1.7)
    getattr(wide[0], name)(*wide[1:], beta=0.3, alpha=1.7)
    assert returned is on_gpu[0]
    assert returned.data_ptr() == before
    assert same_bits(returned.cpu(), wide[0].to(dtype))


@halves
@pytest.mark.parametrize("other", [torch.float32, torch.float64, "the other half"])
def test_mixed_precisions_are_refused_as_without_a_gpu(other: Any, dtype: torch.dtype) -> None:
    if isinstance(other, str):
        other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    for function, inputs in (PRODUCTS["mm"], PRODUCTS["bmm"], PRODUCTS["conv2d"], PRODUCTS["addmm"]):
        first, *rest = inputs()
        for device in ("cpu", "cuda"):
            with pytest.raises(RuntimeError, match="type"):
                function(first.to(device, dtype), *converted(rest, device, other))
    a, b = (one.to("cuda", dtype) for one in PRODUCTS["mm"][1]())
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(a, b, out=torch.empty(9, 17, dtype=other, device="cuda"))


@halves
def test_autocast_multiplies_what_it_rounded(dtype: torch.dtype) -> None:
    x, w, b = n(4, 64), n(32, 64), n(32)
    with torch.autocast("cuda", dtype):
        result = F.linear(x.cuda(), w.cuda(), b.cuda())
    expected = F.linear(*(one.to(dtype).float() for one in (x, w, b))).to(dtype)
    assert same_bits(result.cpu(), expected)


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_a_softmax_of_float16_is_kept_in_float32_and_its_gradient_rounded(
    function: Function, gpu: SimulatedGpu
) -> None:
    x, grad = n(5, 33).half(), n(5, 33)

    def both(taken: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = function(taken.requires_grad_(), -1, dtype=torch.float32)
        return result, *torch.autograd.grad(result, taken, grad.to(taken.device))

    result, by_input = both(x.cuda())
    expected, wide = both(x.float())
    assert torch.equal(result.cpu(), expected)
    assert same_bits(by_input.cpu(), wide.half())
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(x.cuda().softmax(-1).cpu(), x.float().softmax(-1))
    out = torch.empty(5, 33, device="cuda")
    assert torch.ops.aten._softmax.out(x.cuda(), -1, True, out=out) is out
    assert torch.equal(out.cpu(), x.float().softmax(-1))
    with gpu.dry(real_bytes=0):
        assert [(one.dtype, one.shape) for one in both(x.cuda())] == [
            (torch.float32, (5, 33)),
            (torch.float16, (5, 33)),
        ]


# ---------------------------------------------------------------------------------------------------------- bytes


@pytest.fixture
def bytes_of_a_call(gpu: SimulatedGpu) -> Iterator[Callable[..., tuple[Any, ...]]]:
    def measured(name: str, dtype: torch.dtype, dry: bool) -> tuple[Any, ...]:
        """Shape and strides of the result; allocated bytes after the call, peak, and number of allocations and kernels."""
        function, inputs = ALL[name]
        with gpu.dry(real_bytes=0) if dry else nullcontext():
            given = converted(half_inputs(inputs, dtype), "cuda")
            gpu.reset_counts(0)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = function(*given)
            stats = torch.cuda.memory_stats()
            return (
                result.shape,
                result.stride(),
                result.dtype,
                torch.cuda.memory_allocated() - before,
                torch.cuda.max_memory_allocated() - before,
                stats["allocation.all.allocated"],
                gpu.kernel_count(),
            )

    return measured


@halves
@pytest.mark.parametrize("name", ALL)
def test_a_dry_call_takes_the_same_bytes(
    name: str, dtype: torch.dtype, bytes_of_a_call: Callable[..., tuple[Any, ...]]
) -> None:
    assert bytes_of_a_call(name, dtype, dry=True) == bytes_of_a_call(name, dtype, dry=False)


@halves
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_computed_in_float32_is_not_charged(
    name: str, dtype: torch.dtype, bytes_of_a_call: Callable[..., tuple[Any, ...]]
) -> None:
    half, single = (bytes_of_a_call(name, one, dry=False) for one in (dtype, torch.float32))
    assert (half[0], half[1]) == (single[0], single[1])
    assert [2 * half[3], 2 * half[4], *half[5:]] == [*single[3:]]
