"""The marker `max_memory` with ``forecast=``: a limit for the test's recipe with a full-size model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pytest_diffopt.collection.own_recipes import is_recipe
from pytest_diffopt.collection.session import PROGRESS, SETTINGS, registry_of, session_of
from pytest_diffopt.collection.skipping import unverified
from pytest_diffopt.report.html import keep_forecast_picture
from pytest_diffopt.report.rows import ROW_PROPERTY, row_of, source_of

if TYPE_CHECKING:
    from pytest_diffopt.markers import MaxMemory
    from pytest_diffopt.recipe import Recipe

NO_RECIPE = (
    "max_memory: forecast: the test has no recipe that could be forecast: give it the marker recipes, "
    "@recipes(my_recipe), and let it take the fixture 'recipe'"
)


def with_budget(recipe: Recipe, marker: MaxMemory) -> Recipe:
    """The recipe with the marker's limit and model; what its own ``forecast`` says beside them stays."""
    own = recipe.forecast.given() if recipe.forecast is not None else {}
    model = {} if marker.forecast is True else {"model": marker.forecast}
    return recipe.replace(forecast={**own, **model, "max_memory": marker.limit})


@contextlib.contextmanager
def forecast_within(item: pytest.Item, marker: MaxMemory) -> Iterator[None]:
    """Fail a test whose recipe takes more with the full-size model; a test that fails by itself, or skips, is left at that."""
    recipe = getattr(item, "funcargs", {}).get("recipe")
    if not is_recipe(recipe):
        pytest.fail(f"{item.nodeid}: {NO_RECIPE}", pytrace=False)
    from pytest_diffopt.installation import problems_with_installation

    registry_of(item.config)  # which conftest files may add models to
    asked, path = with_budget(recipe, marker), f"{recipe.name}.forecast"
    problems = problems_with_installation(asked, prefix=recipe.name, allow_hub=item.config.stash[SETTINGS].hub)
    if wrong := [str(problem) for problem in problems if problem.path.startswith(path)]:
        pytest.fail(f"{item.nodeid}: {marker.name}: {'; '.join(wrong)}", pytrace=False)
    yield
    _judge(item, marker, asked)


def _judge(item: pytest.Item, marker: MaxMemory, asked: Recipe) -> None:
    from pytest_diffopt.errors import DiffoptError, UnverifiableError

    strict = item.config.stash[SETTINGS].strict
    try:
        with item.config.stash[PROGRESS].running():
            session = session_of(item.config)
            verdict = session.judge(asked, "forecast")
            forecast = session.forecast_evidence(asked).forecast
    except UnverifiableError as error:
        unverified(item, marker.name, str(error), strict=strict)
    except DiffoptError as error:
        raise pytest.fail.Exception(f"{item.name} · {marker.name}: {error}", pytrace=False) from None
    row = row_of(None, source=source_of(item), recipe=asked.name, forecast=forecast)
    item.user_properties.append((ROW_PROPERTY, row))
    if forecast is not None:
        keep_forecast_picture(item, forecast)
    if verdict.status == "failed":
        lines = [f"{item.name} · {marker.name}: {verdict.sentence}", *(f"  {line}" for line in verdict.evidence)]
        pytest.fail("\n".join(lines), pytrace=False)
    if verdict.status == "unverified":
        places = verdict.evidence if forecast is None else ()  # where it stopped
        unverified(item, marker.name, "\n".join([verdict.sentence, *places]), strict=strict)
