"""Places in source code as they read on every machine, and where in the user's code or a library's an exception was raised."""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Literal

from pytest_diffopt.errors import DiffoptError

Whose = Literal["user", "library", "own", ""]

MOST_LINES = 150
"""Of a traceback that is kept: of a longer one its first third, and its end."""

_USER_FRAMES, _LIBRARY_FRAMES = 3, 2
_TEXT = 120
_MESSAGE = 20_000
_CHAIN = 3
_OWN = Path(__file__).parent
_STDLIB = tuple({Path(path) for name in ("stdlib", "platstdlib") if (path := sysconfig.get_path(name))})
_PLUMBING = (
    "torch/nn/modules/module.py",
    "torch/utils/_contextlib.py",
    "torch/_dynamo/",
    "torch/_utils_internal.py",
)
"""What every call of a module or of compiled code goes through; it says nothing of the call."""

_RESUMED = re.compile(r"^(?:.*\.)?torch_dynamo_resume_in_(.+)_at_\d+$")

EXTRA_ROOTS: list[str] = []
"""Entries of ``sys.path`` that are there for recipe files alone: a path is relative to one only where no other holds it."""


@dataclass(frozen=True)
class CodeFrame:
    """A frame of a traceback: where, in which function, and the line itself, as far as it can be read."""

    file: str
    line: int
    function: str
    text: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}, in {self.function}"

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.text else self.place


@functools.lru_cache(maxsize=4096)
def short_path(filename: str) -> str:
    """A path as it reads on every machine: relative to the import path or folder that holds it, e.g. ``diffusers/…``."""
    if filename.startswith("<"):
        return filename
    path = Path(filename)
    roots = [Path(entry) for entry in sys.path if entry and entry not in EXTRA_ROOTS] + [Path.cwd()]
    within = [root for root in roots if path.is_relative_to(root)]
    within = within or [Path(entry) for entry in EXTRA_ROOTS if path.is_relative_to(entry)]
    if not within:
        return filename
    return path.relative_to(max(within, key=lambda root: len(root.parts))).as_posix()


def with_short_paths(text: str) -> str:
    """A text in which each ``File "…"`` of a traceback has its short path."""
    return re.sub(r'File "([^"\n]+)"', lambda found: f'File "{short_path(found[1])}"', text)


@functools.lru_cache(maxsize=4096)
def whose(filename: str) -> Whose:
    """Whose code a file holds; ``""`` where there is no file, as for what is compiled out of a text."""
    if filename.startswith("<"):
        return ""
    path = Path(filename)
    if path.is_relative_to(_OWN):
        return "own"
    if {"site-packages", "dist-packages"} & set(path.parts) or any(path.is_relative_to(root) for root in _STDLIB):
        return "library"
    generated = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if any(part.startswith("torchinductor_") for part in path.parts) or (generated and path.is_relative_to(generated)):
        return "library"  # code that Inductor wrote
    return "user"


RawFrame = tuple[str, int, str]
"""(file name, line, function) of a frame."""


def raw_frames(error: BaseException) -> list[RawFrame]:
    """The frames of an exception's traceback, the outermost first."""
    found = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        found.append((frame.f_code.co_filename, line, function_name(frame.f_code)))
    return found


def function_name(code: CodeType) -> str:
    """The function that a code object is of, with its class where it has one."""
    name = getattr(code, "co_qualname", code.co_name)
    return _RESUMED.sub(r"\1", name.rpartition("<locals>.")[2])


def last_frames(frames: Iterable[RawFrame]) -> tuple[CodeFrame, ...]:
    """The last frames of the user's code and of the libraries', each line once, the outermost first."""
    distinct = list(dict.fromkeys(frames))
    users = [one for one in distinct if whose(one[0]) == "user"][-_USER_FRAMES:]
    libraries = [one for one in distinct if whose(one[0]) == "library"]
    telling = [one for one in libraries if not short_path(one[0]).startswith(_PLUMBING)]
    kept = {*users, *(telling if users or telling else libraries)[-_LIBRARY_FRAMES:]}
    return tuple(code_frame(one) for one in distinct if one in kept)


def last_user_frame(frames: Iterable[RawFrame]) -> CodeFrame | None:
    """The innermost frame of the user's own code; None where there is none."""
    users = [one for one in frames if whose(one[0]) == "user"]
    return code_frame(users[-1]) if users else None


def code_frame(raw: RawFrame) -> CodeFrame:
    """A frame of Python by its (file name, line, function)."""
    file, line, function = raw
    text = linecache.getline(file, line).strip()
    return CodeFrame(short_path(file), line, function, f"{text[:_TEXT]}…" if len(text) > _TEXT else text)


def message_of(error: BaseException) -> str:
    """An exception's own words, whatever its ``__str__`` does; cut where they are longer than anybody reads."""
    try:
        message = str(error)
    except Exception as wrong:  # the author's own __str__
        message = f"(its __str__ raises {type(wrong).__name__})"
    message = with_short_paths(message)
    return message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}…"


def first_line_of(error: BaseException) -> str:
    """``ValueError: no such weights``, or the class alone where the exception says nothing."""
    first = next((line.strip() for line in message_of(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def chain_of(error: BaseException) -> Iterator[tuple[str, BaseException]]:
    """The exceptions behind one, each with how it stands to the one before it: its causes, and the members of a group."""
    seen = {id(error)}
    waiting = [("", error)]
    while waiting and len(seen) <= 2 * _CHAIN:
        _, one = waiting.pop(0)
        behind: list[tuple[str, BaseException]] = []
        if one.__cause__ is not None:
            behind.append(("caused by", one.__cause__))
        elif one.__context__ is not None and not one.__suppress_context__:
            behind.append(("raised while handling", one.__context__))
        members = getattr(one, "exceptions", ())
        if isinstance(members, tuple):
            behind += [("in the group", member) for member in members[:_CHAIN] if isinstance(member, BaseException)]
        for how, found in behind:
            if id(found) not in seen:
                seen.add(id(found))
                waiting.append((how, found))
                yield how, found


def user_frame(error: BaseException) -> CodeFrame | None:
    """Where the user's code raised an exception, or one behind it; None where it raised none of them."""
    found = (last_user_frame(raw_frames(one)) for one in (error, *(behind for _, behind in chain_of(error))))
    return next((frame for frame in found if frame is not None), None)


def traceback_lines(error: BaseException) -> tuple[str, ...]:
    """The whole traceback, with short paths, from the first frame on that is not ours; at most :data:`MOST_LINES` lines."""
    trace = error.__traceback__
    while trace is not None and whose(trace.tb_frame.f_code.co_filename) == "own":
        trace = trace.tb_next
    if trace is None and not isinstance(error, DiffoptError):  # what we raise on purpose says it all
        trace = error.__traceback__
    text = "".join(traceback.format_exception(type(error), error, trace))
    lines = with_short_paths(text).splitlines()
    if len(lines) <= MOST_LINES:
        return tuple(lines)
    first = MOST_LINES // 3
    last = MOST_LINES - first - 1
    return (*lines[:first], f"  … {len(lines) - first - last} lines are left out …", *lines[-last:])
