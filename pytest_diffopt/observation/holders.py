"""Who keeps what stays on the accelerator after a call: an autograd graph, modules of another pipeline, a cache.

Found among the objects that Python's garbage collector knows, and so only looked for where something stays.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_diffopt.byte_sizes import bytes_on
from pytest_diffopt.observation.observation import Holder
from pytest_diffopt.preparation import caching

if TYPE_CHECKING:
    import torch


def holders(components: Mapping[str, torch.nn.Module], kind: str) -> tuple[Holder, ...]:
    """What holds tensors on devices of a kind beside the components' own weights, the largest first.

    Args:
        components: the pipeline's. kind: e.g. ``"cuda"``.
    """
    import torch

    own = {id(inner) for module in components.values() for inner in module.modules()}
    tensors, modules = [], []
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            tensors.append(found)
        elif issubclass(type(found), torch.nn.Module) and id(found) not in own:
            modules.append(found)
    held = [*_graphs(tensors, kind), *_other_modules(modules, kind)]
    for name, module in components.items():
        if size := bytes_on(kind, caching.held_tensors(module)):
            held.append(Holder("cache", name, size))
    return tuple(sorted(held, key=lambda one: -one.bytes))


def _graphs(tensors: list[Any], kind: str) -> list[Holder]:
    """Tensors that hold the graph by which they were made; what the graph saved is no object of Python."""
    made = [one for one in tensors if one.device.type == kind and one.grad_fn is not None]
    names = dict.fromkeys(type(one.grad_fn).__name__ for one in made)
    return [Holder("graph", ", ".join(list(names)[:3]), bytes_on(kind, made))] if made else []


def _other_modules(modules: list[torch.nn.Module], kind: str) -> list[Holder]:
    """Modules of something else; only the outermost of them are named."""
    inside = {id(inner) for module in modules for inner in module.modules() if inner is not module}
    found = []
    for module in modules:
        if id(module) not in inside and (size := bytes_on(kind, [*module.parameters(), *module.buffers()])):
            found.append(Holder("module", type(module).__name__, size))
    return found
