"""Watches what diffusers decides while a pipeline runs: by which backend each layer attends, which steps a cache reuses.

In eager runs alone: code that is compiled would be traced with the watch in it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.observation.observation import AttentionUse, CacheUse
from pytest_diffopt.preparation.attention import attention_layers, can_be_told
from pytest_diffopt.preparation.caching import cache_hooks

if TYPE_CHECKING:
    from pytest_diffopt.preparation.pipeline import Prepared


@dataclass
class _Layer:
    processor: str
    told: bool
    runs: int = 0
    backends: dict[str, int] = field(default_factory=dict)


@dataclass
class AttentionWatch:
    """By which backend the attention layers of each component ran."""

    _layers: dict[tuple[int, str, str], _Layer] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self, prepared: Prepared, current_call: Callable[[], int]) -> Iterator[None]:
        """While the context is open. diffusers' dispatcher looks its functions up in a table: that is where they are seen."""
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

        running: list[_Layer] = []

        def entered(component: str, path: str, layer: Any, *_: Any) -> None:
            key = current_call(), component, path
            name = type(getattr(layer, "processor", None)).__name__
            seen = self._layers.setdefault(key, _Layer(name, can_be_told(layer)))
            seen.runs += 1
            running.append(seen)

        def left(*_: Any) -> None:
            running.pop()

        def counted(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def dispatched(*args: Any, **kwargs: Any) -> Any:
                if running:
                    running[-1].backends[backend] = running[-1].backends.get(backend, 0) + 1
                return function(*args, **kwargs)

            return dispatched

        with contextlib.ExitStack() as stack:
            for component, module in prepared.components.items():
                for path, layer in attention_layers(module):
                    before = functools.partial(entered, component, path)
                    stack.callback(layer.register_forward_pre_hook(before).remove)
                    stack.callback(layer.register_forward_hook(left, always_call=True).remove)
            table = registry._backends
            originals = dict(table)
            stack.callback(table.update, originals)
            for name, function in originals.items():
                table[name] = counted(str(getattr(name, "value", name)), function)
            yield

    def record(self) -> tuple[AttentionUse, ...]:
        """What was seen, by call, component and path."""
        return tuple(
            AttentionUse(
                call, component, path, seen.processor, seen.told, seen.runs, dict(sorted(seen.backends.items()))
            )
            for (call, component, path), seen in sorted(self._layers.items())
        )


@dataclass
class _Cache:
    entered: int = 0
    computed: int = 0
    stale: int = 0
    first_seen: set[int] = field(default_factory=set)


@dataclass
class CacheWatch:
    """How often the modules under a cache's hooks were entered, and how often they computed."""

    _caches: dict[tuple[int, str], _Cache] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self, prepared: Prepared, current_call: Callable[[], int]) -> Iterator[None]:
        """While the context is open. A hook calls the module's own forward where it computes, and only there."""
        with contextlib.ExitStack() as stack:
            for caching in prepared.recipe.caching:
                component = caching.component
                for _, hook in cache_hooks(prepared.components[component], caching.kind):
                    if hook.fn_ref.original_forward is not None:
                        self._watch(stack, hook, component, current_call)
            yield

    def _watch(self, stack: contextlib.ExitStack, hook: Any, component: str, current_call: Callable[[], int]) -> None:
        reference = hook.fn_ref
        forward, original = reference.forward, reference.original_forward
        entries: list[tuple[int, list[bool]]] = []  # the batch that came in, and whether all of it was computed

        def entered(*args: Any, **kwargs: Any) -> Any:
            seen = self._caches.setdefault((current_call(), component), _Cache())
            entry: tuple[int, list[bool]] = (_batch(args, kwargs), [])
            entries.append(entry)
            try:
                result = forward(*args, **kwargs)
            finally:
                entries.pop()
            computed = any(entry[1])
            seen.entered += 1
            seen.computed += computed
            if id(hook) not in seen.first_seen:
                seen.first_seen.add(id(hook))
                seen.stale += not computed
            return result

        def computing(*args: Any, **kwargs: Any) -> Any:
            if entries:
                batch, computed = entries[-1]
                computed.append(_batch(args, kwargs) >= batch)  # half a batch: the other half is approximated
            return original(*args, **kwargs)

        reference.forward, reference.original_forward = entered, computing
        stack.callback(_give_back, reference, forward, original)

    def record(self) -> tuple[CacheUse, ...]:
        """What was seen, by call and component."""
        return tuple(
            CacheUse(call, component, len(seen.first_seen), seen.entered, seen.computed, seen.stale)
            for (call, component), seen in sorted(self._caches.items())
        )


def _give_back(reference: Any, forward: Any, original: Any) -> None:
    reference.forward, reference.original_forward = forward, original


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    import torch

    given = kwargs.get("hidden_states", next((one for one in args if isinstance(one, torch.Tensor)), None))
    return int(given.shape[0]) if isinstance(given, torch.Tensor) and given.dim() else 0
