"""Where a command's lines go: how wide the terminal is, whether it has colour, and what is shown while it works."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from pytest_diffopt.notices import Show, shown_by
from pytest_diffopt.report import tables
from pytest_diffopt.report.progress import ProgressLine


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
    """Yields what says what is being done, in a line on stderr that goes when it is done.

    Without a terminal only what takes long and happens once is said, such as building the simulated accelerator.
    """
    if not _is_lively(sys.stderr):
        plain = ProgressLine.plainly()
        with contextlib.closing(plain), shown_by(plain.announcing):
            yield lambda words: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("") as status:

        def say(words: str) -> None:
            status.update(escape(words))

        @contextlib.contextmanager
        def announcing(text: str, after_seconds: float) -> Iterator[Show]:
            say(text)
            yield say

        with shown_by(announcing):
            yield say
