"""The table of commands, and the one place that turns an error into a sentence and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pytest_diffopt.command_line import advise, calibrate, forecast, listing, run
from pytest_diffopt.command_line.command import MISSED, PROGRAM, WRONG, Command, UsageError
from pytest_diffopt.errors import DiffoptError

COMMANDS: tuple[Command, ...] = (
    run.COMMAND,
    forecast.COMMAND,
    advise.COMMAND,
    calibrate.COMMAND,
    listing.MODELS,
    listing.CARDS,
)

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None, *, program: str = PROGRAM) -> int:
    """Run the command that the arguments name (None: the process's own), and return its exit status.

    ``program`` is what usage lines call it: the words by which it was started.

    argparse itself ends the process, with 2, where the arguments cannot be parsed.
    """
    parser, subparsers = _parsers(program)
    given = parser.parse_args(arguments)
    command: Command = given.command
    try:
        status = command.run(given)
        sys.stdout.flush()
        return status
    except (UsageError, DiffoptError) as error:
        own = subparsers[command.name]
        own.print_usage(sys.stderr)
        print(f"{own.prog}: error: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MISSED
    except KeyboardInterrupt:
        print(f"{program} {command.name}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parsers(program: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog=program,
        description="What optimization recipes of diffusion pipelines take, told with no GPU and no weights.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    subparsers = {}
    for command in COMMANDS:
        own = commands.add_parser(
            command.name, help=command.summary, description=f"{command.summary}.", allow_abbrev=False
        )
        command.add_arguments(own)
        own.set_defaults(command=command)
        subparsers[command.name] = own
    return parser, subparsers
