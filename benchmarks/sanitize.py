"""Runs the tests of the simulated GPU with its library built under a sanitizer of the compiler, GCC's or Clang's.

    python benchmarks/sanitize.py                          # addresses: overruns, use after free
    python benchmarks/sanitize.py undefined -k memory      # undefined behaviour; more arguments are pytest's

torch's own libraries are not built so: what is watched is our code, and every block of memory.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# flags, the runtime that must be loaded first, and its settings
SANITIZERS = {
    "address": (
        "-fsanitize=address -fno-omit-frame-pointer -g1",
        "libasan.so",
        # Python and torch keep much until the end; an absurd request is an error of torch's that a test asks for
        {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0"},
    ),
    "undefined": (
        # one by one: with all of them GCC takes a function's address, in an assertion of torch's headers, for no constant
        (
            "-fsanitize=alignment,bool,bounds,enum,float-cast-overflow,integer-divide-by-zero,return,shift,"
            "signed-integer-overflow,unreachable -fno-sanitize-recover=all -g1"
        ),
        "libubsan.so",
        {"UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
}


def _path_of(library: str) -> str:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    asked = [*compiler, f"-print-file-name={library}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> int:
    """The exit status of pytest, or that of a process which a sanitizer ended."""
    name = arguments.pop(0) if arguments and arguments[0] in SANITIZERS else "address"
    flags, runtime, settings = SANITIZERS[name]
    # and the C++ library: the runtime looks for its exceptions at once, and Python itself does not load it
    found = [_path_of(library) for library in (runtime, "libstdc++.so.6")]
    if not all(Path(path).is_absolute() for path in found):
        print(f"The compiler has no {runtime}: install its sanitizers.", file=sys.stderr)
        return 2
    environment = {**os.environ, **settings, "DIFFOPT_SIM_CXXFLAGS": flags, "LD_PRELOAD": " ".join(found)}
    # one process, no output caught: a report is written as the process ends
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        *(arguments or ["tests/simulated"]),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
