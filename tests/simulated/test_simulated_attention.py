"""Attention takes the kernel that CUDA would take on that GPU, and each kernel gives the values of attention by steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_diffopt.accelerators.simulated import simulated_cuda
from tests.simulated.test_simulated_operations import n

ENTERS = False  # each test its own GPU

FLASH, EFFICIENT, CUDNN, MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
NAMES = {
    FLASH: "aten::_scaled_dot_product_flash_attention",
    EFFICIENT: "aten::_scaled_dot_product_efficient_attention",
    CUDNN: "aten::_scaled_dot_product_cudnn_attention",
}

V100, T4, A100, RTX4090, H100, RTX5090 = "v100-16gb", "t4", "a100-80gb", "rtx-4090", "h100-80gb", "rtx-5090"

CALLS: dict[str, Any] = {
    "half": lambda dtype: ([n(1, 2, 9, 16, dtype=dtype)] * 3, {}),
    "12 wide": lambda dtype: ([n(1, 2, 9, 12, dtype=dtype)] * 3, {}),
    "160 wide": lambda dtype: ([n(1, 2, 9, 160, dtype=dtype)] * 3, {}),
    "264 wide": lambda dtype: ([n(1, 2, 9, 264, dtype=dtype)] * 3, {}),
    "mask": lambda dtype: ([n(1, 2, 9, 16, dtype=dtype)] * 3, {"attn_mask": torch.ones(9, 9) > 0}),
}

# GPU, dtype → the kernel of each call of CALLS. Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
CHOICES: dict[tuple[str, torch.dtype], tuple[SDPBackend, ...]] = {
    (V100, torch.float16): (EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT),
    (V100, torch.bfloat16): (MATH, MATH, MATH, MATH, MATH),
    (V100, torch.float32): (EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT),
    (T4, torch.float16): (EFFICIENT, MATH, EFFICIENT, EFFICIENT, EFFICIENT),
    (T4, torch.bfloat16): (MATH, MATH, MATH, MATH, MATH),
    (A100, torch.float16): (FLASH, FLASH, FLASH, EFFICIENT, EFFICIENT),
    (A100, torch.bfloat16): (FLASH, FLASH, FLASH, EFFICIENT, EFFICIENT),
    (A100, torch.float32): (EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT),
    (A100, torch.float64): (MATH, MATH, MATH, MATH, MATH),
    (RTX4090, torch.bfloat16): (FLASH, FLASH, FLASH, EFFICIENT, EFFICIENT),
    (H100, torch.bfloat16): (CUDNN, FLASH, FLASH, EFFICIENT, CUDNN),
    (H100, torch.float32): (EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT, EFFICIENT),
    (RTX5090, torch.bfloat16): (FLASH, FLASH, FLASH, EFFICIENT, EFFICIENT),
}


def on(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def choice(tensors: list[torch.Tensor], options: dict[str, Any]) -> SDPBackend:
    moved = {name: on(value, "cuda") for name, value in options.items()}
    return SDPBackend(torch._fused_sdp_choice(*(one.cuda() for one in tensors), **moved))


@pytest.mark.parametrize(("gpu", "dtype"), CHOICES)
def test_the_kernel_is_the_one_that_cuda_takes_on_that_gpu(gpu: str, dtype: torch.dtype) -> None:
    with simulated_cuda(gpu):
        chosen = {name: choice(*call(dtype)) for name, call in CALLS.items()}
    assert chosen == dict(zip(CALLS, CHOICES[gpu, dtype], strict=True))


def test_an_order_that_was_set_comes_first_and_what_is_forbidden_is_not_taken() -> None:
    with simulated_cuda(A100):
        call = CALLS["half"](torch.bfloat16)
        with sdpa_kernel([EFFICIENT, FLASH, MATH], set_priority=True):
            assert choice(*call) == EFFICIENT
        with sdpa_kernel([CUDNN, FLASH], set_priority=True):
            assert choice(*call) == CUDNN
        with sdpa_kernel([EFFICIENT, MATH]):
            assert choice(*call) == EFFICIENT
        assert choice(*call) == FLASH
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            assert choice(*call) == EFFICIENT
        finally:
            torch.backends.cuda.enable_flash_sdp(True)


MASKS: dict[str, Any] = {
    "none": lambda dtype: {},
    "causal": lambda dtype: {"is_causal": True},
    "bool": lambda dtype: {"attn_mask": n(2, 1, 8, 8) > -0.5},
    "float": lambda dtype: {"attn_mask": n(8, 8, dtype=dtype)},
    "broadcast": lambda dtype: {"attn_mask": n(2, 1, 1, 8, dtype=dtype).expand(2, 4, 8, 8)},
    "scale": lambda dtype: {"scale": 0.3},
    "a row masked as a whole": lambda dtype: {"attn_mask": torch.arange(8)[:, None].expand(8, 8) != 3},
    "grouped": lambda dtype: {"enable_gqa": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", [16, 20])
def test_each_kernel_gives_the_values_and_gradients_of_attention_by_steps(
    width: int, mask: str, dtype: torch.dtype
) -> None:
    heads = 2 if mask == "grouped" else 4
    shapes = [(2, 4, 8, width), (2, heads, 8, width), (2, heads, 8, width)]
    given = [n(*shape).roll(at).to(dtype).float() for at, shape in enumerate(shapes)]
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [one.to(device, dtype, copy=True).requires_grad_() for one in given]
        options = {name: on(value, device) for name, value in MASKS[mask](dtype).items()}
        out = F.scaled_dot_product_attention(*leaves, **options)
        out.float().square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    with sdpa_kernel(MATH):
        expected = run("cpu", torch.float32)
    with simulated_cuda(A100):
        for kernel in (FLASH, EFFICIENT, CUDNN, MATH):
            with sdpa_kernel([kernel, MATH], set_priority=True):
                found = run("cuda", dtype)
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == dtype
                torch.testing.assert_close(one.cpu().float(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export uses what torch has deprecated
def test_compiled_and_exported_programs_call_the_operators_of_cuda() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._functorch.aot_autograd import aot_module_simplified

        def note(inner: torch.fx.GraphModule, more: Any) -> Any:
            seen.extend(str(node.target) for node in inner.graph.nodes if node.op == "call_function")
            return inner.forward

        return aot_module_simplified(graph, inputs, fw_compiler=note)

    for gpu, dtype, name in (
        (A100, torch.bfloat16, NAMES[FLASH]),
        (A100, torch.float32, NAMES[EFFICIENT]),
        (H100, torch.bfloat16, NAMES[CUDNN]),
    ):
        operator = f"{name.replace('::', '.')}.default"
        with simulated_cuda(gpu):
            x = n(1, 2, 16, 16, dtype=dtype).cuda()
            torch._dynamo.reset()
            seen.clear()
            with torch.no_grad():
                compiled = torch.compile(Attention(), backend=backend, fullgraph=True)(x)
            assert operator in seen
            torch.testing.assert_close(compiled, Attention()(x))
            program = torch.export.export(Attention(), (x,)).run_decompositions()
            assert operator in [str(node.target) for node in program.graph.nodes]
            torch._dynamo.reset()


def test_a_kernel_refuses_tensors_of_two_devices() -> None:
    with simulated_cuda(A100):
        x = n(1, 2, 9, 16, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match=r"to have the same device type, but got query\.device: cuda:0 key"):
            F.scaled_dot_product_attention(x.cuda(), x, x.cuda())
    with simulated_cuda(A100, devices=2):
        mask = torch.ones(9, 9, device="cuda:1") > 0
        with pytest.raises(RuntimeError, match=r"found at least two devices, cuda:0 and cuda:1"):
            F.scaled_dot_product_attention(x.cuda(), x.cuda(), x.cuda(), attn_mask=mask)


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("heads_first", [True, False])
def test_a_result_has_the_strides_that_compiled_code_expects(kernel: str, heads_first: bool) -> None:
    """Of a query that was put together by heads, as joint attention does, and of one that was split from a projection."""
    more: dict[str, Any] = {} if kernel == "flash" else {"attn_bias": None, "compute_log_sumexp": True}
    with simulated_cuda(H100):
        shape = (2, 3, 5, 64) if heads_first else (2, 5, 3, 64)
        query = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        query = query if heads_first else query.transpose(1, 2)
        run = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
        expected = run(*(query.to("meta") for _ in range(3)), **more)[0]
        assert run(query, query, query, **more)[0].stride() == expected.stride()
