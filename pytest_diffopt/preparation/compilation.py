"""Compiles what a recipe says, a component, its repeated blocks, a part or a method; and says what is compiled now."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.part import did_you_mean
from pytest_diffopt.preparation.linear_layers import is_linear_like
from pytest_diffopt.references import resolve_callable

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.recipe import Compilation

_ENOUGH_LINEARS = 4
"""A repeated module with fewer Linear layers is a projection, not a block worth compiling."""


Compiled = tuple[int, str]
"""The identity of a module, and the name of its method that is compiled; empty for its call."""


def compiled_ids(components: Mapping[str, torch.nn.Module]) -> set[Compiled]:
    """What is compiled already."""
    found: set[Compiled] = set()
    for module in components.values():
        root = original_module(module)
        if is_compiled(module):
            found.add((id(root), ""))
        for inner in root.modules():
            found |= {(id(inner), "")} if is_compiled(inner) else set()
            found |= {(id(inner), name) for name in compiled_methods(inner)}
    return found


def uncompile(module: torch.nn.Module, keep: set[Compiled]) -> None:
    """Take compiled calls and methods off a module and its parts, except those that were there before."""
    for inner in original_module(module).modules():
        if (id(inner), "") not in keep and getattr(inner, "_compiled_call_impl", None) is not None:
            object.__setattr__(inner, "_compiled_call_impl", None)
        for name in compiled_methods(inner):
            if (id(inner), name) not in keep and name in vars(inner):
                original = vars(inner)[name]._torchdynamo_orig_callable
                object.__delattr__(inner, name)
                if getattr(inner, name, None) != original:  # it stood on the instance before
                    object.__setattr__(inner, name, original)


def original_module(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the module itself."""
    inner: Any = getattr(module, "_orig_mod", module)
    return inner  # type: ignore[no-any-return]


def named_modules(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """What ``named_modules`` gives, with paths as they are without ``torch.compile``'s wrappers."""
    for path, inner in original_module(module).named_modules():
        if not hasattr(inner, "_orig_mod"):
            yield ".".join(part for part in path.split(".") if part != "_orig_mod"), inner


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calling this very module enters a compiled region, by itself or by its ``forward``."""
    if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
        return True
    return is_compiled_function(getattr(module, "forward", None))


def is_compiled_function(function: object) -> bool:
    """Whether it is what ``torch.compile`` made of a function, as it is or inside a ``functools.partial``."""
    while isinstance(function, functools.partial):
        function = function.func
    made = getattr(function, "_torchdynamo_orig_callable", None) is not None
    return made and not getattr(function, "_torchdynamo_disable", False)


def compiled_methods(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the methods of this very module that are compiled, ``forward`` apart: of the instance, and of its class."""
    kind: Any = type(module)
    own = (name for name, value in vars(module).items() if is_compiled_function(value))
    return tuple(name for name in dict.fromkeys((*own, *_of_class(kind))) if name not in _CALLS)


_CALLS = ("forward", "_compiled_call_impl")


@functools.cache
def _of_class(kind: Any) -> tuple[str, ...]:
    import torch

    classes = kind.__mro__[: kind.__mro__.index(torch.nn.Module)] if torch.nn.Module in kind.__mro__ else ()
    return tuple(name for one in classes for name, value in vars(one).items() if is_compiled_function(value))


def resolve_backend(backend: str | Callable[..., Any]) -> str | Callable[..., Any]:
    """``"package.module:function"`` imported; anything else as it is. Raises UnresolvedReference."""
    return resolve_callable(backend) if isinstance(backend, str) and ":" in backend else backend


def compile_components(
    components: Mapping[str, torch.nn.Module],
    compilations: tuple[Compilation, ...],
    *,
    backend: str | None = None,
    fullgraph: bool | None = None,
) -> None:
    """Compile in place, in the recipe's order.

    Args:
        backend, fullgraph: used instead of what the recipe says, where given.

    Raises:
        PreparationError: a component is not there, or has no blocks that repeat.
    """
    import torch

    own = compiled_ids(components)
    for compilation in compilations:
        if compilation.scope == "factory":
            continue  # the factory has compiled what it compiles
        module, method = target_of(components, compilation.component)
        if compilation.memory_format is not None:
            module.to(memory_format=getattr(torch, compilation.memory_format))  # type: ignore[call-overload]
        kwargs: dict[str, Any] = {
            "backend": backend if backend is not None else resolve_backend(compilation.backend),
            "fullgraph": compilation.fullgraph if fullgraph is None else fullgraph,
            "dynamic": compilation.dynamic,
        }
        overridden = backend is not None and backend != "inductor"  # other backends refuse Inductor's arguments
        if compilation.mode is not None and not overridden:
            kwargs["mode"] = compilation.mode
        if compilation.options and not overridden:
            kwargs["options"] = dict(compilation.options)
        if (id(original_module(module)), method) in own:
            continue  # a factory that compiled the component itself is judged as it stands
        if method:
            object.__setattr__(module, method, torch.compile(getattr(module, method), **kwargs))
        elif compilation.scope == "module":
            compile_module(module, kwargs)
        else:
            _compile_repeated_blocks(compilation.component, module, kwargs)


def target_of(components: Mapping[str, torch.nn.Module], name: str) -> tuple[torch.nn.Module, str]:
    """The module that ``"vae.decoder"`` or ``"vae.decode"`` names, and the name of its method; empty for its call.

    Raises:
        PreparationError: there is nothing of that name.
    """
    import torch

    first, *path = name.split(".")
    if first not in components:
        raise PreparationError(
            f"compilation.component: found {name!r}; {did_you_mean(name, components)}"
            f"the pipeline has: {', '.join(sorted(components))}"
        )
    module = components[first]
    for depth, part in enumerate(path):
        found = getattr(original_module(module), part, None)
        if isinstance(found, torch.nn.Module):
            module = found
            continue
        if callable(found) and depth == len(path) - 1:
            return original_module(module), "" if part == "forward" else part
        root = original_module(module)
        parts = [*dict(root.named_children()), *(way for way in ("encode", "decode") if hasattr(root, way))]
        raise PreparationError(
            f"compilation.component: found {name!r}; {did_you_mean(part, parts)}"
            f"{'.'.join((first, *path[:depth]))} ({type(root).__name__}) has no part or method {part!r}; "
            f"it has: {', '.join(parts) or 'no parts'}"
        )
    return module, ""


def _compile_repeated_blocks(name: str, module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    own: Any = getattr(module, "compile_repeated_blocks", None)
    if own is not None and getattr(module, "_repeated_blocks", None):
        own(**kwargs)
        return
    wanted = set(getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ())
    if not wanted:
        wanted = {
            name for path, name in repeated_classes(module).items() if next(module.get_submodule(path).children(), None)
        }
    blocks = [module.get_submodule(path) for path in outermost(_named(module, wanted))]
    if not blocks:
        raise PreparationError(
            f"compilation.scope: found 'repeated_blocks', but {name} ({type(module).__name__}) names no repeated "
            f'blocks (_repeated_blocks) and has no list of equal modules; use scope = "module"'
        )
    for block in blocks:
        compile_module(block, kwargs)


def _named(module: torch.nn.Module, wanted: set[str]) -> list[str]:
    return [path for path, inner in module.named_modules() if type(inner).__name__ in wanted]


def outermost(paths: Iterable[str]) -> list[str]:
    """Paths that do not lie inside another of them: a compiled module's own parts are traced with it."""
    found: list[str] = []
    for path in sorted(paths, key=lambda path: path.count(".") if path else -1):
        if not any(outer == "" or path.startswith(outer + ".") for outer in found):
            found.append(path)
    return found


def compile_module(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Compile a module in place, as ``module.compile()`` does.

    Dynamo never begins a trace in torch's own modules, so ``torch.nn.Sequential(…).compile()`` compiles nothing at all;
    for these the trace begins in a function of ours, as ``torch.compile(module)`` does for them.
    """
    import torch

    own_compile = type(module).compile is not torch.nn.Module.compile
    if own_compile or not str(type(module).forward.__module__).startswith("torch."):
        module.compile(**kwargs)
        return

    inner: Any = module

    def call(*args: Any, **arguments: Any) -> Any:
        return inner._call_impl(*args, **arguments)

    call.__self__ = module  # type: ignore[attr-defined]  # so that it is known whose call this is
    object.__setattr__(module, "_compiled_call_impl", torch.compile(call, **kwargs))


def repeated_classes(module: torch.nn.Module) -> dict[str, str]:
    """path → class of every module that stands with another of its class in a list, e.g. transformer blocks."""
    import torch

    found: dict[str, str] = {}
    for path, inner in module.named_modules():
        if not isinstance(inner, torch.nn.ModuleList):
            continue
        classes = [type(child).__name__ for child in inner]
        for index, child in enumerate(inner):
            if classes.count(classes[index]) > 1 and _linears(child) >= 1:
                found[f"{path}.{index}" if path else str(index)] = classes[index]
    return found


def _linears(module: torch.nn.Module) -> int:
    return sum(is_linear_like(layer) for layer in module.modules())


def compiled_paths(module: torch.nn.Module) -> tuple[str, ...]:
    """The paths of the modules and methods in a component that enter a compiled region; ``""`` is the component itself."""
    paths = [""] if is_compiled(module) else []
    wrapped = {id(original_module(inner)) for inner in original_module(module).modules() if hasattr(inner, "_orig_mod")}
    for path, inner in named_modules(module):
        paths += [path] if is_compiled(inner) or id(inner) in wrapped else []
        paths += [f"{path}.{method}".lstrip(".") for method in compiled_methods(inner)]
    return tuple(dict.fromkeys(paths))


def disabled_paths(module: torch.nn.Module) -> tuple[str, ...]:
    """The paths of compiled modules whose forward is marked with ``torch.compiler.disable``: compiling them does nothing."""
    root = original_module(module)
    disabled = []
    for path in compiled_paths(module):
        owner, _, last = path.rpartition(".")
        found: Any = getattr(root.get_submodule(owner), last) if path else root
        forward = getattr(found, "forward", None)  # a method has none
        if getattr(forward, "_torchdynamo_disable", False):
            disabled.append(path)
    return tuple(disabled)


def siblings_not_compiled(module: torch.nn.Module) -> tuple[str, ...]:
    """Classes of blocks that stand beside compiled blocks and are not compiled: a regional compile that missed some.

    Blocks count as beside each other when their lists belong to the same module, and only when they are blocks: repeated,
    with several Linear layers. A list of plain projections is none.
    """
    import torch

    root = original_module(module)
    missed: dict[str, None] = {}
    for inner in root.modules():
        containers = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)
        lists = [child for child in inner.children() if isinstance(child, containers)]
        blocks = [block for one in lists for block in one.children()]
        compiled = {type(block).__name__ for block in blocks if is_compiled(block)}
        if not compiled:
            continue
        for block in blocks:
            holds_compiled = any(is_compiled(part) for part in block.modules())
            if not holds_compiled and _linears(block) >= _ENOUGH_LINEARS:
                missed[type(block).__name__] = None
    return tuple(missed)
