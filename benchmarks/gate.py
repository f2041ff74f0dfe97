"""What comparing with baselines and writing reports cost, beside the run that they are of.

    python benchmarks/gate.py [--pairs N] [RECIPE_FILE]

The recipes of a file run as they are, and compared with baselines recorded just before and reported in each format, in turn:
the ratio is of the processor's time of whole commands. Then what was observed is multiplied, to 50, 200 and 800 recipes, of
which baselines are written, read and compared and reports are written, without a run.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_diffopt.baseline.judging import Baselines
from pytest_diffopt.baseline.store import Entry, Store, made_entry, parsed, read_all
from pytest_diffopt.report.junit import junit_xml
from pytest_diffopt.report.markdown import markdown
from pytest_diffopt.report.page import page
from pytest_diffopt.report.run import Run, to_json

DEFAULT = Path(__file__).parents[1] / "examples" / "quantize-compile-offload.recipes.toml"
WRITERS = {".json": to_json, ".md": markdown, ".html": page, ".xml": junit_xml}


def cpu_seconds(file: Path, folder: Path, *arguments: str) -> float:
    """Of one whole command, with what it started; it must pass."""
    begin = _of_children()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(file)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stdout + ran.stderr)
    spent = _of_children() - begin
    print(f"  {' '.join(arguments) or 'as it is'}: {spent:.1f} s, {ran.stdout.splitlines()[-1]}", flush=True)
    return spent


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def multiplied(run: Run, count: int) -> Run:
    """The same run with ``count`` recipes, copies of its own under other names."""
    recipes = tuple(run.recipes[k % len(run.recipes)].model_copy(update={"recipe": f"copy-{k}"}) for k in range(count))
    return run.model_copy(update={"recipes": recipes})


@contextmanager
def told(what: str) -> Iterator[None]:
    """Print the time of the block."""
    begin = time.perf_counter()
    yield
    print(f"  {what}: {time.perf_counter() - begin:.2f} s", flush=True)


def store_and_compare(entries: list[Entry], count: int, folder: Path) -> None:
    """Write ``count`` baselines, read them all, and hold what was observed against each."""
    store, source = Store(folder), "copies.recipes.toml"
    copies = [(f"copy-{k}", entries[k % len(entries)]) for k in range(count)]
    with told(f"{count} baselines written, one by one"), store.locked():
        for name, entry in copies:
            store.record(source, name, entry)
    with told(f"{count} read and compared"):
        baselines = Baselines("baseline", read_all(folder))
        verdicts = [baselines.judge(source, name, entry.key, entry.record) for name, entry in copies]
    if any(one.status != "passed" for one in verdicts):
        raise SystemExit(next(one.sentence for one in verdicts if one.status != "passed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT, help="a recipe file that passes")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="runs of each kind; 0: only the copies")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        compared = ["--diffopt-baseline=baseline"]
        reported = [f"--diffopt-report=report{suffix}" for suffix in WRITERS]
        print("to fill the caches and record:", flush=True)
        cpu_seconds(asked.file.resolve(), folder, *compared, "--diffopt-update-baseline", *reported)
        pairs = []
        for number in range(asked.pairs):
            kinds = [(), (*compared, *reported)]
            times = [
                cpu_seconds(asked.file.resolve(), folder, *kind) for kind in (kinds if number % 2 else kinds[::-1])
            ]
            pairs.append(times if number % 2 else times[::-1])
        if pairs:
            ratios = [with_all / bare for bare, with_all in pairs]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            print(f"compared and reported, against as it is: {statistics.median(ratios):.3f}x ({spread})")
        run = Run.model_validate_json((folder / "report.json").read_text("utf-8"))
        found = read_all(folder / "baseline")
        entries = [made_entry(one.key, one.record) for text in found.values() for one in parsed(text).entries]
        for count in (50, 200, 800):
            store_and_compare(entries, count, folder / str(count))
            copies = multiplied(run, count)
            for suffix, write in WRITERS.items():
                with told(f"{count} recipes in a {suffix} report"):
                    text = write(copies)
                print(f"    {len(text.encode()) / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
