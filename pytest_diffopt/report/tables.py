"""Tables in a terminal: which columns have room, and a table of rich as lines."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

LOG_WIDTH = 160
"""Columns of a table that goes to no terminal: a log does not wrap, and a file's reader scrolls."""

GAP = 3
"""Columns between two columns of a table."""

_PIECE = re.compile(r"[^\W_]+[\W_]*|[\W_]+")
"""A word of a name, with what parts it from the next."""

_Row = TypeVar("_Row")
Column = tuple[str, Callable[[_Row], str]]
"""A column's title, and its figure of a row."""


def width_of(*, terminal: bool) -> int:
    """Columns of a table: as many as ``COLUMNS`` says, else the terminal's, and a log's where it goes to none."""
    asked = os.environ.get("COLUMNS", "")
    if terminal or (asked.isdecimal() and int(asked) > 0):
        return shutil.get_terminal_size((80, 24)).columns
    return LOG_WIDTH


def shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """(what all names begin with, as far as a part of theirs ends: a folder, a file, a word before a hyphen; the names
    without it). Nothing is taken of equal names, of a test's own name or of its parameters."""
    first, last = min(names), max(names)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    same = min(same, len(first.partition("[")[0]))
    same = 1 + max(first.rfind(end, 0, same) for end in "/:-")
    if first == last or len(first) == same:  # nothing would be left of it
        same = 0
    return first[:same], [name[same:] for name in names]


def pieces(name: str) -> list[str]:
    """The words of a name, each with what parts it from the next: a line may end between them."""
    return _PIECE.findall(name)


def folded(name: str, width: int) -> str:
    """A name in lines of at most ``width`` columns, broken between words; a word that has no room in a line is broken."""
    lines = [""]
    for piece in pieces(name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line[at : at + width] for line in lines for at in range(0, len(line), width))


def longest_piece(names: Iterable[str]) -> int:
    """The columns that names need so that no word of theirs is broken."""
    return max((len(piece) for name in names for piece in pieces(name)), default=0)


def fitting(
    columns: Sequence[Column[_Row]], rows: Sequence[_Row], width: int, least_telling: Iterable[Column[_Row]]
) -> list[Column[_Row]]:
    """The columns that have room, each as wide as the longest word of its title or figure; the least telling go first."""
    kept = list(columns)
    for _, shown in least_telling:
        if sum(room(column, rows) for column in kept) <= width:
            break
        kept = [column for column in kept if column[1] is not shown]
    return kept


def room(column: Column[_Row], rows: Sequence[_Row]) -> int:
    """How much of the width a column takes."""
    title, shown = column
    return max(map(len, [*title.split(), *(shown(row) for row in rows)])) + GAP


def widths(needs: Sequence[int], wishes: Sequence[int], width: int) -> list[int]:
    """What columns of one table get: what they need, and from the left what they wish as far as there is room."""
    found = list(needs)
    spare = width - sum(needs) - GAP * (len(needs) - 1)
    for place, wish in enumerate(wishes):
        more = wish - found[place]
        if 0 < more <= spare:
            found[place], spare = wish, spare - more
    return found


def new_table(*, titles: bool = True) -> Table:
    """A table with a line under its titles, or without both."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=titles)


def lines_of(table: Table, *, width: int, color: bool) -> list[str]:
    """The table in at most ``width`` columns, a string a line; escape sequences are in them only with ``color``."""
    import io

    from rich.console import Console

    text = io.StringIO()
    console = Console(
        file=text,
        width=width,
        no_color=not color,
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
    )
    console.print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]
