"""The scratch of CUDA's kernels, on tensors without memory: against figures that others published, and torch's source."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.forecasting.costs import COSTS, NOTHING, attention, choose_attention, convolution, costs_on
from pytest_diffopt.forecasting.generations import GENERATIONS
from pytest_diffopt.forecasting.record import Estimate
from tests.unit.live_bytes import LiveBytes

GIB = 1024**3
HALF = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def convolved(
    input: torch.Tensor, weight: torch.Tensor, *, generation: str = "ada", padding: int = 1, groups: int = 1
) -> tuple[Estimate, torch.Tensor]:
    """The cost of a convolution of stride 1, and its result."""
    spatial = input.dim() - 2
    rest: tuple[Any, ...] = ([1] * spatial, [padding] * spatial, [1] * spatial, False, [0] * spatial, groups)
    result = torch.ops.aten.convolution.default(input, weight, None, *rest)
    return convolution([result], input, weight, None, *rest, generation=generation), result


def test_the_convolution_that_binds_the_vae_of_flux_takes_a_gibibyte() -> None:
    found, _ = convolved(meta(1, 256, 1024, 1024), meta(256, 256, 3, 3))
    assert found.low == int(0.6 * found.expected)
    assert found.expected == pytest.approx(1.001 * GIB, rel=1e-3)
    assert found.high == int(1.5 * found.expected)


@pytest.mark.parametrize(
    ("input", "weight", "padding", "published", "within"),
    [
        # pytorch/pytorch#95024, max_memory_allocated on a GPU of 80 GB
        (
            meta(1, 64, 361, 370, 251, dtype=torch.float16),
            meta(32, 64, 3, 3, 3, dtype=torch.float16),
            0,
            12.874e9,
            0.01,
        ),
        # pytorch/pytorch#128947, an A100; "only 17G"
        (
            meta(1, 256, 4, 1090, 1922, dtype=torch.float32),
            meta(64, 256, 3, 3, 3, dtype=torch.float32),
            0,
            17 * GIB,
            0.06,
        ),
    ],
)
def test_peaks_of_single_convolutions_are_as_published(
    input: torch.Tensor, weight: torch.Tensor, padding: int, published: float, within: float
) -> None:
    found, result = convolved(input, weight, generation="ampere", padding=padding)
    assert size(input) + size(weight) + size(result) + found.expected == pytest.approx(published, rel=within)


@pytest.mark.parametrize(("pixels", "published"), [(512, 1.274), (768, 2.563), (1024, 4.369)])
def test_the_vae_of_qwen_image_takes_what_was_published_of_an_rtx_4090(pixels: int, published: float) -> None:
    """invoke-ai/InvokeAI#9305: torch 2.7.1, float16, GiB allocated at the most while an image is decoded."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        vae = AutoencoderKLQwenImage().to(torch.float16)
    weights = sum(size(one) for one in vae.parameters())
    with torch.no_grad(), LiveBytes(costs_on("ada")) as live:
        vae.decode(meta(1, 16, 1, pixels // 8, pixels // 8, dtype=torch.float16))
    assert (weights + live.peak) / GIB == pytest.approx(published, rel=0.004)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_range_for_a_peak_with_resident_weights_is_no_wider_than_a_fifth(generation: str) -> None:
    found, _ = convolved(meta(1, 256, 1024, 1024), meta(256, 256, 3, 3), generation=generation)
    nf4 = int(13.9 * GIB)
    assert Estimate(nf4 + found.low, nf4 + found.expected, nf4 + found.high).width < 0.2


def test_a_convolution_that_is_channels_last_converts_nothing() -> None:
    last = torch.channels_last
    found, result = convolved(meta(1, 64, 32, 32).to(memory_format=last), meta(64, 64, 3, 3).to(memory_format=last))
    assert (found.low, found.expected) == (0, 0)
    assert found.high == 2 * size(result) + 64 * 64 * 9 * 2  # converted all the same


def test_torch_copies_the_input_that_does_not_share_its_weights_memory_format() -> None:
    input = meta(1, 64, 32, 32)
    found, _ = convolved(input, meta(64, 64, 3, 3).to(memory_format=torch.channels_last))
    assert found.expected == size(input)


def test_torch_copies_an_input_that_is_a_slice_of_a_wider_one() -> None:
    whole, _ = convolved(meta(1, 64, 32, 32), meta(64, 64, 3, 3))
    slice_, _ = convolved(meta(1, 64, 32, 64)[..., :32], meta(64, 64, 3, 3))
    assert slice_.expected == whole.expected + 64 * 32 * 32 * 2


@pytest.mark.parametrize(
    ("dtype", "generation", "groups"),
    [
        (torch.float32, "turing", 1),
        (torch.float32, "volta", 1),
        (torch.float16, "pascal", 1),
        (torch.float64, "ada", 1),
        (HALF, "ada", 64),
    ],
)
def test_nothing_is_expected_of_a_convolution_without_tensor_cores_but_it_may_be(
    dtype: torch.dtype, generation: str, groups: int
) -> None:
    found, _ = convolved(
        meta(1, 64, 32, 32, dtype=dtype),
        meta(64, 64 // groups, 3, 3, dtype=dtype),
        generation=generation,
        groups=groups,
    )
    assert found.low == found.expected == 0 < found.high


def heads(width: int, length: int = 4608, *, count: int = 24, dtype: torch.dtype = HALF) -> torch.Tensor:
    return meta(1, count, length, width, dtype=dtype)


@pytest.mark.parametrize(
    ("width", "dtype", "generation", "masked", "kernel"),
    [
        (128, HALF, "ada", False, "flash"),
        (256, HALF, "ada", False, "flash"),
        (60, HALF, "ada", False, "flash"),
        (512, HALF, "ada", False, "efficient"),
        (128, HALF, "ada", True, "efficient"),
        (60, HALF, "ada", True, "math"),
        (128, torch.float32, "ada", False, "efficient"),
        (130, torch.float32, "ada", False, "math"),
        (130, torch.float32, "turing", False, "efficient"),
        (128, torch.float16, "turing", False, "efficient"),
        (128, HALF, "turing", False, "math"),
        (130, torch.float16, "volta", False, "math"),
        (130, torch.float16, "pascal", False, "efficient"),
        (128, HALF, "pascal", False, "math"),
        (128, torch.float64, "ada", False, "math"),
        (128, HALF, "hopper", False, "cudnn"),
        (128, HALF, "hopper", True, "cudnn"),
        (256, HALF, "hopper", False, "flash"),
        (512, HALF, "hopper", False, "efficient"),
        (128, HALF, "blackwell-datacenter", False, "cudnn"),
        (128, HALF, "blackwell", False, "flash"),
    ],
)
def test_the_kernel_of_an_attention_is_the_first_that_takes_it(
    width: int, dtype: torch.dtype, generation: str, masked: bool, kernel: str
) -> None:
    one = heads(width, dtype=dtype)
    mask = meta(1, 1, 4608, 4608, dtype=dtype) if masked else None
    assert choose_attention(one, one, one, attn_mask=mask, generation=generation) == kernel


def test_a_causal_attention_of_unequal_lengths_is_not_flash_attention() -> None:
    query, key = heads(64, 8), heads(64, 16)
    assert choose_attention(query, key, key, is_causal=True, generation="ada") == "efficient"
    assert choose_attention(query, key, key, generation="ada") == "flash"


def test_heads_that_do_not_lie_side_by_side_are_computed_step_by_step() -> None:
    one = meta(1, 24, 64, 128).transpose(-1, -2)
    assert choose_attention(one, one, one, generation="ada") == "math"


def test_flash_attention_takes_nothing_unless_heads_are_padded() -> None:
    one = heads(128)
    assert attention([one], one, one, one, generation="ada") == NOTHING
    odd = heads(60)
    padded = 4 * 24 * 4608 * 64 * 2
    assert attention([odd], odd, odd, odd, generation="ada") == Estimate(padded, padded, padded)


def test_the_attention_of_a_vae_accumulates_in_float32() -> None:
    half = meta(1, 1, 16384, 512)
    assert attention([half], half, half, half, generation="ada").expected == 16384 * 512 * 4
    wide = meta(1, 1, 16384, 512, dtype=torch.float32)
    assert attention([wide], wide, wide, wide, generation="ada") == NOTHING


@pytest.mark.parametrize(
    ("mask", "copied"),
    [
        (meta(1, 1, 512, 512), 0),
        (meta(1, 1, 512, 512, dtype=torch.bool), 512 * 512 * 2),
        (meta(1, 1, 512, 516), 0 + 512 * 520 * 2),
        (meta(1, 1, 1, 512).expand(1, 1, 512, 512), 0),
    ],
)
def test_a_mask_is_copied_where_the_kernel_cannot_take_it(mask: torch.Tensor, copied: int) -> None:
    query, key = heads(64, 512, count=64), heads(64, mask.shape[-1], count=64)
    assert attention([query], query, key, key, attn_mask=mask, generation="ada").expected == copied


def test_step_by_step_the_scores_are_there_three_times_in_float32() -> None:
    one = heads(128, 1024)
    found = attention([one], one, one, one, generation="turing")
    scores, tensor = 24 * 1024 * 1024, 24 * 1024 * 128
    assert found.expected == found.high == 4 * tensor * 4 + scores * 13 - tensor * 2
    assert found.low == 4 * tensor * 4 + scores * 8 - tensor * 2


def test_step_by_step_is_what_torch_allocates() -> None:
    """Torch's own steps, with the bytes alive at once counted; what ``_safe_softmax`` makes inside itself is not seen."""
    one = meta(1, 4, 96, 32)
    found = attention([one], one, one, one, generation="ada", assumed="math")
    with LiveBytes() as live:
        result = torch.ops.aten._scaled_dot_product_attention_math.default(one, one, one)[0]
    assert size(result) == size(one)
    assert found.low + size(one) == live.peak
    assert found.expected == found.low + 4 * 96 * 96 * 5


def test_cudnns_workspace_is_unknown_up_to_what_it_reads() -> None:
    one = heads(128)
    assert attention([one], one, one, one, generation="hopper") == Estimate(0, 0, 3 * size(one))


def test_a_fused_attention_may_be_assumed_to_take_nothing() -> None:
    one = heads(128)
    assert attention([one], one, one, one, generation="turing", assumed="fused") == NOTHING


def test_costs_on_a_generation_are_called_with_the_operators_own_arguments() -> None:
    costs = costs_on("turing")
    assert costs.keys() == COSTS.keys()
    one = heads(128, 64)
    assert costs["aten::_scaled_dot_product_flash_attention_for_cpu"]([one], one, one, one).expected > 0
    assert "aten::convolution" not in costs_on("ada", convolution_workspace="none")
    fused = costs_on("turing", attention="fused")["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert fused([one], one, one, one, 0.0, False, attn_mask=None, scale=0.5) == NOTHING
    with pytest.raises(DiffoptError, match="No GPU generation is called 'kepler'"):
        costs_on("kepler")
