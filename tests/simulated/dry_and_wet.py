"""A program: replicas in every placement, computed and dry; what the device counted, as JSON on the last line of its output.

``python -m tests.simulated.dry_and_wet REPLICA DTYPE [PLACEMENT ...]``
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import pytest_diffopt.accelerators.simulated  # noqa: F401

sim: Any = torch.sim  # type: ignore[attr-defined]

SIZES = {"tiny-flux": (32, 32), "tiny-sd": (64, 64), "tiny-wan": (32, 32, 5)}


def _group(level: str, stream: bool) -> Callable[[Any], object]:
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    return lambda pipeline: pipeline.enable_group_offload(
        onload_device=torch.device("sim"),
        offload_device=torch.device("cpu"),
        offload_type=level,
        use_stream=stream,
        **blocks,
    )


PLACEMENTS: dict[str, Callable[[Any], object]] = {
    "whole": lambda pipeline: pipeline.to("sim"),
    "model": lambda pipeline: pipeline.enable_model_cpu_offload(device="sim"),
    "sequential": lambda pipeline: pipeline.enable_sequential_cpu_offload(device="sim"),
    "leaf": _group("leaf_level", False),
    "leaf, stream": _group("leaf_level", True),
    "block": _group("block_level", False),
    "block, stream": _group("block_level", True),
}

COUNTED = (
    "peak_allocated",
    "allocated",
    "allocations",
    "allocated_total",
    "h2d_bytes",
    "d2h_bytes",
    "d2d_bytes",
    "kernels",
)


def counters() -> dict[str, int]:
    stats = sim.memory_stats()
    return {
        "peak_bytes": sim.max_memory_allocated(),
        "live_bytes": sim.memory_allocated(),
        "allocations": stats["allocation.all.allocated"],
        "allocated_total_bytes": stats["allocated_bytes.all.allocated"],
        **sim.transfer_stats(),
        "kernels": sim.kernel_count(),
    }


def measure(replica: str, dtype: torch.dtype, placement: str) -> dict[str, Any]:
    """The counters after loading and placing, and after a call, above what was there before."""
    from diffusers import DiffusionPipeline

    from pytest_diffopt.replicas import ensure

    gc.collect()
    sim.reset_counts()
    sim.reset_peak_memory_stats()
    before = sim.memory_allocated()
    pipeline: Any = DiffusionPipeline.from_pretrained(ensure(replica), torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    PLACEMENTS[placement](pipeline)
    gc.collect()
    placed = counters()
    sim.reset_counts()
    sim.reset_peak_memory_stats()
    size = dict(zip(("height", "width", "num_frames"), SIZES[replica], strict=False))
    result = pipeline(
        "a cat", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0), **size
    )
    shape = [list(getattr(result, name)[0].shape) for name in ("images", "frames") if hasattr(result, name)]
    del result
    called = counters()
    for figures in (placed, called):
        for name in ("peak_bytes", "live_bytes"):
            figures[name] -= before
    return {"placed": placed, "called": called, "shape": shape}


def main(replica: str, dtype: str, placements: list[str]) -> dict[str, Any]:
    """Placement → mode → figures, or the error that ended it."""
    found: dict[str, Any] = {}
    for placement in placements or PLACEMENTS:
        row: dict[str, Any] = {"wet": measure(replica, getattr(torch, dtype), placement)}
        for real_bytes in (64 * 1024, 8 * 1024):
            with sim.dry(real_bytes=real_bytes) as run:
                row[f"dry, {real_bytes}"] = measure(replica, getattr(torch, dtype), placement)
            row[f"guesses, {real_bytes}"] = list(run.guesses)
        found[placement] = row
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3:])))
