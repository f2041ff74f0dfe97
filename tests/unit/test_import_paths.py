"""The folder of a recipe file on ``sys.path``: in which mode, for how long, and which module a name leads to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_diffopt import Recipe
from pytest_diffopt.collection.import_paths import give_back, import_root, make_importable, mistaken_modules
from pytest_diffopt.references import resolve
from pytest_diffopt.source_places import EXTRA_ROOTS, short_path


def config(mode: str = "prepend") -> Any:
    return SimpleNamespace(getoption=lambda name: mode, stash=pytest.Stash())


@pytest.fixture(autouse=True)
def _modules_are_forgotten() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def folder(path: Path, module: str = "own_models", *, package: bool = False) -> Path:
    path.mkdir(parents=True)
    (path / f"{module}.py").write_text("def make(): ...\n", encoding="utf-8")
    if package:
        (path / "__init__.py").touch()
    return path


def recipe(reference: str) -> Recipe:
    return Recipe("net", reference)


def problems(reference: str, where: Path) -> list[str]:
    return [str(problem) for problem in mistaken_modules(recipe(reference), where, "recipe.net")]


@pytest.mark.parametrize(("mode", "at"), [("prepend", 0), ("append", -1)])
def test_a_module_next_to_the_recipe_file_is_found_until_the_session_ends(tmp_path: Path, mode: str, at: int) -> None:
    before, session = list(sys.path), config(mode)
    make_importable(folder(tmp_path / "recipes"), session)
    make_importable(tmp_path / "recipes", session)  # a second file there
    assert sys.path[at] == str(tmp_path / "recipes")
    assert len(sys.path) == len(before) + 1
    assert callable(resolve("own_models:make"))
    give_back(session)
    give_back(session)
    assert sys.path == before
    assert EXTRA_ROOTS == []


def test_import_mode_importlib_leaves_the_path_alone(tmp_path: Path) -> None:
    before = list(sys.path)
    make_importable(folder(tmp_path / "recipes"), config("importlib"))
    assert sys.path == before


def test_what_was_on_the_path_before_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    before, session = list(sys.path), config()
    make_importable(tmp_path, session)
    give_back(session)
    assert sys.path == before


def test_in_a_package_modules_have_their_packages_name(tmp_path: Path) -> None:
    inner, session = folder(tmp_path / "suite" / "recipes", package=True), config()
    (tmp_path / "suite" / "__init__.py").touch()
    assert import_root(inner) == tmp_path
    make_importable(inner, session)
    try:
        (found,) = problems("own_models:make", inner)
        assert found == (
            "recipe.net.pipeline: found 'own_models:make'; suite.recipes is a package, so a module in it is named "
            "'suite.recipes.own_models:make'"
        )
        assert callable(resolve("suite.recipes.own_models:make"))
        assert problems("suite.recipes.own_models:make", inner) == []
    finally:
        give_back(session)


def test_two_modules_of_one_name_are_a_mistake_and_not_the_first_one_twice(tmp_path: Path) -> None:
    session = config()
    first, second = folder(tmp_path / "first"), folder(tmp_path / "second")
    make_importable(first, session)
    try:
        resolve("own_models:make")
        make_importable(second, session)
        assert problems("own_models:make", first) == []
        (found,) = problems("own_models:make", second)
        assert "which was imported first, and not" in found
        assert found.endswith("give one of them another name")
    finally:
        give_back(session)


def test_a_path_is_told_from_such_a_folder_only_where_no_other_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, file = config(), str(folder(tmp_path / "deep" / "recipes") / "own_models.py")
    make_importable(tmp_path / "deep" / "recipes", session)
    try:
        assert short_path(file) == "own_models.py"
        monkeypatch.chdir(tmp_path)
        short_path.cache_clear()
        assert short_path(file) == "deep/recipes/own_models.py"
    finally:
        give_back(session)
