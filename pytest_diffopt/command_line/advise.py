"""``advise``: which of the known recipes fit a budget or a card with a full-size model, the cheapest in time first."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_diffopt.command_line import arguments, terminals
from pytest_diffopt.command_line.arguments import STDOUT
from pytest_diffopt.command_line.command import HELD, MISSED, Command, UsageError
from pytest_diffopt.command_line.whole_files import check_writable, write_for
from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.report.advice import advice_lines

if TYPE_CHECKING:
    from pytest_diffopt.forecasting.advice import Advice

DTYPES = ("bfloat16", "float16", "float32")

TOML_HEAD = """\
# Recipes that surely fit, the one that is expected to cost least time first; made by `diffopt advise`.
# pytest runs them on the replica of the model, where there is one, and holds the budgets by forecasts.

"""


@dataclass(frozen=True)
class Options:
    """What the command was told; see its ``--help``."""

    model: str
    wanted: dict[str, Any]
    json: str | None
    toml: Path | None

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """Out of what argparse read.

        Raises:
            UsageError: two of them do not go together, or a file cannot be written.
        """
        assume = arguments.assumptions(given.assume)
        if given.toml is not None and given.json is not None and Path(given.json) == given.toml:
            raise UsageError(f"argument --toml: {str(given.toml)!r} is --json's file already")
        if given.json not in (None, STDOUT):
            check_writable("--json", Path(given.json))
        if given.toml is not None:
            check_writable("--toml", given.toml)
        wanted = {
            "budget": given.max_memory,
            "gpu": given.gpu,
            "sizes": tuple(given.size) or None,
            "steps": given.steps,
            "assume": assume or None,
            "dtype": given.dtype,
            "all": given.all,
        }
        return cls(given.model, wanted, given.json, given.toml)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``advise``."""
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        required=True,
        help=arguments.MODEL,
    )
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument(
        "--max-memory", metavar="16GiB", type=arguments.memory, help="what torch may have allocated at once"
    )
    limit.add_argument(
        "--gpu",
        metavar="CARD",
        type=arguments.card,
        help="a card that the command cards lists: what is reserved, and what CUDA itself takes, must fit it",
    )
    arguments.add_sizes(parser)
    add(
        "--steps",
        metavar="N",
        type=arguments.positive,
        help="denoising steps a call, over which transfers are spread (default: the pipeline's own)",
    )
    arguments.add_assumptions(parser)
    add(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="of what is not quantized (default: %(default)s)",
    )
    add("--all", action="store_true", help="forecast every rung, also those dearer than what surely fits")
    add(
        "--json",
        metavar="PATH",
        help=f"write the ladder to a file; {STDOUT} is standard output, and all else goes to stderr",
    )
    add(
        "--toml",
        metavar="PATH",
        type=Path,
        help="write the recipes that surely fit, with their budgets: a file NAME.recipes.toml is collected by pytest",
    )


def run(given: argparse.Namespace) -> int:
    """Climb the ladder, print, write; 1 where no rung is sure to fit."""
    options = Options.of(given)
    with terminals.progress() as say, contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
        advice = _advised(options, say)
    output = sys.stderr if options.json == STDOUT else sys.stdout
    for line in advice_lines(advice, width=terminals.width_of(output), color=terminals.has_color(output)):
        print(line, file=output)
    if options.json == STDOUT:
        sys.stdout.write(advice.to_json())
    elif options.json is not None:
        write_for("--json", Path(options.json), advice.to_json())
    if options.toml is not None and advice.best is not None:
        write_for("--toml", options.toml, TOML_HEAD + advice.to_toml())
    elif options.toml is not None:
        print(f"{options.toml} was not written: no rung is sure to fit", file=sys.stderr)
    return HELD if advice.best is not None else MISSED


def _advised(options: Options, say: Callable[[str], None]) -> Advice:
    from pytest_diffopt.forecasting.advice import advise

    try:
        return advise(options.model, **options.wanted, progress=say)
    except ReplicaError as error:
        raise UsageError(f"argument --model: {error}") from None


COMMAND = Command(
    "advise",
    "Tell which known recipes fit a budget or a card with a full-size model, the cheapest in time first",
    add_arguments,
    run,
)
