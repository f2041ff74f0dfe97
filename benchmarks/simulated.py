"""Measures what the simulated device costs against the host, as ratios of runs in turn in one process, and prints a table.

    python benchmarks/simulated.py            # all of it
    python benchmarks/simulated.py operations

Figures are medians of interleaved repeats. The build is one cold run, into an empty cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
Rows = list[tuple[str, str, str, str, str]]  # what, device, host, ratio, target


def seconds_per_call(call: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def in_turn(device: Callable[[], object], host: Callable[[], object], count: int, repeats: int) -> tuple[float, ...]:
    """Median seconds on the device and on the host, and the median of the pairs' ratios; after one warm-up of each."""
    seconds_per_call(device, count), seconds_per_call(host, count)
    pairs = [(seconds_per_call(device, count), seconds_per_call(host, count)) for _ in range(repeats)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def operations() -> Rows:
    """Small products and sums: what is measured is the way to the kernel."""
    import torch

    import pytest_diffopt.accelerators.simulated  # noqa: F401

    rows: Rows = []
    host = torch.randn(8, 8)
    device = host.to("sim")
    for name in ("add", "mul", "mm"):
        run: Callable[..., object] = getattr(torch, name)

        def call(x: torch.Tensor, run: Callable[..., object] = run) -> Callable[[], object]:
            return lambda: run(x, x)

        with torch.no_grad():
            a, b, ratio = in_turn(call(device), call(host), 10_000, 21)
        rows.append((f"`{name}`, 8×8", f"{a * 1e6:.1f} µs", f"{b * 1e6:.1f} µs", f"{ratio:.2f}×", "≤2×"))
    return rows


def pipeline() -> Rows:
    """One call of the replica tiny-flux, two steps, whole on the device."""
    import torch
    from diffusers import DiffusionPipeline

    import pytest_diffopt.accelerators.simulated  # noqa: F401
    from pytest_diffopt.replicas import ensure

    def load(device: str) -> Callable[[], object]:
        made: Any = DiffusionPipeline.from_pretrained(ensure("tiny-flux"), dtype=torch.float32)
        made.set_progress_bar_config(disable=True)
        made.to(device)
        return lambda: made(
            "a cat sits",
            num_inference_steps=2,
            height=32,
            width=32,
            max_sequence_length=16,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        )

    a, b, ratio = in_turn(load("sim"), load("cpu"), 3, 15)
    return [("a call of tiny-flux, 2 steps", f"{a * 1e3:.0f} ms", f"{b * 1e3:.0f} ms", f"{ratio:.2f}×", "≤1.10×")]


IMPORT = """
import time, torch
started = time.perf_counter()
import pytest_diffopt.accelerators.simulated
print(time.perf_counter() - started)
"""


def library() -> Rows:
    """Built into an empty cache, then imported with a warm one; torch is imported before."""

    def imported() -> float:
        ran = subprocess.run(
            [sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=True
        )
        return float(ran.stdout)

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "DIFFOPT_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        cold = imported()
        warm = statistics.median(imported() for _ in range(9))
    return [
        ("building the library, once", f"{cold:.0f} s", "", "", "≤30 s"),
        ("importing it after that", f"{warm * 1e3:.0f} ms", "", "", "≤50 ms"),
    ]


BENCHMARKS: dict[str, Callable[[], Rows]] = {"operations": operations, "pipeline": pipeline, "library": library}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which to run; all by default")
    names = parser.parse_args().names or list(BENCHMARKS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    table = Table(title="the simulated device")
    for column in ("what", "device", "host", "ratio", "target"):
        table.add_column(column)
    for name in names:
        for row in BENCHMARKS[name]():
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
