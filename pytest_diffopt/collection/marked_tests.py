"""What the markers do to the tests that carry them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.collection.forecast_limits import NO_RECIPE, forecast_within
from pytest_diffopt.collection.own_recipes import recipe_of_test
from pytest_diffopt.collection.session import SETTINGS, accelerator_of, kind_of
from pytest_diffopt.collection.skipping import place_skip, skip, unverified
from pytest_diffopt.documentation.requirements import missing
from pytest_diffopt.report.html import attach_pictures
from pytest_diffopt.report.rows import RECIPE_PROPERTY, about_of

if TYPE_CHECKING:
    from pytest_diffopt.collection.watching import WatchMarkers
    from pytest_diffopt.markers import MaxMemory
    from pytest_diffopt.observation.compilation import CompileWatch

# What ``pytest --markers`` prints: the first line of each dataclass's docstring in `markers`, written again (a test
# compares them) so that a run whose tests have no such marker does not pay for that module.
MARKER_LINES = {
    "diffopt_requires_gpu": "diffopt_requires_gpu(min_memory=None, capability=None, backends=None, simulated=False): "
    "skip unless the accelerator fits.",
    "diffopt_compile_fullgraph": "diffopt_compile_fullgraph: "
    "all that the test compiles is one graph a frame, and runs: no break, no skip, no fall back.",
    "diffopt_max_recompiles": "diffopt_max_recompiles(limit): "
    "at most that many recompiles in the test, and no recompile limit is ever exhausted.",
    "diffopt_max_memory": "diffopt_max_memory(limit, forecast=None): "
    "the accelerator holds at most that much in the test; or a full-size model would.",
    "diffopt_recipes": "diffopt_recipes(*recipes): "
    "run the test once a recipe; its fixtures `recipe` and `observation` have it and what happened.",
    "diffopt_quantization": 'diffopt_quantization(backend, components=None, pipeline="tiny-flux", **kwargs): '
    "configure fixture `quantized_pipeline`.",
}

MAX_MEMORY: pytest.StashKey[MaxMemory] = pytest.StashKey()
WATCH_MARKERS: pytest.StashKey[WatchMarkers] = pytest.StashKey()
WATCH: pytest.StashKey[CompileWatch] = pytest.StashKey()
"""The open watch of a test that takes the fixture `compile_watch`."""
RECIPE_TAKEN: pytest.StashKey[bool] = pytest.StashKey()
"""Whether the fixture `recipe` of ours ran for a test."""


_ANOTHER_FIXTURE = (
    "recipes: the fixture 'recipe' that this test gets is not pytest-diffopt's: the module, a conftest.py or another plugin "
    "has one of that name, and theirs wins. Rename it, or let it take ours: def recipe(recipe)."
)


def register_markers(config: pytest.Config) -> None:
    """Declare every marker, so that ``--markers`` lists it and ``--strict-markers`` knows it."""
    for line in MARKER_LINES.values():
        config.addinivalue_line("markers", line)


@dataclass(frozen=True)
class Mistake:
    """Stands for a recipe where the marker `recipes` is wrong: so the test fails, and no other with it."""

    text: str


def parametrize_recipes(metafunc: pytest.Metafunc) -> None:
    """Run a test with the marker `recipes` once a recipe."""
    mark = metafunc.definition.get_closest_marker("diffopt_recipes")
    if mark is None:
        return
    if "recipe" not in metafunc.fixturenames:
        return  # said when the test is set up
    from pytest_diffopt.collection.recipe_files import recipes_named
    from pytest_diffopt.errors import DiffoptError
    from pytest_diffopt.markers import Recipes

    found: list[Any]
    try:
        marker = Recipes.of(mark.args, mark.kwargs)
        found = [
            pytest.param(recipe, id=recipe.name)
            for recipe in recipes_named(marker.recipes, metafunc.definition, metafunc.definition.path.parent)
        ]
    except DiffoptError as error:
        found = [pytest.param(Mistake(str(error)), id="mistake")]
    metafunc.parametrize("recipe", found, indirect=True)


def note_recipe(item: pytest.Item) -> None:
    """Let the reports of a test over recipes say which recipe it was, also where it is skipped."""
    if (recipe := recipe_of_test(item)) is not None:
        check = getattr(item, "originalname", item.name)
        about = {"source": item.nodeid, "recipe": recipe.name, "check": check, "content": recipe.content_hash}
        item.user_properties.append((RECIPE_PROPERTY, about))


def set_up(item: pytest.Item) -> None:
    """Reject wrong markers, skip where the accelerator does not fit, and note what is to be watched."""
    names = {mark.name for mark in item.iter_markers()} & MARKER_LINES.keys()
    if not names:
        return
    from pytest_diffopt.collection.watching import WatchMarkers
    from pytest_diffopt.errors import DiffoptError, MarkerError, UnverifiableError
    from pytest_diffopt.markers import MARKERS, MaxMemory, RequiresGpu, closest, not_a_gpu, unsupported

    try:
        for mark in item.iter_markers():
            if mark.name in MARKERS:
                MARKERS[mark.name].of(mark.args, mark.kwargs)
    except MarkerError as error:
        raise pytest.fail.Exception(f"{item.nodeid}: {error}", pytrace=False) from None
    if "diffopt_recipes" in names and "recipe" not in getattr(item, "fixturenames", ()):
        pytest.fail(
            f"{item.nodeid}: recipes: the test takes neither fixture, 'recipe' nor 'observation'", pytrace=False
        )
    recipe = recipe_of_test(item)
    if recipe is not None and (lacking := missing(recipe.requires)):
        skip(item, lacking)
    if (gpu := closest(item, RequiresGpu)) is not None:
        try:
            # a simulated device takes half a minute to build: not only to say that it is no GPU
            why = not_a_gpu(gpu, kind_of(item.config)) or unsupported(gpu, accelerator_of(item.config))
        except UnverifiableError as error:
            why = f"requires_gpu: {error}"
        except DiffoptError as error:
            raise pytest.fail.Exception(f"{item.nodeid}: {error}", pytrace=False) from None
        if why is not None:
            skip(item, why)
    if (memory := closest(item, MaxMemory)) is not None:
        if memory.forecast is not None and "recipe" not in getattr(item, "fixturenames", ()):
            pytest.fail(f"{item.nodeid}: {NO_RECIPE}", pytrace=False)
        item.stash[MAX_MEMORY] = memory
    if (watch_markers := WatchMarkers.of_test(item)) is not None:
        item.stash[WATCH_MARKERS] = watch_markers


def _has_its_recipe(item: pytest.Item) -> bool:
    """Whether the recipe of the marker came to the test: through our fixture, or through one that gives its parameter."""
    given = getattr(item, "funcargs", {}).get("recipe")
    return RECIPE_TAKEN in item.stash or (given is not None and given is recipe_of_test(item))


@contextlib.contextmanager
def watching(item: pytest.Item) -> Iterator[None]:
    """Watch what the test compiles and allocates, where its markers ask for it, and fail it where they do not hold.

    A test that fails by itself, or skips, is left at that.
    """
    if item.get_closest_marker("diffopt_recipes") is not None and not _has_its_recipe(item):
        pytest.fail(f"{item.nodeid}: {_ANOTHER_FIXTURE}", pytrace=False)
    with _watching_memory(item), _watching_compilation(item):
        yield


@contextlib.contextmanager
def _watching_memory(item: pytest.Item) -> Iterator[None]:
    marker = item.stash.get(MAX_MEMORY, None)
    if marker is None:
        yield
        return
    if marker.forecast is not None:
        with forecast_within(item, marker):
            yield
        return
    from pytest_diffopt.collection.watching import memory_failure
    from pytest_diffopt.errors import UnverifiableError
    from pytest_diffopt.observation.memory import MemorySpan

    span, unmeasured = None, ""
    try:
        span = MemorySpan(accelerator_of(item.config)).__enter__()
    except UnverifiableError as error:
        unmeasured = str(error)
    if span is None:
        yield
        unverified(item, marker.name, unmeasured, strict=item.config.stash[SETTINGS].strict)
    try:
        yield
    finally:
        span.__exit__(None, None, None)
    if not getattr(item, "_excinfo", None) and (why := memory_failure(span, marker.limit_bytes)):
        pytest.fail(f"{item.name} · {marker.name}: {why}", pytrace=False)


@contextlib.contextmanager
def _watching_compilation(item: pytest.Item) -> Iterator[None]:
    markers = item.stash.get(WATCH_MARKERS, None)
    if markers is None:
        yield
    elif (watch := item.stash.get(WATCH, None)) is not None:  # the fixture compile_watch opened it
        yield
        _judge(item, markers, watch)
    else:
        from pytest_diffopt.collection.watching import watched

        with watched() as watch:
            yield
        _judge(item, markers, watch)


def _judge(item: pytest.Item, markers: WatchMarkers, watch: CompileWatch) -> None:
    if getattr(item, "_excinfo", None):  # a unittest.TestCase keeps its failure until the report is made
        return
    from pytest_diffopt.collection.watching import verdict_on_test

    if failure := verdict_on_test(item.name, markers, watch.record):
        pytest.fail(failure, pytrace=False)


def tidied(item: pytest.Item, report: pytest.TestReport) -> pytest.TestReport:
    """The report of an item: a skip of ours at the item's place, a recipe's pictures, no trace of torch in its log."""
    place_skip(item, report)
    attach_pictures(item, report)
    if report.failed and (WATCH_MARKERS in item.stash or WATCH in item.stash or about_of(item) is not None):
        report.sections = [(title, kept) for title, text in report.sections if (kept := _without_trace(title, text))]
    return report


def _without_trace(title: str, text: str) -> str:
    """A captured log without the records of torch.__trace: hundreds of lines with no message."""
    if not title.startswith("Captured log"):
        return text
    return "\n".join(line for line in text.splitlines() if " torch.__trace:" not in line)
