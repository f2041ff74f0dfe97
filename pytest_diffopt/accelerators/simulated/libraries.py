"""What other libraries remember of the devices of a process, forgotten when the simulated GPU comes and when it goes.

Their code runs as it stands. Nothing is imported for it; a library that is imported later is met then.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

Action = Callable[[types.ModuleType, contextlib.ExitStack], None]


def _forgetting(*functions: str) -> Action:
    """The functions keep their first answer (``functools.cache``): asked before the GPU was there, it is wrong inside."""

    def forget(module: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
        for name in functions:
            clear = getattr(getattr(module, name, None), "cache_clear", None)
            if clear is not None:
                clear()
                borrowed.callback(clear)

    return forget


def _forget_shared_state(state: Any, borrowed: contextlib.ExitStack) -> None:
    """Accelerate's states are shared by the process: one that was made in here names the device for good."""

    def give_back(shared: dict[str, Any], before: dict[str, Any]) -> None:
        shared.clear()
        shared.update(before)

    for name in ("PartialState", "AcceleratorState"):
        shared = getattr(getattr(state, name, None), "_shared_state", None)
        if isinstance(shared, dict):
            borrowed.callback(give_back, shared, dict(shared))
            shared.clear()


def exchange_everywhere(name: str, old: Any, new: Any) -> None:
    """Whoever imported ``old`` by its name holds ``new`` instead, and whoever is imported from now on will."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


@contextlib.contextmanager
def _with_no_gpu() -> Iterator[None]:
    available = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = available


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    # with a GPU it loads its CUDA library, which needs the driver; its kernels of other kinds run on the key as well
    "bitsandbytes": _with_no_gpu,
}
"""In which context a module is imported, by its name."""

ACTIONS: dict[str, Action] = {
    "accelerate.state": _forget_shared_state,
}
"""What is done to a module, by its name; it is given back when the stack is closed."""
