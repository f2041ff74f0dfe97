"""What a command is, and how it ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

PROGRAM = "diffopt"
"""The command; ``python -m pytest_diffopt`` is the same."""

HELD, MISSED, WRONG = 0, 1, 2
"""Exit statuses: all was done and holds; something failed or is not sure to hold; the input is wrong."""


class UsageError(Exception):
    """The input is wrong: a sentence, or several lines, that say what and what is allowed."""


@dataclass(frozen=True)
class Command:
    """A command of ``diffopt``.

    Args:
        name: what people type.
        summary: its line in the list of commands.
        add_arguments: to its parser, importing nothing heavy: ``--help`` is instant.
        run: what it does; returns the exit status, and raises :class:`UsageError` or ``DiffoptError`` for wrong input.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
