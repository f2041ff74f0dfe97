"""Where a command's lines go: how wide the terminal is, whether it has colour, and what is shown while it works."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from pytest_diffopt.report import tables


def width_of(stream: TextIO) -> int:
    """Columns: the terminal's, and for what is none as many as a log's table has; ``COLUMNS`` says another number."""
    return tables.width_of(terminal=stream.isatty())


def has_color(stream: TextIO) -> bool:
    """Whether to write colours: to a terminal, unless ``NO_COLOR`` is set or it is a dumb one."""
    return _is_lively(stream) and not os.environ.get("NO_COLOR")


def _is_lively(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields what says what is being done, in a line on stderr that goes when it is done; without a terminal, nothing."""
    if not _is_lively(sys.stderr):
        yield lambda words: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("") as status:
        yield lambda words: status.update(escape(words))
