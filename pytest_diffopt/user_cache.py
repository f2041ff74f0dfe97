"""Where the package keeps what it builds once: replicas, and the library of the simulated accelerator."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The user's cache directory; it need not exist yet."""
    if chosen := os.environ.get("DIFFOPT_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home).absolute() / "pytest-diffopt"
