"""The hooks that pytest-diffopt calls, for a ``conftest.py`` or another plugin to implement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe
    from pytest_diffopt.replicas import Registry


@pytest.hookspec
def pytest_diffopt_register_replicas(registry: Registry) -> None:
    """Add families of replicas, so that recipes may name them. Called once a process, before the first recipe is read.

    In the ``conftest.py`` at the root::

        def pytest_diffopt_register_replicas(registry):
            from my_library.testing import TINY_PIPELINE  # a pytest_diffopt.replicas.Family

            registry.register(TINY_PIPELINE)
    """


@pytest.hookspec(firstresult=True)
def pytest_diffopt_modify_recipe(recipe: Recipe, config: pytest.Config) -> Recipe | None:
    """Change a recipe of a recipe file before it is collected; None leaves it as it is. The first answer counts.

    In a ``conftest.py``, to run every recipe that leaves its dtype open in bfloat16::

        def pytest_diffopt_modify_recipe(recipe, config):
            return recipe.replace(dtype="bfloat16") if recipe.dtype is None else None
    """


@pytest.hookspec
def pytest_diffopt_verdict(verdict: Verdict, observation: Observation | None, forecast: Forecast | None) -> None:
    """Read a verdict and what it was judged on. Called after each check of a recipe file, in the process that ran it.

    The check `forecast` is judged on a forecast and on no observation, every other check on an observation alone; what a
    check was not judged on is None.

    In a ``conftest.py``, to keep the observations of what failed::

        from pathlib import Path

        def pytest_diffopt_verdict(verdict, observation):
            if verdict.status == "failed" and observation is not None:
                Path(f"{verdict.recipe}.json").write_text(observation.to_json(), encoding="utf-8")
    """
