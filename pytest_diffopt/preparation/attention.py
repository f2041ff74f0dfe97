"""Tells components which attention backend to use, through diffusers' ``set_attention_backend``, and gives it back.

diffusers then makes that backend the active one for whatever has none of its own, in every pipeline: that is part of what
a recipe runs, and given back too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.preparation.compilation import original_module

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.recipe import Recipe

GLOBAL = "diffusers attention backend"
"""The name of the active backend among the globals that are given back."""


@dataclass
class Attended:
    """Which processors were told, and what each had before."""

    _before: list[tuple[Any, Any]] = field(default_factory=list)
    _active: Any = None

    def tell(self, components: Mapping[str, torch.nn.Module], recipe: Recipe) -> None:
        """Set what the recipe says; nothing where it says nothing.

        Raises:
            PreparationError: a component is not there or cannot be told, or diffusers refuses the backend.
        """
        if recipe.attention is None:
            return
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        for component, backend in asked_of(components, recipe.attention).items():
            module: Any = components[component]
            if self._active is None:
                self._active = _AttentionBackendRegistry._active_backend
            self._before += [
                (layer.processor, layer.processor._attention_backend)
                for _, layer in attention_layers(module)
                if can_be_told(layer)
            ]
            try:
                module.set_attention_backend(backend)
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                raise PreparationError(f"attention: {component} cannot use {backend!r}: {error}") from error

    def put_back(self) -> None:
        """As it was: a factory may return the same pipeline again."""
        while self._before:
            processor, backend = self._before.pop()
            processor._attention_backend = backend
        if self._active is not None:
            from diffusers.models.attention_dispatch import _AttentionBackendRegistry

            _AttentionBackendRegistry._active_backend, self._active = self._active, None


def asked_of(components: Mapping[str, torch.nn.Module], attention: str | Mapping[str, str]) -> dict[str, str]:
    """Component → backend, for a table or for one name.

    Raises:
        PreparationError: a component is not there or cannot be told.
    """
    able = [name for name, module in components.items() if hasattr(module, "set_attention_backend")]
    if isinstance(attention, str):
        if not able:
            raise PreparationError(f"attention: no component can be told; there is {', '.join(sorted(components))}")
        return dict.fromkeys(able, attention)
    for name in attention:
        if name not in components:
            raise PreparationError(
                f"attention: found {name!r}; the pipeline has: {', '.join(sorted(components)) or 'nothing'}"
            )
        if name not in able:
            raise PreparationError(
                f"attention: {name} is a {type(components[name]).__name__}, which has no set_attention_backend(); "
                f"{', '.join(able) or 'no component'} has"
            )
    return dict(attention)


def attention_layers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of what diffusers counts as attention."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    for path, inner in original_module(module).named_modules():
        if isinstance(inner, AttentionModuleMixin | Attention | MochiAttention):
            yield path, inner


def can_be_told(layer: Any) -> bool:
    """Whether the layer's processor asks diffusers' dispatcher; one of the old kind calls torch itself."""
    return hasattr(getattr(layer, "processor", None), "_attention_backend")


def attention_of(module: torch.nn.Module) -> str | None:
    """The backend that a live component was told to use, by its name; None for none, or for several.

    What a context manager ``attention_backend(...)`` sets is no component's, and not seen here.
    """
    told = _told(module)
    return told.pop() if len(told) == 1 else None


def used_by(module: torch.nn.Module) -> list[str]:
    """The backends that a component's processors would use now: their own, or the active one where they have none."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active = _name(_AttentionBackendRegistry._active_backend)
    return sorted({active if backend is None else backend for backend in _told(module)})


def _told(module: torch.nn.Module) -> set[str | None]:
    layers = (layer for _, layer in attention_layers(module) if can_be_told(layer))
    backends = [layer.processor._attention_backend for layer in layers]
    return {None if backend is None else _name(backend) for backend in backends}


def _name(backend: Any) -> str:
    return str(getattr(backend, "value", backend))
