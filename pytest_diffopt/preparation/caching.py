"""Lets components keep work from one denoising step for the next, through diffusers' ``enable_cache``, and takes it off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.denoising import CACHING_KEYS, Caching
from pytest_diffopt.errors import PreparationError
from pytest_diffopt.preparation.compilation import original_module

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_diffopt.recipe import Recipe

CONFIGS = {
    "first_block_cache": "FirstBlockCacheConfig",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcastConfig",
    "faster_cache": "FasterCacheConfig",
    "mag_cache": "MagCacheConfig",
    "taylorseer_cache": "TaylorSeerCacheConfig",
    "sea_cache": "SeaCacheConfig",
    "text_kv_cache": "TextKVCacheConfig",
}
"""Kind → its config's class in ``diffusers.hooks``."""

_TELLS_THE_TIMESTEP = "current_timestep_callback"


@dataclass
class Cached:
    """The components that were given a cache."""

    _on: list[Any] = field(default_factory=list)

    def enable(self, pipeline: Any, components: Mapping[str, torch.nn.Module], recipe: Recipe) -> None:
        """Enable what the recipe says. A component whose factory enabled a cache is judged as it stands.

        Raises:
            PreparationError: a component is not there or takes no cache, or diffusers refuses the config.
        """
        for caching in recipe.caching:
            name = caching.component
            if name not in components:
                raise PreparationError(
                    f"caching.component: found {name!r}; the pipeline has: {', '.join(sorted(components))}"
                )
            module: Any = components[name]
            if not hasattr(module, "enable_cache"):
                able = ", ".join(n for n, m in components.items() if hasattr(m, "enable_cache"))
                raise PreparationError(
                    f"caching.component: {name} is a {type(module).__name__}, which has no enable_cache(); "
                    f"{able or 'no component'} has"
                )
            if module.is_cache_enabled:
                continue
            self._on.append(module)  # also where diffusers stops half way
            try:
                module.enable_cache(config_of(caching, pipeline))
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                raise PreparationError(
                    f"caching: {name} cannot have a {caching.kind}: {type(error).__name__}: {error}"
                ) from error

    def take_off(self) -> None:
        """As it was: a factory may return the same pipeline again."""
        while self._on:
            module = self._on.pop()
            if module.is_cache_enabled:
                module.disable_cache()


def config_of(caching: Caching, pipeline: Any) -> Any:
    """diffusers' config of a recipe's cache; the timestep is the pipeline's.

    Raises:
        PreparationError: this diffusers has no such cache, or the pipeline does not tell the timestep.
    """
    import torch
    from diffusers import hooks

    made = getattr(hooks, CONFIGS[caching.kind], None)
    if made is None:
        raise PreparationError(f"caching.kind: the installed diffusers has no {CONFIGS[caching.kind]}")
    kwargs: dict[str, Any] = dict(caching.kwargs)
    if "taylor_factors_dtype" in kwargs:
        kwargs["taylor_factors_dtype"] = getattr(torch, kwargs["taylor_factors_dtype"])
    if any(one.name == _TELLS_THE_TIMESTEP for one in dataclasses.fields(made)):
        if not hasattr(type(pipeline), "current_timestep"):
            raise PreparationError(
                f"caching: {caching.kind} asks for the timestep, which {type(pipeline).__name__} does not tell "
                f"(it has no current_timestep)"
            )
        kwargs[_TELLS_THE_TIMESTEP] = _timestep_of(pipeline)
    return made(**kwargs)


def _timestep_of(pipeline: Any) -> Callable[[], Any]:
    return lambda: pipeline.current_timestep


def cache_hooks(module: torch.nn.Module, kind: str) -> Iterator[tuple[str, Any]]:
    """(path, hook) of what a cache of a kind put on a component."""
    for path, inner in original_module(module).named_modules():
        registry = getattr(inner, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if type(hook).__module__ == f"diffusers.hooks.{kind}":
                yield path, hook


def held_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """What the caches on a component keep from one step, or one call, for the next."""
    hooks = [
        hook
        for inner in original_module(module).modules()
        for hook in getattr(getattr(inner, "_diffusers_hook", None), "hooks", {}).values()
        if type(hook).__module__.rpartition(".")[2] in CONFIGS
    ]
    return [tensor for hook in hooks for tensor in _tensors_in(vars(hook), set())]


def _tensors_in(held: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors in containers and in objects of diffusers' hooks, not those of modules."""
    import torch

    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for one in list(held.values()):
            yield from _tensors_in(one, seen)
    elif isinstance(held, list | tuple):
        for one in held:
            yield from _tensors_in(one, seen)
    elif type(held).__module__.startswith("diffusers.hooks.") and not isinstance(held, torch.nn.Module):
        yield from _tensors_in(vars(held), seen)


def caching_of(module: torch.nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The cache of a live component as a recipe writes it, (kind, kwargs that differ from the config's defaults); or None.

    Callables are left out: a recipe fills in the one that tells the timestep, and has no place for the others. A cache
    that was put on by ``apply_first_block_cache`` or ``apply_mag_cache`` is seen as well; of the others only
    ``enable_cache`` keeps the config.
    """
    config = getattr(original_module(module), "_cache_config", None)
    if config is None:
        config = _config_on_hooks(module)
    kind = next((kind for kind, name in CONFIGS.items() if type(config).__name__ == name), None)
    if kind is None:
        return None
    defaults = {one.name: one.default for one in dataclasses.fields(config)}
    held = {key: _plain(getattr(config, key)) for key in CACHING_KEYS[kind] if hasattr(config, key)}
    return kind, {key: value for key, value in held.items() if value != _plain(defaults[key])}


def _config_on_hooks(module: torch.nn.Module) -> Any:
    from diffusers import hooks

    for _, hook in cache_hooks(module, "mag_cache"):
        return hook.config
    for _, hook in cache_hooks(module, "first_block_cache"):
        if hasattr(hook, "threshold"):
            return hooks.FirstBlockCacheConfig(threshold=hook.threshold)
    return None


def _plain(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value
