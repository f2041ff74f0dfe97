"""What libraries keep on the device for good: a recipe is charged for it as in a fresh process, whatever ran before it.

Made while the device is dry, as in a forecast, a table has no data: whoever found it later would read what is not there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_diffopt.byte_sizes import bytes_on

if TYPE_CHECKING:
    import torch

_DICTS = (("bitsandbytes.functional", "name2qmap"), ("bitsandbytes.backends.utils", "_code_4bit_cache"))
_CACHED = (("bitsandbytes.backends.default.ops", "_get_4bit_quantize_bounds"),)
"""Where bitsandbytes keeps the tables of its formats; releases that lack one keep none there."""


@contextlib.contextmanager
def made_anew() -> Iterator[None]:
    """Tables of bitsandbytes' formats are made again inside; those of before are back after it."""
    with contextlib.ExitStack() as stack:
        for module, name in (*_DICTS, *_CACHED):
            with contextlib.suppress(ImportError):
                holder = importlib.import_module(module)
                before = getattr(holder, name, None)
                if before is not None:
                    stack.callback(setattr, holder, name, before)
                    setattr(holder, name, {} if isinstance(before, dict) else functools.cache(before.__wrapped__))
        yield


_LIBRARIES = ("diffusers.", "transformers.")

_seen: weakref.WeakSet[Any] = weakref.WeakSet()
"""Caches of functions. Once they are frozen for the garbage collector, it does not list them any more."""

_read: set[str] = set()
"""Modules of the libraries whose caches are found."""


def look() -> None:
    """Find the caches of functions that are there by now."""
    _seen.update([found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper])
    for name, module in list(sys.modules.items()):
        if name.startswith(_LIBRARIES) and name not in _read:
            _read.add(name)
            held = list(vars(module).values())
            held += [one for kind in held if isinstance(kind, type) for one in list(vars(kind).values())]
            _seen.update(cache for one in held for cache in _caches_of(one))


def _caches_of(function: Any) -> Iterator[Any]:
    """The cache that a function is, or that stands inside of a decorator."""
    if type(function) is functools._lru_cache_wrapper:
        yield function
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            if type(cell.cell_contents) is functools._lru_cache_wrapper:
                yield cell.cell_contents


def forget(kind: str) -> None:
    """Clear every ``functools.lru_cache`` that holds a tensor on a device of that kind, as models keep their positions."""
    look()
    for found in list(_seen):
        if any(tensor.device.type == kind for tensor in _tensors(gc.get_referents(found))):
            found.cache_clear()


def held_bytes(kind: str) -> int:
    """Bytes on devices of that kind that functions of diffusers and transformers keep in a ``functools.lru_cache``: tables of
    positions, which are as large for a tiny model as for the whole one. Of the caches that :func:`look` has found."""
    caches = [one for one in list(_seen) if str(getattr(one, "__module__", "")).startswith(_LIBRARIES)]
    return bytes_on(kind, [tensor for one in caches for tensor in _tensors(gc.get_referents(one))])


def _tensors(held: Any, depth: int = 5) -> Iterator[torch.Tensor]:
    import torch

    if type(held) is dict:
        held = list(held.values())
    if isinstance(held, torch.Tensor):
        yield held
    elif depth and type(held) in (list, tuple):
        for one in held:
            yield from _tensors(one, depth - 1)
