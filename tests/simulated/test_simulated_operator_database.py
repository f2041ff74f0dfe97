"""Every operation of torch's own database of operators that the host runs gives the host's values, and its gradients."""

from __future__ import annotations

import itertools
import sys
import types
import unittest
import unittest.mock
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

CHUNKS = 6
SAMPLES = 10  # of an operation, in one dtype

UNKNOWN_VALUES = ("empty", "new_empty")
"""Beginnings of names: memory as it was found."""

REFUSED = {
    "to_sparse": "holds dense tensors only",
    "tensor_split": "to be on cpu, but it's on cuda",  # CUDA's own refusal
}
"""What is refused on the device, and in which words."""

CLOSE = {
    "linalg.lstsq": "LAPACK's last bits depend on how a matrix is aligned",
    "renorm": "its gradient accumulates in float32 on CUDA and in float64 on the host",
    "nn.functional.scaled_dot_product_attention": "CUDA takes another kernel",
}
"""Where the last bits differ, and why."""

TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}
"""Half precision is rounded once on the device, and on the host as its kernels like: where those sum in half precision, the
host's float32 is the reference."""


def database() -> list[Any]:
    """torch's; its tests have a base class from a package that nothing here needs."""
    if "expecttest" not in sys.modules:
        stand_in: Any = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # it forbids the whole process to set flags of torch.backends, which other tests do
        with unittest.mock.patch("torch.backends.disable_global_flags"):
            from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


def moved(value: Any, device: str) -> Any:
    """A copy on the device, which says so itself where the host was named."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().to(device, copy=True).requires_grad_(leaf.requires_grad)
        if isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf == "cpu"):
            return torch.device(device)
        return leaf

    return tree_map(move, value)


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def results(operation: Any, sample: Any, differentiate: bool) -> tuple[list[Any], list[torch.Tensor | None]]:
    """What it returns, and the gradients of everything that it was given."""
    for generator in (torch.default_generator, *torch.cuda.default_generators):
        generator.manual_seed(0)
    given, arguments, options = sample
    returned = tree_flatten(operation(given, *arguments, **options))[0]
    wanted = [one for one in tensors(sample) if one.requires_grad]
    differentiable = [one for one in tensors(returned) if one.requires_grad]
    if not differentiate or not wanted or not differentiable:
        return returned, []
    total = sum(one.abs().square().sum() for one in differentiable)
    return returned, list(torch.autograd.grad(total, wanted, allow_unused=True))


def compare(name: str, host: Any, device: Any) -> None:
    """Raises AssertionError where they differ."""
    assert isinstance(host, torch.Tensor) == isinstance(device, torch.Tensor)
    if not isinstance(host, torch.Tensor):
        assert host == device or host != host or isinstance(host, torch.device)
        return
    assert (host.shape, host.dtype) == (device.shape, device.dtype)
    if name.startswith(UNKNOWN_VALUES) or host.layout is not torch.strided:
        return
    device, host = device.cpu(), host.cpu()
    if name in CLOSE:
        device = torch.where(host.isnan(), host, device)  # of the maximum norm the host has no gradient
    tolerances = TOLERANCES.get(host.dtype) or (
        {"rtol": 1e-3, "atol": 1e-3} if name in CLOSE else {"rtol": 0, "atol": 0}
    )
    torch.testing.assert_close(device, host, equal_nan=True, check_stride=False, **tolerances)


def check(operation: Any, dtype: torch.dtype) -> int:
    """How many samples were compared."""
    floating = dtype.is_floating_point or dtype.is_complex
    differentiate = floating and dtype not in TOLERANCES and operation.supports_autograd
    compared = 0
    for sample in itertools.islice(operation.sample_inputs("cpu", dtype, requires_grad=differentiate), SAMPLES):
        given = (sample.input, sample.args, sample.kwargs)
        if any(one.layout is not torch.strided for one in tensors(given)):
            continue
        try:
            host = results(operation, moved(given, "cpu"), differentiate)
        except Exception:  # torch's own tests know of these
            continue
        try:
            device = results(operation, moved(given, "cuda"), differentiate)
        except (RuntimeError, NotImplementedError) as error:
            if REFUSED.get(operation.name, "\0") not in str(error):
                raise
            return compared + 1
        try:
            compare_all(operation.name, host, device)
        except AssertionError:
            if dtype not in TOLERANCES:
                raise
            exact, _ = results(operation, tree_map(widened, moved(given, "cpu")), False)
            compare_all(operation.name, ([one.to(dtype) for one in exact], []), device)
        compared += 1
    return compared


def compare_all(name: str, host: Any, device: Any) -> None:
    for one, other in zip(host, device, strict=True):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            compare(name, a, b)


def widened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.complex64, torch.bfloat16, torch.float16]
)
def test_every_operation_gives_the_hosts_values(dtype: torch.dtype, chunk: int) -> None:
    def run() -> tuple[dict[str, str], int]:
        differing, compared = {}, 0
        for operation in database()[chunk::CHUNKS]:
            if dtype in operation.dtypes:
                try:
                    compared += check(operation, dtype)
                except Exception as error:
                    name = f"{operation.name}, {operation.variant_test_name}"
                    differing[name] = f"{type(error).__name__}: {str(error)[:300]}"
        return differing, compared

    with warnings.catch_warnings(), ThreadPoolExecutor(1) as thread:  # torch reads the whole stack at each sample
        warnings.simplefilter("ignore")
        differing, compared = thread.submit(run).result()
    assert differing == {}
    assert compared > 100
