"""Matrices of recipes: one recipe and the entries of some of its parts become all combinations of them, or a pairwise
covering array, which covertable makes.

A mistake of an entry is told as any mistake; a combination whose entries are right one by one and wrong together is left
out, with the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pytest_diffopt.errors import Problem, RecipeError
from pytest_diffopt.extras import is_installed, needs
from pytest_diffopt.part import (
    Location,
    Mistake,
    Mistakes,
    content_of,
    did_you_mean,
    fill,
    name_of,
    path_of,
    problems_of,
    shown,
    unknown_key,
)
from pytest_diffopt.recipe import Recipe, recipe_name

__all__ = ["Combinations", "LeftOut", "Matrix", "combinations"]

AXES = ("pipeline", "dtype", "quantization", "attention", "caching", "compilation", "offloading", "dynamo")
"""Keys of a recipe that a matrix takes lists of."""

MODES = ("all", "pairwise")

MOST = 4096
"""Combinations that a matrix may have; each is validated, also where a covering array is taken out of them."""

BARE = "bare"
"""In the name of a combination that has none of the parts."""

_PIPELINE = "pipeline"
"""Stands for one while the other entries of a matrix are validated, where the pipeline is an axis itself."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of an axis: what it adds to a combination's name, and what the recipe's key takes; None for nothing."""

    label: str
    value: Any


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A combination that is no recipe, by the name that it would have, and what refuses it."""

    recipe: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A recipe's axes and their combinations.

    Attributes:
        name: of the table, with which the names of its combinations begin.
        axes: key → its entries, in the order in which they are written.
        pairwise: whether only a covering array of them is taken.
        valid: place of an entry on each axis → the recipe; every combination that is one.
        left_out: the others.
    """

    name: str
    axes: Mapping[str, tuple[Entry, ...]]
    pairwise: bool
    valid: Mapping[tuple[int, ...], Recipe]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The combinations to run, by name: all that are valid, or some in which each pair of entries that goes together
        is there."""
        places = covering(self.valid, self.axes) if self.pairwise else list(self.valid)
        return {self.valid[place].name: self.valid[place] for place in places}

    def refined(self, refuse: Callable[[Recipe], Iterable[Problem]]) -> tuple[Matrix, list[Mistake]]:
        """The matrix without the combinations that are refused, and the mistakes that are none of a combination.

        Args:
            refuse: what is wrong with a recipe; each path begins with the recipe's key.

        Returns:
            what is wrong with each combination that has an entry, or with each of all, is a mistake, at its path inside
            the table, once; any other leaves the combinations out that it is wrong with.
        """
        found = {place: list(refuse(recipe)) for place, recipe in self.valid.items()}
        mistakes: dict[Location, Mistake] = {}
        reasons: dict[tuple[int, ...], str] = {}
        for place, problems in found.items():
            for problem in problems:
                location = self._whose(problem, place, found)
                if location is None:
                    reasons.setdefault(place, f"{problem.path}: found {problem.found}; {problem.allowed}")
                else:
                    mistakes.setdefault((*location, problem.found), Mistake(location, problem.found, problem.allowed))
        valid = {place: recipe for place, recipe in self.valid.items() if place not in reasons}
        out = [LeftOut(self.valid[place].name, reason) for place, reason in reasons.items()]
        if out and not valid and not mistakes:
            mistakes[()] = nothing_left(len(self.left_out) + len(out), out[0])
        return dataclasses.replace(self, valid=valid, left_out=(*self.left_out, *out)), list(mistakes.values())

    def _whose(
        self, problem: Problem, place: tuple[int, ...], found: Mapping[tuple[int, ...], Sequence[Problem]]
    ) -> Location | None:
        """Where the mistake stands in the table; None for one of the combination."""
        key, rest = _split(problem.path)
        keys = list(self.axes)
        if key in keys:
            axis = keys.index(key)
            alike = [other for other in found if other[axis] == place[axis]]
            location: Location = ("matrix", key, place[axis], *rest)
        else:
            alike, location = list(found), (key, *rest)
        if all(any((p.path, p.found) == (problem.path, problem.found) for p in found[other]) for other in alike):
            return location
        return None


def _split(path: str) -> tuple[str, Location]:
    """``compilation[1].component`` as ``("compilation", (1, "component"))``."""
    steps = re.findall(r'\[(\d+)\]|"((?:[^"\\]|\\.)*)"|([^.\[\]"]+)', path)
    words: list[str | int] = [int(number) if number else quoted or word for number, quoted, word in steps]
    return str(words[0]) if words else "", tuple(words[1:])


def nothing_left(count: int, first: LeftOut) -> Mistake:
    """The mistake of a matrix none of whose combinations is a recipe."""
    allowed = f"at least one must be; {first.recipe} is none: {first.reason}"
    return Mistake(("matrix",), f"{count} combinations, none of which is a valid recipe", allowed)


# From what was written.


def matrix_of(
    name: str, base: Mapping[str, Any], table: object, *, whole: bool = True
) -> tuple[Matrix | None, list[Mistake]]:
    """The matrix of a recipe's table, and every mistake in it, each location beginning with ``"matrix"``; those of the
    recipe's other keys are the caller's.

    Args:
        name: the recipe's.
        base: the recipe's other keys, valid together (but for a pipeline that is an axis).
        table: what stands under ``matrix``.
        whole: whether the other keys are right; where they are not, only the entries are looked at.
    """
    mistakes: list[Mistake] = []
    if not isinstance(table, Mapping):
        return None, [Mistake(("matrix",), shown(table), f"a table of: combinations, {', '.join(AXES)}")]
    allowed = ("combinations", *AXES)
    mistakes += [unknown_key(("matrix",), str(key), allowed) for key in table if key not in allowed]
    mode = table.get("combinations", "all")
    if mode not in MODES:
        near = did_you_mean(mode, MODES)
        mistakes.append(Mistake(("matrix", "combinations"), shown(mode), f"{near}allowed: 'all' or 'pairwise'"))
    elif mode == "pairwise" and not is_installed("covertable"):
        mistakes.append(Mistake(("matrix", "combinations"), "'pairwise'", f"it {needs('covertable')}"))
    written = {key: value for key, value in table.items() if key in AXES}
    if not written and not mistakes:
        mistakes.append(Mistake(("matrix",), "no axis", f"at least one of: {', '.join(AXES)}, each a list"))
    rest = {key: value for key, value in base.items() if key not in written}
    axes: dict[str, tuple[Entry, ...]] = {}
    for key, entries in written.items():
        if isinstance(entries, list | tuple) and entries:
            axes[key] = tuple(_entries(name, rest, key, entries, written, mistakes))
        else:
            mistakes.append(Mistake(("matrix", key), shown(entries), "a list of at least one entry"))
    if mistakes or not whole:
        return None, mistakes
    count = math.prod(len(entries) for entries in axes.values())
    if count > MOST:
        return None, [Mistake(("matrix",), f"{count} combinations", f"at most {MOST}; split it into several recipes")]
    return _combined(name, rest, axes, pairwise=mode == "pairwise")


def _entries(
    name: str,
    base: Mapping[str, Any],
    key: str,
    entries: Sequence[Any],
    written: Mapping[str, Any],
    mistakes: list[Mistake],
) -> Iterator[Entry]:
    """The entries of an axis, each validated in the recipe without the other axes."""
    if "pipeline" in written:
        base = {"pipeline": _PIPELINE, **base}
    labels: dict[str, int] = {}
    contents: dict[str, int] = {}
    for index, entry in enumerate(entries):
        location: Location = ("matrix", key, index)
        given, value, inner = _unwrapped(key, entry)
        data = {field: held for field, held in base.items() if value is not None or field != key}
        if value is not None:
            data[key] = value
        recipe = object.__new__(Recipe)
        try:
            fill(recipe, {"name": name, **data})
        except Mistakes as error:
            mistakes += _of_the_entry(key, (*location, *inner), error.mistakes, _mistakes_of(name, base, key))
            continue
        label = _label(key, recipe) if given is None else given
        try:
            recipe_name((label or BARE) if given is None else label)
        except Mistakes as error:
            at = (*location, "name") if given is not None else location
            mistakes += [Mistake(at, one.found, one.allowed) for one in error.mistakes]
            continue
        if (first := contents.setdefault(content_of(getattr(recipe, key)), index)) < index:
            mistakes.append(Mistake(location, f"the same as {path_of(('matrix', key, first))}", "each entry once"))
        elif (first := labels.setdefault(label, index)) < index:
            found = f"an entry called {label!r}, as {path_of(('matrix', key, first))} is"
            mistakes.append(Mistake(location, found, 'names of combinations must differ: give it a name = "…"'))
        yield Entry(label, value)


def _unwrapped(key: str, entry: Any) -> tuple[str | None, Any, Location]:
    """(the name that it gives itself, what the recipe's key takes, None for nothing, where that stands in the entry)."""
    given: str | None = None
    inner: Location = ()
    if isinstance(entry, Mapping) and "name" in entry:
        rest = {field: value for field, value in entry.items() if field != "name"}
        given, entry = entry["name"], rest
        if set(rest) == {"value"}:
            entry, inner = rest["value"], ("value",)
    nothing = entry is None or entry is False or (isinstance(entry, str) and entry == "none")
    return given, None if nothing and key != "pipeline" else entry, inner


def _mistakes_of(name: str, base: Mapping[str, Any], key: str) -> list[Mistake]:
    """Those that the recipe has without the entry, which are told elsewhere."""
    try:
        fill(object.__new__(Recipe), {"name": name, **{k: v for k, v in base.items() if k != key}})
    except Mistakes as error:
        return error.mistakes
    return []


def _of_the_entry(key: str, at: Location, found: list[Mistake], elsewhere: list[Mistake]) -> Iterator[Mistake]:
    for location, what, allowed in found:
        if location[:1] == (key,):
            yield Mistake((*at, *location[1:]), what, allowed)
        elif not any(other.location == location and other.found == what for other in elsewhere):
            yield Mistake(at, f"{path_of(location)}: {what}", allowed)


def _label(key: str, recipe: Recipe) -> str:
    """What an entry adds to the names of its combinations; nothing where it is nothing."""
    value = getattr(recipe, key)
    if not value:
        return ""
    if key == "pipeline":
        return re.split(r"[/:\\]", value if isinstance(value, str) else name_of(value))[-1]
    if key == "quantization":
        return "+".join(
            str(next((one.kwargs[kind] for kind in _KINDS if kind in one.kwargs), one.backend))
            for one in recipe.quantizations
        )
    if key == "compilation":
        return "+".join(dict.fromkeys("regional" if c.scope == "repeated_blocks" else "compile" for c in value))
    if key == "offloading":
        return f"{value.strategy}_offload"
    if key == "attention":
        named = value.values() if isinstance(value, Mapping) else (value,)
        return "+".join(dict.fromkeys(backend.strip("_") for backend in named))
    if key == "caching":
        return "+".join(dict.fromkeys(one.kind for one in value))
    return key if key == "dynamo" else str(value)


_KINDS = ("bnb_4bit_quant_type", "quant_type")
"""Keyword arguments that say more of a quantization than its backend does."""


def _combined(
    name: str, base: Mapping[str, Any], axes: Mapping[str, tuple[Entry, ...]], *, pairwise: bool
) -> tuple[Matrix | None, list[Mistake]]:
    valid: dict[tuple[int, ...], Recipe] = {}
    left_out: list[LeftOut] = []
    names: set[str] = set()
    for place in itertools.product(*(range(len(entries)) for entries in axes.values())):
        chosen = {key: entries[at] for (key, entries), at in zip(axes.items(), place, strict=True)}
        own = "-".join([name, *(entry.label for entry in chosen.values() if entry.label)])
        own = f"{name}-{BARE}" if own == name else own
        if own in names:
            found = f"two combinations that are called {own!r}"
            return None, [Mistake(("matrix",), found, 'give entries of different axes different names: name = "…"')]
        names.add(own)
        data = {"isolate": True, **base, "name": own}
        data |= {key: entry.value for key, entry in chosen.items() if entry.value is not None}
        recipe = object.__new__(Recipe)
        try:
            fill(recipe, data)
            valid[place] = recipe
        except Mistakes as error:
            left_out.append(LeftOut(own, "; ".join(str(problem) for problem in problems_of(error.mistakes))))
    if not valid:
        return None, [nothing_left(len(left_out), left_out[0])]
    return Matrix(name, axes, pairwise, valid, tuple(left_out)), []


# The covering array.

Place = tuple[int, ...]


def covering(valid: Iterable[Place], axes: Mapping[str, Sequence[object]]) -> list[Place]:
    """Some of the valid places, in their order, in which each pair of entries that stands in any of them does: a pairwise
    covering array by covertable, the same at each call and in each process.

    Raises:
        ModuleNotFoundError: covertable is not installed.
    """
    places = list(valid)
    if len(axes) < 2 or not places:
        return places
    import covertable

    keys = list(axes)
    wanted = {pair for place in places for pair in _pairs(place)}
    known = set(places)
    constraints: list[dict[str, Any]] = [
        {"operator": "or", "conditions": [{"operator": "ne", "left": keys[at], "value": value} for at, value in pair]}
        for pair in _all_pairs([len(entries) for entries in axes.values()])
        if pair not in wanted
    ]
    constraints.append(
        {"operator": "fn", "requires": keys, "evaluate": lambda row: tuple(row[key] for key in keys) in known}
    )
    rows = covertable.make({key: list(range(len(entries))) for key, entries in axes.items()}, constraints=constraints)
    chosen = {place for row in rows if (place := tuple(row[key] for key in keys)) in known}
    # a search under constraints may give a pair up that has a combination: none is lost
    missing = wanted - {pair for place in chosen for pair in _pairs(place)}
    while missing:
        best = max(places, key=lambda place: len(missing.intersection(_pairs(place))))
        chosen.add(best)
        missing -= set(_pairs(best))
    return [place for place in places if place in chosen]


_Pair = tuple[tuple[int, int], tuple[int, int]]


def _pairs(place: Place) -> list[_Pair]:
    """Each two of ``(axis, entry)`` in a combination."""
    return list(itertools.combinations(enumerate(place), 2))


def _all_pairs(lengths: Sequence[int]) -> Iterator[_Pair]:
    for one, other in itertools.combinations(range(len(lengths)), 2):
        for left, right in itertools.product(range(lengths[one]), range(lengths[other])):
            yield (one, left), (other, right)


# In Python.


class Combinations(list[Recipe]):
    """Recipes of a matrix. ``left_out`` has the combinations that are none, each with the reason."""

    def __init__(self, recipes: Iterable[Recipe], left_out: Iterable[LeftOut] = ()) -> None:
        super().__init__(recipes)
        self.left_out = tuple(left_out)


def combinations(recipe: Recipe, *, pairwise: bool = False, **axes: Sequence[Any]) -> Combinations:
    """Every valid combination of a recipe with the entries of some of its parts, as ``matrix`` in a recipe file.

    Args:
        recipe: what all have in common; what it says under the key of an axis is replaced.
        pairwise: only so many that each pair of entries is in one of them. Needs ``pip install pytest-diffopt[matrix]``.
        axes: ``pipeline``, ``dtype``, ``quantization``, ``attention``, ``caching``, ``compilation``, ``offloading`` or
            ``dynamo``: a list of what the recipe's key takes, None for nothing. An entry may be a dict with a ``name``
            that its combinations are called by, and, where it is no dict itself, the ``value``.

    Returns:
        a list of recipes, each with ``isolate``; its ``left_out`` says which combinations are no recipe, and why.

    Raises:
        RecipeError: with every wrong axis and entry, or where no combination is a recipe.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"combinations: found {type(recipe).__name__}; it takes a Recipe")
    base = {field: getattr(recipe, field) for field in recipe.given() if field not in ("name", *axes)}
    table = {**axes, "combinations": MODES[bool(pairwise)]}
    matrix, mistakes = matrix_of(recipe.name, base, table)
    if matrix is None:
        shorter = [one._replace(location=one.location[1:] or ("combinations",)) for one in mistakes]
        raise RecipeError(problems_of(shorter), "combinations(...)")
    return Combinations(matrix.recipes.values(), matrix.left_out)
