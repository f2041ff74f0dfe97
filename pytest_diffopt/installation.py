"""What only an installation can tell of a recipe: whether its pipeline, imports, backends, settings and models are there."""

from __future__ import annotations

import importlib
import importlib.util
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pytest_diffopt.errors import DiffoptError, Problem, RecipeError, ReplicaError
from pytest_diffopt.extras import is_installed, needs
from pytest_diffopt.libraries import quiet_imports
from pytest_diffopt.part import Location, Mistake, did_you_mean, path_of, shown
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.recipe import FACTORY, Call, DynamoValue, ForecastBudget, Recipe, is_reference
from pytest_diffopt.references import UnresolvedReference, resolve, resolve_callable
from pytest_diffopt.replicas import Family, registry, resolve_full_size, unresolved

__all__ = ["problems_with_installation"]


def problems_with_installation(recipe: Recipe, *, prefix: str = "recipe", allow_hub: bool = False) -> list[Problem]:
    """The mistakes that show only with the recipe's libraries at hand: its pipeline, imports, backends, settings, forecast.

    Imports what the recipe names; imports torch if the recipe compiles by a backend's name or sets Dynamo, and leaves
    those two unchecked where torch is not installed. Nothing is built: components are checked where the pipeline is a
    replica's, whose family names them.

    Args:
        recipe: a valid recipe.
        prefix: what the paths begin with, e.g. ``"recipe.flux"``.
        allow_hub: whether a hub id means the hub's own pipeline, and not the replica that stands for it.
    """
    mistakes: list[Mistake] = []
    for field, pipeline in (("pipeline", recipe.pipeline), ("reference", recipe.reference)):
        if not isinstance(pipeline, str):
            continue
        if is_reference(pipeline):
            mistakes += _reference_mistakes((field,), pipeline)
        elif not (field == "pipeline" and _forecast_alone(recipe)) and (
            allowed := unresolved(pipeline, allow_hub=allow_hub, registry=registry)
        ):
            mistakes.append(Mistake((field,), repr(pipeline), allowed))
    if isinstance(recipe.call.inputs, str):
        mistakes += _reference_mistakes(("call", "inputs"), recipe.call.inputs)
    mistakes += _media_mistakes(recipe.call)
    if (family := _replica(recipe.pipeline, allow_hub)) is not None:
        mistakes += _component_mistakes(recipe, family.components)
    mistakes += _library_mistakes(recipe)
    torch_installed = importlib.util.find_spec("torch") is not None
    for index, compilation in enumerate(recipe.compilation):
        location = (*_compilation_at(recipe, index), "backend")
        if not isinstance(compilation.backend, str):
            continue
        if ":" in compilation.backend:
            mistakes += _reference_mistakes(location, compilation.backend)
        elif torch_installed and compilation.backend != "inductor":
            mistakes += _backend_mistakes(location, compilation.backend)
    if torch_installed and recipe.dynamo:
        mistakes += _dynamo_mistakes(recipe.dynamo)
    if recipe.attention is not None and importlib.util.find_spec("diffusers") is not None:
        mistakes += _attention_mistakes(recipe.attention)
    if recipe.forecast is not None:
        mistakes += _forecast_mistakes(recipe, recipe.forecast, allow_hub)
    return [Problem(f"{prefix}.{path_of(m.location)}", m.found, m.allowed) for m in mistakes]


def _forecast_alone(recipe: Recipe) -> bool:
    """Whether the pipeline is the full-size model that the recipe asks a forecast of: that check needs no run."""
    if recipe.forecast is None or recipe.forecast.model is not None or not isinstance(recipe.pipeline, str):
        return False
    return registry.find_full_size(recipe.pipeline) is not None


def _library_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    """Backends whose package is not installed; nothing is imported for the answer."""
    for index, quantization in enumerate(recipe.quantizations):
        package = BACKENDS[quantization.backend].distribution
        if package is not None and not is_installed(package):
            at: Location = ("quantization", index) if len(recipe.quantizations) > 1 else ("quantization",)
            yield Mistake((*at, "backend"), repr(quantization.backend), f"it {needs(package)}")


def _compilation_at(recipe: Recipe, index: int) -> Location:
    return ("compilation",) if len(recipe.compilation) == 1 else ("compilation", index)


def _replica(pipeline: object, allow_hub: bool) -> Family | None:
    """The family whose replica will run, by the order in which `replicas.resolution.resolve` looks; else None."""
    if not isinstance(pipeline, str):
        return None
    means_another = "/" in pipeline and (allow_hub or Path(pipeline).expanduser().is_dir())
    return None if means_another else registry.find(pipeline)


def _component_mistakes(recipe: Recipe, components: tuple[str, ...]) -> Iterator[Mistake]:
    named: list[tuple[Location, Iterable[str]]] = []
    for index, quantization in enumerate(recipe.quantizations):
        at: Location = ("quantization", index) if len(recipe.quantizations) > 1 else ("quantization",)
        named.append(((*at, "components"), quantization.components or ()))
    for index, compilation in enumerate(recipe.compilation):
        if compilation.component != FACTORY:
            named.append(((*_compilation_at(recipe, index), "component"), (compilation.owner,)))
    if isinstance(recipe.attention, Mapping):
        named.append((("attention",), recipe.attention))
    for index, caching in enumerate(recipe.caching):
        at = ("caching",) if len(recipe.caching) == 1 else ("caching", index)
        named.append(((*at, "component"), (caching.component,)))
    if recipe.offloading is not None:
        named.append((("offloading", "components"), recipe.offloading.components or ()))
    for location, names in named:
        for name in names:
            if name not in components:
                allowed = f"{did_you_mean(name, components)}the pipeline has: {', '.join(sorted(components))}"
                yield Mistake(location, repr(name), allowed)
    for switch in ("vae_tiling", "vae_slicing"):
        if getattr(recipe, switch) and "vae" not in components:
            yield Mistake((switch,), "true", f"the pipeline has no vae, but {', '.join(sorted(components))}")


def _forecast_mistakes(recipe: Recipe, budget: ForecastBudget, allow_hub: bool) -> Iterator[Mistake]:
    yield from _model_mistakes(recipe, budget, allow_hub)
    if budget.gpu is not None:
        from pytest_diffopt.accelerators.gpus import card

        try:
            card(budget.gpu)
        except DiffoptError as error:
            allowed = str(error).removeprefix(f"No card is called {budget.gpu!r}. ")
            yield Mistake(("forecast", "gpu"), repr(budget.gpu), allowed)
    if budget.assume:
        from pytest_diffopt.forecasting.assumptions import assumed

        at = ("forecast", "assume")
        try:
            assumed(budget.assume)
        except RecipeError as error:
            for problem in error.problems:
                yield Mistake((*at, problem.path.removeprefix("assume").lstrip(".")), problem.found, problem.allowed)
        except DiffoptError as error:
            yield Mistake(at, shown(dict(budget.assume)), str(error))


def _model_mistakes(recipe: Recipe, budget: ForecastBudget, allow_hub: bool) -> Iterator[Mistake]:
    """A full-size model that is not there, or whose pipeline is of another class than the recipe's own."""
    at, pipeline = ("forecast", "model"), recipe.pipeline
    named = pipeline if isinstance(pipeline, str) and not is_reference(pipeline) else None
    model = named if budget.model is None else budget.model
    try:
        found = resolve_full_size(model) if model is not None else None
    except ReplicaError as error:
        if budget.model is not None and Path(budget.model).expanduser().is_dir():
            yield Mistake(at, repr(budget.model), str(error))
            return
        found = None
    names = [name for known in registry.full_sizes.values() for name in (known.name, known.hub_id) if name]
    if found is None:
        allowed = (
            f"{did_you_mean(budget.model, names)}full-size models: {', '.join(registry.full_sizes)}, their hub ids"
        )
        if budget.model is not None:
            yield Mistake(at, repr(budget.model), f"{allowed}, and directories with a pipeline's config files")
        else:
            what = repr(pipeline) if isinstance(pipeline, str) else shown(pipeline)
            yield Mistake(at, "nothing", f"it must be given, since the pipeline {what} names none; {allowed}")
        return
    family = _replica(pipeline, allow_hub)
    if family is not None and family.pipeline_class != found.pipeline_class:
        fitting = [one.name for one in registry.full_sizes.values() if one.pipeline_class == family.pipeline_class]
        allowed = f"{pipeline!r} is a {family.pipeline_class}; in full size there are: {', '.join(fitting) or 'none'}"
        yield Mistake(at, f"{model!r}, a {found.pipeline_class}", allowed)


def _reference_mistakes(
    location: Location, reference: str, find: Callable[[str], Any] = resolve_callable
) -> Iterator[Mistake]:
    try:
        find(reference)
    except UnresolvedReference as error:
        yield Mistake(location, repr(reference), str(error))


def _backend_mistakes(location: Location, backend: str) -> Iterator[Mistake]:
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=None)
    if backend not in known:
        allowed = f"{did_you_mean(backend, known)}allowed: {', '.join(known)}, or 'package.module:function'"
        yield Mistake(location, repr(backend), allowed)


def _attention_mistakes(attention: str | Mapping[str, str]) -> Iterator[Mistake]:
    """Backends that diffusers knows, and whose package is not there: diffusers' own words say which."""
    with quiet_imports():
        from diffusers.models import attention_dispatch

    known = {name.value for name in attention_dispatch.AttentionBackendName}
    named = attention if isinstance(attention, Mapping) else {"": attention}
    for component, backend in named.items():
        at = ("attention", component) if component else ("attention",)
        if backend not in known:
            yield Mistake(at, repr(backend), f"the installed diffusers has: {', '.join(sorted(known))}")
            continue
        try:
            attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(backend))
        except RuntimeError as error:
            yield Mistake(at, repr(backend), str(error))


def _media_mistakes(call: Call) -> Iterator[Mistake]:
    """Strings for pictures and videos that stand for none, and names of functions that are not there."""
    from pytest_diffopt.preparation import media

    for name, one in media.strings_in(call.kwargs):
        location = ("call", "kwargs", name)
        if is_reference(one):
            yield from _reference_mistakes(location, one, resolve)
        elif allowed := media.refused(name, one):
            yield Mistake(location, repr(one), allowed)


def _dynamo_mistakes(settings: Mapping[str, DynamoValue]) -> Iterator[Mistake]:
    import torch

    from pytest_diffopt.preparation import dynamo

    known = dynamo.configs()
    for name, value in settings.items():
        if name not in known:
            where = " or ".join(dynamo.MODULES)
            allowed = f"{did_you_mean(name, list(known), 3)}a setting of {where} of torch {torch.__version__}"
            yield Mistake(("dynamo", name), "an unknown setting", allowed)
            continue
        config = known[name]
        # A setting without an annotation, and torch before 2.6, have only the type of the value.
        declared = config.get_type(name) if hasattr(config, "get_type") else type(getattr(config, name))
        undeclared = declared is type(None)  # the type of a default of None
        if not undeclared and not _accepts(declared, value):
            text = declared.__name__ if isinstance(declared, type) else str(declared).replace("typing.", "")
            yield Mistake(("dynamo", name), shown(value), f"a value of type {text}")


def _accepts(declared: Any, value: object) -> bool:
    kind, arguments = typing.get_origin(declared) or declared, typing.get_args(declared)
    if kind is Literal:
        return value in arguments
    if kind in (typing.Union, types.UnionType):
        return any(_accepts(argument, value) for argument in arguments)
    if isinstance(value, bool):
        return kind in (bool, Any)
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind) if isinstance(kind, type) else kind is Any
