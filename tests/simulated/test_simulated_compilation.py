"""torch.compile on the device: whole models, channels_last, max-autotune, quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from pytest_diffopt.accelerators.simulated import SimulatedGpu


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(16, 4, 3, padding=1),
    ).to("cuda")


@pytest.mark.parametrize("mode", [None, "max-autotune"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_compile_whole_in_either_layout(mode: str | None, format: torch.memory_format) -> None:
    model = convolutions().to(memory_format=format)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to("cuda").to(memory_format=format)
    eager = model(x)
    eager.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    result = torch.compile(model, fullgraph=True, mode=mode)(x)
    result.square().sum().backward()
    assert eager.is_contiguous(memory_format=format)
    assert (result.device, result.stride()) == (eager.device, eager.stride())
    torch.testing.assert_close(result, eager, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-4, atol=1e-4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 8)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    "2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 8, 8)),
    "2d, transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 8, 8)),
    "3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 4, 8, 8)),
    "3d, transposed": (lambda: nn.ConvTranspose3d(4, 6, 3), (2, 4, 4, 8, 8)),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_convolution_has_the_layout_of_the_eager_one(name: str, last: bool) -> None:
    make, shape = LAYERS[name]
    if last and len(shape) == 3:
        pytest.skip("torch has no channels-last format of three dimensions")
    torch.manual_seed(0)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    format = layout if last else torch.contiguous_format
    layer, x = make().to("cuda").to(memory_format=format), torch.randn(shape).to("cuda").to(memory_format=format)
    compiled = torch.compile(layer, fullgraph=True)
    eager = layer(x)
    assert eager.is_contiguous(memory_format=format)
    result = compiled(x)
    assert result.stride() == eager.stride()
    torch.testing.assert_close(result, eager)
    with torch.no_grad():
        assert compiled(x).stride() == eager.stride()


def test_what_inductor_writes_otherwise_for_cuda_compiles() -> None:
    """Softmax in one pass, fused multiplication and addition: it has them in Triton alone."""

    def several(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            x.softmax(-1),
            torch.log_softmax(x, 0),
            torch.addcmul(x, x, x + 1, value=2),
            torch.addcdiv(x, x, x.abs() + 1),
            torch.lerp(x, x + 1, 0.3),
        )

    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).cuda()
    torch.testing.assert_close(torch.compile(several, fullgraph=True)(x), several(x))


def test_inductor_writes_code_for_the_device_and_does_not_fall_back(gpu: SimulatedGpu) -> None:
    """What is fused is one call of C++ code: only the convolutions are operations of the device."""
    model = convolutions().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8).to("cuda")
    compiled = torch.compile(model, fullgraph=True)
    compiled(x)
    gpu.reset_counts()
    compiled(x)
    fused = gpu.kernel_count()
    gpu.reset_counts()
    model(x)
    assert 3 <= fused < gpu.kernel_count()


def test_code_for_several_devices_puts_each_result_where_eager_puts_it() -> None:
    @torch.compile(fullgraph=True)
    def across(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (a * 2).to("cuda:1") + b, a.sin() @ a

    @torch.compile(fullgraph=True)
    def on_the_second(b: torch.Tensor) -> torch.Tensor:
        return b.cos() + 1

    a, b = torch.ones(4, 4, device="cuda:0"), torch.ones(4, 4, device="cuda:1")
    assert [out.device.index for out in across(a, b)] == [1, 0]
    before = torch.cuda.memory_allocated(0)
    assert on_the_second(b).device.index == 1
    assert torch.cuda.memory_allocated(0) == before


def test_a_branch_is_compiled_where_its_tensors_are() -> None:
    @torch.compile(fullgraph=True)
    def choose(b: torch.Tensor) -> torch.Tensor:
        return torch.cond(b.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos() * 2, (b,))  # type: ignore[no-any-return]

    b = torch.ones(4, device="cuda:1")
    out = choose(b)
    assert out.device.index == 1
    torch.testing.assert_close(out, b.sin() + 1)


def test_a_unet_in_channels_last_compiles_whole_and_gives_the_eager_numbers() -> None:
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel

    from pytest_diffopt.replicas import ensure

    unet = UNet2DConditionModel.from_pretrained(ensure("tiny-sd"), subfolder="unet", torch_dtype=torch.float32)
    host = unet.eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=draw)
    prompt = torch.randn(2, 8, unet.config.cross_attention_dim, generator=draw)
    expected = host(latents, 3, prompt, return_dict=False)[0]
    unet = host.to("cuda").to(memory_format=torch.channels_last)
    latents = latents.to("cuda").to(memory_format=torch.channels_last)
    unet.compile(fullgraph=True)
    result = unet(latents, torch.tensor(3, device="cuda"), prompt.to("cuda"), return_dict=False)[0]
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layer", ["nf4", "int8", "int8 with outliers"])
def test_quantized_layers_compile_whole(layer: str, backend: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(128, 64)
    made = (
        bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.bfloat16)
        if layer == "nf4"
        else bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0 if "outliers" in layer else 0.0)
    )
    made.load_state_dict(plain.state_dict())
    model = nn.Sequential(made, nn.GELU()).to("cuda").requires_grad_(False)
    x = torch.randn(3, 128).to(torch.bfloat16 if layer == "nf4" else torch.float16)
    x[0, 5] = 20.0  # an outlier
    x = x.to("cuda")
    eager = model(x)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = torch.compile(model, fullgraph=True, backend=backend)(x)
    assert result.device == torch.device("cuda:0")
    if backend == "aot_eager":
        assert torch.equal(result, eager)
    torch.testing.assert_close(result, eager, rtol=2e-2, atol=2e-2)
    assert (eager - nn.functional.gelu(plain(x.float().cpu())).to("cuda")).abs().mean() < 0.2
