"""What a compute capability settles: NVIDIA's figures, and what must hold between them."""

from __future__ import annotations

import pytest

from pytest_diffopt.accelerators.compute_capabilities import (
    COMPUTE_CAPABILITIES,
    ComputeCapability,
    compute_capability,
)
from pytest_diffopt.errors import DiffoptError

KIB = 1024


def test_ada_has_nvidias_figures() -> None:
    ada = compute_capability(8, 9)
    assert (ada.threads_per_multiprocessor, ada.blocks_per_multiprocessor) == (1536, 24)
    assert ada.shared_memory_per_multiprocessor_bytes == 100 * KIB
    assert (ada.shared_memory_per_block_bytes, ada.shared_memory_per_block_optin_bytes) == (48 * KIB, 99 * KIB)
    assert (ada.registers_per_multiprocessor, ada.threads_per_block, ada.warp_size) == (65536, 1024, 32)


@pytest.mark.parametrize("one", COMPUTE_CAPABILITIES.values(), ids=lambda one: f"{one.major}.{one.minor}")
def test_no_block_may_have_more_than_its_multiprocessor(one: ComputeCapability) -> None:
    assert compute_capability(one.major, one.minor) is one
    assert (
        one.shared_memory_per_block_bytes
        <= one.shared_memory_per_block_optin_bytes
        <= one.shared_memory_per_multiprocessor_bytes
    )
    assert one.threads_per_block <= one.threads_per_multiprocessor
    assert one.threads_per_multiprocessor % one.warp_size == 0
    assert one.registers_per_block <= one.registers_per_multiprocessor


def test_the_capabilities_are_in_order_and_cannot_be_written_to() -> None:
    assert list(COMPUTE_CAPABILITIES) == sorted(COMPUTE_CAPABILITIES)
    with pytest.raises(TypeError):
        COMPUTE_CAPABILITIES[8, 9] = COMPUTE_CAPABILITIES[9, 0]  # type: ignore[index]


def test_an_unknown_capability_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(DiffoptError) as raised:
        compute_capability(5, 2)
    known = "6.0, 6.1, 7.0, 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0"
    assert str(raised.value) == f"No compute capability 5.2 is known. There are {known}."
