"""Lists of devices in other libraries that leave ``sim`` out, each adapted here and given back."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def adapted_libraries() -> Iterator[None]:
    """The libraries that are imported by now know the simulated device inside this, and not after it."""
    with contextlib.ExitStack() as borrowed:
        if (safetensors := sys.modules.get("safetensors.torch")) is not None:
            _adapt_safetensors(safetensors, borrowed)
        yield


def _replace(owner: Any, name: str, value: object, borrowed: contextlib.ExitStack) -> None:
    borrowed.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _adapt_safetensors(safetensors: Any, borrowed: contextlib.ExitStack) -> None:
    # Its Rust side has a fixed list of device names: load on the host, then move.
    load_file: Callable[..., dict[str, Any]] = safetensors.load_file

    @functools.wraps(load_file)
    def load_then_move(filename: Any, device: Any = "cpu", *args: Any, **kwargs: Any) -> dict[str, Any]:
        import torch

        if isinstance(device, int) or torch.device(device).type != "sim":
            return load_file(filename, device, *args, **kwargs)
        return {name: tensor.to(device) for name, tensor in load_file(filename, "cpu", *args, **kwargs).items()}

    holders = [
        module
        for name, module in list(sys.modules.items())
        # whoever imported the function by its name holds it too
        if name.split(".")[0] in ("safetensors", "diffusers", "transformers", "accelerate")
        and vars(module).get("load_file") is load_file
    ]
    for holder in holders:
        _replace(holder, "load_file", load_then_move, borrowed)
