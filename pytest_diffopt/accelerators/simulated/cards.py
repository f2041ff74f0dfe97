"""A card of the table, as CUDA describes it to torch."""

from __future__ import annotations

from pytest_diffopt.accelerators.gpus import card
from pytest_diffopt.accelerators.simulated.boundary import DeviceProperties


def properties_of(name: str, memory_bytes: int | None = None) -> DeviceProperties:
    """What ``torch.cuda.get_device_properties`` returns on a card.

    Args:
        name: of the card, as :func:`pytest_diffopt.accelerators.gpus.card` takes it.
        memory_bytes: another size of its memory; None for its own.

    Raises:
        DiffoptError: no card has that name.
    """
    found = card(name)
    hardware, limits = found.hardware, found.limits
    return DeviceProperties(
        name=found.cuda_name,
        major=limits.major,
        minor=limits.minor,
        total_memory=found.total_bytes if memory_bytes is None else memory_bytes,
        multi_processor_count=hardware.multiprocessors,
        L2_cache_size=hardware.l2_bytes,
        shared_memory_per_block=limits.shared_memory_per_block_bytes,
        shared_memory_per_block_optin=limits.shared_memory_per_block_optin_bytes,
        shared_memory_per_multiprocessor=limits.shared_memory_per_multiprocessor_bytes,
        regs_per_multiprocessor=limits.registers_per_multiprocessor,
        max_threads_per_multi_processor=limits.threads_per_multiprocessor,
        max_threads_per_block=limits.threads_per_block,
        warp_size=limits.warp_size,
        clock_rate=hardware.clock_mhz * 1000,
        memory_clock_rate=hardware.memory_clock_mhz * 1000,
        memory_bus_width=hardware.bus_bits,
    )
