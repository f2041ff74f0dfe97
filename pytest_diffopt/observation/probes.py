"""Probes on live modules: what they return, how often they run, and the same modules in a wider dtype.

None of them touches compiled code: a module that is compiled whole is recorded from outside its compiled call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Protocol

from pytest_diffopt.observation.compilation import meant_codes
from pytest_diffopt.observation.outputs import leaves
from pytest_diffopt.preparation import compilation
from pytest_diffopt.preparation.linear_layers import backend_of

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.observation.outputs import OutputRecorder
    from pytest_diffopt.preparation.pipeline import Prepared


class RunningWatch(Protocol):
    """Who wants to know which component runs."""

    def entered(self, component: str) -> None: ...

    def left(self, component: str) -> None: ...


SENSITIVITY_SEED = 7919
"""Added to the recipe's seed in the sensitivity run; any number will do."""


@contextlib.contextmanager
def recording(prepared: Prepared, recorder: OutputRecorder, *watches: RunningWatch) -> Iterator[None]:
    """Write down what each component returns, without a hook on anything that is compiled whole.

    The watches hear which component runs.
    """
    with contextlib.ExitStack() as stack:
        if not prepared.is_model:
            recordings = [_Recording(name, module, recorder, watches) for name, module in prepared.components.items()]
            for one in recordings:
                one.install(stack)
            stack.enter_context(_around_wrappers(recordings))
        yield


@contextlib.contextmanager
def _around_wrappers(recordings: Sequence[_Recording]) -> Iterator[None]:
    """Record what ``torch.compile(component)`` returns, wherever a pipeline keeps that wrapper: inside it is a graph."""
    from torch._dynamo import OptimizedModule

    kind: Any = OptimizedModule
    by_module = {id(compilation.original_module(one.module)): one for one in recordings}
    original = kind.__call__
    own = "__call__" in vars(kind)

    def call(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        one = by_module.get(id(vars(wrapper).get("_modules", {}).get("_orig_mod")))
        inner = functools.partial(original, wrapper)
        return inner(*args, **kwargs) if one is None else one.around(inner)(*args, **kwargs)

    kind.__call__ = call
    try:
        yield
    finally:
        if own:
            kind.__call__ = original
        else:
            del kind.__call__


class _Recording:
    """Records one component: its call, and an autoencoder's ``encode`` and ``decode``; only the outermost of them."""

    def __init__(
        self, name: str, module: torch.nn.Module, recorder: OutputRecorder, watches: Sequence[RunningWatch]
    ) -> None:
        self.name, self.module, self.recorder, self.watches = name, module, recorder, watches
        self.depth = 0

    def install(self, stack: contextlib.ExitStack) -> None:
        module: Any = self.module
        compiled_call = getattr(module, "_compiled_call_impl", None)
        if compiled_call is not None:
            self._replace(stack, "_compiled_call_impl", self.around(compiled_call))
        else:
            stack.callback(module.register_forward_pre_hook(self._entered).remove)
            stack.callback(module.register_forward_hook(self._left, always_call=True).remove)
        for method in ("encode", "decode"):
            original = getattr(module, method, None)
            # a submodule of that name is no method; one that was compiled by itself is a function on the instance
            if inspect.ismethod(original) or (method in vars(module) and inspect.isfunction(original)):
                self._replace(stack, method, self.around(original))

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if _traced():
                return original(*args, **kwargs)
            self._enter()
            try:
                result = original(*args, **kwargs)
            finally:
                self._leave()
            if self.depth == 0:
                self.recorder.record(self.name, result)
            return result

        return recorded

    def _enter(self) -> None:
        if self.depth == 0:
            for watch in self.watches:
                watch.entered(self.name)
        self.depth += 1

    def _leave(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            for watch in self.watches:
                watch.left(self.name)

    def _entered(self, *_: Any) -> None:
        if not _traced():
            self._enter()

    def _left(self, _module: Any, _args: Any, result: Any) -> None:
        if _traced():
            return
        self._leave()
        if self.depth == 0 and result is not None:
            self.recorder.record(self.name, result)

    def _replace(self, stack: contextlib.ExitStack, attribute: str, value: Any) -> None:
        module = self.module
        if attribute in vars(module):
            stack.callback(object.__setattr__, module, attribute, vars(module)[attribute])
        else:
            stack.callback(object.__delattr__, module, attribute)
        object.__setattr__(module, attribute, value)


def _traced() -> bool:
    """Whether this call is traced as part of something else: nothing of ours may enter its guards."""
    import torch

    return torch.compiler.is_compiling()


@contextlib.contextmanager
def counting_executions(
    prepared: Prepared, counts: dict[tuple[int, str, str], int], current_call: Callable[[], int]
) -> Iterator[None]:
    """Count how often the forward of each component, of its parts and of each block in it really runs in an eager run.

    Counted by code object, so that a caller who holds ``forward`` itself is counted like one who calls the module.
    """
    meant: set[CodeType] = set()
    names: dict[int, tuple[str, str, frozenset[CodeType]]] = {}
    roots: dict[CodeType, list[str]] = {}
    for component, module in prepared.components.items():
        root = compilation.original_module(module)
        named = dict(compilation.named_modules(root))
        repeated = set(getattr(root, "_repeated_blocks", None) or ())
        paths = {
            path: inner
            for path, inner in named.items()
            if "." not in path
            or path.rpartition(".")[2].isdigit()
            or type(inner).__name__ in repeated
            or hasattr(inner, "_diffusers_hook")
        }
        for path, inner in paths.items():
            codes = meant_codes(inner._call_impl)
            if codes:
                own = next(iter(codes))  # the class's forward where it has one: what every way of calling it runs
                meant.add(own)
                names[id(inner)] = (component, path, frozenset({own}))
                if not path:
                    roots.setdefault(own, []).append(component)
    before = sys.getprofile()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in meant:
            owner = frame.f_locals.get("self")
            named = names.get(id(owner))
            only = roots.get(frame.f_code, [])
            if named is None and len(only) == 1 and getattr(type(owner), "forward", None) is not None:
                named = (only[0], "", frozenset({frame.f_code}))  # a copy that the pipeline keeps of the component
            if named is not None and frame.f_code in named[2]:  # not a base class's forward that it calls
                key = (current_call(), named[0], named[1])
                counts[key] = counts.get(key, 0) + 1

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def perturb(arguments: Mapping[str, Any]) -> bool:
    """Change a model's inputs in place, for a sensitivity run; says whether anything could be changed.

    In place, so that strides, views of one storage and the same tensor given twice stay what they are. Numbers shrink by
    up to a third, so that a mask's infinities, a position's range and the sign of a scale stay valid; integers are put in
    another order, so that they stay valid indices.
    """
    import torch

    generator = torch.Generator("cpu").manual_seed(SENSITIVITY_SEED)
    changed = False
    seen = set()
    with torch.no_grad():
        for _, tensor in leaves(arguments):
            if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in seen:
                continue
            seen.add(tensor.untyped_storage().data_ptr())
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            if tensor.is_floating_point() or tensor.is_complex():
                shrink = 1 - torch.rand(flat.shape, generator=generator) / 3
                new = torch.where(torch.isfinite(flat), flat * shrink.to(flat.device, flat.real.dtype), flat)
            else:
                new = flat.flip(0)
            changed |= not torch.equal(torch.nan_to_num(new), torch.nan_to_num(flat))
            flat.copy_(new)
    return changed


def widen(prepared: Prepared) -> torch.dtype:
    """Make a live pipeline compute in the next wider dtype; weights keep their values. Returns that dtype.

    Quantized layers keep the values of their weights and multiply in the wider dtype where they allow it (8-bit does not).

    Raises:
        NotImplementedError: they do not, with the reason.
    """
    import torch

    present = {p.dtype for m in prepared.components.values() for p in m.parameters() if p.is_floating_point()}
    low = {torch.float16, torch.bfloat16}
    if present == {torch.float64}:
        raise NotImplementedError("there is no wider dtype than float64")
    wide = torch.float32 if present & low or not present else torch.float64
    for module in prepared.components.values():
        for layer in module.modules():
            if (backend := backend_of(layer)) is not None:
                backend.widen(layer, wide)
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.dtype != wide:
                    setattr(layer, name, torch.nn.Parameter(parameter.detach().to(wide), requires_grad=False))
            for name, buffer in list(layer.named_buffers(recurse=False)):
                if buffer is not None and buffer.is_floating_point():
                    layer._buffers[name] = buffer.to(wide)
    return wide


def cast_tensors(value: Any, dtype: torch.dtype) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast_tensors(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cast_tensors(item, dtype) for item in value)
    return value
