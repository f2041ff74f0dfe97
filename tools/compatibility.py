"""Runs the bundled suite with other versions of the libraries, and writes docs/compatibility.md's table of what came of it.

    python tools/compatibility.py                      # every row, one after another
    python tools/compatibility.py --jobs 2 --row "diffusers 0.41.0" --row "pytest 8.4.2"
    python tools/compatibility.py --table-only         # no run: the table again, from docs/compatibility.json

Each row is an environment of its own: constraints.txt, with one library changed. The wheel is built once and installed
into each with pip; the suite then runs out of the installed package. What came of it is kept in docs/compatibility.json,
row by row, and the table is made of that. Needs Python 3.11, pip's index, a C++ compiler, and 2 GB of disk for each row
that is kept.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- the table: made by tools/compatibility.py -->", "<!-- the end of the table -->"

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "pytest")
"""Those that have a column, and of which rows change one."""

QUICK = "compile-offload or faults or optional or int8 or (blocks and not offload)"
"""The part of the suite that a row runs: every replica compiled whole and by region, each library, and each known fault."""

HUB_OF_ITS_OWN = ("huggingface_hub", "tokenizers", "safetensors")
"""What transformers pins by itself: a row with another transformers, or diffusers, takes what that one asks for."""


@dataclass(frozen=True)
class Row:
    """One environment: what differs from constraints.txt, and which of its lines do not hold there."""

    changes: Mapping[str, str] = field(default_factory=dict)
    freed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What ``--row`` selects it by: ``"diffusers 0.41.0"``."""
        return ", ".join(f"{library} {version}" for library, version in self.changes.items()) or "constraints.txt"


ROWS = (
    Row(),
    Row({"torch": "2.14.1"}),
    Row({"diffusers": "0.41.0"}, HUB_OF_ITS_OWN),
    Row({"diffusers": "0.40.0"}, HUB_OF_ITS_OWN),
    Row({"diffusers": "0.37.0"}, HUB_OF_ITS_OWN),
    Row({"transformers": "5.12.1"}, HUB_OF_ITS_OWN),
    Row({"transformers": "5.0.0"}, HUB_OF_ITS_OWN),
    Row({"accelerate": "1.12.0"}),
    Row({"accelerate": "1.2.0"}, HUB_OF_ITS_OWN),
    Row({"bitsandbytes": "0.49.2"}),
    Row({"bitsandbytes": "0.47.0"}),
    Row({"pytest": "8.4.2"}),
    Row({"pytest": "8.0.2"}),
    Row(
        {
            "diffusers": "0.37.0",
            "transformers": "5.0.0",
            "accelerate": "1.2.0",
            "bitsandbytes": "0.47.0",
            "pytest": "8.0.2",
        },
        HUB_OF_ITS_OWN,
    ),  # the lower bounds of pyproject.toml together
)


# A row's run.


def constraints_of(text: str, row: Row) -> str:
    """The lines of constraints.txt for a row: its changes in place of theirs, and without those that it frees.

    Raises:
        ValueError: the row changes what has no line there.
    """
    lines, left = [], dict(row.changes)
    for line in text.splitlines():
        name = line.partition("==")[0].strip()
        if name in left:
            lines.append(f"{name}=={left.pop(name)}")
        elif name not in row.freed:
            lines.append(line)
    if left:
        raise ValueError(f"constraints.txt has no line of {', '.join(left)}")
    return "\n".join(lines) + "\n"


def pip(python: Path, *arguments: str) -> None:
    """Run pip there; raises ``CalledProcessError`` with what it said."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PIP_CONSTRAINT": ""})


def run_row(row: Row, wheel: Path, folder: Path, select: str, *, keep: bool) -> dict[str, Any]:
    """Build the row's environment, run the suite in it, and give back its entry of the results."""
    place = folder / re.sub(r"[^\w.]+", "-", row.name)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    place.mkdir(parents=True, exist_ok=True)
    constraints = place / "constraints.txt"
    constraints.write_text(constraints_of((ROOT / "constraints.txt").read_text("utf-8"), row), encoding="utf-8")
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, capture_output=True, text=True)
        extras = "pytest-diffopt[torchao,quanto,gguf]"
        pip(python, "install", "-q", "-c", str(constraints), *(f"{n}=={v}" for n, v in row.changes.items()),
            f"{extras} @ {wheel.as_uri()}")  # fmt: skip
        pip(python, "install", "-q", "--force-reinstall", "--no-deps", str(wheel))  # the same version, built anew
    except subprocess.CalledProcessError as error:
        said = [line for line in (error.stderr or "").splitlines() if line.startswith("ERROR")]  # the first says what
        return entry_of(row, {}, select, {"exit_status": None, "checks": []}, problem=said[0] if said else str(error))
    versions = installed(python)
    log = place / "verdicts.json"
    log.unlink(missing_ok=True)
    ran = run_suite(python, log, folder, place, select)
    if not log.is_file():
        said = [line for line in f"{ran.stdout}\n{ran.stderr}".splitlines() if line.strip()]
        return entry_of(row, versions, select, {"exit_status": ran.returncode, "checks": []}, problem=said[-1])
    (place / "output.txt").write_text(ran.stdout + ran.stderr, encoding="utf-8")
    entry = entry_of(row, versions, select, json.loads(log.read_text("utf-8")))
    if not keep:
        shutil.rmtree(place)
    return entry


def run_suite(python: Path, log: Path, folder: Path, place: Path, select: str) -> subprocess.CompletedProcess[str]:
    """The suite out of the installed package, from a folder in which no configuration of pytest is found."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tools"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DIFFOPT_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "verdict_log", f"--verdict-log={log}"]
    command += ["-c", os.devnull, f"--rootdir={place}", "--pyargs", "pytest_diffopt.suite", "--diffopt-device=sim"]
    command += ["-k", select] if select else []
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def installed(python: Path) -> dict[str, str]:
    """The versions that are there, of Python and of every line of constraints.txt that is; local parts left out."""
    names = [
        line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line
    ]
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name).partition('+')[0]\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    ran = subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(ran.stdout)
    return versions


# What is kept of it, and the table.


def entry_of(
    row: Row, versions: Mapping[str, str], select: str, log: Mapping[str, Any], problem: str = ""
) -> dict[str, Any]:
    """A row's entry of the results: plain data.

    Args:
        versions: that were installed. log: what `verdict_log` wrote. problem: why there is no log.
    """
    checks = log["checks"]
    return {
        "row": row.name,
        "changes": dict(row.changes),
        "versions": dict(versions),
        "selected": select,
        "recipes": len({one["recipe"] for one in checks}),
        "statuses": dict(sorted(Counter(one["status"] for one in checks).items())),
        "broke": [one for one in checks if one["status"] in ("failed", "unverified", "skipped")],
        "problem": problem,
    }


def merged(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results with what was run now in place of what was run before, in the order of `ROWS`; other rows are dropped."""
    by_name = {entry["row"]: entry for entry in [*old, *new]}
    return [by_name[row.name] for row in ROWS if row.name in by_name]


def table_of(results: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table of results: a row each, what was changed in bold."""
    lines = [
        f"| {' | '.join(LIBRARIES)} | recipes | checks | what broke |",
        f"| {' | '.join('---' for _ in LIBRARIES)} | ---: | --- | --- |",
    ]
    for entry in results:
        versions, changes = entry["versions"], entry["changes"]
        shown = [versions.get(name) or changes.get(name, "-") for name in LIBRARIES]
        cells = [f"**{text}**" if name in changes else text for name, text in zip(LIBRARIES, shown, strict=True)]
        counts = ", ".join(f"{number} {word}" for word, number in entry["statuses"].items()) or "none"
        lines.append(f"| {' | '.join(cells)} | {entry['recipes']} | {counts} | {_broke(entry)} |")
    return "\n".join(lines)


def _broke(entry: Mapping[str, Any]) -> str:
    if entry["problem"]:
        return _cell(f"did not run: {entry['problem']}")
    checks: dict[str, list[str]] = {}
    for one in entry["broke"]:
        checks.setdefault(f"`{one['recipe']}`", []).append(one["check"])
    parts = [f"{recipe}: {', '.join(names)}" for recipe, names in checks.items()]
    more = f"; and {len(parts) - _MOST} more recipes" if len(parts) > _MOST else ""
    return _cell("; ".join(parts[:_MOST]) + more) or "nothing"


_MOST = 6
"""Recipes that the cell of a row names."""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def with_table(page: str, table: str) -> str:
    """The page with the table between its two marks.

    Raises:
        ValueError: the page lacks one of them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no table to replace: it needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


# The command.


def main(arguments: Sequence[str] | None = None) -> int:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=names, metavar="ROW", help=f"one of: {'; '.join(names)}")
    parser.add_argument(
        "--select", default=QUICK, metavar="EXPRESSION", help="pytest's -k; '' is all (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".compatibility", help="for environments and caches")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at once (default: 1)")
    parser.add_argument("--keep", action="store_true", help="keep the environments, for a second run")
    parser.add_argument("--table-only", action="store_true", help="run nothing: make the table of the results again")
    asked = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else []
    if not asked.table_only:
        folder = asked.folder.resolve()
        wheels = folder / "wheel"
        shutil.rmtree(wheels, ignore_errors=True)
        pip(Path(sys.executable), "wheel", "-q", "--no-deps", "-w", str(wheels), str(ROOT))
        (wheel,) = wheels.glob("*.whl")
        rows = [row for row in ROWS if asked.row is None or row.name in asked.row]
        with concurrent.futures.ThreadPoolExecutor(asked.jobs) as pool:
            runs = [pool.submit(run_row, row, wheel, folder, asked.select, keep=asked.keep) for row in rows]
            for run in concurrent.futures.as_completed(runs):
                entry = run.result()
                print(f"{entry['row']}: {entry['problem'] or entry['statuses']}", flush=True)
                results = merged(results, [entry])
                RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text("utf-8"), table_of(results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
