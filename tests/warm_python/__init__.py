"""Python processes for tests, forked from one that has torch and the libraries imported.

Half of what a test costs that starts pytest in a process is the import of torch, diffusers and transformers. `launcher.py`
takes the interpreter's place in ``sys.executable``: it asks a `server.py`, which imported them once, to fork, and stays
in front of the forked process: signals and the exit status pass through it. Anything but a run of pytest, of this package's
command, of a worker of pytest-xdist, of execnet's server or of the server of pages goes to the interpreter itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.warm_python.launcher import FOLDER

HERE = Path(__file__).parent
INTERPRETER = sys.executable
"""For tests that look at what is imported, or at the process itself: ``sys.executable`` is the launcher while tests run."""


@contextlib.contextmanager
def warm_python() -> Iterator[str]:
    """The folder of the servers, for as long as this process needs them; the workers of pytest-xdist share it."""
    if FOLDER in os.environ or not hasattr(os, "pidfd_open"):
        yield os.environ.get(FOLDER, "")
        return
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    launcher = folder / "python"
    launcher.write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {shlex.quote(str(HERE / 'launcher.py'))} "
        f'{shlex.quote(sys.executable)} {shlex.quote(str(folder))} {os.getpid()} "$@"\n',
        encoding="utf-8",
    )
    launcher.chmod(0o755)
    os.environ[FOLDER] = str(folder)
    try:
        yield str(folder)
    finally:
        del os.environ[FOLDER]
        shutil.rmtree(folder, ignore_errors=True)  # without it the servers end
