"""The line that says what is being compiled, in a terminal only, and gone when it is done.

It is written to a copy of the terminal's file descriptor, taken before pytest captures output: so it can be in nobody's
captured output, and a thread may write it. What takes minutes and happens once is one plain line on stderr elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import pytest

    from pytest_diffopt.notices import Show

# Written where the cursor stands, without wrapping, and the cursor put back: pytest's own line is left as it is.
_SHOW = "\x1b7\x1b[?7l  {text}\x1b[K\x1b[?7h\x1b8"
_CLEAR = "\x1b[K"


class ProgressLine:
    """One line that is written over and over.

    Args:
        descriptor: of the terminal; None shows nothing.
        plain: of stderr, for what is shown once where there is no terminal; None shows nothing.
        delay_seconds: how long something takes before it is worth a line; then also the time between two updates.
    """

    def __init__(self, descriptor: int | None = None, plain: int | None = None, *, delay_seconds: float = 1.0) -> None:
        self._descriptor = descriptor
        self._plain = plain
        self._delay = delay_seconds
        self._lock = threading.Lock()
        self._text = ""
        self._since = 0.0
        self._shown = False

    @classmethod
    def of(cls, config: pytest.Config) -> ProgressLine:
        """The line of a run: shown in a terminal, without ``-q``, and not in a worker of pytest-xdist."""
        quiet = hasattr(config, "workerinput") or config.get_verbosity() < 0 or os.environ.get("TERM") == "dumb"
        if not quiet and config.pluginmanager.has_plugin("terminalreporter") and (line := _copy_of(sys.stdout, True)):
            return cls(line)
        return cls.plainly()

    @classmethod
    def plainly(cls) -> ProgressLine:
        """One that shows on stderr what happens once, and nothing else."""
        return cls(plain=_copy_of(sys.stderr, False))

    def say(self, text: str) -> None:
        """What is being done from now on."""
        with self._lock:
            if text != self._text:
                self._text, self._since = text, time.monotonic()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Show what is said, while the context is open."""
        if self._descriptor is None:
            yield
            return
        done = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(done,), name="diffopt-progress", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()
            self._text = ""
            if self._shown:
                self._shown = False
                self._write(_CLEAR)

    @contextlib.contextmanager
    def announcing(self, text: str, after_seconds: float) -> Iterator[Show]:
        """Show one thing that happens once; a :data:`~pytest_diffopt.notices.Listener`."""
        if self._descriptor is None:
            timer = threading.Timer(after_seconds, self._write_plain, (text,))
            timer.daemon = True
            timer.start()
            try:
                yield lambda text: None
            finally:
                timer.cancel()
            return
        before = self._text
        with self.running():
            self.say(text)
            yield self.say
        self.say(before)

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in (self._descriptor, self._plain):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._plain = None

    def _tick(self, done: threading.Event) -> None:
        while not done.wait(self._delay):
            with self._lock:
                text, elapsed = self._text, time.monotonic() - self._since
            if text and elapsed >= self._delay:
                self._shown = True
                self._write(_SHOW.format(text=f"{text} … {elapsed:.0f} s"))

    def _write(self, text: str) -> None:
        _write(self._descriptor, text)

    def _write_plain(self, text: str) -> None:
        _write(self._plain, f"diffopt: {text}\n")


def _copy_of(stream: TextIO, terminal: bool) -> int | None:
    """A copy of its descriptor; None where it has none, or is no terminal and has to be."""
    try:
        return os.dup(stream.fileno()) if stream.isatty() or not terminal else None
    except (AttributeError, OSError, ValueError):  # replaced by something that has no descriptor, or closed
        return None


def _write(descriptor: int | None, text: str) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):  # a terminal that went away is no reason to fail a recipe
            os.write(descriptor, text.encode("utf-8", "replace"))
