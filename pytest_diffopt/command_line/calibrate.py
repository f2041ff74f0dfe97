"""``calibrate``: what somebody with a GPU runs: recipes are forecast, run for real, compared, and a row may be given away."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_diffopt.command_line import arguments, terminals
from pytest_diffopt.command_line.command import HELD, MISSED, Command, UsageError
from pytest_diffopt.command_line.selection import Job, chosen, jobs_of, left_out_line
from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.report.calibrations import calibration_lines
from pytest_diffopt.report.forecasts import wrapped

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.forecasting.calibration import Calibration

DEVICES = ("cuda", "sim")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``calibrate``."""
    arguments.add_recipes(parser)
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        help=f"{arguments.MODEL} (default: the one that the recipe's hub id names)",
    )
    add(
        "--weights",
        metavar="DIRECTORY|HUB_ID",
        help="the model's weights; a hub id is downloaded (default: none: a checkpoint of holes is loaded in their place, as "
        "what a run allocates does not depend on values)",
    )
    arguments.add_sizes(parser)
    add("--steps", metavar="N", type=arguments.positive, help="denoising steps a call (default: as in forecast)")
    add(
        "--gpu",
        metavar="CARD",
        type=arguments.card,
        help="a card that the command cards lists, whose kernels are assumed (default: by the name of the GPU)",
    )
    arguments.add_assumptions(parser)
    add(
        "--device",
        choices=DEVICES,
        default=DEVICES[0],
        help="sim is the simulated accelerator, for models that the host can compute (default: %(default)s)",
    )
    add(
        "--row",
        metavar="PATH",
        type=Path,
        help="append a line of JSON for each recipe, to contribute; it has no host's name, no user's and no path",
    )


def run(given: argparse.Namespace) -> int:
    """Forecast, measure, print, append; 1 where a range does not hold what was measured, or a run ended early."""
    from pytest_diffopt.recipe_loading import load_recipes
    from pytest_diffopt.replicas.catalogue import registry

    assume = arguments.assumptions(given.assume)
    recipes = chosen(load_recipes(given.path), given.recipe, str(given.path))
    jobs, left_out = jobs_of(recipes, [given.model] if given.model is not None else [], registry)
    if given.row is not None:
        _append(given.row, "")
    accelerator = _device(given.device)
    if line := left_out_line(left_out, registry):
        print(line, file=sys.stderr)
    failed = False
    for place, job in enumerate(jobs):
        if place:
            print()
        try:
            with terminals.progress() as say, contextlib.redirect_stdout(sys.stderr):
                made = _calibrated(job, accelerator, given, assume, say)
        except UsageError:
            raise
        except DiffoptError as error:
            failed = True
            sentence = f"{job.recipe.name} · {job.title} could not be calibrated: {error}"
            print(*wrapped(sentence, terminals.width_of(sys.stdout)), sep="\n")
            continue
        failed |= not made.holds
        for line in calibration_lines(
            made, width=terminals.width_of(sys.stdout), color=terminals.has_color(sys.stdout)
        ):
            print(line)
        sys.stdout.flush()
        if given.row is not None:
            _append(given.row, made.to_json() + "\n")
    return MISSED if failed else HELD


def _device(kind: str) -> Accelerator:
    from pytest_diffopt.accelerators import resolve_kind, select

    try:
        resolve_kind(kind)
    except DiffoptError:
        raise UsageError(
            "calibrate measures on a GPU, and torch finds no CUDA device on this machine. forecast and advise need none; "
            "--device sim runs models that the host can compute."
        ) from None
    accelerator = select(kind)
    if accelerator.is_simulated:
        from pytest_diffopt.accelerators.simulated import set_caching_allocator

        set_caching_allocator(True)  # it counts as CUDA's does
    return accelerator


def _calibrated(
    job: Job,
    accelerator: Accelerator,
    given: argparse.Namespace,
    assume: dict[str, object],
    say: Callable[[str], None],
) -> Calibration:
    from pytest_diffopt.forecasting.calibration import calibrate

    sizes: Sequence[Sequence[int]] | None = given.size or None
    return calibrate(
        job.recipe,
        job.model,
        accelerator=accelerator,
        weights=given.weights,
        sizes=sizes,
        steps=given.steps,
        gpu=given.gpu.name if given.gpu is not None else None,
        assume=assume or None,
        progress=lambda words: say(f"{job.recipe.name} · {words}"),
    )


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        why = "its folder is missing" if isinstance(error, FileNotFoundError) else error.strerror
        raise UsageError(f"argument --row: {str(path)!r} cannot be written: {why}.") from None


COMMAND = Command(
    "calibrate",
    "Run recipes on a GPU and compare what they take with the forecast; no weights are needed",
    add_arguments,
    run,
)
