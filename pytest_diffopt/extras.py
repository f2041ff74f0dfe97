"""Which extra of this package installs a package that is missing, in the one sentence that says so."""

from __future__ import annotations

from importlib import metadata

EXTRAS = {
    "covertable": "matrix",
    "gguf": "gguf",
    "hypothesis": "hypothesis",
    "optimum-quanto": "quanto",
    "peft": "peft",
    "pytest-html": "html",
    "pytest-xdist": "xdist",
    "torchao": "torchao",
}
"""Distribution → the extra of pytest-diffopt that installs it, in versions that work."""


def needs(distribution: str) -> str:
    """``needs torchao, which is not installed: pip install pytest-diffopt[torchao]``; for other packages no command."""
    extra = EXTRAS.get(distribution)
    install = f": pip install pytest-diffopt[{extra}]" if extra is not None else ""
    return f"needs {distribution}, which is not installed{install}"


def is_installed(distribution: str) -> bool:
    """Whether its metadata is there; nothing is imported for the answer."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
