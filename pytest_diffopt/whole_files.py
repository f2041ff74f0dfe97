"""Files that are written whole or not at all, and known to be writable before minutes of work."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def why_not_writable(path: Path) -> str:
    """Why :func:`write_whole` could not write ``path``; empty where it could. Leaves nothing behind."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(0, "it may not be written to")
        if not _is_special(path):
            aside = _aside(path)
            with open(aside, "xb"):
                pass
            aside.unlink()
    except OSError as error:
        return "its folder is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
    return ""


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text to a file beside ``path``, then put it in its place; what was there stays until then.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    if _is_special(path):  # a pipe or a device takes what comes, and is not replaced
        path.write_text(text, encoding="utf-8")
        return
    aside = _aside(path)
    try:
        with open(aside, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path.resolve())  # the file that a link leads to, and not the link
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _aside(path: Path) -> Path:
    there = path.resolve()
    return there.with_name(f".{there.name}.{os.getpid()}")
