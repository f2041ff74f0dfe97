"""Keeps a recipe's checks on one worker of pytest-xdist under ``--dist loadgroup``: one observation serves all."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadGroupScheduling


class RecipeGroupScheduling(LoadGroupScheduling):  # type: ignore[misc, unused-ignore]
    """Groups as xdist does, and recipes by themselves: with pytest 9.2 the group's name no longer reaches xdist 3.8."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return recipe_scope(nodeid) if scope == nodeid else scope


def recipe_scope(nodeid: str) -> str:
    """``FILE::RECIPE`` of a check's node id; any other node id as it is."""
    recipe = nodeid.rpartition("::")[0]
    return recipe if recipe.rpartition("::")[0].endswith(".recipes.toml") else nodeid


def scheduler(config: pytest.Config, log: Any) -> RecipeGroupScheduling | None:
    """The scheduler of a run with ``--dist loadgroup``; None leaves it to xdist."""
    return RecipeGroupScheduling(config, log) if config.getoption("dist", "no") == "loadgroup" else None
