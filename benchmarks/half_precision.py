"""What half precision costs on the simulated GPU against float32, as ratios of runs in turn in one process; prints a table.

    python benchmarks/half_precision.py [--repeats N]

A block of a UNet is what SD and SDXL have there: random weights, full width, one group of residual and attention layers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

TARGET = 3.0
HALVES = ("float16", "bfloat16")
Call = Callable[[], object]


def block(channels: int, side: int, context: int) -> Callable[[str], Call]:
    """Makes the block in a precision: ``channels`` wide, on an image of ``side`` × ``side``, texts of 77 tokens."""

    def made(precision: str) -> Call:
        import torch
        from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D

        to: dict[str, Any] = {"device": "cuda", "dtype": getattr(torch, precision)}
        layers: Any = CrossAttnDownBlock2D(
            in_channels=channels,
            out_channels=channels,
            temb_channels=1280,
            num_layers=1,
            num_attention_heads=channels // 64,
            cross_attention_dim=context,
        )
        layers.to(**to)
        image, times, texts = (
            torch.randn(*shape).to(**to) for shape in ((1, channels, side, side), (1, 1280), (1, 77, context))
        )
        return lambda: layers(image, times, encoder_hidden_states=texts)

    return made


def pipeline(name: str) -> Callable[[str], Call]:
    """Makes a call of the replica, two steps, whole on the GPU."""

    def made(precision: str) -> Call:
        import torch
        from diffusers import DiffusionPipeline

        from pytest_diffopt.replicas import ensure

        loaded: Any = DiffusionPipeline.from_pretrained(ensure(name), dtype=getattr(torch, precision))
        loaded.set_progress_bar_config(disable=True)
        loaded.to("cuda")
        return lambda: loaded("a cat sits", num_inference_steps=2, height=64, width=64, output_type="pt")

    return made


MEASURED = {
    "SD's block of 320 channels, 64×64": block(320, 64, 768),
    "SD's block of 640 channels, 32×32": block(640, 32, 768),
    "SD's block of 1280 channels, 16×16": block(1280, 16, 768),
    "SDXL's block of 640 channels, 64×64": block(640, 64, 2048),
    "SDXL's block of 1280 channels, 32×32": block(1280, 32, 2048),
    "a call of tiny-sd, 2 steps": pipeline("tiny-sd"),
    "a call of tiny-sdxl, 2 steps": pipeline("tiny-sdxl"),
}


def seconds(call: Call) -> float:
    """Of the processor's time, on one thread: what else the machine does is not in it."""
    started = time.process_time()
    call()
    return time.process_time() - started


def row(made: Callable[[str], Call], repeats: int) -> tuple[list[str], float]:
    """Seconds in float32, each half precision's ratio, and the highest ratio: medians, after one warm-up of each."""
    calls = [made(precision) for precision in ("float32", *HALVES)]
    for call in calls:
        call()
    rounds = [[seconds(call) for call in calls] for _ in range(repeats)]
    ratios = [statistics.median(one[at] / one[0] for one in rounds) for at in (1, 2)]
    return [f"{statistics.median(one[0] for one in rounds):.2f} s", *(f"{ratio:.2f}×" for ratio in ratios)], max(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of the three precisions")
    repeats = parser.parse_args().repeats
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from pytest_diffopt.accelerators.simulated import simulated_cuda

    table = Table(title="half precision on the simulated GPU")
    for column in ("what", "float32", *HALVES, "target"):
        table.add_column(column)
    worst = 0.0
    with simulated_cuda(), torch.no_grad():
        for name, made in MEASURED.items():
            figures, highest = row(made, repeats)
            table.add_row(name, *figures, f"≤{TARGET:g}×")
            worst = max(worst, highest)
    Console(width=120).print(table)
    return int(worst > TARGET)


if __name__ == "__main__":
    raise SystemExit(main())
