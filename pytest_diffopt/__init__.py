"""pytest-diffopt: validates combinations of quantization, torch.compile and offloading in diffusion pipelines.

Every public name is imported when it is first used: importing the package never imports torch.

PYTEST_DONT_REWRITE: torch imports this package, so a program may have done so before it calls pytest, which would warn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_diffopt.checks import assert_recipe, check
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.contract import Contract
    from pytest_diffopt.forecasting.advice import Advice, advise
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.forecasting.running import forecast
    from pytest_diffopt.markers import (
        compile_fullgraph,
        max_memory,
        max_recompiles,
        quantization,
        recipes,
        requires_gpu,
    )
    from pytest_diffopt.matrix import combinations
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.observation.observing import observe
    from pytest_diffopt.recipe import Caching, Call, Compilation, ForecastBudget, Offloading, Quantization, Recipe
    from pytest_diffopt.recipe_loading import load_recipes

    __version__: str

_HOMES = {
    "Advice": "pytest_diffopt.forecasting.advice",
    "Caching": "pytest_diffopt.denoising",
    "Call": "pytest_diffopt.recipe",
    "Compilation": "pytest_diffopt.recipe",
    "Contract": "pytest_diffopt.contract",
    "Forecast": "pytest_diffopt.forecasting.record",
    "ForecastBudget": "pytest_diffopt.recipe",
    "Observation": "pytest_diffopt.observation.observation",
    "Offloading": "pytest_diffopt.recipe",
    "Quantization": "pytest_diffopt.recipe",
    "Recipe": "pytest_diffopt.recipe",
    "Verdict": "pytest_diffopt.checks.verdict",
    "advise": "pytest_diffopt.forecasting.advice",
    "assert_recipe": "pytest_diffopt.checks",
    "check": "pytest_diffopt.checks",
    "combinations": "pytest_diffopt.matrix",
    "compile_fullgraph": "pytest_diffopt.markers",
    "forecast": "pytest_diffopt.forecasting.running",
    "load_recipes": "pytest_diffopt.recipe_loading",
    "max_memory": "pytest_diffopt.markers",
    "max_recompiles": "pytest_diffopt.markers",
    "observe": "pytest_diffopt.observation.observing",
    "quantization": "pytest_diffopt.markers",
    "recipes": "pytest_diffopt.markers",
    "requires_gpu": "pytest_diffopt.markers",
}

__all__ = [
    "Advice",
    "Caching",
    "Call",
    "Compilation",
    "Contract",
    "Forecast",
    "ForecastBudget",
    "Observation",
    "Offloading",
    "Quantization",
    "Recipe",
    "Verdict",
    "__version__",
    "advise",
    "assert_recipe",
    "check",
    "combinations",
    "compile_fullgraph",
    "forecast",
    "load_recipes",
    "max_memory",
    "max_recompiles",
    "observe",
    "quantization",
    "recipes",
    "requires_gpu",
]


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("pytest-diffopt")
    except metadata.PackageNotFoundError:
        return "0+unknown"  # run from a source tree that was never installed
