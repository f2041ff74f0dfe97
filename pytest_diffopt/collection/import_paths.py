"""The folder of a recipe file is importable for what its recipes name, as pytest makes a conftest file's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_diffopt.errors import Problem
from pytest_diffopt.source_places import EXTRA_ROOTS, short_path

if TYPE_CHECKING:
    from pytest_diffopt.recipe import Recipe

_ADDED: pytest.StashKey[list[str]] = pytest.StashKey()


def import_root(folder: Path) -> Path:
    """The first folder upward that is no package: ``models.py`` in it is ``models``, in a package ``package.models``."""
    while (folder / "__init__.py").is_file() and folder.parent != folder:
        folder = folder.parent
    return folder


def make_importable(folder: Path, config: pytest.Config) -> None:
    """As ``--import-mode`` says: first on ``sys.path``, last, or, with ``importlib``, not at all. Until the session ends."""
    mode, root = config.getoption("importmode"), str(import_root(folder))
    if mode == "importlib" or root in sys.path:
        return
    sys.path.insert(len(sys.path) if mode == "append" else 0, root)
    EXTRA_ROOTS.append(root)
    short_path.cache_clear()
    config.stash.setdefault(_ADDED, []).append(root)


def give_back(config: pytest.Config) -> None:
    """``sys.path`` is as it was."""
    for root in config.stash.get(_ADDED, []):
        for entries in (sys.path, EXTRA_ROOTS):
            if root in entries:
                entries.remove(root)
    config.stash[_ADDED] = []
    short_path.cache_clear()


def mistaken_modules(recipe: Recipe, folder: Path, prefix: str) -> Iterator[Problem]:
    """References whose module lies in the recipe's folder and is another one, since Python imports only one of a name, or
    has a longer name, since the folder is a package."""
    root = import_root(folder)
    if str(root) not in sys.path:
        return
    for key, reference in _references(recipe):
        name = reference.partition(":")[0].partition(".")[0]
        own = _module_in(root, name)
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if own is not None and loaded is not None and Path(loaded).resolve() != own.resolve():
            allowed = (
                f"the module {name!r} is {short_path(loaded)}, which was imported first, and not {short_path(str(own))}: "
                f"give one of them another name"
            )
            yield Problem(f"{prefix}.{key}", repr(reference), allowed)
        elif root != folder and loaded is None and _module_in(folder, name) is not None:
            package = ".".join(folder.relative_to(root).parts)
            allowed = f"{package} is a package, so a module in it is named '{package}.{reference}'"
            yield Problem(f"{prefix}.{key}", repr(reference), allowed)


def _module_in(folder: Path, name: str) -> Path | None:
    return next((one for one in (folder / f"{name}.py", folder / name / "__init__.py") if one.is_file()), None)


def _references(recipe: Recipe) -> Iterator[tuple[str, str]]:
    from pytest_diffopt.preparation import media
    from pytest_diffopt.recipe import is_reference

    named = [("pipeline", recipe.pipeline), ("reference", recipe.reference), ("call.inputs", recipe.call.inputs)]
    inputs = recipe.call.inputs if isinstance(recipe.call.inputs, tuple) else ()
    for key, table in (("kwargs", recipe.call.kwargs), *(("inputs", one) for one in inputs)):
        named += [(f"call.{key}.{name}", one) for name, one in media.strings_in(table) if is_reference(one)]
    named += [("compilation.backend", one.backend) for one in recipe.compilation]
    for key, value in named:
        if isinstance(value, str) and ":" in value and "/" not in value:
            yield key, value
