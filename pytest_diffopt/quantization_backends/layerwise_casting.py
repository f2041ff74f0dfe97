"""layerwise_casting: diffusers' hooks that hold a layer's weights in a narrow dtype, and widen them for its forward."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_diffopt.part import refused
from pytest_diffopt.quantization_backends.backend import (
    UNQUANTIZED,
    Backend,
    Stored,
    bytes_of,
    dtype_name,
    kind_name,
    one_of,
    true_or_false,
)

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.observation.observation import Layer
    from pytest_diffopt.recipe import Quantization

HOOK = "layerwise_casting"
DEFAULT_STORAGE = "float8_e4m3fn"
_WIDE = ("float32", "float16", "bfloat16")


def _patterns(value: object) -> object:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) and one for one in patterns):
        raise refused(value, "a regular expression for names of modules, or a list of these")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise refused(pattern, f"a regular expression ({error})") from None
    return list(patterns)


def _classes(value: object) -> object:
    classes = (value,) if isinstance(value, str | type) else value
    if not isinstance(classes, list | tuple):
        raise refused(value, "names of classes, e.g. ['LayerNorm']")
    names = [one.__name__ if isinstance(one, type) else one for one in classes]
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise refused(name, "the name of a class, without its module, e.g. 'LayerNorm'")
    return names


class _LayerwiseCasting(Backend):
    name = library = "layerwise_casting"
    compute_key = "compute_dtype"
    rules = {
        "storage_dtype": one_of("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", prepare=dtype_name),
        "compute_dtype": one_of(*_WIDE, prepare=dtype_name),
        "skip_modules_pattern": _patterns,
        "skip_modules_classes": _classes,
        "non_blocking": true_or_false,
    }
    while_loading = False

    def quantize(
        self, component: torch.nn.Module, paths: list[str], quantization: Quantization, device: torch.device
    ) -> None:
        """The component as a whole, by diffusers' own function: other layers than Linears are cast as well."""
        import torch
        from diffusers.hooks import apply_layerwise_casting

        kwargs = quantization.kwargs
        storage = getattr(torch, kwargs.get("storage_dtype", DEFAULT_STORAGE))
        compute = kwargs.get("compute_dtype")
        given: dict[str, Any] = {"non_blocking": kwargs.get("non_blocking", False)}
        if classes := self._classes_in(component, kwargs):
            given["skip_modules_classes"] = classes
        own: Any = component
        wide = getattr(torch, compute) if compute else next(p.dtype for p in component.parameters())
        if hasattr(component, "enable_layerwise_casting"):
            if skipped := self._skipped(kwargs, quantization.skip_modules):
                given["skip_modules_pattern"] = tuple(skipped)
            own.enable_layerwise_casting(storage_dtype=storage, compute_dtype=wide, **given)
        else:
            given["skip_modules_pattern"] = self._all_patterns(component, kwargs, quantization.skip_modules)
            apply_layerwise_casting(component, storage, wide, **given)

    def named_out(self, quantization: Quantization) -> tuple[str, ...]:
        return tuple(quantization.skip_modules)  # what patterns leave is in `kept_plain`

    def _skipped(self, kwargs: Mapping[str, Any], names: Sequence[str] = ()) -> tuple[str, ...]:
        exact = tuple(rf"(^|\.){re.escape(name)}($|\.)" for name in names)
        patterns = tuple(kwargs.get("skip_modules_pattern") or ())
        if exact and not patterns:  # one that is given stands in place of the library's own
            from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

            patterns = tuple(DEFAULT_SKIP_MODULES_PATTERN)
        return (*patterns, *exact)

    def _all_patterns(self, component: Any, kwargs: Mapping[str, Any], names: Sequence[str] = ()) -> tuple[str, ...]:
        """As ``ModelMixin.enable_layerwise_casting`` puts them together."""
        from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

        return (
            *(self._skipped(kwargs, names) or DEFAULT_SKIP_MODULES_PATTERN),
            *(getattr(component, "_keep_in_fp32_modules", None) or ()),
            *(getattr(component, "_skip_layerwise_casting_patterns", None) or ()),
        )

    def _classes_in(self, component: torch.nn.Module, kwargs: Mapping[str, Any]) -> tuple[type, ...]:
        names = kwargs.get("skip_modules_classes") or ()
        return tuple({base for m in component.modules() for base in type(m).__mro__ if base.__name__ in names})

    def kept_plain(self, component: torch.nn.Module, quantization: Quantization) -> tuple[str, ...]:
        """Linear layers that the patterns and classes leave alone, by their paths."""
        return self._left(component, quantization.kwargs, quantization.skip_modules)

    def _left(
        self, component: torch.nn.Module, kwargs: Mapping[str, Any], names: Sequence[str] = ()
    ) -> tuple[str, ...]:
        import torch

        patterns = self._all_patterns(component, kwargs, names)
        classes = self._classes_in(component, kwargs)
        modules = dict(component.named_modules())

        def left(path: str) -> bool:
            steps = path.split(".")
            above = [".".join(steps[: count + 1]) for count in range(len(steps))]
            return any(
                isinstance(modules[one], classes) or any(re.search(pattern, one) for pattern in patterns)
                for one in above
            )

        return tuple(path for path, layer in modules.items() if isinstance(layer, torch.nn.Linear) and left(path))

    def is_layer(self, module: Any) -> bool:
        return hook_of(module) is not None

    def read(self, module: Any, count: int) -> Stored | None:
        weight, hook = module.weight, hook_of(module)
        stored = bytes_of(weight)
        dtype = kind_name(weight.dtype)
        cast = weight.dtype == hook.storage_dtype and stored == count * weight.dtype.itemsize
        return Stored(dtype if cast else UNQUANTIZED, stored, dtype=dtype, compute_dtype=kind_name(hook.compute_dtype))

    def owns(self, layer: Any, parameter: torch.Tensor) -> bool:
        hook = hook_of(layer)
        return hook is not None and parameter.dtype == hook.storage_dtype

    def widen(self, layer: Any, wide: torch.dtype) -> None:
        hook_of(layer).compute_dtype = wide

    def kwargs_of(self, component: torch.nn.Module, layers: list[Any]) -> dict[str, Any] | None:
        import torch

        for layer in layers:
            hook = hook_of(layer)
            if layer.weight.dtype != hook.storage_dtype:
                continue
            kwargs: dict[str, Any] = {
                "storage_dtype": kind_name(hook.storage_dtype),
                "compute_dtype": kind_name(hook.compute_dtype),
            }
            plain = [p for p, m in component.named_modules() if isinstance(m, torch.nn.Linear) and not self.is_layer(m)]
            by_library = self._left(component, kwargs)
            if further := [path for path in plain if path not in by_library]:
                defaults = self._all_patterns(object(), kwargs)
                kwargs["skip_modules_pattern"] = [*defaults, *(f"^{re.escape(path)}$" for path in further)]
            return kwargs
        return None

    def wrong(self, quantization: Quantization, layer: Layer) -> str:
        wanted = quantization.kwargs.get("storage_dtype", DEFAULT_STORAGE)
        if layer.library != self.library:
            return f"in {layer.format} of {layer.library}, with no hook that casts it"
        if layer.format != wanted:
            return f"stored in {layer.format}, not {wanted}"
        compute = quantization.kwargs.get("compute_dtype")
        if compute is not None and layer.compute_dtype != compute:
            return f"computes in {layer.compute_dtype}, not {compute}"
        return ""

    def most_bytes(self, layer: Layer) -> int:
        return layer.parameters * (1 if layer.format.startswith("float8") else 2)


def hook_of(module: Any) -> Any:
    """diffusers' casting hook on a module whose forward really runs it, or None."""
    held = vars(module) if hasattr(module, "__dict__") else {}
    registry = held.get("_diffusers_hook")
    return registry.get_hook(HOOK) if registry is not None and "forward" in held else None


LAYERWISE_CASTING = _LayerwiseCasting()
