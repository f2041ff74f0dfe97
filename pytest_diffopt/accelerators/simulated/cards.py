"""A card of the table, as CUDA describes it to torch."""

from __future__ import annotations

from pytest_diffopt.accelerators.simulated.boundary import DeviceProperties


def properties_of(name: str, memory_bytes: int | None = None) -> DeviceProperties:
    return DeviceProperties(name="NVIDIA GeForce RTX 4090", major=8, minor=9, total_memory=memory_bytes or 25153765376, multi_processor_count=128, L2_cache_size=72<<20, shared_memory_per_block=49152, shared_memory_per_block_optin=101376, shared_memory_per_multiprocessor=102400, regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536, clock_rate=2520000, memory_clock_rate=10501000, memory_bus_width=384)
