"""Every name of torch that the simulated GPU takes for a while, and gives back.

Each change is a place, a name and a value; what stood there is written down first. torch's own modules are changed, and
the few of others that bound a name of torch when they were imported; those that are imported later are met then.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pytest_diffopt.accelerators.simulated import boundary
from pytest_diffopt.accelerators.simulated.boundary import DeviceProperties
from pytest_diffopt.accelerators.simulated.imports import AfterImport

_ops = torch.ops.pytest_diffopt_sim

_ABSENT = object()

Action = Callable[[types.ModuleType, contextlib.ExitStack], None]
"""What is done to a module, to be given back when the stack is closed."""


def set_for_a_while(owner: Any, name: str, value: object, borrowed: contextlib.ExitStack) -> None:
    """Set an attribute until ``borrowed`` is closed; one that was not there is gone again then."""
    before = vars(owner).get(name, _ABSENT)

    def give_back() -> None:
        if before is not _ABSENT:
            setattr(owner, name, before)
        elif name in vars(owner):
            delattr(owner, name)

    borrowed.callback(give_back)
    setattr(owner, name, value)


def keep(table: dict[Any, Any], borrowed: contextlib.ExitStack) -> None:
    """A dictionary holds what it holds now, once ``borrowed`` is closed."""
    before = dict(table)

    def give_back() -> None:
        table.clear()
        table.update(before)

    borrowed.callback(give_back)


def borrow(properties: DeviceProperties, devices: int, borrowed: contextlib.ExitStack) -> None:
    """Make torch's Python know the simulated GPU, until ``borrowed`` is closed."""
    names = boundary.names(properties, devices)
    for name, value in names.items():
        set_for_a_while(torch._C, name, value, borrowed)
    borrowed.callback(names["_cuda_record_memory_history"], None)
    _borrow_torch_cuda(properties, names, borrowed)
    _borrow_storages(borrowed)
    _borrow_others(borrowed)


# ------------------------------------------------------------------------------------------------------- torch.cuda


def _borrow_torch_cuda(properties: DeviceProperties, names: dict[str, Any], borrowed: contextlib.ExitStack) -> None:
    cuda = torch.cuda
    cudnn: Any = sys.modules["torch.backends.cudnn"]
    bound = {**names, **_classes()}
    for module in (cuda, cuda.streams, cuda.graphs, cuda.memory, cuda.nvtx, cudnn):
        for name in [one for one in vars(module) if one in bound]:  # it bound the name when it was imported
            set_for_a_while(module, name, bound[name], borrowed)
    values: dict[str, Any] = {
        "_initialized": False,
        "_queued_calls": list(cuda._queued_calls),
        "_cached_device_count": None,
        "_device_count_nvml": lambda: -1,  # a real GPU of this machine is hidden
        "_is_in_bad_fork": names["_cuda_isInBadFork"],
        "_exchange_device": names["_cuda_exchangeDevice"],
        "_maybe_exchange_device": names["_cuda_maybeExchangeDevice"],
        "_get_device_properties": lambda device: properties,
        "default_generators": (),
    }
    for name, value in values.items():
        set_for_a_while(cuda, name, value, borrowed)
    set_for_a_while(torch.version, "cuda", boundary.CUDA_VERSION, borrowed)
    set_for_a_while(cudnn, "_init", lambda: True, borrowed)
    set_for_a_while(cudnn, "version", names["_cudnn"].getVersionInt, borrowed)
    # cuDNN's recurrent networks are computed by their cells
    set_for_a_while(cudnn, "is_acceptable", lambda tensor: False, borrowed)
    cuda._check_bf16_tensor_supported.cache_clear()
    borrowed.callback(cuda._check_bf16_tensor_supported.cache_clear)
    borrowed.callback(_ask_again)
    _refuse_after_a_fork()


_made: dict[str, Any] = {}


def _classes() -> dict[str, Any]:
    """torch.cuda's classes, by their own source, on the bases of the boundary: those that stand there have no base."""
    if not _made:
        wanted = {"streams": ("Stream", "ExternalStream", "Event"), "graphs": ("CUDAGraph",), "memory": ("MemPool",)}
        for module, names in wanted.items():
            remade = _run_again(f"torch.cuda.{module}")
            _made.update({name: getattr(remade, name) for name in names})
    return _made


def _run_again(name: str) -> types.ModuleType:
    """A second module of that source; the one that everybody imported stays what it is."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_SET_REQUIRES_INIT = "_ZN5torch5utils24set_requires_device_initEN3c1010DeviceTypeEb"
_CUDA = 1  # c10::DeviceType::CUDA


def _ask_again() -> None:
    """C++ asks ``torch.cuda._lazy_init`` once, and remembers that it succeeded: from here on it is asked again."""
    library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_python.so"))
    function = library[_SET_REQUIRES_INIT]
    function.argtypes = [ctypes.c_int8, ctypes.c_bool]
    function.restype = None
    function(_CUDA, True)


@functools.cache  # what is registered stays
def _refuse_after_a_fork() -> None:
    """As on CUDA: a child that was forked asks ``_lazy_init`` again, which refuses what its parent initialized."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_ask_again)


# --------------------------------------------------------------------------------------------------------- storages


def _borrow_storages(borrowed: contextlib.ExitStack) -> None:
    """A build of torch for the CPU makes no storage on CUDA, and resizes none."""
    storage: Any = torch.UntypedStorage
    make, resize = storage.__new__, storage.resize_

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return make(cls, *args, **kwargs)
        given = args[0] if args else kwargs.get("size", 0)
        if isinstance(given, int):
            return torch.empty(given, dtype=torch.uint8, device=device).untyped_storage()
        return torch.tensor(list(given), dtype=torch.uint8, device=device).untyped_storage()

    def resize_(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return resize(self, size)
        _ops.resize_storage(torch.empty(0, dtype=torch.uint8, device=self.device).set_(self), int(size))
        return self

    set_for_a_while(storage, "__new__", __new__, borrowed)
    set_for_a_while(storage, "resize_", resize_, borrowed)
    set_for_a_while(torch._C._dynamo.guards, "_empty_strided_cuda", boundary.empty_strided, borrowed)


# ----------------------------------------------------------------------------------------- who bound a name of torch


def _dynamo_interface(module: Any, borrowed: contextlib.ExitStack) -> None:
    """Dynamo's table of what a device can do keeps classes and functions of the time at which it was imported."""
    interface, cuda = module.CudaInterface, torch.cuda
    for name in ("Stream", "Event"):
        set_for_a_while(interface, name, getattr(cuda, name), borrowed)
    for name, value in {
        "exchange_device": cuda._exchange_device,
        "maybe_exchange_device": cuda._maybe_exchange_device,
        "get_raw_stream": vars(torch._C)["_cuda_getCurrentRawStream"],
    }.items():
        set_for_a_while(interface, name, staticmethod(value), borrowed)
    # Triton would compile for a driver that is not there
    set_for_a_while(interface, "is_triton_capable", staticmethod(lambda device=None: False), borrowed)
    for remembered in (module.caching_worker_current_devices, module.caching_worker_device_properties):
        keep(remembered, borrowed)
        remembered.clear()
    keep(module.device_interfaces, borrowed)
    set_for_a_while(module, "_device_initialized", False, borrowed)


def _borrow_others(borrowed: contextlib.ExitStack) -> None:
    from pytest_diffopt.accelerators.simulated import inductor, libraries

    actions: dict[str, Action] = {
        "torch._dynamo.device_interface": _dynamo_interface,
        **inductor.ACTIONS,
        **libraries.ACTIONS,
    }

    def act(name: str) -> Callable[[types.ModuleType], None]:
        return lambda module: actions[name](module, borrowed)

    watch = AfterImport({name: act(name) for name in actions}, libraries.AROUND)
    borrowed.callback(watch.stop)
    watch.start()
