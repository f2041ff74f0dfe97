"""Which values are recipes of ours: other suites have parameters and fixtures named ``recipe`` too."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest
    from typing_extensions import TypeIs

    from pytest_diffopt.recipe import Recipe


def is_recipe(value: object) -> TypeIs[Recipe]:
    """Whether a value is a :class:`~pytest_diffopt.Recipe`. Imports nothing: whoever has one has imported its class."""
    module = sys.modules.get("pytest_diffopt.recipe")
    return module is not None and isinstance(value, module.Recipe)


def recipe_of_test(item: pytest.Item) -> Recipe | None:
    """The recipe that a test is parametrized with; None if it has none, or a parameter of that name which is no recipe."""
    value = getattr(getattr(item, "callspec", None), "params", {}).get("recipe")
    return value if is_recipe(value) else None
