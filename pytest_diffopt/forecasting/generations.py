"""GPU generations, and what CUDA's libraries do differently on each.

A number here is read in the source of torch, and a docstring says where; none was measured by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pytest_diffopt.accelerators.gpus import GenerationName
from pytest_diffopt.errors import DiffoptError

_MIB = 1024**2


@dataclass(frozen=True)
class Generation:
    """One generation.

    Attributes:
        name: as :attr:`pytest_diffopt.accelerators.gpus.Card.generation`.
        capability: the compute capability of the least of its cards: ``(8, 0)`` is sm80.
        cublas_workspace_bytes: that torch's allocator holds for cuBLAS from the first matrix product on, for each stream
            that makes one. ``:4096:2:16:8`` is 2 × 4096 KiB + 8 × 16 KiB; Hopper and Blackwell have 32 MiB. Source,
            pytorch/pytorch: aten/src/ATen/cuda/CublasHandlePool.cpp, ``parseChosenWorkspaceSize``. Blackwell had 8.125
            MiB before pytorch/pytorch#175344, of February 2026.
        cudnn_convolution: how many times the bytes of a convolution's tensors cuDNN's workspace is taken to be, at the
            least, as expected and at the most; see :func:`pytest_diffopt.forecasting.costs.convolution`.
    """

    name: GenerationName
    capability: tuple[int, int]
    cublas_workspace_bytes: int
    cudnn_convolution: tuple[float, float, float]

    @property
    def has_flash_attention(self) -> bool:
        """Whether flash attention runs: from sm80 to sm121.

        Source, pytorch/pytorch: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
        """
        return self.capability >= (8, 0)

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether torch asks cuDNN first: sm90 and sm10x, with cuDNN newer than 9.15.0.

        On other Blackwells, sm120, it does not. Source: as above, ``check_prefer_cudnn_attention``.
        """
        return self.capability[0] in (9, 10)


_SMALL_CUBLAS = 2 * 4096 * 1024 + 8 * 16 * 1024
_LARGE_CUBLAS = 32 * _MIB

# cuBLASLt has no workspace besides: both share one unless TORCH_CUBLASLT_UNIFIED_WORKSPACE=0. Sources: the docstring of
# torch.backends.cuda.blas_workspace_size in torch 2.13; pytorch/pytorch: aten/src/ATen/cuda/CublasHandlePool.cpp. A torch
# after pytorch/pytorch#194311 (August 2026) frees the workspace after each product, unless TORCH_CUBLAS_WORKSPACE_CACHE=1.

_GENERATIONS = (
    Generation("pascal", (6, 0), _SMALL_CUBLAS, (0.0, 1.0, 2.0)),
    Generation("volta", (7, 0), _SMALL_CUBLAS, (0.0, 1.0, 2.0)),
    Generation("turing", (7, 5), _SMALL_CUBLAS, (0.0, 1.0, 2.0)),
    Generation("ampere", (8, 0), _SMALL_CUBLAS, (0.6, 1.0, 1.5)),
    Generation("ada", (8, 9), _SMALL_CUBLAS, (0.6, 1.0, 1.5)),
    Generation("hopper", (9, 0), _LARGE_CUBLAS, (0.6, 1.0, 1.5)),
    Generation("blackwell-datacenter", (10, 0), _LARGE_CUBLAS, (0.0, 1.0, 2.0)),
    Generation("blackwell", (12, 0), _LARGE_CUBLAS, (0.0, 1.0, 2.0)),
)

GENERATIONS: Mapping[str, Generation] = MappingProxyType({one.name: one for one in _GENERATIONS})
"""The generations by name, oldest first; cannot be written to."""


def generation(name: str) -> Generation:
    """The generation of that name.

    Raises:
        DiffoptError: there is none; the sentence has all names.
    """
    if name in GENERATIONS:
        return GENERATIONS[name]
    raise DiffoptError(f"No GPU generation is called {name!r}. There are {', '.join(GENERATIONS)}.")
