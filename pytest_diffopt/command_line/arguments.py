"""Arguments that commands share, each parsed once: sizes, memory, cards, assumptions."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from pytest_diffopt.accelerators.gpus import Card
from pytest_diffopt.accelerators.gpus import card as find_card
from pytest_diffopt.byte_sizes import SIZES_ALLOWED, parse_bytes
from pytest_diffopt.command_line.command import UsageError
from pytest_diffopt.errors import DiffoptError

MODEL = "a full-size model: a name that the command models lists, its hub id, or a directory of config files"
"""What ``--model`` takes."""

STDOUT = "-"
"""Written for the path of a file, it is standard output."""


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """A file of recipes, and ``--recipe``."""
    parser.add_argument("path", metavar="RECIPES.toml", type=Path, help="a file with tables [recipe.NAME]")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        action="append",
        default=[],
        help="one of its recipes; again for more (default: all)",
    )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """``--size``."""
    parser.add_argument(
        "--size",
        metavar="HEIGHTxWIDTH[xFRAMES]",
        action="append",
        default=[],
        type=size,
        help="what a call makes, in pixels; again for further calls (default: the model's own)",
    )


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """``--assume``, which :func:`assumptions` reads."""
    parser.add_argument(
        "--assume",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=assumption,
        help="take something for granted that a run without a GPU cannot know; again for more",
    )


def assumptions(given: Iterable[tuple[str, object]]) -> dict[str, object]:
    """What was given to ``--assume``.

    Raises:
        UsageError: a key is given twice or unknown, or a value is none of what its key takes.
    """
    from pytest_diffopt.forecasting.assumptions import assumed

    found: dict[str, object] = {}
    for key, value in given:
        if key in found:
            raise UsageError(f"argument --assume: {key!r} is given twice, as {found[key]!r} and {value!r}")
        found[key] = value
    try:
        assumed(found)
    except DiffoptError as error:
        raise UsageError(f"argument --assume: {error}") from None
    return found


def size(text: str) -> tuple[int, ...]:
    """``"1024x1024"`` as ``(1024, 1024)``: height, width, and the frames of a video."""
    sides = re.split("[x×]", text.strip().casefold())
    if len(sides) not in (2, 3) or not all(re.fullmatch("[0-9]+", side) and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f"found {text!r}; write HEIGHTxWIDTH, or HEIGHTxWIDTHxFRAMES for a video, in pixels: 1024x1024, 480x832x81"
        )
    return tuple(map(int, sides))


def positive(text: str) -> int:
    """``"28"`` as 28."""
    if not re.fullmatch("[0-9]+", text) or not int(text):
        raise argparse.ArgumentTypeError(f"found {text!r}; write a whole number from 1 on")
    return int(text)


def memory(text: str) -> int:
    """``"16GiB"`` in bytes; a number alone is bytes."""
    try:
        return parse_bytes(int(text) if re.fullmatch("[0-9]+", text) else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}; {SIZES_ALLOWED}") from None


def card(text: str) -> Card:
    """``"rtx-4090"`` as the card of that name."""
    try:
        return find_card(text)
    except DiffoptError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def assumption(text: str) -> tuple[str, object]:
    """``"key=value"``; ``true`` and ``false`` are what they say, everything else is text, versions too."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise argparse.ArgumentTypeError(f"found {text!r}; write KEY=VALUE")
    held = {"true": True, "false": False}.get(value.strip(), value.strip())
    return key.strip(), held
