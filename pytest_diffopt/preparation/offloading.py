"""Puts the offloading hooks of a recipe on a live pipeline, through the libraries' own calls, and takes them off again."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.quantization_backends import layerwise_casting

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.recipe import Offloading


@dataclass
class Offloaded:
    """What was put on a pipeline.

    Attributes:
        kept_resident: components that the pipeline's class keeps on the accelerator.
        stays_until: of a class of diffusers, component → the one whose run sends it away, by its ``model_cpu_offload_seq``;
            empty where it stays until the call ends.
    """

    kept_resident: tuple[str, ...] = ()
    stays_until: dict[str, str] = field(default_factory=dict)
    _last_hooks: list[Any] = field(default_factory=list)
    _folders: list[str] = field(default_factory=list)

    def after_call(self) -> None:
        """Let the last component of a call leave; a diffusers pipeline whose own method put the hooks does it itself."""
        for hook in self._last_hooks:
            hook.offload()

    def clean_up(self) -> None:
        """Delete what was written to disk, once the hooks are off."""
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # the recipe's own folder, where nothing else is in it
                os.rmdir(os.path.dirname(folder))


def offload(pipeline: Any, components: Mapping[str, torch.nn.Module], offloading: Offloading, device: Any) -> Offloaded:
    """Offload the whole pipeline, or the named components: the others are then placed on the device.

    Args:
        device: where the components go to run.

    Raises:
        PreparationError: a component is not there.
    """
    for name in offloading.components or ():
        if name not in components:
            raise PreparationError(
                f"offloading.components: found {name!r}; the pipeline has: {', '.join(sorted(components))}"
            )
    meant = {name: components[name] for name in offloading.components or components}
    for name, module in components.items():
        if name not in meant:
            module.to(device)
    if offloading.strategy == "group":
        own_way = offloading.components is None and hasattr(pipeline, "enable_group_offload")
        return _offload_groups(pipeline if own_way else None, meant, offloading, device)
    method = f"enable_{offloading.strategy}_cpu_offload"
    if offloading.components is None and hasattr(pipeline, method):
        getattr(pipeline, method)(device=str(device))
        return by_class(pipeline, components)
    if offloading.strategy == "sequential":
        return _offload_leaves(meant, device)
    return _offload_in_turn(meant, getattr(pipeline, "model_cpu_offload_seq", None) or "", device)


def by_class(pipeline: Any, components: Mapping[str, torch.nn.Module]) -> Offloaded:
    """What a pipeline's class says of components that its own method offloads."""
    excluded = getattr(pipeline, "_exclude_from_cpu_offload", ())
    chain = [one for one in (getattr(pipeline, "model_cpu_offload_seq", None) or "").split("->") if one in components]
    stays: dict[str, str] = {}
    if type(pipeline).__module__.startswith("diffusers."):
        stays = {name: "" for name in components if name not in excluded} | dict(itertools.pairwise(chain))
    return Offloaded(kept_resident=tuple(name for name in components if name in excluded), stays_until=stays)


def take_off(pipeline: Any, components: Mapping[str, torch.nn.Module]) -> None:
    """Remove every offloading hook from a pipeline and its components, and leave them on the host."""
    from accelerate.hooks import remove_hook_from_module

    if hasattr(pipeline, "remove_all_hooks"):
        pipeline.remove_all_hooks()
    for module in components.values():
        remove_hook_from_module(module, recurse=True)
        registries: list[Any] = [getattr(inner, "_diffusers_hook", None) for inner in module.modules()]
        for registry in registries:
            for hook in getattr(registry, "hooks", {}).values():
                if getattr(getattr(hook, "group", None), "_is_offloaded_to_disk", False):
                    hook.group.onload_()  # the file alone has the weights
        for registry in registries:
            for name in list(getattr(registry, "hooks", {})):
                if name != layerwise_casting.HOOK:  # no offloading, and it cannot be removed
                    registry.remove_hook(name, recurse=False)
        if any(parameter.device.type not in ("cpu", "meta") for parameter in module.parameters()):
            module.to("cpu")


def _offload_in_turn(meant: Mapping[str, torch.nn.Module], sequence: str, device: Any) -> Offloaded:
    """Whole components; one that begins sends away the one before it, as diffusers' own method does."""
    from accelerate import cpu_offload_with_hook

    first = [name for name in sequence.split("->") if name in meant]
    hooks: list[Any] = []
    previous: Any = None
    for name in (*first, *(name for name in meant if name not in first)):
        meant[name].to("cpu")
        _, previous = cpu_offload_with_hook(meant[name], execution_device=device, prev_module_hook=previous)
        hooks.append(previous)
    return Offloaded(_last_hooks=hooks)


def _offload_leaves(meant: Mapping[str, torch.nn.Module], device: Any) -> Offloaded:
    from accelerate import cpu_offload

    for module in meant.values():
        module.to("cpu")
        # weights that stand beside submodules have no leaf of their own: their module's buffers leave with them
        cpu_offload(module, execution_device=device, offload_buffers=len(module._parameters) > 0)
    return Offloaded()


def _offload_groups(
    pipeline: Any, meant: Mapping[str, torch.nn.Module], offloading: Offloading, device: Any
) -> Offloaded:
    """Groups of layers, through the pipeline's own call where it has one, else component by component."""
    import torch
    from diffusers.hooks import apply_group_offloading

    kind = offloading.resolved_offload_type
    kwargs: dict[str, Any] = {
        "onload_device": torch.device(device),
        "offload_device": torch.device("cpu"),
        "offload_type": kind,
        "num_blocks_per_group": (offloading.num_blocks_per_group or 1) if kind == "block_level" else None,
        "use_stream": offloading.use_stream,
        "record_stream": offloading.record_stream,
        "non_blocking": offloading.non_blocking,
        "low_cpu_mem_usage": offloading.low_cpu_mem_usage,
    }
    folder: str | None = None
    if offloading.offload_to_disk_path is not None:
        # a file that is there already is taken for the group's own, whatever is in it: each run gets a folder of its own
        os.makedirs(offloading.offload_to_disk_path, exist_ok=True)
        folder = tempfile.mkdtemp(dir=offloading.offload_to_disk_path)
    offloaded = Offloaded(_folders=[folder] if folder is not None else [])
    if pipeline is not None:
        pipeline.enable_group_offload(**kwargs, offload_to_disk_path=folder)
        return offloaded
    for name, module in meant.items():
        # files are named after layers: those of two components with equal names would be one
        kwargs["offload_to_disk_path"] = os.path.join(folder, name) if folder is not None else None
        if hasattr(module, "enable_group_offload"):
            module.enable_group_offload(**kwargs)  # type: ignore[operator]
        else:
            apply_group_offloading(module, **kwargs)
    return offloaded


def offloading_of(module: torch.nn.Module) -> Offloading | None:
    """How a live component is offloaded, read off the hooks on it and on its parts; None where it is not.

    Its ``components`` are left open.
    """
    from pytest_diffopt.recipe import Offloading

    for inner in module.modules():
        registry = getattr(inner, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            config = getattr(hook, "config", None)
            if type(config).__name__ == "GroupOffloadingConfig":
                return _group_offloading_of(config)
    device_map = getattr(module, "hf_device_map", None) or {}
    if any(str(place) in ("cpu", "disk") for place in device_map.values()):
        return None  # a device map leaves parts there for good
    found = [(path, hook) for path, inner in module.named_modules() for hook in _accelerate_hooks(inner)]
    if any(type(hook).__name__ == "CpuOffload" for path, hook in found if not path):
        return Offloading("model")
    if any(getattr(hook, "offload", False) for _, hook in found):
        return Offloading("sequential")
    return None


def _group_offloading_of(config: Any) -> Offloading:
    from pytest_diffopt.recipe import Offloading

    kind = getattr(config.offload_type, "value", config.offload_type)
    streamed = config.stream is not None
    return Offloading(
        "group",
        offload_type=kind,
        num_blocks_per_group=config.num_blocks_per_group if kind == "block_level" else None,
        use_stream=streamed,
        record_stream=streamed and bool(config.record_stream),
        non_blocking=bool(config.non_blocking),
        low_cpu_mem_usage=streamed and bool(config.low_cpu_mem_usage),
        offload_to_disk_path=config.offload_to_disk_path,
    )


def _accelerate_hooks(module: torch.nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []
