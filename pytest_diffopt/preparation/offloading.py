"""Puts the offloading hooks of a recipe on a live pipeline, through diffusers' own calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.recipe import Offloading


def offload(pipeline: Any, components: Mapping[str, torch.nn.Module], offloading: Offloading, device: Any) -> None:
    """Offload the whole pipeline or the named components.

    Raises:
        PreparationError: a component is not there, or the pipeline has no way to be offloaded like this.
    """
    for name in offloading.components or ():
        if name not in components:
            raise PreparationError(
                f"offloading.components: found {name!r}; the pipeline has: {', '.join(sorted(components))}"
            )
    if offloading.strategy == "group":
        _offload_groups(components, offloading, device)
        return
    method = f"enable_{offloading.strategy}_cpu_offload"
    if offloading.components is not None or not hasattr(pipeline, method):
        _hook_modules(components, offloading, device)
        return
    getattr(pipeline, method)(device=str(device))


def take_off(pipeline: Any, components: Mapping[str, torch.nn.Module]) -> None:
    """Remove every offloading hook from a pipeline and its components."""
    from accelerate.hooks import remove_hook_from_module

    if hasattr(pipeline, "remove_all_hooks"):
        pipeline.remove_all_hooks()
    for module in components.values():
        remove_hook_from_module(module, recurse=True)
        for inner in module.modules():
            registry: Any = getattr(inner, "_diffusers_hook", None)
            for name in list(getattr(registry, "hooks", {})):
                registry.remove_hook(name, recurse=False)


def _hook_modules(components: Mapping[str, torch.nn.Module], offloading: Offloading, device: Any) -> None:
    from accelerate import cpu_offload, cpu_offload_with_hook

    for name in offloading.components if offloading.components is not None else components:
        if offloading.strategy == "model":
            cpu_offload_with_hook(components[name], execution_device=device)
        else:
            cpu_offload(components[name], execution_device=device)


def _offload_groups(components: Mapping[str, torch.nn.Module], offloading: Offloading, device: Any) -> None:
    import torch
    from diffusers.hooks import apply_group_offloading

    kind = offloading.offload_type or "leaf_level"
    kwargs: dict[str, Any] = {
        "onload_device": torch.device(device),
        "offload_device": torch.device("cpu"),
        "offload_type": kind,
        "num_blocks_per_group": (offloading.num_blocks_per_group or 1) if kind == "block_level" else None,
        "use_stream": offloading.use_stream,
        "record_stream": offloading.record_stream,
        "non_blocking": offloading.non_blocking,
        "low_cpu_mem_usage": offloading.low_cpu_mem_usage,
        "offload_to_disk_path": offloading.offload_to_disk_path,
    }
    for name in offloading.components if offloading.components is not None else components:
        apply_group_offloading(components[name], **kwargs)
