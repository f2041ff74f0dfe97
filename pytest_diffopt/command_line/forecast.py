"""``forecast``: the peak memory of a file's recipes with full-size models, with no GPU and no weights."""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_diffopt.accelerators.gpus import CARDS
from pytest_diffopt.byte_sizes import human
from pytest_diffopt.command_line import arguments, terminals
from pytest_diffopt.command_line.arguments import STDOUT
from pytest_diffopt.command_line.command import HELD, MISSED, Command, UsageError
from pytest_diffopt.command_line.selection import Job, chosen, jobs_of, left_out_line
from pytest_diffopt.command_line.whole_files import check_writable, write_for
from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.report.forecasts import (
    ANY_CARD,
    Row,
    Target,
    detail_lines,
    document,
    missed,
    picture,
    table_lines,
    wrapped,
)

if TYPE_CHECKING:
    from pytest_diffopt.accelerators.gpus import Card
    from pytest_diffopt.forecasting.record import Forecast

COMMON_GB = (12, 16, 24, 80)
"""Sizes of cards that have a column where no card is named."""


@dataclass(frozen=True)
class Options:
    """What the command was told; see its ``--help``."""

    path: Path
    recipes: tuple[str, ...]
    models: tuple[str, ...]
    cards: tuple[Card, ...]
    sizes: tuple[tuple[int, ...], ...] | None
    steps: int | None
    assume: Mapping[str, object]
    max_memory_bytes: int | None
    details: bool
    json: str | None
    svg: Path | None

    @classmethod
    def of(cls, given: argparse.Namespace) -> Options:
        """Out of what argparse read.

        Raises:
            UsageError: two of them do not go together.
        """
        assume = arguments.assumptions(given.assume)
        if given.svg is not None and given.json is not None and Path(given.json) == given.svg:
            raise UsageError(f"argument --svg: {str(given.svg)!r} is --json's file already")
        return cls(
            path=given.path,
            recipes=tuple(given.recipe),
            models=tuple(given.model),
            cards=tuple(dict.fromkeys(given.gpu)),
            sizes=tuple(given.size) or None,
            steps=given.steps,
            assume=assume,
            max_memory_bytes=given.max_memory,
            details=given.details,
            json=given.json,
            svg=given.svg,
        )

    @property
    def targets(self) -> list[Target]:
        """The columns of what a recipe may fit: the cards named, or common sizes; and the budget."""
        found = [Target(card.name, (card,), required=True) for card in self.cards] or common_sizes()
        if self.max_memory_bytes is not None:
            whole, rest = divmod(self.max_memory_bytes, 2**30)
            title = f"in {human(self.max_memory_bytes) if rest else f'{whole} GiB'}"
            found.append(Target(title, budget_bytes=self.max_memory_bytes, required=True))
        return found


def common_sizes() -> list[Target]:
    """A column for each of a few sizes of cards, which stands for all known cards of that size."""
    return [
        Target(f"{size} GB", tuple(card for card in CARDS.values() if card.nominal_bytes == size * 2**30))
        for size in COMMON_GB
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``forecast``."""
    arguments.add_recipes(parser)
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        action="append",
        default=[],
        help=f"{arguments.MODEL}; again "
        "for more: each recipe takes those of its own pipeline (default: the one of the recipe's part forecast, else the "
        "one that its hub id names)",
    )
    add(
        "--gpu",
        metavar="CARD",
        action="append",
        default=[],
        type=arguments.card,
        help="a card that the command cards lists; again for more. A recipe that is not sure to fit it fails "
        f"(default: columns for cards of {', '.join(map(str, COMMON_GB))} GB, which fail nothing)",
    )
    arguments.add_sizes(parser)
    add(
        "--steps",
        metavar="N",
        type=arguments.positive,
        help="denoising steps a call (default: the recipe's, and 3 at the least)",
    )
    arguments.add_assumptions(parser)
    add(
        "--max-memory",
        metavar="16GiB",
        type=arguments.memory,
        help="fail a recipe whose peak is not sure to stay within it",
    )
    add(
        "--details",
        action="store_true",
        help="for each recipe all peaks, what is alive at the highest, and what is assumed",
    )
    add(
        "--json",
        metavar="PATH",
        help=f"write the forecasts to a file; {STDOUT} is standard output, and all else goes to stderr",
    )
    add(
        "--svg",
        metavar="PATH",
        type=Path,
        help="draw whose bytes are on the accelerator over time; with several recipes one file each, PATH-RECIPE.svg",
    )


def run(given: argparse.Namespace) -> int:
    """Forecast, print, write; 1 where a recipe failed, or is not sure to fit what was named."""
    from pytest_diffopt.recipe_loading import load_recipes
    from pytest_diffopt.replicas.catalogue import registry

    options = Options.of(given)
    recipes = chosen(load_recipes(options.path), options.recipes, str(options.path))
    jobs, left_out = jobs_of(recipes, options.models, registry)
    pictures = picture_paths(options.svg, jobs)
    if options.json not in (None, STDOUT):
        check_writable("--json", Path(str(options.json)))
    for path in pictures:
        check_writable("--svg", path)
    if line := left_out_line(left_out, registry):
        print(line, file=sys.stderr)

    with terminals.progress() as say, contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
        rows = forecast_rows(jobs, options, say)
    output = sys.stderr if options.json == STDOUT else sys.stdout
    width, color = terminals.width_of(output), terminals.has_color(output)
    for line in report_lines(rows, options, width=width, color=color):
        print(line, file=output)
    for line in write(rows, options, pictures):
        print(line, file=sys.stderr)
    failed = any(row.failure for row in rows) or missed(rows, options.targets)
    return MISSED if failed else HELD


def forecast_rows(jobs: Sequence[Job], options: Options, say: Callable[[str], None]) -> list[Row]:
    """A row a job, in order; one that fails says why, and the others are forecast all the same."""
    from pytest_diffopt.forecasting.running import forecast

    rows = []
    for place, job in enumerate(jobs):
        about = f"{place + 1} of {len(jobs)} · {job.recipe.name} · {job.title}"
        say(about)
        forecasts: dict[str, Forecast] = {}
        failure = ""
        try:
            for card in options.cards or (None,):  # each card's own kernels
                own = job.recipe.forecast  # what the command does not say, the recipe's own part may
                forecasts[card.name if card is not None else ANY_CARD] = forecast(
                    job.recipe,
                    job.model,
                    sizes=options.sizes or (own.sizes if own is not None else None),
                    steps=options.steps or (own.num_inference_steps if own is not None else None),
                    gpu=card.name if card is not None else None,
                    assume={**(own.assume if own is not None else {}), **options.assume} or None,
                    kwargs=own.kwargs if own is not None else None,
                    progress=functools.partial(_say_about, say, about),
                )
        except DiffoptError as error:
            forecasts, failure = {}, str(error)
        rows.append(Row(job.recipe.name, job.title, forecasts, failure))
    return rows


def _say_about(say: Callable[[str], None], about: str, words: str) -> None:
    say(f"{about} · {words}")


def report_lines(rows: Sequence[Row], options: Options, *, width: int, color: bool) -> Iterator[str]:
    """What is printed: the table, what is not sure to fit, and the details where they are asked for."""
    yield from table_lines(rows, options.targets, width=width, color=color)
    notes = missed(rows, options.targets)
    if not options.cards:
        common = ", ".join(f"{size} GB" for size in COMMON_GB)
        notes.append(
            f"{common}: 'fits' is every known card of that size, 'may fit' is not sure of all; --gpu names one."
        )
    if notes:
        yield ""
        for note in notes:
            yield from wrapped(note, width)
    if options.details:
        for row in rows:
            for one in row.distinct:
                yield ""
                yield from detail_lines(one, width=width, color=color)


def write(rows: Sequence[Row], options: Options, pictures: Sequence[Path]) -> list[str]:
    """Write what was asked for; returns what to say of it.

    Raises:
        UsageError: a file that could be written before no longer can.
    """
    said = []
    if options.json == STDOUT:
        sys.stdout.write(document(rows, options.targets))
    elif options.json is not None:
        write_for("--json", Path(options.json), document(rows, options.targets))
    for row, path in zip(rows, pictures, strict=bool(pictures)):
        drawn = picture(row, options.targets)
        if drawn is not None:
            write_for("--svg", path, drawn)
        elif not row.failure:
            said.append(f"{row.title}: nothing was written down over time, so there is no picture")
    return said


def picture_paths(path: Path | None, jobs: Sequence[Job]) -> list[Path]:
    """A file a job: the path itself for one, else with the recipe's name, and the model's where recipes have several."""
    if path is None or len(jobs) == 1:
        return [path] if path is not None else []
    names = [job.recipe.name for job in jobs]
    if len(set(names)) < len(names):
        names = [f"{job.recipe.name}-{job.title}" for job in jobs]
    return [path.with_name(f"{path.stem}-{name}{path.suffix}") for name in _as_file_names(names)]


def _as_file_names(names: Iterable[str]) -> Iterator[str]:
    taken: set[str] = set()
    for name in names:
        plain = written = re.sub(r"[^\w.-]+", "_", name)
        number = 1
        while written.casefold() in taken:  # some file systems do not tell case
            number += 1
            written = f"{plain}-{number}"
        taken.add(written.casefold())
        yield written


COMMAND = Command(
    "forecast",
    "Forecast the peak memory of recipes with full-size models, with no GPU and no weights",
    add_arguments,
    run,
)
