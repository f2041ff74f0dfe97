"""How much faster two workers are than one process, on ten recipes, with a warm compiler cache.

    python benchmarks/two_workers.py [--pairs N]

Ten recipes of five replicas run in one process and in two workers, in turn, after one run that fills the caches, which takes
some minutes where they are empty. What counts is the ratio of whole commands: start-up and imports, which workers pay each,
are in it. It wants two cores that are idle: with other work on them it measures that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 1.6

FAMILIES = {
    "tiny-flux": "transformer",
    "tiny-sd3": "transformer",
    "tiny-sd": "unet",
    "tiny-wan": "transformer",
    "tiny-sdxl": "unet",
}


def recipes() -> str:
    """Ten: each replica in two precisions, its denoiser compiled block by block."""
    rows = []
    for pipeline, component in FAMILIES.items():
        for dtype in ("bfloat16", "float32"):
            rows.append(f'[recipe.{pipeline}-{dtype}]\npipeline = "{pipeline}"\ndtype = "{dtype}"\n')
            rows.append(f'compilation = {{ component = "{component}", scope = "repeated_blocks" }}\n')
            rows.append("contract = { parity_multiple = 10.0 }\n\n")  # what is judged is not what is measured
    return "".join(rows)


def seconds(folder: Path, *arguments: str) -> float:
    """Of one whole command; it must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "ten.recipes.toml"]
    begin = time.monotonic()
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stdout + ran.stderr)
    print(f"  {' '.join(arguments)}: {time.monotonic() - begin:.1f} s, {ran.stdout.splitlines()[-1]}", flush=True)
    return time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="runs of each kind")
    pairs = parser.parse_args().pairs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "ten.recipes.toml").write_text(recipes(), encoding="utf-8")
        print(f"load before: {os.getloadavg()[0]:.1f}; to fill the caches:", flush=True)
        seconds(folder, "-n", "2")
        measured = [(seconds(folder, "-n", "0"), seconds(folder, "-n", "2")) for _ in range(pairs)]
    ratio = statistics.median(one / two for one, two in measured)
    one, two = (statistics.median(times) for times in zip(*measured, strict=True))
    print(f"one process {one:.1f} s, two workers {two:.1f} s: {ratio:.2f}x, target {TARGET}x")
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
