"""What takes long and happens once is announced: as a line of a terminal, as one plain line, or to the logger."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator

import pytest

from pytest_diffopt import notices
from pytest_diffopt.command_line import terminals
from pytest_diffopt.notices import Show, announced, shown_by
from pytest_diffopt.report.progress import ProgressLine

SLOW, QUICK = 0.3, 0.0


def written(line: ProgressLine, reader: int, seconds: float, **asked: float) -> str:
    with shown_by(line.announcing), announced("building it", **asked) as show:
        time.sleep(seconds)
        show("building it: 1 of 2")
        time.sleep(seconds)
    line.close()
    with os.fdopen(reader, encoding="utf-8") as file:
        return file.read()


def test_without_a_terminal_it_is_one_plain_line() -> None:
    reader, writer = os.pipe()
    assert written(ProgressLine(plain=writer), reader, SLOW) == "diffopt: building it\n"


def test_what_does_not_take_long_is_not_worth_a_line() -> None:
    reader, writer = os.pipe()
    assert written(ProgressLine(plain=writer), reader, QUICK, after_seconds=30) == ""


def test_in_a_terminal_it_is_a_line_that_goes() -> None:
    reader, writer = os.pipe()
    shown = written(ProgressLine(writer, delay_seconds=0.01), reader, SLOW)
    assert "building it … 0 s" in shown
    assert "building it: 1 of 2 … 0 s" in shown
    assert shown.endswith("\x1b[K")
    assert "\n" not in shown


def test_a_line_that_says_what_is_compiled_says_it_again_after() -> None:
    reader, writer = os.pipe()
    line = ProgressLine(writer, delay_seconds=0.01)
    with line.running():
        line.say("compiling transformer")
        with shown_by(line.announcing), announced("building it"):
            time.sleep(SLOW)
        time.sleep(SLOW)
    line.close()
    with os.fdopen(reader, encoding="utf-8") as file:
        assert "compiling transformer" in file.read().rpartition("building it")[2]


def test_with_nobody_to_show_it_the_logger_has_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pytest_diffopt")
    line = ProgressLine()
    with shown_by(line.announcing), announced("shown elsewhere"):
        pass
    with shown_by(notices._on_stderr), announced("building it", after_seconds=1):
        pass
    assert caplog.messages == ["building it"]


def test_who_shows_it_is_as_before_also_after_a_raise() -> None:
    heard: list[str] = []

    @contextlib.contextmanager
    def listen(text: str, after_seconds: float) -> Iterator[Show]:
        heard.append(text)
        yield heard.append

    with shown_by(listen):
        with pytest.raises(KeyError), shown_by(ProgressLine().announcing):
            raise KeyError
        with announced("building it") as show:
            show("more")
    assert heard == ["building it", "more"]


def test_a_command_shows_it_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with terminals.progress(), announced("building it"):
        time.sleep(SLOW)
    assert capfd.readouterr().err == "diffopt: building it\n"
