"""How a full-size model is loaded in a forecast: the libraries' own code, in an order that is the same every time."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pytest_diffopt.libraries import exchange_everywhere
from pytest_diffopt.preparation import loading_order
from pytest_diffopt.replicas.checkpoint import DTYPES


@contextlib.contextmanager
def in_order(begins: Callable[[str], object], ends: Callable[[str], object]) -> Iterator[None]:
    """Load the components of pipelines in the order of the pipeline's own arguments. Files are mapped and never read.

    Args:
        begins, ends: told the name of each component that is loaded.
    """
    import safetensors
    from diffusers.pipelines import pipeline_utils

    load = pipeline_utils.load_sub_model

    def load_and_tell(*args: Any, **kwargs: Any) -> Any:
        name = str(kwargs.get("name", ""))
        begins(name)
        try:
            return load(*args, **kwargs)
        finally:
            ends(name)

    opened: Any = safetensors.safe_open

    def open_mapped(filename: Any, framework: Any = "pt", device: Any = "cpu", **_: Any) -> MappedFile:
        return MappedFile(opened(filename, framework, "cpu"), Path(filename), device)

    with contextlib.ExitStack() as stack:
        stack.enter_context(loading_order.in_order())
        stack.callback(exchange_everywhere, "safe_open", open_mapped, opened)
        exchange_everywhere("safe_open", opened, open_mapped)
        pipeline_utils.load_sub_model = load_and_tell
        stack.callback(setattr, pipeline_utils, "load_sub_model", load)
        yield


READ_BYTES = 1 << 20
"""Tensors of at most so many bytes are not mapped: they may be read."""


class MappedFile:
    """An open file whose weights are a hole: large tensors are mapped and never read, small ones are noughts as in the hole.

    safetensors tells the system to read each tensor ahead, and a system that is asked for one page of a hole reads some
    megabytes: for 30 GB of holes that takes half a minute, and memory.
    """

    def __init__(self, file: Any, path: Path, device: Any) -> None:
        self._file, self._device = file, device
        self._storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        with path.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            self._header: dict[str, Any] = json.loads(opened.read(length))
        self._begin = 8 + length

    def __enter__(self) -> MappedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        entry = self._header[name]
        first, last = (self._begin + offset for offset in entry["data_offsets"])
        dtype, shape = getattr(torch, DTYPES[entry["dtype"]]), tuple(entry["shape"])
        if last - first <= READ_BYTES:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        empty: Any = torch.empty(0, dtype=dtype)
        mapped: torch.Tensor = empty.set_(self._storage[first:last], 0, shape)
        return mapped.to(self._device)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        return {name: self.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118

    def get_slice(self, name: str) -> MappedSlice:
        return MappedSlice(self._file.get_slice(name), lambda: self.get_tensor(name))


class MappedSlice:
    """A tensor of a mapped file, of which a part may be asked for."""

    def __init__(self, part: Any, tensor: Callable[[], torch.Tensor]) -> None:
        self._part, self._tensor = part, tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor()[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)
