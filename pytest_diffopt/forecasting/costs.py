"""Scratch memory of CUDA's kernels: taken from torch's allocator while a kernel runs, and given back when it returns.

A kernel of the host, or one that computes nothing, does not show it. A cost is a pure function of what the operator was
called with: its results first, then its own arguments, and the generation of the GPU. Only metadata of tensors is read,
so tensors of the ``meta`` device do. It returns bytes as an :class:`Estimate`, beside the bytes of the results
themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from pytest_diffopt.forecasting.generations import generation as generation_of
from pytest_diffopt.forecasting.record import Estimate

if TYPE_CHECKING:
    from torch import Tensor

AttentionKernel = Literal["cudnn", "flash", "efficient", "math"]
AssumedAttention = Literal["cuda", "math", "fused"]

NOTHING = Estimate(0, 0, 0)

_OF_FLOAT32_IMAGES = (0.4, 0.75)
"""The least and the expected part of a convolution's tensors, see :func:`convolution`."""


def convolution(
    results: Sequence[Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    generation: str,
) -> Estimate:
    """cuDNN's workspace, and the copies that torch makes so that all tensors have one memory format.

    cuDNN's kernels for tensor cores read and write channels last. Where tensors are not so, it converts input, weight
    and output within its workspace: as many bytes as all three have. That is what is expected, for images (4-D) and for
    videos (5-D) alike, and these public figures have it so:

    - RTX 4090, torch 2.7.1, float16, the VAE of Qwen-Image (3-D convolutions): 1.274, 4.369 and 16.754 GiB published at
      512², 1024² and 2048²; 1.271, 4.368 and 16.751 with this rule. Source: invoke-ai/InvokeAI#9305.
    - RTX 4090, bfloat16, FLUX.1 with nf4, bound by its VAE at 1024²: 14.945 GiB published, 14.900 with this rule.
    - L20, bfloat16, FLUX.1 at 2048²: 40.96 GiB published; 40.7 with this rule, of which its weights are 31.4. Source:
      vipshop/cache-dit#645.
    - float16, a convolution of 256 by 256 channels: 9.90 GiB reserved, of it 5.88 are tensors, and input and output
      4.00. Source: pytorch/pytorch#123533.
    - A GPU of 80 GB, float16, 3-D: 12.874 GB published, 12.79 with this rule. Source: pytorch/pytorch#95024.
    - A100, float32, 3-D: 17 GiB published, 17.98 with this rule. Source: pytorch/pytorch#128947. So float32 has the
      same rule: TF32, which is allowed for convolutions by default, runs on tensor cores as well.
    - Images in float32 take less of it: SDXL's VAE on an A100, 16.827 GiB published in float32
      (huggingface/diffusion-fast), 28.09 for four images, and 21.72 in float16, where the VAE is upcast
      (huggingface/blog#1603). One image takes half of it, four take five sixths: three quarters are expected, 17.33, 27.59
      and 21.24.
    - H100, bfloat16, FLUX.1 at 1024²: 36.17 GiB published, and 23.27 with model offloading; 36.33 and 23.26 *reserved* with
      this rule. Allocated they would be 33.83 and 22.63: those figures are what nvidia-smi and the caching allocator see.

    The range: every public figure of Ampere, Ada and Hopper above lies within a few percent of what is expected, so 0.6 to
    1.5 times are taken for other shapes and versions of cuDNN. On the others, of which no figure was found, the least is
    0 and the most twice as much. Where memory is short, torch goes on to a plan of cuDNN's that needs less
    (pytorch/pytorch: aten/src/ATen/native/cudnn/Conv_v8.cpp, ``try_plans``): so nothing is ever said not to fit for a
    workspace's sake, see :attr:`Forecast.floor_bytes`.

    Channels last, nothing is converted, and nothing is expected. Where only the input or only the weight is channels
    last, torch copies the other; and an input that is not contiguous at all. Source, pytorch/pytorch:
    aten/src/ATen/native/Convolution.cpp, where ``cudnn_conv_suggest_memory_format`` decides. Nothing is expected of
    float32 before Ampere, where there is no TF32, of anything on Pascal, which has no tensor cores, of float64, and of
    depthwise convolutions, which have kernels of their own in torch (aten/src/ATen/native/cuda/DepthwiseConv2d.cu);
    their most is the same.

    Not modelled: torch 2.9, which does not use cuDNN for 3-D half precision and takes 7.3 GiB where float32 takes
    2.5 (pytorch/pytorch#166643); and ``torch.backends.cudnn.benchmark``, which tries every kernel once.
    """
    import torch

    which = generation_of(generation)
    output = results[0]
    everything = sum(_bytes(one) for one in (input, weight, output))
    copies = 0
    if _is_channels_last(input) or _is_channels_last(weight):
        copies = sum(_bytes(one) for one in (input, weight) if not _fits_channels_last(one))
        return Estimate(copies, copies, copies + everything)
    copies = sum(_bytes(one) for one in (input, weight) if not one.is_contiguous())
    least, expected, most = which.cudnn_convolution
    if input.dtype == torch.float32 and input.dim() == 4:
        least, expected = min(least, _OF_FLOAT32_IMAGES[0]), _OF_FLOAT32_IMAGES[1]
    is_depthwise = groups > 1 and groups == input.shape[1]
    without_tensor_cores = which.capability < ((8, 0) if input.dtype == torch.float32 else (7, 0))
    if is_depthwise or without_tensor_cores or input.dtype == torch.float64:
        least = expected = 0.0
    return Estimate(
        copies + int(least * everything), copies + int(expected * everything), copies + int(most * everything)
    )


def choose_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    generation: str,
) -> AttentionKernel:
    """The kernel that ``scaled_dot_product_attention`` takes on CUDA, when no gradient is asked for.

    Source, pytorch/pytorch: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and .../sdp_utils_cpp.h: the first in
    the order of ``priority_order`` whose conditions hold. cuDNN comes first on Hopper, and on Blackwell in data centers;
    flash attention takes half precision, no mask and heads up to 256 wide, from Ampere on; memory-efficient attention
    takes a mask, any width that is a multiple of its alignment, and float32, but bfloat16 only from Ampere on. All else
    is computed step by step.

    Args:
        query, key, value: shape (batch, heads, length, width of a head).
        attn_mask: added to the scores, or bool; shape that broadcasts to (batch, heads, length of query, length of key).

    Raises:
        DiffoptError: no generation has that name.
    """
    import torch

    which = generation_of(generation)
    tensors = (query, key, value)
    if any(one.dim() != 4 for one in tensors):
        return "math"
    widths = {one.shape[-1] for one in tensors}
    widest = max(widths)
    if any(one.dtype != query.dtype for one in tensors) or any(0 in one.shape for one in tensors):
        return "math"
    if any(one.stride(-1) != 1 and one.shape[-1] != 1 for one in tensors):
        return "math"
    halves = (torch.float16, torch.bfloat16) if which.capability >= (8, 0) else (torch.float16,)
    is_half = query.dtype in halves
    if (
        which.prefers_cudnn_attention
        and is_half
        and widest <= 128
        and all(width % 8 == 0 for width in widths)
        and key.shape[2] != 1
    ):
        return "cudnn"
    is_square = query.shape[2] == key.shape[2]
    if (
        which.has_flash_attention
        and is_half
        and attn_mask is None
        and len(widths) == 1
        and widest <= 256
        and (is_square or not is_causal)
    ):
        return "flash"
    alignment = _gemm_alignment(is_half, which.capability)
    if (
        (is_half or query.dtype == torch.float32)
        and query.shape[-1] == key.shape[-1]
        and all(width % alignment == 0 for width in widths)
    ):
        return "efficient"
    return "math"


def attention(
    results: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    generation: str,
    assumed: AssumedAttention = "cuda",
) -> Estimate:
    """What the kernel takes that CUDA chooses for an attention, beside its result and the logarithms of sums.

    Arguments as of ``aten::_scaled_dot_product_flash_attention_for_cpu``, which stands for every fused kernel on the
    simulated device.

    - flash: copies of query, key and value, and a wider result, where the width of a head is not a multiple of 8
      (source, pytorch/pytorch: aten/src/ATen/native/transformers/attention.cpp, ``pad_last_dim``). What it splits a
      short query into, 24 MiB or less, is not counted.
    - efficient: for heads wider than 128 a float32 buffer of the result's shape, unless the result is float32 (source,
      in torch's own headers: ATen/native/transformers/cuda/mem_eff_attention/kernel_forward.h,
      ``kNeedsOutputAccumulatorBuffer``, and the kernels in kernels/cutlassF.h). A bool mask is made one of numbers, and
      a mask whose rows do not begin at multiples of 8 numbers is padded (attention.cpp, ``preprocess_mask``).
    - math: query, key and value in float32 for half precision, the query scaled, and three times the scores with one
      byte of each while the softmax looks for rows that are masked as a whole (attention.cpp,
      ``_scaled_dot_product_attention_math`` and ``_safe_softmax``). The least has two times the scores, as before torch
      2.5.
    - cudnn: nothing is expected; its workspace is not public, and the most is the size of query, key and value. A bool
      mask is made one of numbers.

    Args:
        assumed: ``"cuda"``, what CUDA chooses; ``"math"``, step by step; ``"fused"``, a fused kernel that takes nothing.
    """
    if assumed == "fused":
        return NOTHING
    kernel: AttentionKernel = "math"
    if assumed == "cuda":
        kernel = choose_attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, generation=generation)
    if kernel == "flash":
        return _exactly(sum(_padding_of_heads(one) for one in (query, key, value, query)))
    if kernel == "efficient":
        return _exactly(_accumulator(query, value) + _mask_copies(attn_mask, query, pads=True))
    if kernel == "cudnn":
        mask = _mask_copies(attn_mask, query, pads=False)
        return Estimate(mask, mask, mask + sum(_bytes(one) for one in (query, key, value)))
    return _step_by_step(results, query, key, value, is_causal, attn_mask)


COSTS: Mapping[str, Callable[..., Estimate]] = MappingProxyType(
    {
        "aten::convolution": convolution,
        "aten::_scaled_dot_product_flash_attention_for_cpu": attention,
    }
)
"""The cost of an operator by its name; what is not here takes nothing worth a forecast. Cannot be written to."""


def costs_on(
    generation: str,
    *,
    convolution_workspace: Literal["expected", "none"] = "expected",
    attention: AssumedAttention = "cuda",
) -> Mapping[str, Callable[..., Estimate]]:
    """The costs on GPUs of a generation: each is called with the results and the operator's arguments alone.

    Args:
        convolution_workspace: ``"none"`` leaves convolutions out.
        attention: see :func:`attention`.

    Raises:
        DiffoptError: no generation has that name.
    """
    generation_of(generation)
    costs: dict[str, Callable[..., Estimate]] = {}
    for name, cost in COSTS.items():
        if cost is convolution:
            if convolution_workspace == "expected":
                costs[name] = functools.partial(cost, generation=generation)
        else:
            costs[name] = functools.partial(cost, generation=generation, assumed=attention)
    return costs


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _exactly(size: int) -> Estimate:
    return Estimate(size, size, size)


def _fits_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is channels last, also where the order of its dimensions cannot be told."""
    import torch

    if tensor.dim() not in (4, 5):
        return False
    wanted = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous(memory_format=wanted)


def _is_channels_last(tensor: Tensor) -> bool:
    return _fits_channels_last(tensor) and not tensor.is_contiguous()


def _gemm_alignment(is_half: bool, capability: tuple[int, int]) -> int:
    """``minimum_gemm_alignment``. Source: pytorch/pytorch: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp."""
    if is_half:
        return 8 if capability >= (7, 0) else 1
    return 4 if capability >= (8, 0) else 1


def _padding_of_heads(tensor: Tensor) -> int:
    """Bytes of a copy whose last dimension is rounded up to a multiple of 8; 0 if it is one."""
    width = tensor.shape[-1]
    if width % 8 == 0:
        return 0
    return _bytes(tensor) // width * (width + 8 - width % 8)


def _accumulator(query: Tensor, value: Tensor) -> int:
    import torch

    if query.dtype == torch.float32 or max(query.shape[-1], value.shape[-1]) <= 128:
        return 0
    return query.numel() // query.shape[-1] * value.shape[-1] * 4


def _mask_copies(mask: Tensor | None, query: Tensor, *, pads: bool) -> int:
    import torch

    if mask is None:
        return 0
    size = 0
    if mask.dtype == torch.bool:
        size += mask.numel() * query.element_size()
    unaligned = mask.stride(-1) != 1 or any(stride % 8 for stride in mask.stride()[:-1])
    if pads and unaligned:
        width = mask.shape[-1]
        size += mask.numel() // max(width, 1) * (width + 8 - width % 8) * query.element_size()
    return size


def _step_by_step(
    results: Sequence[Tensor], query: Tensor, key: Tensor, value: Tensor, is_causal: bool, mask: Tensor | None
) -> Estimate:
    wide = max(query.element_size(), 4)
    is_half = query.element_size() < 4
    inputs = query.numel() * wide  # the query, scaled
    if is_half:
        inputs += (query.numel() + key.numel() + value.numel()) * wide
    if is_causal:
        inputs += query.shape[-2] * key.shape[-2] * wide
    inputs += _mask_copies(mask, query, pads=False)
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    # the result is there once the softmax is over, and then is counted already
    there_later = sum(_bytes(one) for one in results)
    product = query.numel() // query.shape[-1] * value.shape[-1] * wide
    at_the_end = inputs + scores * wide + (product + scores * query.element_size() if is_half else 0)
    expected = max(inputs + scores * (3 * wide + 1) - there_later, at_the_end, 0)
    least = max(inputs + scores * 2 * wide - there_later, 0)
    return Estimate(min(least, expected), expected, expected)
