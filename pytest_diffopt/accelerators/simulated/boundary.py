"""What ``torch/cuda/*.py`` is written on, over the simulated GPU: ``torch._C._cuda_*`` and the classes beside them.

torch's own Python runs on top of it, unchanged. A name of a CUDA build that the simulated GPU has no answer for raises
``NotImplementedError`` with that name.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from pytest_diffopt.accelerators.simulated.memory_history import History

_ops = torch.ops.pytest_diffopt_sim

CUDA_VERSION = "13.0"
CUDNN_VERSION = (9, 19, 0)

# In the order in which the library counts them.
COUNTERS = (
    "allocated",
    "peak_allocated",
    "requested",
    "peak_requested",
    "reserved",
    "peak_reserved",
    "allocations",
    "frees",
    "allocated_total",
    "segments_made",
    "segments_freed",
    "out_of_memory",
    "h2d_bytes",
    "d2h_bytes",
    "d2d_bytes",
    "h2d_calls",
    "d2h_calls",
    "d2d_calls",
    "kernels",
)


@dataclass(frozen=True)
class DeviceProperties:
    """What ``torch.cuda.get_device_properties`` returns: the attributes of torch's ``_CudaDeviceProperties``.

    Memory in bytes, clocks in kHz, the bus in bits.
    """

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    L2_cache_size: int
    shared_memory_per_block: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    regs_per_multiprocessor: int
    max_threads_per_multi_processor: int
    clock_rate: int
    memory_clock_rate: int
    memory_bus_width: int
    max_threads_per_block: int = 1024
    warp_size: int = 32
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    pci_bus_id: int = 0
    pci_device_id: int = 0
    pci_domain_id: int = 0
    gcnArchName: str = ""
    uuid: str = "00000000-0000-0000-0000-000000000000"

    def __str__(self) -> str:
        mib = 1024**2
        return (
            f"_CudaDeviceProperties(name='{self.name}', major={self.major}, minor={self.minor}, "
            f"total_memory={self.total_memory // mib}MB, multi_processor_count={self.multi_processor_count}, "
            f"uuid={self.uuid}, L2_cache_size={self.L2_cache_size // mib}MB)"
        )

    __repr__ = __str__


def counters(device: int) -> dict[str, int]:
    """What one GPU has counted, by :data:`COUNTERS`."""
    return dict(zip(COUNTERS, _ops.counters(device), strict=True))


def refused(name: str, why: str = "") -> Callable[..., NoReturn]:
    """A function that stands for a name of a CUDA build and raises it."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"The simulated GPU has no {name}" + (f": {why}" if why else "."))

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    return refuse


class _Refusing:
    """A class of a CUDA build that cannot be made here."""

    _why = ""

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        refused(f"torch.cuda.{cls.__name__.lstrip('_')}", cls._why)()

    def __init_subclass__(cls, why: str = "", **more: object) -> None:
        super().__init_subclass__(**more)
        cls._why = why or cls._why


class Graph(_Refusing, why="its kernels have run when a call returns, and no graph of them is recorded."):
    """Stands for ``torch._C._CUDAGraph``."""


class GreenContext(_Refusing):
    """Stands for ``torch._C._CUDAGreenContext``."""


class AllocatorState(_Refusing):
    """Stands for ``torch._C._cuda_CUDAAllocator_AllocatorState``."""


class Allocator(_Refusing):
    """Stands for ``torch._C._cuda_CUDAAllocator``."""


class MemPool:
    """Stands for ``torch._C._MemPool``: a pool in name, whose blocks are the device's like any others."""

    _made = 0

    def __init__(self, allocator: Any = None, is_user_created: bool = True, *args: Any, **kwargs: Any) -> None:
        if allocator is not None:
            refused("torch.cuda.MemPool with an allocator of its own")()
        MemPool._made += 1
        self._id = (0, MemPool._made) if is_user_created else (MemPool._made, 0)
        self.allocator = None

    @property
    def id(self) -> tuple[int, int]:
        return self._id

    def use_count(self) -> int:
        return 1


# ---------------------------------------------------------------------------------------------- streams and events


class StreamBase(torch.Stream):
    """Stands for ``torch._C._CudaStreamBase``. What is queued on a stream has run when the call returns."""

    def __new__(
        cls, priority: int = 0, stream_id: int = 0, device_index: int = 0, device_type: int = 0, stream_ptr: int = 0
    ) -> StreamBase:
        made: Any
        if stream_ptr or device_type:
            index, kind = (device_index, device_type) if device_type else (_current_device(), _device_type())
            made = super().__new__(cls, stream_id=stream_ptr or stream_id, device_index=index, device_type=kind)
        else:
            made = super().__new__(cls, device=torch.device("cuda", _current_device()), priority=priority)
        assert isinstance(made, StreamBase)
        return made

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    @property
    def priority(self) -> int:
        return 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, -5)


class EventBase(torch.Event):
    """Stands for ``torch._C._CudaEventBase``: a point in time of the host."""

    _event: torch.Event

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> EventBase:
        if external:
            refused("external events", "they belong to graphs of kernels.")()
        made: Any = super().__new__(cls, "cuda", enable_timing=enable_timing, blocking=blocking)
        # torch.Event's own methods take an event of exactly that class
        made._event = torch.Event("cuda", enable_timing=enable_timing, blocking=blocking)
        assert isinstance(made, EventBase)
        return made

    @classmethod
    def from_ipc_handle(cls, device: Any, ipc_handle: bytes) -> NoReturn:
        refused("events that processes share")()

    def ipc_handle(self) -> NoReturn:
        refused("events that processes share")()

    def record(self, stream: Any = None) -> None:
        self._event.record(stream)

    def wait(self, stream: Any = None) -> None:
        """Everything before it has run."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._event.synchronize()

    def elapsed_time(self, end_event: Any) -> float:
        return float(self._event.elapsed_time(getattr(end_event, "_event", end_event)))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._event.device

    @property
    def cuda_event(self) -> int:
        return int(self._event.event_id)


def _device_type() -> int:
    return int(torch._C._accelerator_getStream(_current_device()).device_type)


def _as_tuple(stream: Any) -> tuple[int, int, int]:
    return int(stream.stream_id), int(stream.device_index), int(stream.device_type)


def _get_current_stream(device: int) -> tuple[int, int, int]:
    return _as_tuple(torch._C._accelerator_getStream(device))


def _get_default_stream(device: int) -> tuple[int, int, int]:
    _ops.check_device(device)
    return 0, device, _device_type()


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    stream = torch.Stream(stream_id=stream_id, device_index=device_index, device_type=device_type)
    torch._C._accelerator_setStream(stream)


# --------------------------------------------------------------------------------------------------------- devices


def _current_device() -> int:
    return int(_ops.current_device())


def _set_device(device: int) -> None:
    _ops.set_device(int(device))


def _exchange_device(device: int) -> int:
    if device < 0:
        return -1
    previous = _current_device()
    if device != previous:
        _ops.set_device(int(device))
    return previous


def _maybe_exchange_device(device: int) -> int:
    return _exchange_device(device)


def _can_access_peer(device: int, peer: int) -> bool:
    return device != peer


# ---------------------------------------------------------------------------------------------------------- memory


def _memory_stats(device: int) -> dict[str, Any]:
    c = counters(device)

    def stat(current: int, peak: int, allocated: int) -> dict[str, dict[str, int]]:
        whole = {"current": current, "peak": peak, "allocated": allocated, "freed": allocated - current}
        return {"all": whole, "large_pool": whole, "small_pool": dict.fromkeys(whole, 0)}

    nothing = stat(0, 0, 0)
    blocks = stat(c["allocations"] - c["frees"], c["allocations"] - c["frees"], c["allocations"])
    segments = c["segments_made"] - c["segments_freed"]
    unused = c["reserved"] - c["allocated"]
    return {
        "allocation": blocks,
        "active": blocks,
        "segment": stat(segments, segments, c["segments_made"]),
        "inactive_split": nothing,
        "allocated_bytes": stat(c["allocated"], c["peak_allocated"], c["allocated_total"]),
        "active_bytes": stat(c["allocated"], c["peak_allocated"], c["allocated_total"]),
        "requested_bytes": stat(c["requested"], c["peak_requested"], c["requested"]),
        "reserved_bytes": stat(c["reserved"], c["peak_reserved"], c["peak_reserved"]),
        "inactive_split_bytes": stat(unused, unused, unused),
        "oversize_allocations": nothing["all"],
        "oversize_segments": nothing["all"],
        "max_split_size": -1,
        "num_alloc_retries": c["out_of_memory"],
        "num_ooms": c["out_of_memory"],
        "num_sync_all_streams": 0,
        "num_device_alloc": c["segments_made"],
        "num_device_free": c["segments_freed"],
    }


def _host_memory_stats() -> dict[str, Any]:
    allocated, peak, _pinned, _peak_pinned = _ops.host_counters()
    whole = {"current": allocated, "peak": peak, "allocated": allocated, "freed": 0}
    return {"allocated_bytes": whole, "active_bytes": whole}


def _set_memory_fraction(fraction: float, device: int) -> None:
    _ops.set_allowed(device, int(int(_ops.capacity(device)) * fraction))


def _get_memory_fraction(device: int) -> float:
    total = int(_ops.capacity(device))
    return float(_ops.allowed(device)) / total if total else 1.0


def _mem_get_info(device: int) -> tuple[int, int]:
    total = int(_ops.capacity(device))
    return max(total - counters(device)["reserved"], 0), total


def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """Stands for ``torch._C._dynamo.guards._empty_strided_cuda``, by which compiled code allocates."""
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


class _Settings:
    """What is set and read again, and changes nothing here."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {
            "caching": True,
            "cudnn_benchmark_limit": 10,
            "conv_benchmark_empty_cache": True,
            "cublas": 8519680,
            "cublas_lt": 1048576,
        }

    def getter(self, name: str) -> Callable[[], Any]:
        return lambda: self.values[name]

    def setter(self, name: str) -> Callable[[Any], None]:
        return lambda value: self.values.__setitem__(name, value)


# ------------------------------------------------------------------------------------------------ the runtime's module


class _Error(int):
    success = 0


def _runtime() -> types.ModuleType:
    """Stands for ``torch._C._cudart``."""
    module: Any = types.ModuleType("torch._C._cudart")
    module.cudaError = _Error
    module.cudaGetErrorString = lambda error: "no error" if not int(error) else f"error {int(error)}"
    module.cudaMemGetInfo = _mem_get_info
    for name in ("cudaProfilerStart", "cudaProfilerStop"):
        setattr(module, name, lambda: 0)
    module.cudaHostRegister = lambda pointer, size, flags: 0
    module.cudaHostUnregister = lambda pointer: 0
    module.cudaStreamCreate = refused("cudaStreamCreate")
    module.cudaStreamDestroy = refused("cudaStreamDestroy")
    return module  # type: ignore[no-any-return]


def _cudnn() -> types.ModuleType:
    """Stands for ``torch._C._cudnn``."""
    module: Any = types.ModuleType("torch._C._cudnn")
    major, minor, patch = CUDNN_VERSION
    module.is_cuda = True
    module.getVersionInt = lambda: major * 10000 + minor * 100 + patch
    module.getRuntimeVersion = lambda: CUDNN_VERSION
    module.getCompileVersion = lambda: CUDNN_VERSION
    return module  # type: ignore[no-any-return]


class Ranges:
    """Stands for ``torch._C._nvtx``: nobody listens."""

    def __init__(self) -> None:
        self._open = 0

    def rangePushA(self, msg: str) -> int:
        self._open += 1
        return self._open - 1

    def rangePop(self) -> int:
        self._open -= 1
        return self._open

    def rangeStartA(self, msg: str) -> int:
        return 0

    def rangeEnd(self, range_id: int) -> None: ...

    def markA(self, msg: str) -> None: ...

    def deviceRangeStart(self, msg: str, stream: int) -> object:
        return object()

    def deviceRangeEnd(self, handle: object, stream: int) -> None: ...


# ------------------------------------------------------------------------------------------------------- all names

_UNSUPPORTED = {
    "_cuda_attach_out_of_memory_observer": "",
    "_cuda_beginAllocateCurrentStreamToPool": "",
    "_cuda_changeCurrentAllocator": "its memory is the host's.",
    "_cuda_checkPoolLiveAllocations": "",
    "_cuda_cudaCachingAllocator_raw_alloc": "its memory is the host's.",
    "_cuda_cudaCachingAllocator_raw_delete": "its memory is the host's.",
    "_cuda_cudaHostAllocator": "its memory is the host's.",
    "_cuda_customAllocator": "its memory is the host's.",
    "_cuda_getAllocator": "its memory is the host's.",
    "_cuda_getCheckpointState": "",
    "_cuda_getCurrentBlasHandle": "there is no cuBLAS.",
    "_cuda_getCurrentSolverHandle": "there is no cuSOLVER.",
    "_cuda_getStreamFromExternal": "",
    "_cuda_jiterator_compile_and_launch_kernel": "CUDA C++ is not compiled.",
    "_cuda_setCheckpointPoolState": "",
    "_construct_CUDA_Tensor_From_Storage_And_Metadata": "",
    "_cuda_getHipblasltVersion": "it is no AMD GPU.",
    **{
        f"_cuda_{name}": "there is no cuBLAS to tune."
        for name in (
            "record_untuned_enable",
            "tunableop_enable",
            "tunableop_get_filename",
            "tunableop_get_max_tuning_duration",
            "tunableop_get_max_tuning_iterations",
            "tunableop_get_results",
            "tunableop_get_rotating_buffer_size",
            "tunableop_get_validators",
            "tunableop_read_file",
            "tunableop_set_filename",
            "tunableop_set_max_tuning_duration",
            "tunableop_set_max_tuning_iterations",
            "tunableop_set_numerical_check_tolerances",
            "tunableop_set_rotating_buffer_size",
            "tunableop_tuning_enable",
        )
    },
}


def names(properties: DeviceProperties, devices: int) -> dict[str, Any]:
    """Everything of ``torch._C`` that a CUDA build has and torch's Python asks for, by name."""
    settings, history = _Settings(), History(devices)
    home = os.getpid()

    def init() -> None:
        torch.cuda.default_generators = tuple(_ops.default_generator(index) for index in range(devices))

    known: dict[str, Any] = {
        "_has_cuda": True,
        "_has_cudnn": True,
        "_cudart": _runtime(),
        "_cudnn": _cudnn(),
        "_nvtx": Ranges(),
        "_CudaDeviceProperties": DeviceProperties,
        "_CudaStreamBase": StreamBase,
        "_CudaEventBase": EventBase,
        "_CUDAGraph": Graph,
        "_CUDAGreenContext": GreenContext,
        "_MemPool": MemPool,
        "_cuda_CUDAAllocator": Allocator,
        "_cuda_CUDAAllocator_AllocatorState": AllocatorState,
        "_graph_pool_handle": refused("torch.cuda.graph_pool_handle"),
        "_cuda_init": init,
        # the GPU of a process is not its children's
        "_cuda_isInBadFork": lambda: os.getpid() != home and bool(torch.cuda._initialized),
        "_cuda_getDeviceCount": lambda: devices,
        "_cuda_getDevice": _current_device,
        "_cuda_setDevice": _set_device,
        "_cuda_exchangeDevice": _exchange_device,
        "_cuda_maybeExchangeDevice": _maybe_exchange_device,
        "_cuda_hasPrimaryContext": lambda device: True,
        "_cuda_canDeviceAccessPeer": _can_access_peer,
        "_cuda_getArchFlags": lambda: f"sm_{properties.major}{properties.minor}",
        "_cuda_getCompiledVersion": lambda: 13000,
        "_cuda_getCurrentStream": _get_current_stream,
        "_cuda_getCurrentRawStream": lambda device: _get_current_stream(device)[0],
        "_cuda_getDefaultStream": _get_default_stream,
        "_cuda_setStream": _set_stream,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_synchronize": _ops.synchronize,
        "_cuda_sleep": lambda cycles: None,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_clearCublasWorkspaces": lambda: None,
        "_cuda_resetCublasWorkspaceSize": lambda: None,
        "_cuda_resetCublasLtWorkspaceSize": lambda: None,
        "_cuda_getCublasWorkspaceSize": settings.getter("cublas"),
        "_cuda_setCublasWorkspaceSize": settings.setter("cublas"),
        "_cuda_getCublasLtWorkspaceSize": settings.getter("cublas_lt"),
        "_cuda_setCublasLtWorkspaceSize": settings.setter("cublas_lt"),
        "_cuda_get_sync_debug_mode": _ops.sync_debug_mode,
        "_cuda_set_sync_debug_mode": _ops.set_sync_debug_mode,
        "_cuda_get_cudnn_benchmark_limit": settings.getter("cudnn_benchmark_limit"),
        "_cuda_set_cudnn_benchmark_limit": settings.setter("cudnn_benchmark_limit"),
        "_cuda_get_conv_benchmark_empty_cache": settings.getter("conv_benchmark_empty_cache"),
        "_cudnn_set_conv_benchmark_empty_cache": settings.setter("conv_benchmark_empty_cache"),
        "_cuda_cudaCachingAllocator_is_enabled": settings.getter("caching"),
        "_cuda_cudaCachingAllocator_enable": settings.setter("caching"),
        "_cuda_getMemoryMetadata": lambda: history.metadata,
        "_cuda_setMemoryMetadata": lambda metadata: setattr(history, "metadata", metadata),
        "_cuda_memoryMetadataSupported": lambda: True,
        "_cuda_memoryStats": _memory_stats,
        "_cuda_resetAccumulatedMemoryStats": lambda device: _ops.reset_counts(device),
        "_cuda_resetPeakMemoryStats": lambda device: _ops.reset_peaks(device),
        "_cuda_hostMemoryStats": _host_memory_stats,
        "_cuda_resetAccumulatedHostMemoryStats": lambda: None,
        "_cuda_resetPeakHostMemoryStats": lambda: _ops.reset_host_peaks(),
        "_cuda_emptyCache": lambda: _ops.empty_cache(),
        "_host_emptyCache": lambda: _ops.empty_host_cache(),
        # it asks a table of host allocators, which a build of torch for the CPU leaves empty
        "_accelerator_emptyHostCache": lambda: None,
        "_cuda_setMemoryFraction": _set_memory_fraction,
        "_cuda_getMemoryFraction": _get_memory_fraction,
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_isHistoryEnabled": history.is_enabled,
        "_cuda_record_memory_history": history.record,
        "_cuda_record_memory_history_legacy": history.record_legacy,
        "_cuda_memorySnapshot": history.snapshot,
        "_cuda_allocationTraceback": history.frames_of,
        "_cuda_beginAllocateToPool": lambda device, pool: None,
        "_cuda_beginAllocateCurrentThreadToPool": lambda device, pool: None,
        "_cuda_endAllocateToPool": lambda device, pool: None,
        "_cuda_releasePool": lambda device, pool: None,
        "_cuda_tunableop_is_enabled": lambda: False,
        "_cuda_tunableop_tuning_is_enabled": lambda: False,
        "_cuda_record_untuned_is_enabled": lambda: False,
    }
    # a CUDA build has functions for a real GPU there
    others = {name: "" for name in vars(torch._C) if name.startswith("_cuda_") and name not in known} | _UNSUPPORTED
    return known | {name: refused(f"torch._C.{name}", why) for name, why in others.items()}
