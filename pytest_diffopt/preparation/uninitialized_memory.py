"""What nobody has written has one value while a recipe runs: what reads it is wrong in every run, not right by chance.

A new tensor is often given a block that was freed just before, and with it the very numbers that should have been kept: a
library that forgets to load a weight back then looks healthy in one run and broken in the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

BYTE = 0x7B
"""Of every byte: a great finite number in each floating type (1e36 in float32 and bfloat16, 61280 in float16, 352 in
float8_e4m3fn), so that what is multiplied by zero, or by a ``beta`` of zero, comes to zero as it should."""

_PERTURB = -6
"""``M_PERTURB`` of glibc's malloc.h."""

_OF_THE_USER = ("MALLOC_PERTURB_", "GLIBC_TUNABLES")

_depth = 0


@contextlib.contextmanager
def filled() -> Iterator[bool]:
    """Memory of the host, and of the simulated device, which lies there, begins as :data:`BYTE` inside.

    By glibc's ``mallopt``; elsewhere nothing is done, nor where the user has set it for the process.

    Yields:
        Whether it is filled.
    """
    global _depth
    change = None if any(name in os.environ for name in _OF_THE_USER) else _mallopt()
    if change is None:
        yield False
        return
    _depth += 1
    try:
        yield change(_PERTURB, BYTE ^ 0xFF) == 1  # it fills what it gives with the complement
    finally:
        _depth -= 1
        if not _depth:
            change(_PERTURB, 0)


def _mallopt() -> ctypes._NamedFuncPointer | None:
    try:
        return getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # no such library, as on Windows
        return None
