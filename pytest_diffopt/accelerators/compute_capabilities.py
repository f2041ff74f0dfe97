"""What a GPU's compute capability settles: how many threads, registers and how much shared memory there are at most.

Source: the CUDA programming guide's appendix "Compute Capabilities",
https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html; the same figures are in code in
NVIDIA/cccl: libcudacxx/include/cuda/__device/arch_traits.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pytest_diffopt.errors import DiffoptError

_KIB = 1024


@dataclass(frozen=True)
class ComputeCapability:
    """One compute capability; 8.9 is ``major=8``, ``minor=9``, which compilers call ``sm_89``.

    Args:
        threads_per_multiprocessor, blocks_per_multiprocessor: resident at once, at most.
        shared_memory_per_multiprocessor_bytes: for all blocks that are resident on it.
        shared_memory_per_block_optin_bytes: what a block may have if the kernel asks for it before it is launched.
        shared_memory_per_block_bytes: what a block may have otherwise.
        registers_per_multiprocessor, registers_per_block: of 32 bits.
    """

    major: int
    minor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    shared_memory_per_multiprocessor_bytes: int
    shared_memory_per_block_optin_bytes: int
    shared_memory_per_block_bytes: int = 48 * _KIB
    registers_per_multiprocessor: int = 65536
    registers_per_block: int = 65536
    threads_per_block: int = 1024
    warp_size: int = 32


_COMPUTE_CAPABILITIES = (
    ComputeCapability(6, 0, 2048, 32, 64 * _KIB, 48 * _KIB),
    ComputeCapability(6, 1, 2048, 32, 96 * _KIB, 48 * _KIB),
    ComputeCapability(7, 0, 2048, 32, 96 * _KIB, 96 * _KIB),
    ComputeCapability(7, 5, 1024, 16, 64 * _KIB, 64 * _KIB),
    ComputeCapability(8, 0, 2048, 32, 164 * _KIB, 163 * _KIB),
    ComputeCapability(8, 6, 1536, 16, 100 * _KIB, 99 * _KIB),
    ComputeCapability(8, 9, 1536, 24, 100 * _KIB, 99 * _KIB),
    ComputeCapability(9, 0, 2048, 32, 228 * _KIB, 227 * _KIB),
    ComputeCapability(10, 0, 2048, 32, 228 * _KIB, 227 * _KIB),
    ComputeCapability(12, 0, 1536, 24, 100 * _KIB, 99 * _KIB),
)

COMPUTE_CAPABILITIES: Mapping[tuple[int, int], ComputeCapability] = MappingProxyType(
    {(one.major, one.minor): one for one in _COMPUTE_CAPABILITIES}
)
"""By ``(major, minor)``, lowest first: those of the cards in :mod:`.gpus`; cannot be written to."""


def compute_capability(major: int, minor: int) -> ComputeCapability:
    """The compute capability of that number.

    Raises:
        DiffoptError: it is not known; the sentence has all that are.
    """
    if (major, minor) in COMPUTE_CAPABILITIES:
        return COMPUTE_CAPABILITIES[major, minor]
    known = ", ".join(f"{one.major}.{one.minor}" for one in COMPUTE_CAPABILITIES.values())
    raise DiffoptError(f"No compute capability {major}.{minor} is known. There are {known}.")
