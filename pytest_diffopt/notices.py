"""What takes long and happens once, such as building the simulated accelerator, is announced while it goes on.

A run of pytest and a command show it in their own way. In any other program a terminal gets a line on stderr, which is
cleared when it is done; elsewhere it is a record of the logger ``pytest_diffopt``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Show = Callable[[str], None]
"""Shows another text from now on."""
Listener = Callable[[str, float], AbstractContextManager[Show]]
"""Shows a text while the context is open, if that takes longer than so many seconds."""


@contextlib.contextmanager
def announced(text: str, *, after_seconds: float = 0.0) -> Iterator[Show]:
    """Announce what is done inside; yields what shows how far it is.

    Args:
        text: e.g. ``"building the simulated accelerator"``.
        after_seconds: how long it takes before it is worth a line.
    """
    with _listener(text, after_seconds) as show:
        yield show


@contextlib.contextmanager
def shown_by(listener: Listener) -> Iterator[None]:
    """Let ``listener`` show what is announced, while the context is open."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextlib.contextmanager
def _on_stderr(text: str, after_seconds: float) -> Iterator[Show]:
    if after_seconds or not sys.stderr.isatty():
        logging.getLogger("pytest_diffopt").info(text)
        yield lambda text: None
        return

    def show(text: str) -> None:
        sys.stderr.write(f"\r{text}\033[K")
        sys.stderr.flush()

    show(text)
    try:
        yield show
    finally:
        show("")


_listener: Listener = _on_stderr
