"""The fixtures. Their bodies import what they need, so that none costs anything until a test asks for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.collection.marked_tests import WATCH, Mistake
from pytest_diffopt.collection.session import PROGRESS, SETTINGS, accelerator_of, registry_of, session_of
from pytest_diffopt.report.rows import ROW_PROPERTY, row_of, source_of

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.observation.compilation import CompileWatch
    from pytest_diffopt.observation.memory import MemorySpan
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe


@pytest.fixture(scope="session")
def accelerator(pytestconfig: pytest.Config) -> Iterator[Accelerator]:
    """The device that recipes run on, as ``--diffopt-device`` says.

    From the first test that takes it to the end of the session the libraries know the simulated one as a device of theirs.
    """
    from pytest_diffopt.errors import DiffoptError

    try:
        found = accelerator_of(pytestconfig)
    except DiffoptError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    with found.known_to_libraries():
        yield found


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
def memory_watch(request: pytest.FixtureRequest, accelerator: Accelerator) -> Iterator[MemorySpan]:
    """The accelerator's memory from here to the end of the test: ``peak_bytes``, ``live_bytes``, ``transferred_bytes``, …

    On a device that does not count its memory the test is unverified: skipped, or failed with ``--diffopt-strict``.
    """
    from pytest_diffopt.collection.skipping import unverified
    from pytest_diffopt.errors import UnverifiableError
    from pytest_diffopt.observation.memory import MemorySpan

    try:
        span = MemorySpan(accelerator).__enter__()
    except UnverifiableError as error:
        unverified(request.node, "memory_watch", str(error), strict=request.config.stash[SETTINGS].strict)
    try:
        yield span
    finally:
        span.__exit__(None, None, None)


@pytest.fixture
def recipe(request: pytest.FixtureRequest) -> Recipe:
    """The recipe that the marker `recipes` parametrizes the test with."""
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
def quantized_pipeline(request: pytest.FixtureRequest, accelerator: Accelerator) -> Iterator[Any]:
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
        with prepared(asked, accelerator, allow_hub=request.config.stash[SETTINGS].hub) as live:
            yield live.pipeline
    except DiffoptError as error:
        text = f"{request.node.name} · quantized_pipeline: {error}"
        raise pytest.fail.Exception(text, pytrace=False) from None
