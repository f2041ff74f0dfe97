"""Runs a script or a module in this process as ``python`` would."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import InspectLoader
from pathlib import Path

from pytest_diffopt.command_line.command import UsageError

INTERRUPTED = 130


def run_as_main(
    target: str, arguments: Sequence[str], *, is_module: bool, failed: Callable[[BaseException], None]
) -> object:
    """Run it as ``__main__``, which it stays, and return what a process of its own would give to ``sys.exit``.

    An exception that ends it is printed as ``python`` prints it, without a frame of ours.

    Args:
        target: the path of a script, or the name of a module.
        failed: called with that exception, while the frames that it left are alive.

    Raises:
        UsageError: there is no such script or module.
    """
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __file__=None, __cached__=None)
    find_code = _of_module(target, main) if is_module else _of_script(target, main)
    sys.argv = [str(main.__file__) if is_module else target, *arguments]
    sys.modules["__main__"] = main
    try:
        exec(find_code(), main.__dict__)
    except SystemExit as error:
        return error.code
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_globals is not main.__dict__:
            trace = trace.tb_next
        failed(error)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _of_script(target: str, main: types.ModuleType) -> Callable[[], types.CodeType]:
    path = Path(target).absolute()
    try:
        with io.open_code(str(path)) as file:
            source = file.read()
    except OSError as error:
        raise UsageError(f"argument PROGRAM: {target!r} cannot be read: {error.strerror}") from None
    main.__file__ = str(path)
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", str(path))
    main.__spec__ = main.__package__ = None
    _set_first_path(str(path.resolve().parent))
    return lambda: compile(source, str(path), "exec", dont_inherit=True)


def _of_module(target: str, main: types.ModuleType) -> Callable[[], types.CodeType]:
    _set_first_path(os.getcwd())
    try:
        spec = importlib.util.find_spec(target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{target}.__main__")
    except (ImportError, ValueError) as error:
        raise UsageError(f"argument -m: {target!r} cannot be found: {error}") from None
    if spec is None or not isinstance(spec.loader, InspectLoader):
        raise UsageError(f"argument -m: found {target!r}; it takes a module, or a package with a __main__")
    main.__file__, main.__dict__["__cached__"] = spec.origin, spec.cached
    main.__loader__, main.__spec__, main.__package__ = spec.loader, spec, spec.parent
    name, loader = spec.name, spec.loader

    def find_code() -> types.CodeType:
        code = loader.get_code(name)
        if code is None:
            raise ImportError(f"No code object available for {name}")
        return code

    return find_code


def _set_first_path(folder: str) -> None:
    """In the place of the folder of this command, which python put there; with ``-P`` it puts none."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder
