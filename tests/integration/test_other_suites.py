"""Suites that know nothing of the plugin: with it installed they collect the same tests and give the same results."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest

_OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)

# Marks, fixtures, parameters, options and ini options of the names that ours have without their prefix; from a conftest,
# a module, a class, and a plugin that is loaded before those that are installed.
PLUGIN = """
import pytest

@pytest.fixture
def observation(): return "a telescope's"

@pytest.fixture(scope="session")
def compile_watch(): return "a compiler's"

@pytest.fixture(name="memory_watch", params=["low", "high"])
def _memory(request): return request.param
"""
CONFTEST = """
import pytest

def pytest_addoption(parser):
    for name in ("device", "hub", "report", "docs", "baseline"):
        parser.addoption(f"--{name}", default="own")
    parser.addini("device", "own", default="ini")

def pytest_configure(config):
    for name in ("quantization", "requires_gpu", "recipes(a, b)", "max_recompiles"):
        config.addinivalue_line("markers", f"{name}: of this suite")

@pytest.fixture
def accelerator(): return "gas"

@pytest.fixture
def recipe(): return "soup"

def pytest_collection_modifyitems(items):
    for item in items:
        if (mark := item.get_closest_marker("requires_gpu")) and mark.kwargs.get("skip"):
            item.add_marker(pytest.mark.skip(reason="no gas"))
"""
SUITE = """
import pytest

class Dish:
    content_hash, requires, name = "salt", ("no-such-distribution",), "dish"

@pytest.mark.quantization
def test_bare_mark(): ...

@pytest.mark.quantization(bits=4)
class TestClass:
    @pytest.fixture
    def quantized_pipeline(self): return "tiny"

    def test_fixture_of_the_class(self, quantized_pipeline): assert quantized_pipeline == "tiny"

@pytest.mark.requires_gpu("A100", skip=True)
def test_skips(): assert False

@pytest.mark.requires_gpu(min_memory="lots")
@pytest.mark.max_recompiles("never")
def test_other_arguments(accelerator): assert accelerator == "gas"

@pytest.mark.recipes("bread", "butter")
def test_fixtures(recipe, observation, compile_watch):
    assert (recipe, observation, compile_watch) == ("soup", "a telescope's", "a compiler's")

@pytest.mark.parametrize("recipe", [1, Dish(), Dish])
def test_parameters(recipe): assert recipe != "soup"

@pytest.mark.parametrize(("accelerator", "observation"), [("a", "b")])
def test_parameters_over_fixtures(accelerator, observation): assert accelerator + observation == "ab"

def test_fixture_with_parameters(memory_watch): assert memory_watch == "low"

def test_options(pytestconfig):
    assert {pytestconfig.getoption(name) for name in ("device", "hub", "report", "docs", "baseline")} == {"own"}
    assert pytestconfig.getini("device") == "ini"
"""


def test_a_suite_with_the_same_names_gives_the_same_results_with_the_plugin(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_suite=SUITE, own_plugin=PLUGIN)
    pytester.makepyfile(test_unregistered="import pytest\n\n@pytest.mark.max_memory('12GiB')\ndef test_it(): ...")
    arguments = ("-v", "-p", "own_plugin", "--strict-markers", "--continue-on-collection-errors")
    pytester.syspathinsert()
    without = pytester.runpytest_subprocess("-p", "no:diffopt", "-p", "no:pytest_diffopt.plugin", *arguments)
    within = run_pytest(*arguments)
    assert "diffopt" not in without.stdout.str()
    assert "diffopt" in within.stdout.str()  # its line of the header
    outcomes = _OUTCOME.findall(within.stdout.str())
    assert outcomes == _OUTCOME.findall(without.stdout.str())
    assert within.parseoutcomes() == without.parseoutcomes() == {"passed": 10, "failed": 1, "skipped": 1, "errors": 1}
    assert len(outcomes) == 12
    for result in (without, within):
        result.stdout.fnmatch_lines(["'max_memory' not found in `markers` configuration option"])


def test_a_suites_own_fixtures_win_and_ours_do_not_depend_on_them(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture
        def accelerator(): return "gas"
        """
    )
    pytester.makepyfile(
        test_their_recipe="""
        import pytest
        import torch
        from pytest_diffopt import Recipe, recipes

        @pytest.fixture
        def recipe(): return "soup"

        @recipes(Recipe("small", lambda: torch.nn.Linear(2, 2)))
        def test_marked(recipe): ...

        def test_observed(observation): ...

        def test_memory(accelerator, memory_watch):
            assert accelerator == "gas"
            assert memory_watch.accelerator.kind == "sim"
        """,
        test_recipe_on_top="""
        import pytest
        import torch
        from pytest_diffopt import Call, Recipe, recipes

        def factory(): return torch.nn.Linear(2, 2)

        @pytest.fixture
        def recipe(recipe): return recipe.replace(name=recipe.name + "-changed")

        @recipes(Recipe("small", factory, call=Call(inputs=[{"input": torch.ones(1, 2)}])))
        def test_changed(observation): assert observation.name == "small-changed"
        """,
    )
    result = run_pytest("--diffopt-device=sim")
    assert result.parseoutcomes() == {"passed": 2, "failed": 1, "errors": 1}, result.stdout.str()
    hidden = "recipes: the fixture 'recipe' that this test gets is not pytest-diffopt's: the module, a conftest.py or another"
    expected = [
        "observation: expected a Recipe from the fixture 'recipe', got str",
        f"*::test_marked[[]small[]]: {hidden} *",
    ]
    result.stdout.fnmatch_lines(expected)
