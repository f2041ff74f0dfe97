"""Recipes out of TOML: what a table inherits by ``extends`` and drops by ``without``, and every mistake at once."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pytest_diffopt.errors import Problem, RecipeError
from pytest_diffopt.matrix import Matrix, matrix_of
from pytest_diffopt.part import (
    Location,
    Mistake,
    Mistakes,
    did_you_mean,
    fill,
    problems_of,
    shown,
    unknown_key,
)
from pytest_diffopt.recipe import OTHER_DYNAMO_NAME, PARTS_TO_DROP, Recipe, unknown_parts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["load_recipes", "loads_recipes"]

_NEVER_MERGED = ("compilation", "caching", "attention")
"""Parts that a table replaces as a whole: a list may stand there, or a single name."""

_TABLE_KEYS = [
    "extends",
    "without",
    *(field.name for field in dataclasses.fields(cast(Any, Recipe)) if field.name != "name"),
    "matrix",
]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a file holds: a recipe or a matrix for each of its tables, by name, in the order of the file."""

    tables: Mapping[str, Recipe | Matrix]

    @property
    def recipes(self) -> dict[str, Recipe]:
        """All of them, a matrix as its combinations."""
        found: dict[str, Recipe] = {}
        for name, table in self.tables.items():
            found |= table.recipes if isinstance(table, Matrix) else {name: table}
        return found


def load_recipes(path: str | Path) -> dict[str, Recipe]:
    """The recipes of a TOML file by name, in the order of the file; those of a matrix are its combinations.

    Raises:
        RecipeError: with every mistake in the file.
    """
    return load_tables(path).recipes


def load_tables(path: str | Path) -> Loaded:
    """As `load_recipes`, with the matrices as such.

    Raises:
        RecipeError: with every mistake in the file; its ``tables`` are those that are right.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        found, allowed = "no such file", "a TOML file with tables [recipe.NAME]"
    except UnicodeDecodeError as error:
        found, allowed = f"byte 0x{error.object[error.start]:02x} at byte offset {error.start}", "UTF-8 text"
    except OSError as error:
        found, allowed = f"a file that cannot be read ({error.strerror})", "a file that can be read"
        if path.is_dir():
            found, allowed = "a directory", "a TOML file with tables [recipe.NAME]"
    else:
        return _loaded(text, str(path))
    raise RecipeError([Problem(str(path), found, allowed)], str(path))


def loads_recipes(text: str, source: str = "<string>") -> dict[str, Recipe]:
    """The recipes of a TOML text by name, in the order of the text; ``source`` names it in errors.

    Raises:
        RecipeError: with every mistake in the text.
    """
    return _loaded(text, source).recipes


def _loaded(text: str, source: str) -> Loaded:
    text = text.removeprefix("\ufeff")  # some editors begin a file with it, and tomllib refuses it
    if not text.strip():
        raise RecipeError([Problem(source, "an empty file", "at least one table [recipe.NAME]")], source)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([_syntax_problem(str(error), text)], source) from None
    except (RecursionError, ValueError) as error:  # nested too deep, or a number too long
        raise RecipeError([Problem(source, "text that TOML cannot hold", str(error))], source) from None
    tables, mistakes = _tables(data)
    loaded = Loaded(_built(tables, mistakes))
    if mistakes:
        raw = data.get("recipe")
        places = {name: place for place, name in enumerate(raw)} if isinstance(raw, dict) else {}
        mistakes.sort(key=lambda mistake: places.get(mistake.location[1], -1) if len(mistake.location) > 1 else -1)
        wrong = RecipeError(problems_of(mistakes), source)
        wrong.recipes, wrong.tables = loaded.recipes, dict(loaded.tables)
        raise wrong
    return loaded


def _syntax_problem(message: str, text: str) -> Problem:
    lines = text.split("\n")
    match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message, re.DOTALL)
    reason, line, column = message.removesuffix(" (at end of document)"), len(lines), len(lines[-1]) + 1
    if match:
        reason, line, column = match[1], int(match[2]), int(match[3])
    found = shown(lines[line - 1].strip()) if match and line <= len(lines) else "the end of the file"
    return Problem(f"line {line}, column {column}", found, f"TOML: {reason[:1].lower()}{reason[1:]}")


@dataclasses.dataclass
class _TableOfRecipe:
    """One table of a file. ``incomplete``: a parent is missing, so what is not given may be the parent's. ``matrix``: what
    stands under that key; None where it has none."""

    name: str
    own: dict[str, Any]
    parents: list[str]
    without: list[str]
    matrix: Any = None
    incomplete: bool = False
    merged: dict[str, Any] = dataclasses.field(default_factory=dict)
    mistakes: list[Mistake] = dataclasses.field(default_factory=list)


def _tables(data: dict[str, Any]) -> tuple[dict[str, _TableOfRecipe], list[Mistake]]:
    mistakes = [unknown_key((), key, ["recipe"]) for key in data if key != "recipe"]
    raw = data.get("recipe", {})
    if not isinstance(raw, dict):
        mistakes.append(Mistake(("recipe",), shown(raw), "tables [recipe.NAME]"))
        raw = {}
    elif not raw and not mistakes:
        mistakes.append(Mistake(("recipe",), "no recipes", "at least one table [recipe.NAME]"))
    tables: dict[str, _TableOfRecipe] = {}
    for name, table in raw.items():
        if not isinstance(table, dict):
            mistakes.append(Mistake(("recipe", name), shown(table), f"a table of: {', '.join(_TABLE_KEYS)}"))
            continue
        own = {key: value for key, value in table.items() if key in _TABLE_KEYS[2:-1]}
        parents, without = (_words(name, table, key, mistakes) for key in ("extends", "without"))
        mistakes += [unknown_key(("recipe", name), key, _TABLE_KEYS) for key in table if key not in _TABLE_KEYS]
        tables[name] = _TableOfRecipe(name, own, parents, without, table.get("matrix"))
        for mistake in unknown_parts(without):
            mistakes.append(mistake._replace(location=("recipe", name, "without")))
        if without and "extends" not in table:
            mistakes.append(
                Mistake(("recipe", name, "without"), shown(without), "it drops inherited parts: it needs extends")
            )
    for table in tables.values():
        for parent in table.parents:
            if parent not in raw:
                known = [
                    other for other in raw if other != table.name and getattr(tables.get(other), "matrix", None) is None
                ]
                allowed = f"{did_you_mean(parent, known)}known recipes: {', '.join(map(repr, known)) or 'none'}"
                mistakes.append(Mistake(("recipe", table.name, "extends"), shown(parent), allowed))
            elif parent in tables and tables[parent].matrix is not None and parent != table.name:
                allowed = "a matrix is several recipes, and none of them is extended: extend what they have in common"
                mistakes.append(Mistake(("recipe", table.name, "extends"), f"{shown(parent)}, a matrix", allowed))
            table.incomplete |= parent not in tables or tables[parent].matrix is not None
        table.parents = [parent for parent in table.parents if parent in tables]
    return tables, mistakes


def _words(name: str, table: Mapping[str, Any], key: str, mistakes: list[Mistake]) -> list[str]:
    value = table.get(key, [])
    words = [value] if isinstance(value, str) else value
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        return words
    mistakes.append(Mistake(("recipe", name, key), shown(value), "a string, or a list of strings"))
    return []


def _built(tables: dict[str, _TableOfRecipe], mistakes: list[Mistake]) -> dict[str, Recipe | Matrix]:
    order = _parents_first(tables, mistakes)
    recipes: dict[str, Recipe | Matrix] = {}
    for table in order:
        parents = [tables[parent] for parent in table.parents]
        table.incomplete |= any(parent.incomplete for parent in parents)
        for parent in parents:
            table.merged = _merge(table.merged, parent.merged)
        inherited = {key: value for key, value in table.merged.items() if key not in table.without}
        table.merged = _merge(inherited, table.own)
        made = _recipe_of(table) if table.matrix is None else _matrix_of(table, mistakes)
        if made is not None:
            recipes[table.name] = made
    for table in tables.values():
        mistakes += _own_mistakes(table, [tables[parent] for parent in table.parents])
    mistakes += _names_taken_twice(tables, recipes)
    return {name: recipes[name] for name in tables if name in recipes}


def _recipe_of(table: _TableOfRecipe, **more: Any) -> Recipe | None:
    """The recipe of a table, or None: then the table has the mistakes."""
    recipe = object.__new__(Recipe)
    try:
        fill(recipe, {"name": table.name, **more, **table.merged})
    except Mistakes as error:
        table.mistakes = error.mistakes
        return None
    return recipe


def _matrix_of(table: _TableOfRecipe, mistakes: list[Mistake]) -> Matrix | None:
    at: Location = ("recipe", table.name)
    axes = table.matrix if isinstance(table.matrix, Mapping) else {}
    for key in axes:
        if key in table.own:
            allowed = f"either here or in the matrix, whose {key} takes its place"
            mistakes.append(Mistake((*at, key), shown(table.own[key]), allowed))
    table.merged = {key: value for key, value in table.merged.items() if key not in axes}
    common = _recipe_of(table, **({"pipeline": "axis"} if "pipeline" in axes else {}))
    whole = common is not None and not table.incomplete
    matrix, own = matrix_of(table.name, table.merged, table.matrix, whole=whole)
    mistakes += [one._replace(location=(*at, *one.location)) for one in own]
    return matrix


def _names_taken_twice(tables: Mapping[str, object], recipes: Mapping[str, Recipe | Matrix]) -> Iterator[Mistake]:
    taken = {name: name for name in tables if not isinstance(recipes.get(name), Matrix)}
    for name, made in recipes.items():
        for combination in made.recipes if isinstance(made, Matrix) else ():
            if (other := taken.setdefault(combination, name)) != name:
                found = f"a combination that is called {combination!r}, as one of [recipe.{other}] is"
                yield Mistake(("recipe", name, "matrix"), found, 'names differ: give an entry another one, name = "…"')


def _own_mistakes(table: _TableOfRecipe, parents: list[_TableOfRecipe]) -> Iterator[Mistake]:
    theirs = {mistake for parent in parents for mistake in parent.mistakes}
    for mistake in table.mistakes:
        location, found, allowed = mistake
        here = _is_written(location, table.own)
        if (mistake in theirs and not here) or (table.incomplete and found == "nothing" and not here):
            continue
        if not here and location[0] in PARTS_TO_DROP and _is_written(location, table.merged):
            allowed += f" (it is inherited: without = [{location[0]!r}] drops it)"
        path: Location = () if location == ("name",) else location
        yield Mistake(("recipe", table.name, *path), found, allowed)


def _is_written(location: Location, data: Any) -> bool:
    if location[0] in _NEVER_MERGED:
        return location[0] in data
    for step in location:
        if isinstance(data, Mapping):
            if step not in data:
                return False
            data = data[step]
    return True


def _merge(parent: Mapping[str, Any], child: Mapping[str, Any], location: Location = ()) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        if location == ("dynamo",):
            merged.pop(OTHER_DYNAMO_NAME.get(key, ""), None)
        inherited = merged.get(key)
        mergeable = isinstance(value, Mapping) and isinstance(inherited, Mapping)
        if mergeable and not (location == () and key in _NEVER_MERGED):
            merged[key] = _merge(cast("Mapping[str, Any]", inherited), value, (*location, key))
        else:
            merged[key] = value
    return merged


def _parents_first(tables: dict[str, _TableOfRecipe], mistakes: list[Mistake]) -> list[_TableOfRecipe]:
    """Every table after its parents. Cycles are reported, and cut open where they close."""
    order: list[_TableOfRecipe] = []
    waiting = dict(tables)
    while waiting:
        ready = [table for table in waiting.values() if not any(parent in waiting for parent in table.parents)]
        if not ready:
            cycle = _cycle(waiting)
            first = tables[cycle[0]]
            found = " -> ".join([*cycle, cycle[0]])
            mistakes.append(Mistake(("recipe", first.name, "extends"), found, "extends may not come back to itself"))
            first.parents = [parent for parent in first.parents if parent != cycle[1 % len(cycle)]]
            first.incomplete = True
        for table in ready:
            order.append(waiting.pop(table.name))
    return order


def _cycle(waiting: Mapping[str, _TableOfRecipe]) -> list[str]:
    path: list[str] = []
    name = next(iter(waiting))
    while name not in path:
        path.append(name)
        name = next(parent for parent in waiting[name].parents if parent in waiting)
    cycle = path[path.index(name) :]
    first = min(cycle, key=list(waiting).index)  # named from the one that stands first in the file
    return cycle[cycle.index(first) :] + cycle[: cycle.index(first)]
