"""What commands write, checked before minutes of work."""

from __future__ import annotations

from pathlib import Path

from pytest_diffopt.command_line.command import UsageError
from pytest_diffopt.whole_files import why_not_writable, write_whole


def check_writable(option: str, path: Path) -> None:
    """Raises UsageError where :func:`write_whole` could not write ``path``; leaves nothing behind."""
    if why := why_not_writable(path):
        raise UsageError(f"argument {option}: {str(path)!r} cannot be written: {why}.")


def write_for(option: str, path: Path, text: str) -> None:
    """:func:`write_whole` for an option; raises UsageError where what could be written before no longer can."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise UsageError(f"argument {option}: {str(path)!r} cannot be written: {error.strerror}.") from None
