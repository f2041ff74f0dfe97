"""Every operation gives the bits that the host gives."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_diffopt.accelerators.simulated import SimulatedGpu

Inputs = Callable[[], list[Any]]


def n(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape))).to(dtype)


def integers(*shape: int, below: int = 5) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def moved(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(one, device) for one in value)
    return value


def flat(value: Any) -> list[Any]:
    return [leaf for one in value for leaf in flat(one)] if isinstance(value, (list, tuple)) else [value]


def assert_same(host: Any, device: Any) -> None:
    """Same values to the bit, dtypes, shapes and strides; tensors of the second on the device."""
    assert len(flat(host)) == len(flat(device))
    for a, b in zip(flat(host), flat(device), strict=True):
        if not isinstance(a, torch.Tensor):
            assert a == b
            continue
        assert b.device.type == "cuda"
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        back = b.cpu()
        assert torch.equal(a.isnan(), back.isnan()) if a.is_floating_point() else True
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(back)), (a - back).abs().max()


UNARY = """
    abs acos asin atan ceil cos cosh digamma erf erfc erfinv exp exp2 expm1 floor frac i0 lgamma log log10 log1p
    log2 neg reciprocal round rsqrt sigmoid sign signbit sin sinc sinh sqrt square tan tanh trunc isnan isinf
    isfinite logical_not relu positive
""".split()  # noqa: SIM905
BINARY = """
    add sub mul div true_divide floor_divide fmod remainder maximum minimum fmax fmin atan2 hypot copysign eq ne
    lt le gt ge logical_and logical_or logical_xor nextafter logaddexp heaviside
""".split()  # noqa: SIM905
ACTIVATIONS = """
    gelu silu mish elu selu celu leaky_relu softplus softsign hardswish hardsigmoid logsigmoid relu6
""".split()  # noqa: SIM905

OPERATIONS: dict[str, tuple[Callable[..., Any], Inputs]] = {
    **{name: (getattr(torch, name), lambda: [n(5, 7)]) for name in UNARY},
    **{f"{name}, broadcast": (getattr(torch, name), lambda: [n(5, 7), n(7)]) for name in BINARY},
    **{name: (getattr(F, name), lambda: [n(5, 7)]) for name in ACTIVATIONS},
    "add a number": (lambda x: x + 2.5, lambda: [n(3, 3)]),
    "add an integer to integers": (lambda x: x + 2, lambda: [integers(3, 3)]),
    "integers become floats": (lambda x: x + 2.5, lambda: [integers(3, 3)]),
    "half times float number": (lambda x: x * 2.5, lambda: [n(3, 3, dtype=torch.float16)]),
    "bfloat16 add": (torch.add, lambda: [n(9, 9, dtype=torch.bfloat16), n(9, 9, dtype=torch.bfloat16)]),
    "a host number in a tensor": (lambda x: x + torch.tensor(3.0), lambda: [n(4)]),
    "bitwise": (lambda a, b: [a & b, a | b, a ^ b, ~a, a << 1, a >> 1], lambda: [integers(6), integers(6)]),
    "bool": (lambda a: [a > 0, (a > 0).any(), (a > 0).all(0), (a > 0).sum()], lambda: [n(4, 4)]),
    "mm": (torch.mm, lambda: [n(9, 33), n(33, 17)]),
    "mm, transposed": (lambda a, b: a.t() @ b.t(), lambda: [n(33, 9), n(17, 33)]),
    "bmm": (torch.bmm, lambda: [n(3, 9, 8), n(3, 8, 5)]),
    "matmul, broadcast": (torch.matmul, lambda: [n(2, 1, 4, 8), n(3, 8, 5)]),
    "addmm": (torch.addmm, lambda: [n(5), n(9, 8), n(8, 5)]),
    "baddbmm": (torch.baddbmm, lambda: [n(2, 3, 5), n(2, 3, 4), n(2, 4, 5)]),
    "mv and dot": (lambda a, b: [a @ b, b @ b], lambda: [n(6, 8), n(8)]),
    "addr": (torch.addr, lambda: [n(4, 5), n(4), n(5)]),
    "linear": (F.linear, lambda: [n(4, 64), n(32, 64), n(32)]),
    "linear, bfloat16": (F.linear, lambda: [n(4, 64, dtype=torch.bfloat16), n(32, 64, dtype=torch.bfloat16)]),
    "einsum": (lambda a, b: torch.einsum("bik,bkj->bij", a, b), lambda: [n(2, 3, 4), n(2, 4, 5)]),
    "sums": (lambda x: [x.sum(), x.sum(0), x.mean(1), x.prod(1), x.var(), x.std(0), x.norm()], lambda: [n(33, 65)]),
    "extremes": (lambda x: [x.max(), *x.max(1), x.argmin(0), *x.aminmax(dim=0), x.amax((0, 1))], lambda: [n(9, 11)]),
    "softmax": (lambda x: [x.softmax(-1), x.log_softmax(0), x.logsumexp(1)], lambda: [n(9, 65)]),
    "layer_norm": (F.layer_norm, lambda: [n(4, 33), (33,), n(33), n(33)]),
    "layer_norm, no weight": (F.layer_norm, lambda: [n(4, 33), (33,)]),
    "rms_norm": (F.rms_norm, lambda: [n(4, 33), (33,), n(33)]),
    "group_norm": (F.group_norm, lambda: [n(2, 8, 5, 5), 4, n(8), n(8)]),
    "batch_norm": (lambda x, m, v: [F.batch_norm(x, m, v.abs(), training=True), m], lambda: [n(4, 3, 5), n(3), n(3)]),
    "instance_norm": (F.instance_norm, lambda: [n(2, 3, 8, 8)]),
    "conv1d": (F.conv1d, lambda: [n(2, 4, 16), n(6, 4, 3), n(6), 2, 1]),
    "conv2d": (F.conv2d, lambda: [n(2, 4, 9, 9), n(6, 4, 3, 3), n(6), 1, 1]),
    "conv2d, no bias, strided, dilated": (F.conv2d, lambda: [n(2, 4, 12, 12), n(6, 4, 3, 3), None, 2, 2, 2]),
    "conv2d, depthwise": (F.conv2d, lambda: [n(2, 4, 9, 9), n(4, 1, 3, 3), n(4), 1, 1, 1, 4]),
    "conv2d, channels last": (
        lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w),
        lambda: [n(2, 4, 9, 9), n(6, 4, 3, 3)],
    ),
    "conv2d, weight channels last": (
        lambda x, w: F.conv2d(x, w.to(memory_format=torch.channels_last), stride=2, padding=1),
        lambda: [n(2, 4, 9, 9), n(6, 4, 3, 3)],
    ),
    "conv3d, channels last": (
        # the host picks a kernel by size, and this one's is contiguous
        lambda x, w: F.conv3d(x.to(memory_format=torch.channels_last_3d), w).contiguous(),
        lambda: [n(1, 3, 6, 6, 6), n(4, 3, 3, 3, 3)],
    ),
    "conv_transpose2d, channels last": (
        lambda x, w: F.conv_transpose2d(x.to(memory_format=torch.channels_last), w, None, 2),
        lambda: [n(2, 4, 9, 9), n(4, 6, 3, 3)],
    ),
    "conv2d, bfloat16": (F.conv2d, lambda: [n(1, 4, 9, 9, dtype=torch.bfloat16), n(6, 4, 3, 3, dtype=torch.bfloat16)]),
    "conv2d, no batch": (F.conv2d, lambda: [n(4, 9, 9), n(6, 4, 3, 3)]),
    "conv3d": (F.conv3d, lambda: [n(1, 3, 6, 6, 6), n(4, 3, 3, 3, 3), n(4)]),
    "conv_transpose1d": (F.conv_transpose1d, lambda: [n(2, 4, 9), n(4, 6, 3), n(6), 2]),
    "conv_transpose2d": (F.conv_transpose2d, lambda: [n(2, 4, 9, 9), n(4, 6, 3, 3), n(6), 2, 1, 1]),
    "conv_transpose3d": (F.conv_transpose3d, lambda: [n(1, 2, 4, 4, 4), n(2, 3, 3, 3, 3)]),
    "pooling": (
        lambda x: [*F.max_pool2d(x, 2, return_indices=True), F.avg_pool2d(x, 3, 2), F.adaptive_avg_pool2d(x, 2)],
        lambda: [n(2, 3, 8, 8)],
    ),
    "padding": (
        lambda x: [F.pad(x, (1, 2)), F.pad(x, (1, 2), "reflect"), F.pad(x, (1, 1), "replicate")],
        lambda: [n(2, 3, 8)],
    ),
    "embedding": (F.embedding, lambda: [integers(3, 4), n(5, 8)]),
    "one_hot": (lambda x: F.one_hot(x, 5), lambda: [integers(3, 4)]),
    **{
        f"interpolate, {mode}": (
            lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode),
            lambda: [n(1, 3, 6, 6)],
        )
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    },
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), lambda: [n(1, 8, 4, 4)]),
    "grid_sample": (
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
        lambda: [n(1, 2, 5, 5), n(1, 4, 4, 2)],
    ),
    "index": (
        lambda x, i: [x[i], x[:, i], x[x > 0], x[1:, ::2], x[..., None], x[i, i]],
        lambda: [n(5, 5), integers(4)],
    ),
    "index by a host tensor": (lambda x: x[torch.tensor([0, 2])], lambda: [n(5, 5)]),
    "index_select": (lambda x, i: x.index_select(1, i), lambda: [n(5, 6), integers(3)]),
    "gather": (lambda x, i: x.gather(1, i), lambda: [n(4, 5), integers(4, 3)]),
    "scatter": (
        lambda x, i, s: [x.scatter(1, i, s), x.scatter_add(1, i, s)],
        lambda: [n(4, 5), integers(4, 3), n(4, 3)],
    ),
    "index_put": (lambda x, i, v: x.index_put((i,), v, accumulate=True), lambda: [n(5, 4), integers(3), n(3, 4)]),
    "where": (lambda x, y: [torch.where(x > 0, x, y), torch.where(x > 0, 1.0, y)], lambda: [n(4, 4), n(4, 4)]),
    "masked_fill": (lambda x: [x.masked_fill(x > 0, 9.0), x.masked_select(x > 0)], lambda: [n(4, 4)]),
    "nonzero and unique": (lambda x: [x.nonzero(), *torch.unique(x, return_counts=True)], lambda: [integers(4, 4)]),
    "sort": (lambda x: [*x.sort(1), x.argsort(0), *x.topk(3, 1), *x.kthvalue(2), *x.median(1)], lambda: [n(4, 9)]),
    "cumulative": (lambda x: [x.cumsum(0), x.cumprod(1), *x.cummax(0), x.logcumsumexp(1)], lambda: [n(4, 9)]),
    "fft": (lambda x: [torch.fft.fft(x), torch.fft.rfft2(x), torch.fft.irfft(torch.fft.rfft(x))], lambda: [n(4, 8)]),
    "complex": (
        lambda x: [
            c := torch.view_as_complex(x),
            c.abs(),
            c.angle(),
            c.conj().resolve_conj(),
            c * c.conj(),
            c.real,
            c.imag,
        ],
        lambda: [n(5, 2)],
    ),
    "polar": (torch.polar, lambda: [n(5).abs(), n(5)]),
    "linalg": (
        lambda x: [torch.linalg.inv(x), torch.linalg.det(x), torch.linalg.solve(x, x[0]), *torch.linalg.qr(x)],
        lambda: [n(4, 4) + 5 * torch.eye(4)],
    ),
    "cat and stack": (
        lambda a, b: [torch.cat([a, b]), torch.stack([a, b], 1), *torch.meshgrid(a[0], b[0], indexing="ij")],
        lambda: [n(2, 3), n(2, 3)],
    ),
    "split": (lambda x: [*x.chunk(3, 1), *x.split(2), *x.unbind(0), *torch.tensor_split(x, 2)], lambda: [n(4, 9)]),
    "views": (
        lambda x: [
            x.t(),
            x.view(-1),
            x.reshape(9, 4),
            x.permute(1, 0),
            x.unsqueeze(0).expand(3, 4, 9),
            x.unfold(1, 3, 2),
            x.diagonal(),
            x[1].narrow(0, 2, 3),
            x.flip(0),
            x.roll(1, 0),
            x.as_strided((2, 2), (1, 2)),
        ],
        lambda: [n(4, 9)],
    ),
    "copies": (
        lambda x: [
            x.contiguous(),
            x.t().contiguous(),
            x.clone(),
            x.repeat(2, 1),
            x.repeat_interleave(2, 0),
            x.tril(),
            x.triu(1),
        ],
        lambda: [n(4, 9)],
    ),
    "dtypes": (
        lambda x: [
            x.to(d) for d in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool)
        ],
        lambda: [n(4, 4).abs()],
    ),
    "float8": (
        lambda x: [x.to(torch.float8_e4m3fn).float(), x.view(torch.int32), x.view(torch.uint8)],
        lambda: [n(4, 4)],
    ),
    "losses": (
        lambda x, y: [F.mse_loss(x, y), F.l1_loss(x, y), F.smooth_l1_loss(x, y), F.cosine_similarity(x, y)],
        lambda: [n(4, 5), n(4, 5)],
    ),
    "cross_entropy": (F.cross_entropy, lambda: [n(4, 5), integers(4)]),
    "cdist": (torch.cdist, lambda: [n(4, 5), n(6, 5)]),
    "clamp and lerp": (
        lambda x, y: [x.clamp(-1, 1), x.lerp(y, 0.3), x.addcmul(x, y, value=2), x.addcdiv(x, y + 9)],
        lambda: [n(4), n(4)],
    ),
    "foreach": (
        lambda a, b: [*torch._foreach_add([a, b], 1.0), *torch._foreach_mul([a, b], [b, a])],
        lambda: [n(4), n(4)],
    ),
    "bucketize": (torch.bucketize, lambda: [n(9), n(4).sort()[0]]),
    "python numbers": (lambda x: [x.sum().item(), x.tolist(), bool((x > 0).any()), x.shape, len(x)], lambda: [n(2, 3)]),
    "factories": (
        lambda x: [
            torch.zeros_like(x),
            torch.ones(3, device=x.device),
            torch.full((2,), 7, device=x.device),
            torch.arange(5, device=x.device),
            torch.eye(3, device=x.device),
            torch.linspace(0, 1, 7, device=x.device),
            torch.tensor([1, 2], device=x.device),
            x.new_zeros(2),
        ],
        lambda: [n(3)],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_bits_of_the_host(name: str) -> None:
    operation, inputs = OPERATIONS[name]
    assert_same(operation(*moved(inputs(), "cpu")), operation(*moved(inputs(), "cuda")))


DIFFERENTIATED = [
    *(
        name
        for name in OPERATIONS
        if name.startswith(("conv", "linear", "mm", "matmul", "layer_norm", "rms_norm", "group_norm", "interpolate"))
    ),
    *(
        "gelu",
        "silu",
        "mish",
        "softmax",
        "embedding",
        "cat and stack",
        "cumulative",
        "einsum",
        "pooling",
        "fft",
        "views",
    ),
]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_have_the_bits_of_the_host(name: str) -> None:
    operation, inputs = OPERATIONS[name]

    def gradients(device: str) -> list[Any]:
        given = moved(inputs(), device)
        leaves = [one.requires_grad_() for one in given if isinstance(one, torch.Tensor) and one.is_floating_point()]
        results = [one for one in flat(operation(*given)) if isinstance(one, torch.Tensor) and one.requires_grad]
        sum(one.abs().square().sum() for one in results).backward()
        return [leaf.grad for leaf in leaves]

    host, device = gradients("cpu"), gradients("cuda")
    assert len(host) > 0
    assert_same([g.contiguous() for g in host], [g.contiguous() for g in device])


def test_a_structured_operation_goes_straight_to_the_hosts_kernel(gpu: SimulatedGpu) -> None:
    """By way of its out= variant, shapes would be worked out twice: half of a small operation's time."""
    x = n(4, 4).to("cuda")
    gpu.record_operations()
    (x + x, x @ x, x.mul_(2), torch.cat([x, x]))
    gpu.record_operations(False)
    assert gpu.recorded_operations() == {"aten::add.Tensor": 1, "aten::mm": 1, "aten::mul_.Tensor": 1, "aten::cat": 1}


def test_noughts_that_autograd_never_writes_out_hold_no_memory() -> None:
    x = n(64).to("cuda").requires_grad_()
    y = x.sgn().sum()
    before = torch.cuda.memory_allocated()
    (gradient,) = torch.autograd.grad(y, x, retain_graph=True)
    assert gradient._is_zerotensor()
    assert torch.cuda.memory_allocated() == before
    assert (gradient + 1).tolist() == [1.0] * 64
    assert gradient.cpu().tolist() == [0.0] * 64


IN_PLACE: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda x: x.add_(1),
    "a slice": lambda x: x[1:].mul_(2),
    "a column": lambda x: x[:, 1].fill_(3),
    "a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "by a host number": lambda x: x.copy_(torch.tensor(2.0)),
    "transposed": lambda x: x.t_().add_(torch.arange(4.0, device=x.device)[:, None].t().expand(6, 4)),
    "zero_": lambda x: x.view(-1)[::2].zero_(),
    "resize_, smaller and larger": lambda x: (x.resize_(2, 3), x.resize_(6, 8), x.view(-1)[6:].zero_()),
    "out=": lambda x: torch.mul(x.clone(), 2, out=x),
    "out= of another shape": lambda x: torch.cat([x.clone(), x.clone()], out=x.resize_(0)),
    "out= a slice": lambda x: torch.sin(x[0].clone(), out=x[1]),
    "set_": lambda x: x.set_(torch.ones(3, 3, device=x.device)),
    "set_, nothing": lambda x: x.set_(),
    "sort out=": lambda x: torch.sort(x.clone(), out=(x, torch.empty(0, dtype=torch.long, device=x.device))),
    "index_add_": lambda x: x.index_add_(0, torch.tensor([0, 2], device=x.device), torch.ones(2, 6, device=x.device)),
    "clamp_ and unsqueeze_": lambda x: x.clamp_(0, 1).unsqueeze_(0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_changed_in_place_is_as_on_the_host(name: str) -> None:
    host, device = n(4, 6), n(4, 6).to("cuda")
    host_view, device_view = host.view(-1), device.view(-1)
    IN_PLACE[name](host)
    IN_PLACE[name](device)
    assert_same(host, device)
    if not name.startswith(("out= of", "resize_", "set_")):
        assert_same(host_view, device_view)


RANDOM: dict[str, Callable[[str], torch.Tensor]] = {
    "randn": lambda d: torch.randn(33, device=d),
    "rand": lambda d: torch.rand(33, device=d),
    "randint": lambda d: torch.randint(9, (33,), device=d),
    "randperm": lambda d: torch.randperm(33, device=d),
    "normal_": lambda d: torch.empty(33, device=d).normal_(1, 2),
    "uniform_": lambda d: torch.empty(33, device=d).uniform_(1, 2),
    "bernoulli": lambda d: torch.full((33,), 0.3, device=d).bernoulli(),
    "exponential_": lambda d: torch.empty(33, device=d).exponential_(),
    "multinomial": lambda d: torch.ones(9, device=d).multinomial(5),
    "rand_like": lambda d: torch.rand_like(torch.empty(7, device=d)),
    "randn_like": lambda d: torch.randn_like(torch.empty(7, device=d)),
}


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_seed_draws_what_the_host_draws(name: str) -> None:
    torch.manual_seed(3)
    host = RANDOM[name]("cpu")
    torch.manual_seed(3)
    assert_same(host, RANDOM[name]("cuda"))


def test_dropout_draws_from_the_device_and_leaves_the_hosts_generator_alone() -> None:
    x = torch.ones(1000, device="cuda")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = F.dropout(x, 0.5), F.dropout(x, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x, 0.5), first)
    assert set(first.unique().tolist()) == {0.0, 2.0}


ATTENTION = {
    "plain": lambda: ([n(2, 4, 9, 16), n(2, 4, 9, 16), n(2, 4, 9, 16)], {}),
    "causal": lambda: ([n(2, 4, 9, 16), n(2, 4, 9, 16), n(2, 4, 9, 16)], {"is_causal": True}),
    "mask": lambda: ([n(2, 4, 9, 16), n(2, 4, 7, 16), n(2, 4, 7, 16)], {"attn_mask": n(2, 1, 9, 7)}),
    "bool mask": lambda: ([n(2, 4, 9, 16), n(2, 4, 7, 16), n(2, 4, 7, 16)], {"attn_mask": n(9, 7) > -1}),
    "expanded mask": lambda: ([n(2, 4, 9, 16)] * 3, {"attn_mask": n(2, 1, 9, 1).expand(2, 4, 9, 9)}),
    "scale": lambda: ([n(2, 4, 9, 16)] * 3, {"scale": 0.3}),
    "value of another width": lambda: ([n(2, 4, 9, 16), n(2, 4, 9, 16), n(2, 4, 9, 8)], {}),
    "transposed": lambda: ([n(2, 9, 4, 16).transpose(1, 2)] * 3, {}),
    "last stride not 1": lambda: ([n(2, 4, 16, 9).transpose(2, 3)] * 3, {}),
    "grouped queries": lambda: ([n(2, 4, 9, 16), n(2, 2, 9, 16), n(2, 2, 9, 16)], {"enable_gqa": True}),
    "bfloat16": lambda: ([n(2, 4, 9, 16, dtype=torch.bfloat16)] * 3, {}),
    "three dimensions": lambda: ([n(4, 9, 16)] * 3, {}),
}


def attend(device: str, case: str) -> Any:
    tensors, options = ATTENTION[case]()
    # one at a time, with its strides: .to() keeps them only where they are dense
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if case == "expanded mask":
        options["attn_mask"] = options["attn_mask"][..., :1].expand(2, 4, 9, 9)
    return F.scaled_dot_product_attention(*(t.to(device) for t in tensors), **options)


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("backend", [None, SDPBackend.MATH])
def test_attention_has_the_bits_of_the_host(case: str, backend: SDPBackend | None) -> None:
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        host, device = attend("cpu", case), attend("cuda", case)
    if backend is None and case == "bfloat16":  # accumulated in float32, and rounded once
        tensors, options = ATTENTION[case]()
        exact = F.scaled_dot_product_attention(*(t.float() for t in tensors), **options)
        assert torch.equal(device.cpu(), exact.bfloat16())
    elif backend is None and case in ("value of another width", "grouped queries"):  # by steps, in float32
        torch.testing.assert_close(device.cpu(), host)
    else:
        assert_same(host.contiguous(), device.contiguous())
    if backend is None and case == "bfloat16":  # flash attention's: the query's strides
        assert device.stride() == ATTENTION[case]()[0][0].stride()
    elif backend is None and host.dim() == 4 and case not in ("last stride not 1", "grouped queries"):
        assert device.transpose(1, 2).is_contiguous()  # one row of heads after the other


# torch 2.14 gives attention of three dimensions a fourth itself
LIFTS_THREE_DIMENSIONS = torch.__version__ >= torch.torch_version.TorchVersion("2.14")

FLASH, EFFICIENT, CUDNN, MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
HALF = torch.bfloat16
# what is attended, and which of CUDA's kernels take it: sdp_utils.cpp of torch, on capability 8.0
FORCED = {
    "half": (lambda: ([n(2, 4, 9, 16, dtype=HALF)] * 3, {}), {FLASH, EFFICIENT, CUDNN}),
    "half causal": (lambda: ([n(2, 4, 9, 16, dtype=HALF)] * 3, {"is_causal": True}), {FLASH, EFFICIENT, CUDNN}),
    "half mask": (
        lambda: ([n(2, 4, 9, 16, dtype=HALF)] * 3, {"attn_mask": torch.ones(9, 9) > 0}),
        {EFFICIENT, CUDNN},
    ),
    "half causal, not square": (
        lambda: (
            [n(2, 4, 9, 16, dtype=HALF), n(2, 4, 7, 16, dtype=HALF), n(2, 4, 7, 16, dtype=HALF)],
            {"is_causal": True},
        ),
        {EFFICIENT, CUDNN},
    ),
    "half, a key of one": (
        lambda: ([n(2, 4, 9, 16, dtype=HALF), n(2, 4, 1, 16, dtype=HALF), n(2, 4, 1, 16, dtype=HALF)], {}),
        {FLASH, EFFICIENT},
    ),
    "half, 12 wide": (lambda: ([n(2, 4, 9, 12, dtype=HALF)] * 3, {}), {FLASH}),
    "half, 160 wide": (lambda: ([n(2, 4, 9, 160, dtype=HALF)] * 3, {}), {FLASH, EFFICIENT}),
    "half, 512 wide": (lambda: ([n(1, 1, 9, 512, dtype=HALF)] * 3, {}), {EFFICIENT}),
    "half, value of another width": (
        lambda: ([n(2, 4, 9, 16, dtype=HALF), n(2, 4, 9, 16, dtype=HALF), n(2, 4, 9, 8, dtype=HALF)], {}),
        {EFFICIENT, CUDNN},
    ),
    "float32": (lambda: ([n(2, 4, 9, 16)] * 3, {}), {EFFICIENT}),
    "float32 mask": (lambda: ([n(2, 4, 9, 16)] * 3, {"attn_mask": n(9, 9)}), {EFFICIENT}),
    "float32, 6 wide": (lambda: ([n(2, 4, 9, 6)] * 3, {}), set()),
    "float64": (lambda: ([n(2, 4, 9, 16).double()] * 3, {}), set()),
    "three dimensions": (
        lambda: ([n(4, 9, 16, dtype=HALF)] * 3, {}),
        {FLASH, EFFICIENT, CUDNN} if LIFTS_THREE_DIMENSIONS else set(),
    ),
}


def forced(case: str, backends: Any) -> torch.Tensor:
    tensors, options = FORCED[case][0]()
    options = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(*(t.to("cuda") for t in tensors), **options)


@pytest.mark.parametrize("backend", [FLASH, EFFICIENT, CUDNN, MATH])
@pytest.mark.parametrize("case", FORCED)
def test_a_forced_attention_kernel_runs_what_cudas_runs_and_refuses_the_rest(case: str, backend: SDPBackend) -> None:
    if backend is MATH or backend in FORCED[case][1]:
        torch.testing.assert_close(forced(case, backend), forced(case, MATH), rtol=2e-2, atol=2e-2)
    else:
        with pytest.raises(RuntimeError, match=r"^No available kernel\. Abort"):
            forced(case, backend)
        torch.testing.assert_close(forced(case, [backend, MATH]), forced(case, MATH), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backends", "fused"),
    [(FLASH, True), (EFFICIENT, True), (CUDNN, True), ([FLASH, MATH], True), (MATH, False), ([CUDNN, EFFICIENT], True)],
)
def test_only_math_holds_the_scores_in_memory_wet_and_dry(backends: Any, fused: bool, gpu: SimulatedGpu) -> None:
    length = 256
    scores_bytes = length * length * 2
    taken = []
    for context in (contextlib.nullcontext(), gpu.dry()):
        with context, sdpa_kernel(backends):
            query = torch.empty(4, 4, length, 16, dtype=HALF, device="cuda").fill_(0.1)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            F.scaled_dot_product_attention(query, query, query)
            taken.append(torch.cuda.max_memory_allocated() - before)
            assert gpu.is_hollow(query) == (len(taken) == 2)
            del query
    assert taken[0] == taken[1]
    assert (taken[0] < 16 * scores_bytes) == fused


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_a_forced_attention_kernel_compiles_whole_and_is_refused_there_too(mode: str) -> None:
    def attends(x: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(x, x, x)

    x = n(1, 2, 16, 16, dtype=HALF).to("cuda")
    torch._dynamo.reset()
    compiled = torch.compile(attends, backend=mode, fullgraph=True)
    for backend in (EFFICIENT, MATH):
        torch.testing.assert_close(compiled(x, backend), attends(x, backend), rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="No available kernel"):
        compiled(x.float(), FLASH)
    torch._dynamo.reset()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("weight_too", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 8, 8), (2, 1, 8, 8), (2, 4, 1, 1), (2, 4, 3, 8, 8)])
def test_a_convolutions_layout_is_the_one_that_fake_tensors_foretell(
    shape: tuple[int, ...], channels_last: bool, weight_too: bool
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    convolve = F.conv2d if len(shape) == 4 else F.conv3d
    x = n(*shape).to("cuda").to(memory_format=last if channels_last else torch.contiguous_format)
    weight = n(6, shape[1], *[1] * (len(shape) - 2)).to("cuda")
    weight = weight.to(memory_format=last if weight_too else torch.contiguous_format)
    real = convolve(x, weight)
    backward = torch.ops.aten.convolution_backward
    rest = [
        None,
        [1] * (len(shape) - 2),
        [0] * (len(shape) - 2),
        [1] * (len(shape) - 2),
        False,
        [0] * (len(shape) - 2),
        1,
    ]
    gradients = backward(real, x, weight, *rest, [True, True, False])
    with FakeTensorMode() as mode:
        fake_x, fake_weight = mode.from_tensor(x), mode.from_tensor(weight)
        fake = convolve(fake_x, fake_weight)
        foretold = backward(fake, fake_x, fake_weight, *rest, [True, True, False])
    for one, other in zip((real, *gradients[:2]), (fake, *foretold[:2]), strict=True):
        assert (one.shape, one.stride()) == (other.shape, other.stride())
    if (channels_last or weight_too) and shape[1] > 1 and shape[2] > 1:  # else a layout has two names
        assert real.is_contiguous(memory_format=last)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "transposed": (lambda: torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "transposed 3d": (lambda: torch.nn.ConvTranspose3d(4, 6, 3, padding=1), (2, 4, 4, 8, 8)),
    "strided": (lambda: torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "dilated": (lambda: torch.nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 8, 8)),
    "grouped 3d": (lambda: torch.nn.Conv3d(4, 6, 3, padding=1, groups=2), (2, 4, 4, 8, 8)),
    "depthwise 3d": (lambda: torch.nn.Conv3d(4, 4, 3, padding=1, groups=4), (2, 4, 4, 8, 8)),
    "transposed, grouped": (lambda: torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 8, 8)),
    "depthwise": (lambda: torch.nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 8, 8)),
    "group norm": (lambda: torch.nn.GroupNorm(2, 4), (2, 4, 8, 8)),
    "nearest": (lambda: torch.nn.Upsample(scale_factor=2), (2, 4, 8, 8)),
    "nearest 3d": (lambda: torch.nn.Upsample(scale_factor=2), (2, 4, 4, 8, 8)),
    "bilinear": (lambda: torch.nn.Upsample(scale_factor=2, mode="bilinear"), (2, 16, 8, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("weight_too", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_layout_is_the_one_that_fake_tensors_foretell(
    name: str, weight_too: bool, channels_last: bool, dtype: torch.dtype
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    make, shape = LAYERS[name]
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    layer = make().to("cuda", dtype).requires_grad_(False)
    layer = layer.to(memory_format=last) if weight_too else layer
    x = n(*shape).to("cuda", dtype).to(memory_format=last if channels_last else torch.contiguous_format)
    with FakeTensorMode() as mode:
        weights = {key: mode.from_tensor(value) for key, value in layer.named_parameters()}
        fake = torch.func.functional_call(layer, weights, (mode.from_tensor(x),))
    real = layer(x)
    assert (real.shape, real.stride()) == (fake.shape, fake.stride())
    if channels_last and name != "group norm":  # CUDA's makes them contiguous
        assert real.is_contiguous(memory_format=last)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers_and_their_gradients_are_the_hosts(kind: Any, bias: bool) -> None:
    torch.manual_seed(0)
    layer = kind(4, 5, num_layers=2, bidirectional=True, bias=bias).double()

    def run(device: str) -> list[torch.Tensor]:
        there = copy.deepcopy(layer).to(device)
        x = torch.linspace(-1, 1, 24, dtype=torch.float64, device=device).view(3, 2, 4).requires_grad_()
        out, state = there(x)
        (out.sin().sum() + sum(part.cos().sum() for part in state)).backward()
        return [out, x.grad, *(parameter.grad for parameter in there.parameters())]

    for host, device in zip(run("cpu"), run("cuda"), strict=True):
        torch.testing.assert_close(device.cpu(), host, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.nn.LSTMCell, torch.nn.GRUCell])
def test_a_recurrent_cells_gradients_are_those_of_finite_differences(kind: Any) -> None:
    torch.manual_seed(0)
    cell = kind(3, 2).double().to("cuda")
    x = torch.randn(2, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(cell, (x,))
    assert torch.autograd.gradgradcheck(lambda x: cell(x)[0], (x,))


def test_a_recurrent_cell_refuses_the_hosts_state() -> None:
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        torch.nn.LSTMCell(3, 2).to("cuda")(
            torch.ones(1, 3, device="cuda"), (torch.ones(1, 2, device="cuda"), torch.ones(1, 2))
        )


def test_sparse_results_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="holds dense tensors only"):
        torch.eye(3, device="cuda").to_sparse()


# ------------------------------------------------------------------------------------------------------- autocast


def test_autocast_casts_the_operations_that_cuda_casts() -> None:
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    text = header.read_text(encoding="utf-8")
    key = "AutocastCUDA"
    listed = 0
    for policy in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        block = re.search(rf"#define AT_FORALL_{policy}\(_\)((?:.*\\\n)+.*\n)", text)
        assert block is not None, policy
        for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", block[1]):
            full = f"aten::{name}.{overload}" if overload else f"aten::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(full, key), full
            listed += 1
    assert listed > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_the_dtypes_that_cuda_gives(dtype: torch.dtype) -> None:
    x, w = n(8, 8).to("cuda"), n(8, 8).to("cuda")
    image, kernel = n(1, 2, 5, 5).to("cuda"), n(3, 2, 3, 3).to("cuda")
    with torch.autocast("cuda", dtype=dtype):
        assert (x @ w).dtype == F.linear(x, w).dtype == F.conv2d(image, kernel).dtype == dtype
        assert F.scaled_dot_product_attention(x[None], w[None], w[None]).dtype == dtype
        half = x @ w
        assert half.softmax(-1).dtype == F.layer_norm(half, (8,)).dtype == half.exp().dtype == torch.float32
        assert half.norm().dtype == half.sum().dtype == torch.float32
        assert torch.cat([half, x]).dtype == torch.float32
        assert (half + half).dtype == dtype
        assert (x.double() @ w.double()).dtype == torch.float64
        with torch.autocast("cuda", enabled=False):
            assert (x @ w).dtype == torch.float32
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(x.sigmoid(), w.sigmoid())
    assert (x @ w).dtype == torch.float32
    assert torch.equal(half, x.to(dtype) @ w.to(dtype))


def test_a_cast_weight_is_kept_until_autocast_ends(gpu: SimulatedGpu) -> None:
    x, w = n(8, 8).to("cuda"), n(8, 8).to("cuda").requires_grad_()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        (x @ w).detach()
        kept = torch.cuda.memory_allocated() - before
        gpu.record_operations()
        (x @ w).detach()
        gpu.record_operations(False)
    assert kept == 8 * 8 * 2
    assert torch.cuda.memory_allocated() == before


def test_the_hosts_autocast_does_not_touch_the_device() -> None:
    x, image, kernel = n(8, 8).to("cuda"), n(1, 2, 5, 5).to("cuda"), n(3, 2, 3, 3).to("cuda")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == F.conv2d(image, kernel).dtype == torch.float32


def test_autocast_trains_as_with_casts_by_hand() -> None:
    def gradient(by_hand: bool) -> torch.Tensor:
        x, w = n(8, 8).to("cuda"), n(4, 8).to("cuda").requires_grad_()
        if by_hand:
            loss = F.linear(x.bfloat16(), w.bfloat16()).float().sum()
        else:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = F.linear(x, w).sum()
        loss.backward()
        assert w.grad is not None
        return w.grad

    assert_same(gradient(True).cpu(), gradient(False))
