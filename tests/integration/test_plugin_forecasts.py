"""Forecasts in recipe files and under the marker max_memory, with a maker of forecasts that a conftest file puts in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest

CONFTEST = """
import sys, types
import pytest_diffopt.forecasting
from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.observation.observation import Owner, PhaseResidency, Residency
from tests.made_forecasts import gib, made

PHASES = (PhaseResidency("call 0", 0, 1, 1, 100),)
RESIDENCY = Residency((Owner("transformer", "weights"),), PHASES, (0, 1), ((0,), (100,)))


def forecast(recipe, model=None, **given):
    print("FORECAST", recipe.name, model, given["sizes"], given["steps"])
    if recipe.name == "broken":
        raise ReplicaError("the vae cannot be built.")
    peak = {"large": gib(20), "wide": gib(14, 15, 18)}.get(recipe.name, gib(15))
    return made(peak, recipe=recipe.name, model=model or "flux.1-dev", residency=RESIDENCY)


running = types.ModuleType("pytest_diffopt.forecasting.running")
running.forecast = forecast
sys.modules[running.__name__] = pytest_diffopt.forecasting.running = running


def pytest_diffopt_verdict(verdict, observation, forecast):
    if verdict.check == "forecast":
        print("READ", verdict.status, observation, forecast.model if forecast else None)
"""

BUDGET = 'forecast = { model = "flux.1-dev", max_memory = "16GiB" }\n'
FILE = "".join(
    f'[recipe.{name}]\npipeline = "tiny-flux"\ncall = {{ seed = {seed} }}\n{BUDGET}'
    for seed, name in enumerate(("small", "large", "wide", "broken"))
)


@pytest.fixture
def files(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    pytester.makefile(".recipes.toml", a=FILE)
    return pytester


def test_a_recipe_file_is_judged_on_its_forecasts_with_no_run_of_a_recipe(
    run_pytest: RunPytest, files: pytest.Pytester
) -> None:
    result = run_pytest(
        "--diffopt-device=cpu",
        "-rA",
        "-k",
        "forecast",
        *[f"a.recipes.toml::{one}::forecast" for one in ("small", "large", "wide", "broken")],
    )
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "unverified": 2}
    result.stdout.fnmatch_lines(
        [
            "large · forecast: flux.1-dev peaks at 20.00 GiB while transformer runs: 16.00 GiB allowed, at least 4.00 GiB *",
            "  the peak: call 1, transformer, aten::bmm; calls of 28 steps at 1024×1024",
            "*= optimization recipes =*",
            "recipe * forecast (GiB) * verdict",
            "small * 15.00 flux.1-dev * 1 passed",
            "large * 20.00 flux.1-dev * 1 failed: forecast",
            "wide * 15.00 flux.1-dev * 1 unverified: forecast",
            "broken * - * 1 unverified: forecast",
            "2 unverified: nothing was judged there, so nothing passed",
            "  wide · forecast: * its range reaches 2.00 GiB over the 16.00 GiB allowed",
            "  broken · forecast: no forecast was made: the vae cannot be built.",
        ]
    )
    out = result.stdout.str()
    assert out.count("FORECAST small") == 1
    assert "READ passed None flux.1-dev" in out
    assert "READ unverified None" not in out.replace("READ unverified None flux.1-dev", "")


def test_strict_fails_what_may_fit(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    result = run_pytest("--diffopt-device=cpu", "--diffopt-strict", "a.recipes.toml::wide::forecast")
    assert result.parseoutcomes() == {"failed": 1}


def test_workers_send_what_was_forecast(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    wanted = [f"a.recipes.toml::{one}::forecast" for one in ("small", "large", "wide")]
    result = run_pytest("--diffopt-device=cpu", "-n", "2", *wanted)
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "unverified": 1}
    result.stdout.fnmatch_lines_random(
        ["small * 15.00 flux.1-dev * 1 passed", "large * 20.00 flux.1-dev * 1 failed: forecast"]
    )


def test_mistakes_in_a_forecast_are_told_at_collection(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    table = '[recipe.{0}]\npipeline = "tiny-flux"\nforecast = {1}\n'
    rows = [
        ("a", '{ model = "flux.1-def", max_memory = "16GiB" }'),
        ("b", '{ model = "sdxl", gpu = "rtx-4091" }'),
        ("c", '{ model = "flux.1-dev" }'),
    ]
    pytester.makefile(".recipes.toml", wrong="".join(table.format(*row) for row in rows))
    result = run_pytest()
    assert result.parseoutcomes() == {"errors": 1}
    result.stdout.fnmatch_lines_random(
        [
            "wrong.recipes.toml: 4 mistakes",
            "  recipe.a.forecast.model: found 'flux.1-def'; did you mean 'flux.1-dev'? *",
            "  recipe.b.forecast.model: found 'sdxl', a StableDiffusionXLPipeline; 'tiny-flux' is a FluxPipeline; *",
            "  recipe.b.forecast.gpu: found 'rtx-4091'; Did you mean 'rtx-4090'? *",
            "  recipe.c.forecast.max_memory: found nothing; max_memory, gpu or both must be given: *",
        ]
    )


def test_pytest_html_shows_what_was_forecast_beside_what_was_observed(
    run_pytest: RunPytest, files: pytest.Pytester
) -> None:
    pytest.importorskip("pytest_html")
    files.makepyfile(
        factories="""
        import torch

        def model():
            return torch.nn.Linear(4, 4)

        def inputs(k):
            return {"input": torch.ones(2, 4) * k}
        """
    )
    table = '[recipe.tiny]\npipeline = "factories:model"\ncall = {{ inputs = "factories:inputs" }}\n{}'
    files.makefile(".recipes.toml", b=table.format(BUDGET))
    pictures = {}
    for item in ("a.recipes.toml::small::forecast", "b.recipes.toml"):
        result = run_pytest("--diffopt-device=sim", "--html=report.html", "--self-contained-html", item)
        assert result.ret == pytest.ExitCode.OK
        page = (files.path / "report.html").read_text(encoding="utf-8")
        pictures[item] = (page.count("&lt;svg"), page.count(", forecast of flux.1-dev&lt;/title&gt;"))
    # two of each: for a wide page, and for a phone
    assert pictures == {"a.recipes.toml::small::forecast": (2, 2), "b.recipes.toml": (6, 2)}


MARKED = """
import pytest
from pytest_diffopt import Recipe, max_memory, recipes

SMALL, LARGE, WIDE = (
    Recipe(name, "tiny-flux", call={"seed": seed}) for seed, name in enumerate(("small", "large", "wide"))
)
OWN = Recipe("own", "black-forest-labs/FLUX.1-dev", forecast={"gpu": "rtx-4090", "sizes": [512, 512]})
"""


def test_max_memory_with_a_forecast_is_about_the_full_size_of_the_tests_recipe(
    run_pytest: RunPytest, files: pytest.Pytester
) -> None:
    files.makepyfile(
        MARKED
        + """
@recipes(SMALL, LARGE, WIDE)
@max_memory("16GiB", forecast="flux.1-dev")
def test_fits(recipe):
    print("BODY", recipe.name)

@recipes(OWN)
@max_memory("16GiB", forecast=True)
def test_own(recipe):
    pass

@recipes(LARGE)
@max_memory("1KiB", forecast="flux.1-dev")
def test_fails_by_itself(recipe):
    raise ZeroDivisionError("of its own")

@recipes(SMALL, SMALL.replace(name="again"))
@pytest.mark.diffopt_max_memory("14GiB", forecast="FLUX.1-dev")
def test_tight(recipe):
    pass
"""
    )
    result = run_pytest("--diffopt-device=cpu", "-rA", *files.path.glob("test_*.py"))
    assert result.parseoutcomes() == {"passed": 2, "failed": 4, "unverified": 1}
    result.stdout.fnmatch_lines_random(
        [
            (
                "test_fits[[]large[]] · max_memory: flux.1-dev peaks at 20.00 GiB while transformer runs: "
                "16.00 GiB allowed, at least 4.00 GiB too little"
            ),
            "  the peak: call 1, transformer, aten::bmm; calls of 28 steps at 1024×1024",
            "*ZeroDivisionError: of its own",
            "test_tight[[]again[]] · max_memory: * 14.00 GiB allowed, at least 1.00 GiB too little",
            "test_fits[[]small[]] * 15.00 flux.1-dev * 1 passed",
            "test_tight[[]small[]] * 15.00 flux.1-dev * 1 failed: test_tight",
            "test_own[[]own[]] * 15.00 flux.1-dev * 1 passed",
            "  wide · test_fits: * its range reaches 2.00 GiB over the 16.00 GiB allowed",
        ]
    )
    out = result.stdout.str()
    assert "FORECAST own None ((512, 512),) None" in out
    assert [out.count(f"FORECAST {name} ") for name in ("small", "large", "again")] == [1, 1, 0]


def test_max_memory_with_a_forecast_is_the_same_on_workers(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    marked = '@recipes(SMALL, LARGE, WIDE)\n@max_memory("16GiB", forecast="flux.1-dev")\ndef test_fits(recipe): ...\n'
    files.makepyfile(MARKED + marked)
    result = run_pytest("--diffopt-device=cpu", "-n", "2", *files.path.glob("test_*.py"))
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "unverified": 1}
    result.stdout.fnmatch_lines(["test_fits[[]large[]] * 20.00 flux.1-dev * 1 failed: test_fits"])


def test_max_memory_with_a_forecast_names_what_is_missing(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    files.makepyfile(
        MARKED
        + """
@max_memory("16GiB", forecast="flux.1-dev")
def test_without_a_recipe():
    print("BODY")

@pytest.fixture
def recipe(request):
    return getattr(request, "param", "no recipe")

@max_memory("16GiB", forecast="flux.1-dev")
def test_with_something_else(recipe):
    print("BODY")

@recipes(SMALL)
@max_memory("16GiB", forecast="flux.1-def")
def test_misspelt(recipe):
    print("BODY")

@recipes(SMALL)
@max_memory("16GiB", forecast=True)
def test_no_model(recipe):
    print("BODY")
"""
    )
    result = run_pytest("--diffopt-device=cpu", "-rA", *files.path.glob("test_*.py"))
    assert result.parseoutcomes() == {"errors": 1, "failed": 3}
    missing = "max_memory: forecast: the test has no recipe that could be forecast: give it the marker recipes, *"
    result.stdout.fnmatch_lines_random(
        [
            f"*::test_without_a_recipe: {missing}",
            f"*::test_with_something_else: {missing}",
            "*::test_misspelt[[]small[]]: max_memory: small.forecast.model: found 'flux.1-def'; did you mean 'flux.1-dev'? *",
            "*::test_no_model[[]small[]]: max_memory: small.forecast.model: found nothing; it must be given, *",
        ]
    )
    assert "BODY" not in result.stdout.str().replace('print("BODY")', "")
