"""``run``: a script or a module on a simulated GPU, and what it took."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import sys
from pathlib import Path

from pytest_diffopt.command_line.arguments import card, memory, positive
from pytest_diffopt.command_line.command import Command, UsageError
from pytest_diffopt.command_line.terminals import progress
from pytest_diffopt.command_line.whole_files import check_writable, write_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s --gpu CARD [--devices N] [--memory SIZE] [--json FILE] (PROGRAM.py | -m MODULE) [ARGUMENTS ...]"
    )
    parser.add_argument("--gpu", metavar="CARD", type=card, required=True, help="a card that the command cards lists")
    parser.add_argument("--devices", metavar="N", type=positive, default=1, help="how many of it, 1 to 16 (default: 1)")
    parser.add_argument(
        "--memory", metavar="SIZE", type=memory, help="of each, e.g. 12GiB (default: what CUDA reports on the card)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what the program took into this file too")
    parser.add_argument(
        "-m", dest="module", metavar="MODULE", nargs=argparse.REMAINDER, help="a module, and its arguments"
    )
    parser.add_argument(
        "program",
        metavar="PROGRAM",
        nargs=argparse.REMAINDER,
        help="a script, and its arguments; options come before it",
    )


def run(given: argparse.Namespace) -> int:
    """Ends the process as the program would have ended it."""
    words = given.module if given.module is not None else given.program
    if not words:
        raise UsageError("argument PROGRAM: name a script, or a module with -m")
    if given.json is not None:
        check_writable("--json", given.json)
    from pytest_diffopt.accelerators.whole_process import ChosenGpu, whole_process
    from pytest_diffopt.command_line.programs import run_as_main
    from pytest_diffopt.command_line.usage import Meter, Usage

    borrowed = contextlib.ExitStack()
    try:
        with progress():
            gpu = borrowed.enter_context(whole_process(ChosenGpu(given.gpu.name, given.devices, given.memory)))
    except ValueError as error:
        raise UsageError(str(error)) from None
    assert gpu is not None
    gpu.set_caching_allocator(True)  # it counts, and runs out, as CUDA's does
    meter = Meter(gpu, borrowed)
    path = given.json.absolute() if given.json is not None else None
    process, status = os.getpid(), 1

    def report() -> None:
        if os.getpid() != process:  # a fork of the program
            return
        usage = Usage(
            program=tuple(words),
            exit_status=status,
            gpu=gpu.properties.name,
            memory_bytes=gpu.memory_bytes,
            devices=meter.read(),
            syncs=meter.syncs(),
            out_of_memory=meter.out_of_memory,
        )
        borrowed.close()
        print(*usage.lines(), sep="\n", file=sys.__stderr__)
        if path is not None:
            try:
                write_for("--json", path, json.dumps(usage.to_data(), indent=2) + "\n")
            except UsageError as error:
                print(f"diffopt run: error: {error}", file=sys.__stderr__)

    atexit.register(report)  # after the program's threads, and what it registers itself
    try:
        ended = run_as_main(words[0], words[1:], is_module=given.module is not None, failed=meter.failed)
    except UsageError:
        atexit.unregister(report)
        borrowed.close()
        raise
    status = ended & 0xFF if isinstance(ended, int) else int(ended is not None)
    raise SystemExit(ended)


COMMAND = Command("run", "Run a script on a simulated GPU, and say what it took", add_arguments, run)
