"""Probes on live modules: what they return, how often they run, and the same modules in a wider dtype.

None of them touches compiled code: a module that is compiled whole is recorded from outside its compiled call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from pytest_diffopt.observation.compilation import meant_code
from pytest_diffopt.preparation import compilation
from pytest_diffopt.preparation.quantization import has_quantized_layers

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.observation.outputs import OutputRecorder
    from pytest_diffopt.preparation.pipeline import Prepared

SENSITIVITY_SEED = 7919
"""Added to the recipe's seed in the sensitivity run; any number will do."""


@contextlib.contextmanager
def recording(prepared: Prepared, recorder: OutputRecorder) -> Iterator[None]:
    """Write down what each component returns, without a hook on anything that is compiled whole."""
    with contextlib.ExitStack() as stack:
        if not prepared.is_model:
            for name, module in prepared.components.items():
                _record_component(stack, name, module, recorder)
        yield


def _record_component(
    stack: contextlib.ExitStack, name: str, module: torch.nn.Module, recorder: OutputRecorder
) -> None:
    compiled_call: Any = getattr(module, "_compiled_call_impl", None)
    if compiled_call is not None:

        def from_outside(*args: Any, **kwargs: Any) -> Any:
            result = compiled_call(*args, **kwargs)
            recorder.record(name, result)
            return result

        object.__setattr__(module, "_compiled_call_impl", from_outside)
        stack.callback(object.__setattr__, module, "_compiled_call_impl", compiled_call)
    else:
        handle = module.register_forward_hook(lambda inner, args, result: recorder.record(name, result))
        stack.callback(handle.remove)
    for method in ("encode", "decode"):  # an autoencoder is called by these, not by its forward
        original: Any = getattr(module, method, None)
        if not callable(original):
            continue

        def recorded(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            result = _original(*args, **kwargs)
            recorder.record(name, result)
            return result

        own = method in vars(module)
        object.__setattr__(module, method, recorded)
        stack.callback(object.__setattr__ if own else _delete_attribute, module, method, *([original] if own else []))


def _delete_attribute(module: Any, name: str) -> None:
    object.__delattr__(module, name)


@contextlib.contextmanager
def counting_executions(
    prepared: Prepared, counts: dict[tuple[int, str, str], int], current_call: Callable[[], int]
) -> Iterator[None]:
    """Count how often the forward of each component, and of each block in it, really runs in an eager run.

    Counted by code object, so that a caller who holds ``forward`` itself is counted like one who calls the module.
    """
    meant: set[CodeType] = set()
    names: dict[int, tuple[str, str, CodeType]] = {}
    for component, module in prepared.components.items():
        root = compilation.original_module(module)
        paths = {path: inner for path, inner in root.named_modules() if path == "" or path.rpartition(".")[2].isdigit()}
        repeated = set(getattr(root, "_repeated_blocks", None) or ())
        paths |= {path: inner for path, inner in root.named_modules() if type(inner).__name__ in repeated}
        for path, inner in paths.items():
            code = meant_code(inner._call_impl)
            if code is not None:
                meant.add(code)
                names[id(inner)] = (component, path, code)
    before = sys.getprofile()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in meant:
            named = names.get(id(frame.f_locals.get("self")))
            if named is not None and named[2] is frame.f_code:  # not a base class's forward that it calls
                key = (current_call(), named[0], named[1])
                counts[key] = counts.get(key, 0) + 1

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def perturbed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A model's inputs with every floating tensor changed by noise of its own size: the inputs of a sensitivity run."""
    import torch

    generator = torch.Generator("cpu").manual_seed(SENSITIVITY_SEED)

    def change(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
            scale = float(value.detach().float().std()) if value.numel() > 1 else abs(float(value.detach().float()))
            return (value + (noise * (scale or 1.0)).to(value.device, value.dtype)).to(value.dtype)
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(change(item) for item in value)
        return value

    return {name: change(value) for name, value in arguments.items()}


def widen(prepared: Prepared) -> torch.dtype:
    """Make a live pipeline compute in the next wider dtype; weights keep their values. Returns that dtype.

    Quantized layers keep their quantized weights and multiply in the wider dtype where they allow it (8-bit does not).
    """
    import torch

    present = {p.dtype for m in prepared.components.values() for p in m.parameters() if p.is_floating_point()}
    low = {torch.float16, torch.bfloat16}
    wide = torch.float32 if present & low or not present else torch.float64
    quantized_layers = has_quantized_layers(prepared.components.values())
    if quantized_layers and wide == torch.float64:
        raise NotImplementedError("quantized layers do not multiply in float64")
    for module in prepared.components.values():
        for layer in module.modules():
            if hasattr(getattr(layer, "weight", None), "quant_state"):
                quantized: Any = layer
                quantized.compute_dtype = wide
                if quantized.weight.quant_state is not None:
                    quantized.weight.quant_state.dtype = wide
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
