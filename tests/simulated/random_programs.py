"""Random programs of tensor operations that run in parallel on the host and on the simulated device.

A program is a list of steps, an operation's name and numbers that choose its operands; any list is a program. Every
tensor has a twin on the other side, and after each step the twins are compared: dtypes, shapes, strides, offsets, bits,
which of them share memory, and the bytes that the device says are alive.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from pytest_diffopt.accelerators import simulated

Step = tuple[str, tuple[int, ...]]
Tensors = list[torch.Tensor]

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64),
    *(torch.int32, torch.uint8, torch.bool, torch.complex64),
)
SHAPES = (
    (3,),
    (2, 3),
    (3, 3),
    (4, 4),
    (2, 3, 4),
    (1, 2, 4, 4),
    (2, 3, 4, 5),
    (),
    (0,),
    (2, 0),
    (1, 1),
    (7, 5),
    (2, 2, 2),
)
POOL = 12  # tensors alive at most: an older one is dropped
LARGEST = 500  # numbers in a tensor: products of products grow fast


@dataclass(frozen=True)
class Draw:
    """The numbers of one step, on one side."""

    device: str
    numbers: tuple[int, ...]

    def of(self, choices: Sequence[Any], at: int) -> Any:
        return choices[self.numbers[at] % len(choices)]

    def below(self, limit: int, at: int) -> int:
        return self.numbers[at] % limit if limit > 0 else 0


Body = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """``body(draw, *operands)``; what it returns joins the pool, ``writes`` says which operands it changes."""

    body: Body
    operands: int
    writes: tuple[int, ...] = ()
    allocates_for_good: bool = True


OPERATIONS: dict[str, Operation] = {}


def operation(name: str, operands: int, body: Body, writes: tuple[int, ...] = ()) -> None:
    OPERATIONS[name] = Operation(body, operands, writes)


# ------------------------------------------------------------------------------------------------------ creation


def _seeded(d: Draw, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(d.numbers[3])
    return draw()


def _channels_last(d: Draw) -> torch.Tensor:
    made = torch.arange(2 * 3 * 4 * 4, device=d.device, dtype=torch.float32).view(2, 3, 4, 4)
    return made.to(memory_format=torch.channels_last)


def _initialised(x: torch.Tensor, before: int) -> None:
    """What a storage has grown by, set to nought: other tensors may look at it."""
    whole = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    whole[before:] = 0


def _strided(d: Draw) -> torch.Tensor:
    made = torch.empty_strided((3, 2), d.of(((2, 1), (1, 3), (4, 2), (0, 1)), 0), device=d.device)
    _initialised(made, 0)
    return made.fill_(d.numbers[1])


for name, body in {
    "zeros": lambda d: torch.zeros(d.of(SHAPES, 0), dtype=d.of(DTYPES, 1), device=d.device),
    "ones": lambda d: torch.ones(d.of(SHAPES, 0), dtype=d.of(DTYPES, 1), device=d.device),
    "full": lambda d: torch.full(d.of(SHAPES, 0), d.numbers[1], device=d.device),
    "arange": lambda d: torch.arange(d.below(9, 0), device=d.device, dtype=d.of((torch.int64, torch.float32), 1)),
    "linspace": lambda d: torch.linspace(0, 1, d.below(9, 0), device=d.device),
    "eye": lambda d: torch.eye(d.below(5, 0), device=d.device),
    "randn": lambda d: _seeded(d, lambda: torch.randn(d.of(SHAPES, 0), dtype=d.of(DTYPES[:4], 1), device=d.device)),
    "randint": lambda d: _seeded(d, lambda: torch.randint(9, d.of(SHAPES, 0), device=d.device)),
    "randperm": lambda d: _seeded(d, lambda: torch.randperm(d.below(9, 0), device=d.device)),
    "tensor": lambda d: torch.tensor([1.0, 2.5, -3.0][: d.below(4, 0)], device=d.device, dtype=d.of(DTYPES[:4], 1)),
    "number": lambda d: torch.tensor(d.numbers[0] / 4, device=d.device),
    "channels_last": _channels_last,
    "empty_strided": _strided,
    "empty, channels_last": lambda d: torch.empty(
        (2, 3, 4, 5), device=d.device, dtype=d.of(DTYPES, 0), memory_format=torch.channels_last
    ).fill_(1),
}.items():
    operation(name, 0, body)


# --------------------------------------------------------------------------------------------------------- views


def _dim(d: Draw, x: torch.Tensor, at: int = 0) -> int:
    return d.below(max(x.dim(), 1), at)


def _narrow(d: Draw, x: torch.Tensor) -> torch.Tensor:
    dim = _dim(d, x)
    start = d.below(x.shape[dim] + 1, 1)
    return x.narrow(dim, start, d.below(x.shape[dim] - start + 1, 2))


def _slice(d: Draw, x: torch.Tensor) -> torch.Tensor:
    return x[d.below(3, 0) :: 1 + d.below(3, 1)]


def _sharing(d: Draw, x: torch.Tensor) -> torch.Tensor:
    before = x.untyped_storage().nbytes()
    made = torch.empty(0, dtype=x.dtype, device=x.device)
    made.set_(x.untyped_storage(), d.below(2, 0), (d.below(3, 1),), (1,))
    _initialised(made, before)  # it grows where it is too small
    return made


def _overlapping(d: Draw, x: torch.Tensor) -> torch.Tensor:
    room = x.untyped_storage().nbytes() // x.element_size()
    size = d.below(min(room, 6) + 1, 0)
    return x.as_strided((size,), (1,), d.below(room - size + 1, 1))


for name, body in {
    "view, flat": lambda d, x: x.view(-1),
    "view, dtype": lambda d, x: x.view(d.of((torch.uint8, torch.int32, torch.float16, torch.float32), 0)),
    "reshape": lambda d, x: x.reshape(d.of(((-1,), (2, -1), (-1, 3), (1, -1, 2)), 0)),
    "transpose": lambda d, x: x.transpose(_dim(d, x, 0), _dim(d, x, 1)),
    "permute": lambda d, x: x.permute(*reversed(range(x.dim()))),
    "narrow": _narrow,
    "slice": _slice,
    "select": lambda d, x: x.select(_dim(d, x), d.below(3, 1)),
    "unsqueeze": lambda d, x: x.unsqueeze(d.below(x.dim() + 1, 0)),
    "squeeze": lambda d, x: x.squeeze(),
    "expand": lambda d, x: x.unsqueeze(0).expand(2, *x.shape),
    "diagonal": lambda d, x: x.diagonal(d.below(3, 0) - 1),
    "unfold": lambda d, x: x.unfold(_dim(d, x), 2, 1 + d.below(2, 1)),
    "as_strided": _overlapping,
    "detach": lambda d, x: x.detach(),
    "data": lambda d, x: x.data,
    "split": lambda d, x: list(x.split(2, _dim(d, x))),
    "unbind": lambda d, x: list(x.unbind(_dim(d, x))),
    "chunk": lambda d, x: list(x.chunk(2, _dim(d, x))),
    "flatten": lambda d, x: x.flatten(),
    "view_as_real": lambda d, x: torch.view_as_real(x),
    "view_as_complex": lambda d, x: torch.view_as_complex(x),
    "conj": lambda d, x: x.conj(),
    "imag of conj": lambda d, x: x.conj().imag,
    "real": lambda d, x: x.real,
    "movedim": lambda d, x: x.movedim(0, -1),
    "alias": lambda d, x: torch.ops.aten.alias(x),
    "view_as": lambda d, x: x.view_as(x),
    "shares a storage": _sharing,
}.items():
    operation(name, 1, body)


# -------------------------------------------------------------------------------------------------- new results


def _convolve(d: Draw, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    weight = torch.randn(4, x.shape[1], 3, 3, device=x.device, dtype=x.dtype)
    if d.below(2, 0):
        weight = weight.to(memory_format=torch.channels_last)
    made = F.conv2d(x, weight, stride=1 + d.below(2, 1), padding=1)
    # as cuDNN, and unlike the host, the device does not keep channels_last in this dtype
    return made.contiguous() if x.dtype == torch.float64 else made


def _normal_like(x: torch.Tensor, *shape: int) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(*shape, device=x.device, dtype=x.dtype)


def _copied_by_pickle(d: Draw, x: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = copy.deepcopy(x)
    return made


FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)

for name, body in {
    "neg": lambda d, x: -x,
    "exp": lambda d, x: x.exp(),
    "sigmoid": lambda d, x: x.sigmoid(),
    "abs": lambda d, x: x.abs(),
    "gelu": lambda d, x: F.gelu(x),
    "silu": lambda d, x: F.silu(x),
    "relu": lambda d, x: x.relu(),
    "plus a number": lambda d, x: x + d.numbers[0] / 2,
    "a number minus": lambda d, x: 3 - x,
    "divided by a number": lambda d, x: x / 3,
    "power": lambda d, x: x**2,
    "not": lambda d, x: ~x,
    "sum": lambda d, x: x.sum(),
    "sum, dim": lambda d, x: x.sum(_dim(d, x), keepdim=bool(d.below(2, 1))),
    "mean": lambda d, x: x.mean(_dim(d, x)),
    "amax": lambda d, x: x.amax(_dim(d, x)),
    "max": lambda d, x: list(x.max(_dim(d, x))),
    "argmax": lambda d, x: x.argmax(),
    "all": lambda d, x: x.all(),
    "var": lambda d, x: x.var(),
    "norm": lambda d, x: x.norm(),
    "cumsum": lambda d, x: x.cumsum(_dim(d, x)),
    "softmax": lambda d, x: x.softmax(_dim(d, x)),
    "sort": lambda d, x: list(x.sort(stable=True)),
    "topk": lambda d, x: list(x.topk(1 + d.below(2, 0))),
    "nonzero": lambda d, x: x.nonzero(),
    "unique": lambda d, x: x.unique(),
    "masked by itself": lambda d, x: x[x > 0],
    "clone": lambda d, x: x.clone(memory_format=d.of(FORMATS, 0)),
    "contiguous": lambda d, x: x.contiguous(),
    "to channels_last": lambda d, x: x.to(memory_format=torch.channels_last),
    "dtype": lambda d, x: x.to(d.of(DTYPES, 0)),
    "flip": lambda d, x: x.flip(_dim(d, x)),
    "roll": lambda d, x: x.roll(1, _dim(d, x)),
    "repeat": lambda d, x: x.repeat(2, *[1] * x.dim()),
    "tril": lambda d, x: x.tril(),
    "pad": lambda d, x: F.pad(x, (1, 0)),
    "interpolate": lambda d, x: F.interpolate(x, scale_factor=2),
    "layer_norm": lambda d, x: F.layer_norm(x, x.shape[-1:]),
    "group_norm": lambda d, x: F.group_norm(x.contiguous(), 1),  # CUDA's result is
    "convolve": _convolve,
    "pool": lambda d, x: F.avg_pool2d(x, 2),
    "linear": lambda d, x: F.linear(x, _normal_like(x, 5, x.shape[-1]), _normal_like(x, 5)),
    "attend": lambda d, x: F.scaled_dot_product_attention(x, x, x),
    "zeros_like": lambda d, x: torch.zeros_like(x),
    "new_ones": lambda d, x: x.new_ones(2, 2),
    "rand_like": lambda d, x: _seeded(d, lambda: torch.rand_like(x)),
    "dropout": lambda d, x: _seeded(d, lambda: F.dropout(x.float(), 0.5)),
    "multinomial": lambda d, x: _seeded(d, lambda: torch.ones(4, device=x.device).multinomial(2)),
    "deepcopy": _copied_by_pickle,
    "resolve_conj": lambda d, x: x.resolve_conj(),
    "from numbers": lambda d, x: torch.tensor(x.flatten()[:3].tolist(), device=x.device),
    "item": lambda d, x: torch.full((2,), float(x.flatten()[0].abs().item()), device=x.device),
    "one_hot": lambda d, x: F.one_hot(x.long().abs() % 3, 3),
    "copied storage": lambda d, x: torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage().clone()),
}.items():
    operation(name, 1, body)

for name, body in {
    "add": lambda d, x, y: x + y,
    "add, alpha": lambda d, x, y: torch.add(x, y, alpha=2),
    "sub": lambda d, x, y: x - y,
    "mul": lambda d, x, y: x * y,
    "div": lambda d, x, y: x / y,
    "maximum": lambda d, x, y: torch.maximum(x, y),
    "eq": lambda d, x, y: x == y,
    "less": lambda d, x, y: x < y,
    "where": lambda d, x, y: torch.where(x > 0, x, y),
    "matmul": lambda d, x, y: x @ y,
    "matmul, transposed": lambda d, x, y: x @ y.mT,
    "mm": lambda d, x, y: torch.mm(x, y),
    "addmm": lambda d, x, y: torch.addmm(x, x, y),
    "bmm": lambda d, x, y: torch.bmm(x, y),
    "outer": lambda d, x, y: torch.outer(x.flatten(), y.flatten()),
    "cat": lambda d, x, y: torch.cat([x, y], _dim(d, x)),
    "cat, three": lambda d, x, y: torch.cat([x, y, x]),
    "stack": lambda d, x, y: torch.stack([x, y], d.below(2, 0)),
    "index": lambda d, x, y: x[y.long().abs() % max(x.shape[0], 1)],
    "index by a host tensor": lambda d, x, y: x[torch.tensor([0, -1])],
    "index, column": lambda d, x, y: x[:, y.long().abs() % max(x.shape[1], 1)],
    "index_select": lambda d, x, y: x.index_select(0, y.flatten().long().abs() % max(x.shape[0], 1)),
    "gather": lambda d, x, y: x.gather(0, y.long().abs() % max(x.shape[0], 1)),
    "take": lambda d, x, y: x.take(y.long().abs() % max(x.numel(), 1)),
    "masked": lambda d, x, y: x[y > 0],
    "index_put": lambda d, x, y: x.index_put((y.flatten().long().abs() % max(x.shape[0], 1),), x[0], accumulate=True),
    "scatter": lambda d, x, y: x.scatter(0, y.long().abs() % max(x.shape[0], 1), 1),
    "embedding": lambda d, x, y: F.embedding(y.long().abs() % max(x.shape[0], 1), x),
    "lerp": lambda d, x, y: x.lerp(y, 0.5),
    "expand_as": lambda d, x, y: x.expand_as(y),
    "reshape_as": lambda d, x, y: x.reshape_as(y),
    "foreach": lambda d, x, y: list(torch._foreach_add([x, y], 1)),
    "mse_loss": lambda d, x, y: F.mse_loss(x, y).clone(),  # the host leaves it in memory of the operands' size
    "broadcast_tensors": lambda d, x, y: list(torch.broadcast_tensors(x, y)),
}.items():
    operation(name, 2, body)


# ------------------------------------------------------------------------------------------- changed in place


def _set_slice(d: Draw, x: torch.Tensor) -> None:
    x[d.below(2, 0) :: 2] = d.numbers[1]


def _resize(d: Draw, x: torch.Tensor) -> None:
    before = x.untyped_storage().nbytes()
    x.resize_(d.of(SHAPES, 0))
    _initialised(x, before)


def _resize_as(d: Draw, x: torch.Tensor, y: torch.Tensor) -> None:
    before = x.untyped_storage().nbytes()
    x.resize_as_(y)
    _initialised(x, before)


def _grow(d: Draw, x: torch.Tensor) -> None:
    before = x.untyped_storage().nbytes()
    x.untyped_storage().resize_(before + 16 * d.below(3, 0))
    _initialised(x, before)


def _set_nothing(d: Draw, x: torch.Tensor) -> None:
    x.set_()


for name, body in {
    "add_, number": lambda d, x: x.add_(1),
    "mul_, number": lambda d, x: x.mul_(2),
    "zero_": lambda d, x: x.zero_(),
    "fill_": lambda d, x: x.fill_(d.numbers[0]),
    "t_": lambda d, x: x.t_(),
    "transpose_": lambda d, x: x.transpose_(0, -1),
    "unsqueeze_": lambda d, x: x.unsqueeze_(0),
    "squeeze_": lambda d, x: x.squeeze_(),
    "as_strided_": lambda d, x: x.as_strided_((1,), (1,)),
    "clamp_": lambda d, x: x.clamp_(-1, 1),
    "relu_": lambda d, x: x.relu_(),
    "neg_": lambda d, x: x.neg_(),
    "cumsum_": lambda d, x: x.cumsum_(0),
    "masked_fill_": lambda d, x: x.masked_fill_(x > 0, 2),
    "set a slice": _set_slice,
    "set a mask": lambda d, x: x.__setitem__(x > 1, 0),
    "set a number": lambda d, x: x.__setitem__((...,), torch.tensor(2.0)),
    "resize_": _resize,
    "grow the storage": _grow,
    "set_, nothing": _set_nothing,
    "normal_": lambda d, x: _seeded(d, lambda: x.normal_()),
    "bernoulli_": lambda d, x: _seeded(d, lambda: x.bernoulli_(0.5)),
    "index_fill_": lambda d, x: x.index_fill_(0, torch.tensor([0], device=x.device), 3),
    "index_add_": lambda d, x: x.index_add_(0, torch.tensor([0], device=x.device), x[:1].clone()),
    "to itself": lambda d, x: x.copy_(x.clone().flip(0)),
    "sqrt, out": lambda d, x: torch.sqrt(x.clone(), out=x),
    "data = a copy": lambda d, x: setattr(x, "data", x.detach().clone()),
    "foreach_mul_": lambda d, x: torch._foreach_mul_([x, x], 2),
}.items():
    # what the in-place operation returns is the operand itself: nothing joins the pool
    operation(name, 1, lambda d, x, body=body: (body(d, x), None)[1], (0,))


def _set_storage(d: Draw, x: torch.Tensor, y: torch.Tensor) -> None:
    before = y.untyped_storage().nbytes()
    x.set_(y.untyped_storage(), 0, (1,), (1,))
    _initialised(x, before)


def _data(d: Draw, x: torch.Tensor, y: torch.Tensor) -> None:
    x.data = y.detach()


for name, body in {
    "add_": lambda d, x, y: x.add_(y),
    "sub_": lambda d, x, y: x.sub_(y),
    "mul_": lambda d, x, y: x.mul_(y),
    "copy_": lambda d, x, y: x.copy_(y),
    "set_, tensor": lambda d, x, y: x.set_(y),
    "set_, storage": _set_storage,
    "data": _data,
    "index_put_": lambda d, x, y: x.index_put_((y.flatten().long().abs() % max(x.shape[0], 1),), x[0].clone()),
    "index_copy_": lambda d, x, y: x.index_copy_(0, torch.tensor([0], device=x.device), y[:1]),
    "scatter_add_": lambda d, x, y: x.scatter_add_(0, y.long().abs() % max(x.shape[0], 1), x.clone()),
    "set a row": lambda d, x, y: x.__setitem__(0, y),
    "resize_as_": _resize_as,
    "neg, out": lambda d, x, y: torch.neg(y, out=x),
    "exp, out of a view": lambda d, x, y: torch.exp(y[0], out=x),
    "sum, out": lambda d, x, y: torch.sum(y, 0, out=x),
    "add, out": lambda d, x, y: torch.add(y, y, out=x),
    "mm, out": lambda d, x, y: torch.mm(y, y, out=x),
    "cat, out": lambda d, x, y: torch.cat([y, y], out=x),
    "sort, out": lambda d, x, y: torch.sort(y, out=(x, torch.empty(0, dtype=torch.long, device=y.device))),
    "index_select, out": lambda d, x, y: torch.index_select(y, 0, torch.tensor([0], device=y.device), out=x),
    "arange, out": lambda d, x, y: torch.arange(d.below(9, 0), out=x),
    "addcmul_": lambda d, x, y: x.addcmul_(y, y),
    "lerp_": lambda d, x, y: x.lerp_(y, 0.25),
    "swap": lambda d, x, y: (lambda kept: (x.copy_(y), y.copy_(kept)))(x.clone()),
}.items():
    operation(f"{name} 2", 2, lambda d, x, y, body=body: (body(d, x, y), None)[1], (0, 1) if name == "swap" else (0,))


# ------------------------------------------------------------------------------------------------------ autograd


def _gradients(d: Draw, x: torch.Tensor, y: torch.Tensor) -> Tensors:
    """Of a small graph of views, an in-place change and a product, with respect to both operands."""
    a, b = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    middle = (
        lambda: a * b,
        lambda: a @ b,
        lambda: torch.cat([a, b]),
        lambda: (a * 1).relu_() + b.sum(),
        lambda: a.view(-1)[:2].exp().sum() * b,
        lambda: F.layer_norm(a, a.shape[-1:]) * b.softmax(-1),
        lambda: (a * 1).index_put((torch.tensor([0], device=a.device),), b.sum()),
        lambda: F.gelu(a).t() @ F.silu(b),
    )
    d.of(middle, 0)().float().square().sum().backward()
    return [leaf.grad for leaf in (a, b) if leaf.grad is not None]


operation("gradients", 2, _gradients)


def _checkpointed(d: Draw, x: torch.Tensor) -> Tensors:
    from torch.utils.checkpoint import checkpoint

    a = x.detach().clone().requires_grad_()
    checkpoint(lambda t: t.sin().exp(), a, use_reentrant=False).sum().backward()
    assert a.grad is not None
    return [a.grad]


operation("gradients, checkpointed", 1, _checkpointed)

MOVES = ("move to another device", "delete")
NAMES = (*OPERATIONS, *MOVES)
PLACES = ("cuda:0", "cuda:1", "cpu")


# -------------------------------------------------------------------------------------------------- running them


@dataclass
class Twins:
    """The pool: every tensor on the host with its twin, and the bytes that were alive before the first."""

    host: Tensors = field(default_factory=list)
    device: Tensors = field(default_factory=list)
    base: list[int] = field(default_factory=lambda: requested())
    limited: bool = False

    def add(self, host: Any, device: Any) -> None:
        many = isinstance(host, (list, tuple))
        a, b = (list(host), list(device)) if many else ([host], [device])
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            if isinstance(one, torch.Tensor) and one.numel() <= LARGEST:
                self.host.append(one)
                self.device.append(other)
        del self.host[: max(0, len(self.host) - POOL)], self.device[: max(0, len(self.device) - POOL)]

    def compare(self) -> None:
        """Raises AssertionError at the first difference."""
        partner: dict[int, int] = {}
        live: dict[str, dict[int, int]] = {}
        for at, (a, b) in enumerate(zip(self.host, self.device, strict=True)):
            assert (a.dtype, a.shape, a.stride(), a.storage_offset(), a.is_conj(), a.is_neg()) == (
                *(b.dtype, b.shape, b.stride(), b.storage_offset(), b.is_conj(), b.is_neg()),
            ), f"tensor {at}: layout"
            assert a._is_view() == b._is_view(), f"tensor {at}: a view on one side only"
            ours, theirs = a.untyped_storage(), b.untyped_storage()
            assert ours.nbytes() == theirs.nbytes(), f"tensor {at}: {ours.nbytes()} and {theirs.nbytes()} bytes"
            assert theirs.device == b.device
            assert partner.setdefault(ours._cdata, theirs._cdata) == theirs._cdata, f"tensor {at}: memory not shared"
            for one in (b, b._base):  # a view keeps what it was made of, which may have other memory by now
                if one is not None:
                    held = one.untyped_storage()
                    live.setdefault(str(one.device), {})[held._cdata] = held.nbytes()
            assert bits(a) == bits(b), f"tensor {at}: {a} and {b}"
        assert len(set(partner.values())) == len(partner), "memory is shared on the device only"
        for index in range(2):
            told = requested()[index] - self.base[index]
            counted = sum(live.get(f"cuda:{index}", {}).values())
            assert told == counted, f"cuda:{index} tells {told} bytes, its tensors hold {counted}"


def requested() -> list[int]:
    """The live bytes of each device as they were asked for, whether or not the caching allocator rounds them."""
    return [torch.cuda.memory_stats(i)["requested_bytes.all.current"] for i in range(2)]


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's values, row by row, as the bytes that they are."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return bytes(plain.view(torch.uint8).tolist())


def run(
    program: Sequence[Step], after_step: Callable[[Twins], None] = Twins.compare, limit_bytes: int | None = None
) -> int:
    """Run a program on both sides, compare after each step, and return how many steps had an effect.

    With ``limit_bytes``, each device has that many bytes for it, and what does not fit must leave everything as it was.

    Raises:
        AssertionError: the sides differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # out= of another shape, complex to real: both sides say so
        twins, effective = Twins(limited=limit_bytes is not None), 0
        base = twins.base
        for i in range(2):
            simulated.set_memory_limit(None if limit_bytes is None else torch.cuda.memory_reserved(i) + limit_bytes, i)
        for step in program:
            effective += run_step(twins, *step)
            after_step(twins)
        del twins
    if requested() != base:  # a failed step's traceback may hold its operands in a cycle
        gc.collect()
    assert requested() == base, f"{base} bytes were on the devices, {requested()} are left"
    return effective


def run_step(twins: Twins, name: str, numbers: tuple[int, ...]) -> bool:
    if name == "delete":
        if twins.host:
            at = numbers[0] % len(twins.host)
            del twins.host[at], twins.device[at]
        return True
    if name == "move to another device":
        if not twins.host:
            return False
        at = numbers[0] % len(twins.host)
        place = PLACES[numbers[1] % len(PLACES)]
        # the host's twin copies where the device's does: always, or only to another place
        host = twins.host[at]
        if str(twins.device[at].device) != place:
            host = host.to("cpu", copy=True)
        try:
            twins.add(host, twins.device[at].to(place))
        except torch.OutOfMemoryError:
            assert twins.limited
            return False
        return True
    made = OPERATIONS[name]
    if made.operands > len(twins.host):
        return False
    chosen = [numbers[-1 - i] % len(twins.host) for i in range(made.operands)]
    host, device = [twins.host[i] for i in chosen], [twins.device[i] for i in chosen]
    place = PLACES[numbers[2] % 16 // 7] if not device else str(device[0].device)
    here = _attempt(made, Draw("cpu", numbers), host)
    there = _attempt(made, Draw(place, numbers), device)
    worked = not isinstance(here, Exception)
    if worked and not isinstance(there, Exception):
        twins.add(here, there)
        return True
    full = twins.limited and isinstance(there, torch.OutOfMemoryError)
    if worked:
        assert full or spread(device), f"{name}: only the device raised {there!r}"
        drop(twins, chosen, made.writes)
        return False
    assert isinstance(there, Exception), f"{name}: only the host raised {here!r}"
    if not full and not spread(device):
        assert type(here) is type(there), f"{name}: {here!r} and {there!r}"
    drop(twins, chosen, made.writes)
    return False


def spread(operands: Tensors) -> bool:
    """Whether operands stand on several devices: then the device may refuse them, before any other mistake is found."""
    return len({t.device for t in operands}) > 1


def drop(twins: Twins, chosen: list[int], writes: tuple[int, ...]) -> None:
    """What a failed step may have half changed, and everything that shares its memory."""
    gone = {twins.host[chosen[i]].untyped_storage()._cdata for i in writes}
    gone |= {twins.device[chosen[i]].untyped_storage()._cdata for i in writes}
    kept = [
        i
        for i in range(len(twins.host))
        if twins.host[i].untyped_storage()._cdata not in gone and twins.device[i].untyped_storage()._cdata not in gone
    ]
    twins.host, twins.device = [twins.host[i] for i in kept], [twins.device[i] for i in kept]


def _attempt(made: Operation, draw: Draw, operands: Tensors) -> Any:
    try:
        with torch.cuda.device(draw.device if draw.device != "cpu" else 0):
            return made.body(draw, *operands)
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        return error.with_traceback(None)
