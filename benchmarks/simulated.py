"""Measures what the simulated GPU costs against the host, as ratios of runs in turn in one process, and prints a table.

    python benchmarks/simulated.py            # all of it
    python benchmarks/simulated.py operations

Figures are medians of interleaved repeats. The build is one cold run, into an empty cache.
"""

from __future__ import annotations

import argparse
import contextlib
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

    rows: Rows = []
    host = torch.randn(8, 8)
    device = host.to("cuda")
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

    a, b, ratio = in_turn(load("cuda"), load("cpu"), 3, 15)
    return [("a call of tiny-flux, 2 steps", f"{a * 1e3:.0f} ms", f"{b * 1e3:.0f} ms", f"{ratio:.2f}×", "≤1.10×")]


ENTER = """
import time, torch
from pytest_diffopt.accelerators.simulated import simulated_cuda

def entered():
    started = time.perf_counter()
    with simulated_cuda():
        taken = time.perf_counter() - started
        torch.ones(1, device="cuda")
    return taken

print(entered(), sorted(entered() for _ in range(9))[4])
"""


def library() -> Rows:
    """Built into an empty cache, then entered with a warm one, for the first time in a process and again; torch is
    imported before."""

    def entered() -> tuple[float, float]:
        ran = subprocess.run([sys.executable, "-c", ENTER], env=environment, capture_output=True, text=True, check=True)
        first, again = map(float, ran.stdout.split())
        return first, again

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "DIFFOPT_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        cold, _ = entered()
        warm = [entered() for _ in range(9)]
    first, again = (statistics.median(column) for column in zip(*warm, strict=True))
    return [
        ("building the library, once", f"{cold:.0f} s", "", "", "≤30 s"),
        ("entering it, first in a process", f"{first * 1e3:.0f} ms", "", "", "≤100 ms"),
        ("entering it again", f"{again * 1e3:.1f} ms", "", "", "≤100 ms"),
    ]


BENCHMARKS: dict[str, Callable[[], Rows]] = {"operations": operations, "pipeline": pipeline, "library": library}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which to run; all by default")
    names = parser.parse_args().names or list(BENCHMARKS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    table = Table(title="the simulated GPU")
    for column in ("what", "device", "host", "ratio", "target"):
        table.add_column(column)
    from pytest_diffopt.accelerators.simulated import simulated_cuda

    for name in names:
        # the last one enters in processes of its own
        with simulated_cuda() if name != "library" else contextlib.nullcontext():
            rows = BENCHMARKS[name]()
        for row in rows:
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
