"""Which recipes of a file are forecast, and with which full-size models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_diffopt.command_line.command import UsageError
from pytest_diffopt.errors import ReplicaError

if TYPE_CHECKING:
    from pytest_diffopt.recipe import Recipe
    from pytest_diffopt.replicas.catalogue import Registry
    from pytest_diffopt.replicas.description import Description


@dataclass(frozen=True)
class Job:
    """A recipe to forecast with a model.

    Attributes:
        model: as the user named it; None for the one that the recipe's own pipeline names.
        title: the model's name.
    """

    recipe: Recipe
    model: str | None
    title: str


def chosen(recipes: Mapping[str, Recipe], names: Sequence[str], source: str) -> list[Recipe]:
    """The recipes of those names, in the order of the file; all where no name is given.

    Raises:
        UsageError: a name is none of the file's.
    """
    from pytest_diffopt.part import did_you_mean

    for name in names:
        if name not in recipes:
            hint = did_you_mean(name, recipes)
            raise UsageError(
                f"argument --recipe: {source} has no recipe {name!r}; {hint}it has: {', '.join(recipes) or 'none'}"
            )
    return [recipe for name, recipe in recipes.items() if not names or name in names]


def jobs_of(recipes: Iterable[Recipe], models: Sequence[str], registry: Registry) -> tuple[list[Job], list[Recipe]]:
    """The jobs, recipe by recipe, and the recipes that are left out since no model has their pipeline.

    A recipe takes those models whose pipeline's class is its own, and where its own is not known, as a factory's is not
    before it is run, all of them. Without models it takes the one of its own part ``forecast``, else the full size that its
    pipeline names.

    Raises:
        UsageError: a model is unknown or fits no recipe, or there is none and a recipe's pipeline names none.
    """
    if not models:
        return _own_models(recipes, registry), []
    described: dict[str, Description] = {}
    for model in models:
        found = _described(model, registry)
        if found not in described.values():  # a name and its hub id are one
            described[model] = found
    jobs, left_out = [], []
    classes: dict[str, str | None] = {}
    for recipe in recipes:
        wanted = classes[recipe.name] = pipeline_class(recipe, registry)
        fitting = [
            Job(recipe, model, found.name)
            for model, found in described.items()
            if wanted in (None, found.pipeline_class)
        ]
        jobs += fitting
        if not fitting:
            left_out.append(recipe)
    if not jobs:
        named = ", ".join(f"{found.name} ({found.pipeline_class})" for found in described.values())
        found_classes = ", ".join(dict.fromkeys(str(one) for one in classes.values()))
        raise UsageError(f"argument --model: no recipe has the pipeline of {named}; the recipes' are {found_classes}")
    return jobs, left_out


def pipeline_class(recipe: Recipe, registry: Registry) -> str | None:
    """The class of a recipe's pipeline, as far as it can be told with nothing built or imported; else None."""
    named = _named_pipeline(recipe)
    if named is None:
        return None
    if (family := registry.find(named)) is not None:
        return family.pipeline_class
    try:
        return _resolved(named, registry).pipeline_class
    except ReplicaError:
        return None


def left_out_line(recipes: Sequence[Recipe], registry: Registry) -> str:
    """Which recipes are left out, in one line; empty for none."""
    if not recipes:
        return ""
    named = ", ".join(f"{recipe.name} ({pipeline_class(recipe, registry)})" for recipe in recipes)
    return f"left out, as no --model has their pipeline: {named}"


def _own_models(recipes: Iterable[Recipe], registry: Registry) -> list[Job]:
    jobs: list[Job] = []
    without: dict[str, list[str]] = {}
    for recipe in recipes:
        own = recipe.forecast.model if recipe.forecast is not None else None
        named = own or _named_pipeline(recipe)
        try:
            if named is None:
                raise ReplicaError("it is made by a factory, which names no full-size model.")
            jobs.append(Job(recipe, own, _resolved(named, registry).name))
        except ReplicaError as error:
            without.setdefault(_why_none(named, error, registry), []).append(recipe.name)
    if without:
        lines = [f"{', '.join(names)}: {why}" for why, names in without.items()]
        raise UsageError("\n  ".join(["name a full-size model with --model", *lines]))
    return jobs


def _why_none(named: str | None, error: ReplicaError, registry: Registry) -> str:
    family = registry.find(named) if named is not None else None
    if family is None:
        return str(error) if named is not None else f"{error} There are {', '.join(registry.full_sizes)}."
    sizes = [one.name for one in registry.full_sizes.values() if one.pipeline_class == family.pipeline_class]
    there = f"of {family.pipeline_class} there are {', '.join(sizes)}."
    if not sizes:
        there = f"none of {family.pipeline_class} is known by name: name a directory that holds its config files."
    return f"the replica {named!r} is tiny; {there}"


def _named_pipeline(recipe: Recipe) -> str | None:
    from pytest_diffopt.recipe import is_reference

    named = recipe.pipeline
    return named if isinstance(named, str) and not is_reference(named) else None


def _resolved(named: str, registry: Registry) -> Description:
    from pytest_diffopt.replicas.resolution import resolve_full_size

    return resolve_full_size(named, registry=registry)


def _described(model: str, registry: Registry) -> Description:
    try:
        return _resolved(model, registry)
    except ReplicaError as error:
        raise UsageError(f"argument --model: {error}") from None
