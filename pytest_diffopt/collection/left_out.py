"""Which checks of the recipe files that a run read it was told to leave out: a release gate does not pass over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_diffopt.recipe import Recipe

_READ: pytest.StashKey[dict[str, dict[str, list[str]]]] = pytest.StashKey()
"""Recipe file (node id) → recipe → its checks, as far as files were read."""
SOURCES: pytest.StashKey[dict[str, list[str]]] = pytest.StashKey()
"""Recipe file, as baselines name it → the names of all its recipes."""
LEFT_OUT: pytest.StashKey[list[str]] = pytest.StashKey()
_WORKER_OUTPUT = "diffopt_collected"


def note_read(
    config: pytest.Config, nodeid: str, source: str, recipes: Iterable[Recipe], more: tuple[str, ...]
) -> None:
    """A recipe file was read.

    Args:
        source: as baselines name it. more: checks that each recipe has beside its own.
    """
    from pytest_diffopt.checks import checks_for

    checks = {recipe.name: [*checks_for(recipe), *more] for recipe in recipes}
    config.stash.setdefault(_READ, {})[nodeid] = checks
    config.stash.setdefault(SOURCES, {})[source] = list(checks)


def note_selected(config: pytest.Config, nodeids: Iterable[str]) -> None:
    """These are the tests that will run: what else the files that were read have is left out."""
    selected = set(nodeids)
    config.stash[LEFT_OUT] = [
        nodeid
        for file, recipes in config.stash.get(_READ, {}).items()
        for recipe, checks in recipes.items()
        for check in checks
        if (nodeid := f"{file}::{recipe}::{check}") not in selected
    ]
    output: dict[str, Any] | None = getattr(config, "workeroutput", None)
    if output is not None:
        output[_WORKER_OUTPUT] = {"left_out": config.stash[LEFT_OUT], "sources": config.stash.get(SOURCES, {})}


def take_from_worker(config: pytest.Config, node: Any) -> None:
    """What a worker of pytest-xdist read and left out; each of them reads the same."""
    output = getattr(node, "workeroutput", {}).get(_WORKER_OUTPUT)
    if output is not None:
        config.stash[LEFT_OUT] = output["left_out"]
        config.stash.setdefault(SOURCES, {}).update(output["sources"])
