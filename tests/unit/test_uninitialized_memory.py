"""What nobody has written has one value inside, of which zero times is zero; outside nothing is changed."""

from __future__ import annotations

import platform

import pytest
import torch

from pytest_diffopt.preparation import uninitialized_memory
from pytest_diffopt.preparation.uninitialized_memory import BYTE, filled

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt with M_PERTURB is glibc's alone")
SIZES = (1, 1_000, 10_000_000)


def is_filled(size: int) -> bool:
    return bool((torch.empty(size, dtype=torch.uint8) == BYTE).all())


@glibc
def test_every_new_block_is_filled_inside_and_no_more_outside() -> None:
    with filled() as is_done:
        assert is_done
        with filled():
            pass
        assert all(is_filled(size) for size in SIZES)
    assert not is_filled(10_000_000)  # fresh from the kernel, and zero
    with pytest.raises(ZeroDivisionError), filled():
        raise ZeroDivisionError
    assert not is_filled(10_000_000)


@glibc
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_it_is_great_and_finite_and_nothing_beside_a_zero(dtype: torch.dtype) -> None:
    with filled():
        found = torch.empty(1_000, dtype=dtype)
        assert found.isfinite().all()
        assert (found > 60_000).all()
        assert not (found * 0).any()
        product = torch.baddbmm(torch.empty(2, 3, 3, dtype=dtype), *torch.ones(2, 2, 3, 3, dtype=dtype), beta=0)
    assert (product == 3).all()


def test_it_leaves_alone_what_the_user_set_and_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("MALLOC_PERTURB_", "7")
        with filled() as is_done:
            assert not is_done
    monkeypatch.setattr(uninitialized_memory, "_mallopt", lambda: None)
    with filled() as is_done:
        assert not is_done
