"""Other libraries know the simulated device: each list of devices that leaves it out, adapted here and given back.

Most of these libraries ask by name for one device after the other, and CUDA comes with its own branch. Intel's XPU came
later, to every place that lists devices: so in the functions of :data:`XPU_BRANCHES` the branch for ``xpu`` is taken by
``sim``. The function's *code* is exchanged, not the function: whoever imported it by its name runs the other code too, and
nobody keeps it when it is given back. :data:`OTHERS` are the places that need more than a name.

Nothing is imported for an adaptation. A library that is imported later is adapted then.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from pytest_diffopt.accelerators.simulated.imports import AfterImport

XPU_BRANCHES: dict[str, tuple[str, ...]] = {
    # Where a model without a device map goes, and the way back to floats; without a GPU they refuse ("No GPU found").
    "diffusers.quantizers.bitsandbytes.bnb_quantizer": (
        "BnB4BitDiffusersQuantizer.validate_environment",
        "BnB4BitDiffusersQuantizer.update_device_map",
        "BnB4BitDiffusersQuantizer._dequantize",
        "BnB8BitDiffusersQuantizer.validate_environment",
        "BnB8BitDiffusersQuantizer.update_device_map",
    ),
    # A pipeline that is offloaded refuses to be moved onto the device, or warns.
    "diffusers.pipelines.pipeline_utils": ("DiffusionPipeline.to",),
    "diffusers.modular_pipelines.modular_pipeline": ("ModularPipeline.to",),
    # Before 0.41: "Using streams for data transfer requires a CUDA device, or an Intel XPU device."
    "diffusers.hooks.group_offloading": ("apply_group_offloading",),
    # Where a model without a device map goes: else to the host.
    "transformers.quantizers.quantizer_bnb_4bit": ("Bnb4BitHfQuantizer.update_device_map",),
    "transformers.quantizers.quantizer_bnb_8bit": ("Bnb8BitHfQuantizer.update_device_map",),
    # What is reserved and not in use is free as well.
    "transformers.integrations.accelerate": ("get_max_memory",),
    # What is allocated ahead of loading is capped by the device's memory.
    "transformers.modeling_utils": ("caching_allocator_warmup",),
    # The device's cache is emptied between offloaded models.
    "accelerate.utils.memory": ("clear_device_cache",),
    # Quantized weights go over whole and are quantized there; the device has memory to share out; its gradient scaler.
    "accelerate.utils.modeling": (
        "set_module_tensor_to_device",
        "get_max_memory",
        "get_balanced_memory",
        "get_grad_scaler",
    ),
    # Where accelerate's own quantized loading puts a model; without a GPU it refuses.
    "accelerate.utils.bnb": ("load_and_quantize_model", "get_quantized_model_device_map"),
    # The device of Accelerator(), and of offloading hooks that were given none.
    "accelerate.state": ("PartialState.default_device",),
    # "Float8 dynamic quantization requires CUDA compute capability ≥8.9 or MI300+ or XPU."
    "torchao.float8.inference": ("_check_hardware_support",),
    # "fp16 mixed precision requires a device in (...)".
    "accelerate.accelerator": ("Accelerator.__init__",),
}
"""Functions, by their module, whose branch for ``xpu`` is taken by ``sim``. One that is not there is left out: versions
differ."""


def _adapt_get_device(torch_utils: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
    # It remembers its first answer: "cpu" if it was asked before the device was there.
    backend = getattr(torch_utils, "TorchDeviceBackend", None)
    if backend is not None and "_detect_device_type" in vars(backend):
        _set(backend, "_detect_device_type", staticmethod(lambda: "sim"), borrowed)
    elif (get_device := getattr(torch_utils, "get_device", None)) is not None:
        # before 0.41 a chain of names
        _exchange_code(inspect.unwrap(get_device), borrowed)
        if (forget := getattr(get_device, "cache_clear", None)) is not None:
            forget()
            borrowed.callback(forget)


def _adapt_device_map(pipeline_utils: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
    # DiffusionPipeline.from_pretrained(device_map="sim"): the list was made when the module was imported.
    names = getattr(pipeline_utils, "SUPPORTED_DEVICE_MAP", None)
    if isinstance(names, list) and "sim" not in names:
        names.append("sim")
        borrowed.callback(names.remove, "sim")


def _adapt_shared_state(state: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
    # Accelerate's states are shared by the process: one that was made in here names the device for good.
    def give_back(shared: dict[str, Any], before: dict[str, Any]) -> None:
        if getattr(shared.get("device"), "type", None) == "sim":
            shared.clear()
            shared.update(before)

    for name in ("PartialState", "AcceleratorState"):
        shared = getattr(getattr(state, name, None), "_shared_state", None)
        if isinstance(shared, dict):
            borrowed.callback(give_back, shared, dict(shared))


def _adapt_safe_open(safetensors: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
    # Its Rust side has a fixed list of device names: opened for the host, then moved tensor by tensor.
    original: Any = safetensors.safe_open

    @functools.wraps(original, updated=())
    def safe_open(filename: Any, framework: Any, device: Any = "cpu", **kwargs: Any) -> Any:
        if str(device).split(":")[0] != "sim":
            return original(filename, framework, device, **kwargs)
        return _FileForSim(original(filename, framework, "cpu", **kwargs), device)

    borrowed.callback(exchange_everywhere, "safe_open", safe_open, original)
    exchange_everywhere("safe_open", original, safe_open)


def exchange_everywhere(name: str, old: Any, new: Any) -> None:
    """Whoever imported ``old`` by its name holds ``new`` instead, and whoever is imported from now on will."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


OTHERS: dict[str, tuple[Callable[[types.ModuleType, contextlib.ExitStack], None], ...]] = {
    "diffusers.utils.torch_utils": (_adapt_get_device,),
    "diffusers.pipelines.pipeline_utils": (_adapt_device_map,),
    "accelerate.state": (_adapt_shared_state,),
    "safetensors": (_adapt_safe_open,),
}
"""What is done to a module, by its name, and how it is given back."""


class _FileForSim:
    """An open file whose tensors go to the device as they are read."""

    def __init__(self, file: Any, device: Any) -> None:
        self._file = file
        self._device = device

    def __enter__(self) -> _FileForSim:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def get_tensor(self, name: str) -> Any:
        return self._file.get_tensor(name).to(self._device)

    def get_tensors(self) -> dict[str, Any]:
        return {name: tensor.to(self._device) for name, tensor in self._file.get_tensors().items()}

    def get_slice(self, name: str) -> _SliceForSim:
        return _SliceForSim(self._file.get_slice(name), self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _SliceForSim:
    """A part of an open file, read when it is indexed."""

    def __init__(self, part: Any, device: Any) -> None:
        self._part = part
        self._device = device

    def __getitem__(self, index: Any) -> Any:
        return self._part[index].to(self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


# ------------------------------------------------------------------------------------------ adapting and giving back

_lock = threading.RLock()
_inside = 0
_borrowed = contextlib.ExitStack()


@contextlib.contextmanager
def adapted_libraries() -> Iterator[None]:
    """Other libraries know the simulated device inside this, those too that are imported in here; not after it.

    It nests, and threads may share it: what the first one in adapts, the last one out gives back.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def adapt_libraries() -> None:
    """The same until the process ends, for a test suite that has nowhere to open a context. Calling it again is free."""
    global _for_good
    with _lock:
        if not _for_good:
            _enter()
            _for_good = True


_for_good = False


def adapt_as_environment_says() -> None:
    """:func:`adapt_libraries` where ``DIFFOPT_SIM_ADAPT`` is 1: for programs in which only the import can be added.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    text = os.environ.get("DIFFOPT_SIM_ADAPT", "0")
    if text not in ("0", "1"):
        raise ValueError(f"DIFFOPT_SIM_ADAPT: found {text!r}; it takes 0 or 1")
    if text == "1":
        adapt_libraries()


def _enter() -> None:
    global _inside
    with _lock:
        if not _inside:
            watch = AfterImport({name: functools.partial(_adapt, name) for name in {**XPU_BRANCHES, **OTHERS}})
            try:
                watch.start()
            except BaseException:
                watch.stop()
                _borrowed.close()
                raise
            _borrowed.callback(watch.stop)
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            _borrowed.close()


def _adapt(name: str, module: types.ModuleType) -> None:
    for path in XPU_BRANCHES.get(name, ()):
        if (function := _find(module, path)) is not None:
            _exchange_code(function, _borrowed)
    for adapt in OTHERS.get(name, ()):
        adapt(module, _borrowed)


def _find(module: types.ModuleType, path: str) -> types.FunctionType | None:
    """A function by its path in a module, below properties and decorators."""
    found: Any = module
    for step in path.split("."):
        found = vars(found).get(step)
        if found is None:
            return None
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(found)
    return found if isinstance(found, types.FunctionType) else None


def _set(owner: Any, name: str, value: object, borrowed: contextlib.ExitStack) -> None:
    borrowed.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, value)


def _exchange_code(function: types.FunctionType, borrowed: contextlib.ExitStack) -> None:
    """The function takes ``sim`` where its source says ``xpu``."""
    original = function.__code__
    code = _with_sim(original, original.co_filename)
    if code is original:
        return
    for name in ("is_sim_available", "is_torch_sim_available"):  # what its calls of is_..xpu_available are now
        if name not in function.__globals__:
            function.__globals__[name] = _is_sim_available
            borrowed.callback(function.__globals__.pop, name)
    function.__code__ = code
    borrowed.callback(setattr, function, "__code__", original)


def _is_sim_available(*args: object, **kwargs: object) -> bool:
    return True


@functools.lru_cache(maxsize=256)  # contexts are opened around every run of a recipe
def _with_sim(code: types.CodeType, filename: str) -> types.CodeType:
    """The code that takes ``sim`` for ``xpu``, or itself. The file is for the cache: codes of two files may be equal."""
    names = tuple(re.sub(r"^(is_(?:torch_)?)?xpu(_available)?$", r"\1sim\2", name) for name in code.co_names)
    constants = tuple(_constant_with_sim(value) for value in code.co_consts)
    if names == code.co_names and constants == code.co_consts:
        return code
    return code.replace(co_names=names, co_consts=constants)


def _constant_with_sim(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _with_sim(value, value.co_filename)  # a function inside the function
    if isinstance(value, str):
        return re.sub(r"^xpu(?=:|$)", "sim", value)  # "xpu", and the beginning of f"xpu:{index}"
    if isinstance(value, (tuple, frozenset)) and "xpu" in value:
        if "cuda" in value or "cpu" in value:
            return type(value)((*value, "sim"))  # a list of names that something must be in
        return type(value)(_constant_with_sim(one) for one in value)  # the arguments of a call, f("xpu", **more)
    return value
