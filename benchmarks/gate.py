"""What comparing with baselines and writing reports cost, beside the run that they are of.

    python benchmarks/gate.py [--runs N] [RECIPE_FILE]

The recipes of a file run, compared with baselines recorded just before and reported in each format, with this file as a
plugin that clocks what belongs to either: whole commands differ by more from one to the next than the two take. Then what was
observed is multiplied, to 50, 200 and 800 recipes, of which baselines are written, read and compared and reports are written,
without a run.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pytest_diffopt.baseline.judging import Baselines
from pytest_diffopt.baseline.store import Entry, Store, made_entry, parsed, read_all
from pytest_diffopt.report.junit import junit_xml
from pytest_diffopt.report.markdown import markdown
from pytest_diffopt.report.page import page
from pytest_diffopt.report.run import Run, to_json

DEFAULT = Path(__file__).parents[1] / "examples" / "quantize-compile-offload.recipes.toml"
TARGET = 0.02
WRITERS = {".json": to_json, ".md": markdown, ".html": page, ".xml": junit_xml}


SHARE = "compared and reported: "


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: clock what compares and reports, in this process."""
    from pytest_diffopt.collection import baselines
    from pytest_diffopt.collection.recipe_files import CheckItem
    from pytest_diffopt.report.gate import Gate
    from pytest_diffopt.report.reports import Reports

    config.stash[_CLOCK] = clock = Clock()
    for holder, name in (
        (baselines, "judged"),
        (CheckItem, "_write_down"),
        (CheckItem, "_draw"),
        (Gate, "finish"),
        (Reports, "add"),
        (Reports, "write"),
        (Reports, "pytest_html_results_summary"),
    ):
        setattr(holder, name, clock.clocked(getattr(holder, name)))


def pytest_unconfigure(config: pytest.Config) -> None:
    clock = config.stash[_CLOCK]
    share = clock.seconds / (time.perf_counter() - clock.begun)
    print(f"\n{SHARE}{clock.seconds:.3f} s, {share:.4f} of the run", file=sys.stderr)


class Clock:
    """Adds up the time in some functions; one that another of them calls is not counted twice."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds = 0.0
        self._inside = False

    def clocked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def around(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            begin, self._inside = time.perf_counter(), True
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin
                self._inside = False

        return around


_CLOCK: pytest.StashKey[Clock] = pytest.StashKey()


def share_of(file: Path, folder: Path, *arguments: str) -> float:
    """The share of a run, of those items alone that it ran, in which it compared and reported; it must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gate", *arguments, str(file)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stdout + ran.stderr)
    (said,) = [line for line in ran.stderr.splitlines() if line.startswith(SHARE)]
    print(f"  {said}; {ran.stdout.splitlines()[-1]}", flush=True)
    return float(said.removeprefix(SHARE).split()[2])


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
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs that are clocked; 0: only the copies")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as made:
        folder, file = Path(made), asked.file.resolve()
        compared = ["--diffopt-baseline=baseline"]
        reported = [f"--diffopt-report=report{suffix}" for suffix in WRITERS]
        print("to fill the caches and record:", flush=True)
        share_of(file, folder, *compared, "--diffopt-update-baseline", *reported)
        shares = [share_of(file, folder, *compared, *reported) for _ in range(asked.runs)]
        if shares:
            print(f"median share of a run: {statistics.median(shares):.4f}, target {TARGET}")
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
