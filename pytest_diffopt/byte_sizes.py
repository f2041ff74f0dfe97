"""Sizes in bytes, as people write and read them, and as tensors take them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from typing import TYPE_CHECKING

from pytest_diffopt.errors import Problem

if TYPE_CHECKING:
    import torch

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZES_ALLOWED = f"write bytes as an int, or a number with one of: {', '.join(_UNITS)}"


def parse_bytes(value: str | int, name: str = "max_memory") -> int:
    """``"12GiB"`` or ``"1.5 GB"`` in bytes (KB, MB, … are 1000s; KiB, MiB, … are 1024s). An int already is bytes.

    Raises:
        ValueError: for anything else, less than one byte included; ``name`` says what was wrong.
    """
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str):
        match = re.fullmatch(rf"\s*([0-9]+(?:\.[0-9]+)?)\s*({'|'.join(_UNITS)})\s*", value)
        size = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        found = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
        raise ValueError(str(Problem(name, found, SIZES_ALLOWED)))
    return size


def unit_of(highest_bytes: int) -> tuple[int, str]:
    """(bytes in it, its name) of the unit in which sizes up to so many bytes are written."""
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if highest_bytes >= 1 << power:
            return 1 << power, name
    return 1, "B"


def human(count: int) -> str:
    """Bytes for a person: ``"9.45 MiB"``."""
    unit, name = unit_of(count)
    return f"{count} B" if unit == 1 else f"{count / unit:.2f} {name}"


def bytes_on(kind: str, tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory of tensors on devices of a kind, e.g. ``"cuda"``; what they share counts once."""
    import torch

    storages: dict[int, int] = {}
    for tensor in tensors:
        if tensor.device.type == kind and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
