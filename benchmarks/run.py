"""Measures what pytest-diffopt costs, as ratios of two commands run in turn on this machine, and prints a table.

    python benchmarks/run.py            # all of it
    python benchmarks/run.py startup    # one

Each figure is the median over pairs A B A B …, after one warm-up of each. Seconds and peak memory are of whole processes.
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
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "quantize-compile-offload.recipes.toml"


@dataclass(frozen=True)
class Run:
    """One finished process: wall and CPU seconds, and its peak memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: str
    against: str
    ratio: str
    target: str


def run(command: list[str], folder: Path) -> Run:
    """Run a command to its end. Raises CalledProcessError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".pytest_cache" / "inductor"))
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def pairs(ours: list[str], against: list[str], folder: Path, count: int) -> tuple[list[Run], list[Run]]:
    """Both commands in turn, after one warm-up of each."""
    run(ours, folder), run(against, folder)
    first, second = [], []
    for _ in range(count):
        first.append(run(ours, folder))
        second.append(run(against, folder))
    return first, second


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}"


def startup(folder: Path) -> Row:
    """pytest on a one-test file, with the plugin and without."""
    (folder / "test_one.py").write_text("def test_one():\n    pass\n", encoding="utf-8")
    base = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_one.py"]
    ours, against = pairs(base, [*base[:3], "-p", "no:diffopt", *base[3:]], folder, 21)
    ratio = [a.cpu_seconds / b.cpu_seconds for a, b in zip(ours, against, strict=True)]
    return Row(
        "pytest start-up, one-test file (CPU time)",
        f"{median([r.cpu_seconds for r in ours])} s",
        f"{median([r.cpu_seconds for r in against])} s with -p no:diffopt",
        f"{median(ratio)}×",
        "≤1.05×",
    )


BARE = """
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from pytest_diffopt.accelerators import Accelerator
from pytest_diffopt.preparation.quantization import quantizers_accept, use_default_kernels
from pytest_diffopt.replicas.resolution import resolve

torch._dynamo.config.capture_dynamic_output_shape_ops = True
host = Accelerator("cpu", "cpu")
A, B = "a cat in a garden", "a ship at night"


def load():
    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        components_to_quantize=["transformer", "text_encoder_2"],
    )
    with quantizers_accept(host):
        pipe = DiffusionPipeline.from_pretrained(
            resolve("tiny-flux").path_or_id, quantization_config=config, dtype=torch.bfloat16
        )
    use_default_kernels({"transformer": pipe.transformer, "text_encoder_2": pipe.text_encoder_2}, host)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls(pipe):
    for prompt in (A, A, B):
        pipe(prompt, height=96, width=96, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")


calls(load())
pipe = load()
pipe.transformer.to(memory_format=torch.channels_last)
pipe.transformer.compile(mode="max-autotune", fullgraph=True)
calls(pipe)
"""

CHECKED = """
from pytest_diffopt import check, load_recipes

verdicts = check(load_recipes({example!r})["flux-nf4-compile"])
assert all(verdict.status == "passed" for verdict in verdicts), verdicts
"""


def validation(folder: Path) -> Row:
    """All checks of one recipe, against a bare script that makes the same reference run, cold run and further calls."""
    (folder / "checked.py").write_text(CHECKED.format(example=str(EXAMPLE)), encoding="utf-8")
    (folder / "bare.py").write_text(BARE, encoding="utf-8")
    ours, against = pairs([sys.executable, "checked.py"], [sys.executable, "bare.py"], folder, 5)
    ratio = [a.seconds / b.seconds for a, b in zip(ours, against, strict=True)]
    return Row(
        "validating flux-nf4-compile, all checks",
        f"{median([r.seconds for r in ours])} s",
        f"{median([r.seconds for r in against])} s, the bare script",
        f"{median(ratio)}×",
        "≤1.3×",
    )


def recipes(folder: Path) -> Row:
    """pytest on the seed's first two recipes, with a warm Inductor cache."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE), "-k", "not offload"]
    run(command, folder)
    found = [run(command, folder) for _ in range(3)]
    seconds = statistics.median([r.seconds for r in found])
    peak = max(r.peak_bytes for r in found) / 2**30
    return Row("pytest, the first two recipes, warm", f"{seconds:.1f} s, {peak:.2f} GiB", "", "", "≤45 s")


BENCHMARKS: dict[str, Callable[[Path], Row]] = {"startup": startup, "validation": validation, "recipes": recipes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which to run; all by default")
    names = parser.parse_args().names or list(BENCHMARKS)
    table = Table(title="pytest-diffopt")
    for column in ("what", "ours", "against", "ratio", "target"):
        table.add_column(column)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            row = BENCHMARKS[name](Path(folder))
        table.add_row(row.what, row.ours, row.against, row.ratio, row.target)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
