"""Settings of Dynamo that a recipe gives by name: those of ``torch._dynamo.config`` and ``torch.fx.experimental._config``.

No name stands in both. The second decides how sizes become symbols, e.g. ``use_duck_shape``.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_diffopt.errors import PreparationError

MODULES = ("torch._dynamo.config", "torch.fx.experimental._config")


def configs() -> dict[str, Any]:
    """Name of a setting → the module that holds it."""
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, MODULES):
        names = module._config
        found |= {name: module for name in names if not name.startswith("_") and name != "TYPE_CHECKING"}
    return found


def values() -> dict[str, Any]:
    """The settings that a recipe can say, as they are now."""
    found = {name: getattr(module, name) for name, module in configs().items()}
    return {
        name: value for name, value in found.items() if value is None or isinstance(value, bool | int | float | str)
    }


@contextlib.contextmanager
def settings(given: Mapping[str, Any]) -> Iterator[None]:
    """Set Dynamo's settings by name while the context is open; Inductor draws random numbers as eager code does.

    Raises:
        PreparationError: the installed torch has no setting of that name.
    """
    import torch

    known = configs() if given else {}
    if unknown := [name for name in given if name not in known]:
        raise PreparationError(f"dynamo: found {unknown[0]!r}, which torch {torch.__version__} does not have")
    inductor: Any = importlib.import_module("torch._inductor.config")
    with contextlib.ExitStack() as stack:
        for name, value in given.items():
            stack.enter_context(known[name].patch({name: value}))
        # numbers that a model draws must be the eager ones: Inductor's own generator gives others
        stack.enter_context(inductor.patch(fallback_random=True))
        yield
