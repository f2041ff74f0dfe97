"""The fixtures. Their bodies import what they need, so that none costs anything until a test asks for it.

Their names are plain words, which other suites use too, so one of ours is there only where nobody else has that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.collection.marked_tests import RECIPE_TAKEN, WATCH, Mistake
from pytest_diffopt.collection.own_recipes import is_recipe
from pytest_diffopt.collection.session import PROGRESS, SETTINGS, accelerator_of, registry_of, session_of
from pytest_diffopt.report.rows import ROW_PROPERTY, row_of, source_of

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.observation.compilation import CompileWatch
    from pytest_diffopt.observation.memory import MemorySpan
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe


NAMES = ("accelerator", "compile_watch", "memory_watch", "observation", "quantized_pipeline", "recipe")


def register_fixtures(session: pytest.Session) -> None:
    """Add the fixtures whose names no other plugin has; modules, classes and conftest.py files override them anyway.

    Among plugins the one that is registered last wins, and that is chance: entry points come in the order of folders.
    """
    plugins = session.config.pluginmanager
    known: Any = plugins.get_plugin("funcmanage")  # knows by now what all the other plugins have
    root: Any = session if pytest.version_tuple >= (8, 1) else session.nodeid
    ours = ModuleType("pytest_diffopt_fixtures")
    for name in ("_diffopt_accelerator", *NAMES):
        if not any(_is_of_a_plugin(found) for found in known.getfixturedefs(name, root) or ()):
            setattr(ours, name, globals()[name])
    plugins.register(ours, "diffopt-fixtures")


def _is_of_a_plugin(found: Any) -> bool:
    """Whether a fixture that every test sees is a plugin's. pytest 8 lists those of the first conftest.py here too."""
    return not vars(found).get("has_location", False)


@pytest.fixture(scope="session")
def _diffopt_accelerator(pytestconfig: pytest.Config) -> Iterator[Accelerator]:
    """What `accelerator` gives, for the other fixtures here: a suite may have another `accelerator`."""
    from pytest_diffopt.errors import DiffoptError

    try:
        found = accelerator_of(pytestconfig)
    except DiffoptError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    with found.in_use():  # it is by now, but for a test that asks for the fixture while it runs
        yield found


@pytest.fixture(scope="session")
def accelerator(_diffopt_accelerator: Accelerator) -> Accelerator:
    """The device that recipes run on, as ``--diffopt-device`` says.

    A simulated GPU is ``torch.device("cuda")`` while a test runs that takes this, and gone between tests.
    """
    return _diffopt_accelerator


@pytest.fixture
def compile_watch(request: pytest.FixtureRequest) -> Iterator[CompileWatch]:
    """An open compile watch: ``compile_watch.record`` says what was compiled since.

    Torch's globals are given back after. The markers `compile_fullgraph` and `max_recompiles` judge the same watch.
    """
    from pytest_diffopt.collection.watching import watched

    with watched() as watch:
        request.node.stash[WATCH] = watch
        yield watch


@pytest.fixture
def memory_watch(request: pytest.FixtureRequest, _diffopt_accelerator: Accelerator) -> Iterator[MemorySpan]:
    """The accelerator's memory from here to the end of the test: ``peak_bytes``, ``live_bytes``, ``transferred_bytes``, …

    On a device that does not count its memory the test is unverified: skipped, or failed with ``--diffopt-strict``.
    """
    from pytest_diffopt.collection.skipping import unverified
    from pytest_diffopt.errors import UnverifiableError
    from pytest_diffopt.observation.memory import MemorySpan

    try:
        span = MemorySpan(_diffopt_accelerator).__enter__()
    except UnverifiableError as error:
        unverified(request.node, "memory_watch", str(error), strict=request.config.stash[SETTINGS].strict)
    try:
        yield span
    finally:
        span.__exit__(None, None, None)


@pytest.fixture
def recipe(request: pytest.FixtureRequest) -> Recipe:
    """The recipe that the marker `recipes` parametrizes the test with."""
    request.node.stash[RECIPE_TAKEN] = True
    if not hasattr(request, "param"):
        pytest.fail("recipe: the test has no marker recipes: @recipes(my_recipe, 'more.recipes.toml')", pytrace=False)
    if isinstance(request.param, Mistake):
        pytest.fail(f"{request.node.nodeid}: {request.param.text}", pytrace=False)
    found: Recipe = request.param
    return found


@pytest.fixture
def observation(request: pytest.FixtureRequest, recipe: Recipe) -> Observation:
    """What happened when the test's recipe ran; a recipe runs once, however many tests and checks read of it.

    Where an exception ended that run, ``observation.failure`` has it, and the report of a test that fails says it.
    """
    from pytest_diffopt.checks.crashes import described
    from pytest_diffopt.errors import DiffoptError

    if not is_recipe(recipe):
        found = type(recipe).__name__
        pytest.fail(f"observation: expected a Recipe from the fixture 'recipe', got {found}", pytrace=False)
    try:
        with request.config.stash[PROGRESS].running():
            observed: Observation = session_of(request.config).observe(recipe)
    except DiffoptError as error:
        text = f"{recipe.name} · observation: {type(error).__name__}: {error}"
        raise pytest.fail.Exception(text, pytrace=False) from None
    if (failure := observed.failure) is not None:
        whole = ["", *failure.traceback] if request.config.get_verbosity() >= 2 else []
        request.node.add_report_section("setup", "diffopt", "\n".join([*described(failure), *whole]))
    request.node.user_properties.append((ROW_PROPERTY, row_of(observed, source=source_of(request.node))))
    return observed


@pytest.fixture
def quantized_pipeline(request: pytest.FixtureRequest, _diffopt_accelerator: Accelerator) -> Iterator[Any]:
    """A live pipeline, quantized as the marker `quantization` says; torch's globals are given back after."""
    from pytest_diffopt.errors import DiffoptError
    from pytest_diffopt.markers import QuantizationMarker, closest

    marker = closest(request.node, QuantizationMarker)
    if marker is None:
        example = '@quantization("bitsandbytes_4bit", components="transformer")'
        pytest.fail(f"quantized_pipeline: the test has no marker quantization: {example}", pytrace=False)
    from pytest_diffopt.preparation.pipeline import prepared

    registry_of(request.config)
    asked = marker.recipe(re.sub(r"[^A-Za-z0-9_.-]+", "-", request.node.name).strip("-"))
    try:
        with prepared(asked, _diffopt_accelerator, allow_hub=request.config.stash[SETTINGS].hub) as live:
            yield live.pipeline
    except DiffoptError as error:
        text = f"{request.node.name} · quantized_pipeline: {error}"
        raise pytest.fail.Exception(text, pytrace=False) from None
