"""``torch.sim``: the names of ``torch.cuda``, and what only a simulated device can tell."""

from __future__ import annotations

import os
import types
from typing import Any, NamedTuple

import torch
from torch.utils import backend_registration

from pytest_diffopt.accelerators.simulated.cuda_names import add_names

# names of torch.sim too
from pytest_diffopt.accelerators.simulated.dry import (  # noqa: F401
    dry,
    host_memory_stats,
    is_dry,
    is_hollow,
    register_cost,
    register_dry_kernel,
    reset_peak_host_memory_stats,
)

NAME = "Simulated accelerator"
CAPABILITY = (8, 0)

_ops = torch.ops.pytest_diffopt_sim

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

Device = torch.device | str | int | None


def _index(device: Device = None) -> int:
    """The index of a device, as torch.cuda resolves it.

    Raises:
        ValueError: it is not a simulated device.
        torch.AcceleratorError: there is no device of that index.
    """
    if device is None:
        return int(_ops.current_device())
    if isinstance(device, int):
        index: int | None = device
    else:
        device = torch.device(device)
        if device.type != "sim":
            raise ValueError(f"Expected a sim device, but got: {device}")
        index = device.index
    if index is None:
        return int(_ops.current_device())
    _ops.check_device(index)
    return index


def _counters(device: Device = None) -> dict[str, int]:
    return dict(zip(COUNTERS, _ops.counters(_index(device)), strict=True))


# --------------------------------------------------------------------------------------------------------- devices


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def init() -> None:
    """Nothing is left to do after the import."""


_lazy_init = init
# checkpointing keeps the device's random numbers only where this is so
_initialized = True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return int(_ops.device_count())


def current_device() -> int:
    return int(_ops.current_device())


def set_device(device: Device) -> None:
    _ops.set_device(_index(device))


class device:
    """Context manager: another current device."""

    def __init__(self, device: Device) -> None:
        self.idx = _index(device) if not isinstance(device, int) or device >= 0 else -1
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = current_device()
        if self.idx >= 0:
            _ops.set_device(self.idx)

    def __exit__(self, *exception: object) -> None:
        _ops.set_device(self.prev_idx)


class device_of(device):
    """Context manager: the current device is that of a tensor or storage; nothing for those of other devices."""

    def __init__(self, obj: Any) -> None:
        super().__init__(obj.device.index if obj.device.type == "sim" else -1)


def _exchange_device(index: int) -> int:
    previous = current_device()
    if index >= 0:
        _ops.set_device(index)
    return previous


_maybe_exchange_device = _exchange_device


class DeviceProperties(NamedTuple):
    """What :func:`get_device_properties` tells; the names of torch.cuda's."""

    name: str
    total_memory: int
    major: int
    minor: int
    multi_processor_count: int
    warp_size: int


def get_device_properties(device: Device = None) -> DeviceProperties:
    return DeviceProperties(
        NAME, int(_ops.capacity(_index(device))), *CAPABILITY, multi_processor_count=1, warp_size=32
    )


def get_device_name(device: Device = None) -> str:
    return get_device_properties(device).name


def get_device_capability(device: Device = None) -> tuple[int, int]:
    properties = get_device_properties(device)
    return properties.major, properties.minor


def can_device_access_peer(device: Device, peer_device: Device) -> bool:
    return _index(device) != _index(peer_device)


def synchronize(device: Device = None) -> None:
    """Everything has run when a call returns; only the device is checked."""
    _index(device)


def ipc_collect() -> None:
    """Nothing is shared between processes."""


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


# ---------------------------------------------------------------------------------------------------------- memory


def memory_allocated(device: Device = None) -> int:
    return int(_ops.memory_allocated(_index(device)))


def max_memory_allocated(device: Device = None) -> int:
    return _counters(device)["peak_allocated"]


def memory_reserved(device: Device = None) -> int:
    return _counters(device)["reserved"]


def max_memory_reserved(device: Device = None) -> int:
    return _counters(device)["peak_reserved"]


def reset_peak_memory_stats(device: Device = None) -> None:
    _ops.reset_peaks(_index(device))


def reset_max_memory_allocated(device: Device = None) -> None:
    reset_peak_memory_stats(device)


def reset_accumulated_memory_stats(device: Device = None) -> None:
    _ops.reset_counts(_index(device))


def memory_stats(device: Device = None) -> dict[str, int]:
    """The keys of torch.cuda's that have a meaning here, in bytes and counts."""
    c = _counters(device)
    stats: dict[str, int] = {}

    def add(name: str, current: int, peak: int, allocated: int) -> None:
        for key, value in zip(
            ("current", "peak", "allocated", "freed"), (current, peak, allocated, allocated - current), strict=True
        ):
            stats[f"{name}.all.{key}"] = value

    add("allocated_bytes", c["allocated"], c["peak_allocated"], c["allocated_total"])
    add("active_bytes", c["allocated"], c["peak_allocated"], c["allocated_total"])
    stats["requested_bytes.all.current"] = c["requested"]
    stats["requested_bytes.all.peak"] = c["peak_requested"]
    stats["reserved_bytes.all.current"] = c["reserved"]
    stats["reserved_bytes.all.peak"] = c["peak_reserved"]
    stats["allocation.all.allocated"] = c["allocations"]
    stats["allocation.all.freed"] = c["frees"]
    stats["allocation.all.current"] = c["allocations"] - c["frees"]
    stats["segment.all.allocated"] = c["segments_made"]
    stats["segment.all.freed"] = c["segments_freed"]
    stats["segment.all.current"] = c["segments_made"] - c["segments_freed"]
    stats["num_ooms"] = c["out_of_memory"]
    return stats


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """Free and total bytes of the device."""
    total = int(_ops.capacity(_index(device)))
    return max(total - memory_reserved(device), 0), total


def empty_cache() -> None:
    _ops.empty_cache()


def set_memory_limit(limit_bytes: int | None, device: Device = None) -> None:
    """How much memory the device has, in bytes; None for the 16 GiB that it begins with."""
    if limit_bytes is not None and limit_bytes < 0:
        raise ValueError(f"limit_bytes: found {limit_bytes}; it takes bytes, or None for the default")
    _ops.set_capacity(_index(device), -1 if limit_bytes is None else int(limit_bytes))


def set_per_process_memory_fraction(fraction: float, device: Device = None) -> None:
    """The part of the device's memory that this process may take."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    _ops.set_allowed(_index(device), int(int(_ops.capacity(_index(device))) * fraction))


def get_per_process_memory_fraction(device: Device = None) -> float:
    total = int(_ops.capacity(_index(device)))
    return float(_ops.allowed(_index(device))) / total if total else 1.0


def set_caching_allocator(enabled: bool) -> None:
    """Round sizes and keep freed blocks as CUDA's caching allocator does; off, every byte counts as it was asked for."""
    _ops.set_caching(enabled)


def is_caching_allocator() -> bool:
    return bool(_ops.caching())


def transfer_stats(device: Device = None) -> dict[str, int]:
    """Bytes and calls that crossed: ``h2d`` host to device, ``d2h`` back, ``d2d`` within and between devices."""
    c = _counters(device)
    return {name: c[name] for name in COUNTERS if name[:3] in ("h2d", "d2h", "d2d")}


def kernel_count(device: Device = None) -> int:
    """Operations that the device has run since :func:`reset_counts`."""
    return _counters(device)["kernels"]


def reset_counts(device: Device = None) -> None:
    """Transfers, operations and allocations are counted from nought again."""
    _ops.reset_counts(_index(device))


def record_operations(enabled: bool = True) -> None:
    """Begin (forgetting the last recording) or end to write down which operations run."""
    _ops.record_operations(enabled)


def recorded_operations() -> dict[str, int]:
    """How often each operation ran, by its name, e.g. ``aten::mm``."""
    lines = (line.rsplit(" ", 1) for line in _ops.recorded_operations())
    return {name: int(times) for name, times in lines}


class MemoryEvent(NamedTuple):
    """What happened to a block of memory.

    Attributes:
        block: its number, which no other block ever has; negative for host memory that is not torch's own.
        bytes: what it takes, negative where it was freed; 0 for a copy into it.
        operation: that did it, e.g. ``"aten::mm"``; "" where none did.
        mark: the last one that :func:`mark_memory_events` was given before it.
        source: the block that was copied, else 0.
        pinned: whether that is pinned memory of the host.
        low, high: of a kernel's workspace that a cost rule foretold, and that is given back at once: its bytes at the
            least and at the most, where ``bytes`` are the expected ones; else 0.
    """

    block: int
    bytes: int
    operation: str
    mark: int
    source: int
    pinned: bool
    low: int = 0
    high: int = 0


def record_memory_events(enabled: bool = True) -> None:
    """Begin (forgetting the last recording) or end to write down what happens to memory."""
    _ops.open_ledger(enabled)


def mark_memory_events(mark: int) -> None:
    """Let every later event say ``mark``."""
    _ops.mark_ledger(mark)


def recorded_memory_events(device: Device = None) -> list[MemoryEvent]:
    """What happened on one device, in order."""
    names = _ops.ledger_operations()
    index = _index(device)
    return [
        MemoryEvent(block, count, names[operation], mark, source, bool(pinned), low, high)
        for block, count, source, pinned, operation, mark, on, low, high in _ops.ledger_events().tolist()
        if on == index
    ]


def replay_reserved_memory(workspaces: str = "expected", device: Device = None) -> int:
    """The most that CUDA's caching allocator would reserve for the recorded events, in bytes, from nothing reserved.

    Args:
        workspaces: what kernels take for themselves, by their cost rules: ``"low"``, ``"expected"`` or ``"high"``.
    """
    known = ("low", "expected", "high")
    if workspaces not in known:
        raise ValueError(f"workspaces: found {workspaces!r}; it takes one of {', '.join(known)}")
    return int(_ops.replay_reserved(_index(device), known.index(workspaces)))


def memory_blocks(tensors: list[torch.Tensor]) -> list[int]:
    """The number of each tensor's block, on the host as well; 0 for a tensor without memory."""
    return list(_ops.block_numbers(tensors))


# ------------------------------------------------------------------------------------------------- random numbers


def _generator(device: Device = None) -> torch.Generator:
    return default_generators[_index(device)]


def manual_seed(seed: int) -> None:
    _generator().manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(int(seed))


def seed() -> None:
    _generator().seed()


def seed_all() -> None:
    manual_seed_all(_generator().seed())


def initial_seed() -> int:
    return _generator().initial_seed()


def get_rng_state(device: Device = "sim") -> torch.Tensor:
    return _generator(device).get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    return [generator.get_state() for generator in default_generators]


def set_rng_state(new_state: torch.Tensor, device: Device = "sim") -> None:
    _generator(device).set_state(new_state)


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


# ---------------------------------------------------------------------------------------------- streams and events


class Stream(torch.Stream):
    """A stream in name: what is queued on it has run when the call returns."""

    def __new__(cls, device: Device = None, priority: int = 0, **known: Any) -> Stream:
        made = (
            super().__new__(cls, priority=priority, **known)
            if "stream_id" in known
            else super().__new__(cls, device=torch.device("sim", _index(device)), priority=priority)
        )
        assert isinstance(made, Stream)
        return made


class _EventType(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.Event) and instance.device.type == "sim"


class Event(torch.Event, metaclass=_EventType):
    """A point in time; ``elapsed_time`` measures the host."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        # torch.Event itself: its methods take no other event than one of exactly that class
        made: Any = torch.Event("sim", enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)
        return made  # type: ignore[no-any-return]


def _as_stream(stream: torch.Stream) -> Stream:
    return Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def current_stream(device: Device = None) -> Stream:
    return _as_stream(torch.accelerator.current_stream(_index(device)))


def default_stream(device: Device = None) -> Stream:
    kind = torch.accelerator.current_stream(_index(device)).device_type
    return Stream(stream_id=0, device_index=_index(device), device_type=kind)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


class StreamContext:
    """Context manager: another current stream; None changes nothing."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self._device = current_device()
            self._previous = current_stream(self.stream.device)
            set_stream(self.stream)

    def __exit__(self, *exception: object) -> None:
        if self.stream is not None:
            set_stream(self._previous)
            _ops.set_device(self._device)


def stream(stream: torch.Stream | None) -> StreamContext:
    return StreamContext(stream)


# ---------------------------------------------------------------------------------------------------- registration

default_generators: tuple[torch.Generator, ...] = ()


def _device_count_wanted() -> int:
    text = os.environ.get("DIFFOPT_SIM_DEVICES", "2")
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 16:
        raise ValueError(f"DIFFOPT_SIM_DEVICES: found {text!r}; it takes a number of devices from 1 to 16")
    return int(text)


def register() -> None:
    """Make ``torch.device("sim")`` and ``torch.sim`` out of the loaded library; once in a process."""
    global default_generators
    _ops.set_device_count(_device_count_wanted())
    backend_registration.rename_privateuse1_backend("sim")
    module: Any = types.ModuleType("torch.sim", __doc__)
    hidden = {
        "annotations",
        "os",
        "types",
        "Any",
        "NamedTuple",
        "torch",
        "register",
        "backend_registration",
        "COUNTERS",
        "Device",
        "add_names",
    }
    kept = {"_index", "_lazy_init", "_initialized", "_is_in_bad_fork", "_exchange_device", "_maybe_exchange_device"}
    for name, value in globals().items():
        if name in kept or not (name.startswith("_") or name in hidden):
            setattr(module, name, value)
    add_names(module)
    torch._register_device_module("sim", module)  # type: ignore[no-untyped-call]
    backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
    default_generators = tuple(_ops.default_generator(index) for index in range(device_count()))
    module.default_generators = default_generators
