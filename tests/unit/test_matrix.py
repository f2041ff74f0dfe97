"""Matrices in recipe files and in Python: which combinations there are, what they are called, every mistake at its path."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_diffopt import Call, Compilation, Offloading, Quantization, Recipe, combinations
from pytest_diffopt.errors import Problem, RecipeError
from pytest_diffopt.matrix import LeftOut, Matrix, covering
from pytest_diffopt.recipe_loading import load_tables, loads_recipes

FLUX = """
[recipe.flux]
pipeline = "tiny-flux"
dtype = "bfloat16"
matrix.compilation = ["none", { component = "transformer" }, { name = "whole", component = "transformer", fullgraph = true }]
matrix.offloading = ["none", { strategy = "model" }]
[[recipe.flux.matrix.quantization]]
backend = "bitsandbytes_4bit"
kwargs = { bnb_4bit_quant_type = "nf4" }
[[recipe.flux.matrix.quantization]]
backend = "bitsandbytes_8bit"
"""


_NAMED = "{ name = 'q%d', backend = 'bitsandbytes_8bit', skip_modules = '%d' }"


def mistakes(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        loads_recipes(text)
    return [str(problem) for problem in caught.value.problems]


def test_a_matrix_is_every_valid_combination_under_a_name_of_its_own() -> None:
    recipes = loads_recipes(FLUX)
    assert list(recipes) == [
        "flux-nf4",
        "flux-bitsandbytes_8bit",
        "flux-model_offload-nf4",
        "flux-model_offload-bitsandbytes_8bit",
        "flux-compile-nf4",
        "flux-compile-bitsandbytes_8bit",
        "flux-compile-model_offload-nf4",
        "flux-compile-model_offload-bitsandbytes_8bit",
        "flux-whole-nf4",
        "flux-whole-bitsandbytes_8bit",
    ]
    assert all(name == recipe.name for name, recipe in recipes.items())
    assert recipes["flux-compile-model_offload-nf4"] == Recipe(
        "flux-compile-model_offload-nf4",
        "tiny-flux",
        "bfloat16",
        quantization=Quantization("bitsandbytes_4bit", kwargs={"bnb_4bit_quant_type": "nf4"}),
        compilation=Compilation("transformer"),
        offloading=Offloading("model"),
        isolate=True,
    )


def test_names_last_when_an_entry_is_added() -> None:
    before = loads_recipes(FLUX)
    after = loads_recipes(FLUX + '[[recipe.flux.matrix.quantization]]\nbackend = "layerwise_casting"\n')
    assert len(after) == 15
    assert {name: after[name] for name in before} == before


def test_what_is_left_out_is_kept_with_its_reason(tmp_path: Any) -> None:
    path = tmp_path / "a.recipes.toml"
    path.write_text(FLUX, encoding="utf-8")
    matrix = load_tables(path).tables["flux"]
    assert isinstance(matrix, Matrix)
    assert [one.recipe for one in matrix.left_out] == [
        "flux-whole-model_offload-nf4",
        "flux-whole-model_offload-bitsandbytes_8bit",
    ]
    assert all("compilation.fullgraph: found true with scope = 'module'" in one.reason for one in matrix.left_out)


def test_a_combination_without_any_part_is_bare_and_a_matrix_stands_in_its_place_of_the_file() -> None:
    text = """
    recipe.first.pipeline = "p"
    recipe.m = { pipeline = "p", matrix = { offloading = [false, { strategy = "group" }], dtype = ["none", "float16"] } }
    recipe.last.pipeline = "p"
    """
    assert list(loads_recipes(text)) == [
        *("first", "m-bare", "m-float16", "m-group_offload", "m-group_offload-float16", "last")
    ]


def test_an_entry_replaces_what_is_inherited_and_none_takes_it_away() -> None:
    text = """
    [recipe.base]
    pipeline = "p"
    dynamo = { verbose = true }
    quantization = { backend = "bitsandbytes_4bit", components = ["a"] }
    [recipe.m]
    extends = "base"
    isolate = false
    matrix.quantization = ["none", { backend = "bitsandbytes_8bit" }]
    matrix.pipeline = ["owner/x", "q"]
    """
    recipes = loads_recipes(text)
    assert list(recipes) == ["base", "m-x", "m-q", "m-bitsandbytes_8bit-x", "m-bitsandbytes_8bit-q"]
    assert recipes["m-x"].quantization is None
    assert recipes["m-bitsandbytes_8bit-q"].quantization == Quantization("bitsandbytes_8bit")
    assert {recipe.isolate for recipe in recipes.values()} == {False}
    assert recipes["m-q"].dynamo == {"verbose": True}


def test_what_is_no_table_may_have_a_name_too_and_an_entry_may_be_several_parts() -> None:
    text = """
    [recipe.m]
    pipeline = "p"
    [recipe.m.matrix]
    attention = [{ name = "sdpa", value = "native" }, { transformer = "_native_math" }]
    compilation = [[{ component = "a" }, { component = "b", scope = "repeated_blocks" }], { name = "c", value = "none" }]
    """
    recipes = loads_recipes(text)
    assert list(recipes) == ["m-sdpa-compile+regional", "m-sdpa-c", "m-native_math-compile+regional", "m-native_math-c"]
    assert len(recipes["m-sdpa-compile+regional"].compilation) == 2
    assert recipes["m-sdpa-c"].attention == "native"


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("3", ["recipe.m.matrix: found 3; a table of: combinations, pipeline, dtype, quantization, "]),
        ("{}", ["recipe.m.matrix: found no axis; at least one of: pipeline, dtype, quantization, "]),
        ("{ offloadng = [] }", ["recipe.m.matrix.offloadng: found an unknown key; did you mean 'offloading'? "]),
        ("{ offloading = [] }", ["recipe.m.matrix.offloading: found []; a list of at least one entry"]),
        ("{ dtype = 'float32' }", ["recipe.m.matrix.dtype: found 'float32'; a list of at least one entry"]),
        (
            "{ dtype = ['float32'], combinations = 'pairwize' }",
            ["recipe.m.matrix.combinations: found 'pairwize'; did you mean 'pairwise'? allowed: 'all' or 'pairwise'"],
        ),
        (
            "{ quantization = ['none', { backend = 'bitsandbytes_5bit' }], dtype = ['bfloat15', 'float32'] }",
            [
                "recipe.m.matrix.quantization[1].backend: found 'bitsandbytes_5bit'; did you mean 'bitsandbytes_8bit'",
                "recipe.m.matrix.dtype[0]: found 'bfloat15'; ",
            ],
        ),
        (
            "{ compilation = [{ name = 'a', value = [{ component = 'x' }, { component = 'y', mode = 'fast' }] }] }",
            ["recipe.m.matrix.compilation[0].value[1].mode: found 'fast'; "],
        ),
        (
            "{ offloading = [{ strategy = 'model' }, { strategy = 'model', components = ['x'] }] }",
            [
                "recipe.m.matrix.offloading[1]: found an entry called 'model_offload', as matrix.offloading[0] is; names "
            ],
        ),
        (
            "{ dtype = ['float32', 'none', false, { name = 'x', value = 'float32' }] }",
            [
                "recipe.m.matrix.dtype[2]: found the same as matrix.dtype[1]; each entry once",
                "recipe.m.matrix.dtype[3]: found the same as matrix.dtype[0]; each entry once",
            ],
        ),
        (
            "{ dtype = [{ name = 'a/b', value = 'float32' }] }",
            ["recipe.m.matrix.dtype[0].name: found 'a/b'; a string "],
        ),
        ("{ dtype = [{ name = '', value = 'float32' }] }", ["recipe.m.matrix.dtype[0].name: found ''; a string "]),
        ("{ dtype = [{ name = 3, value = 'float32' }] }", ["recipe.m.matrix.dtype[0].name: found 3; a string "]),
        (
            "{ dtype = ['none', 'float32'], offloading = ['none', { name = 'float32', strategy = 'model' }] }",
            ["recipe.m.matrix: found two combinations that are called 'm-float32'; give entries of different axes "],
        ),
        (
            "{ compilation = [{ component = 'x', fullgraph = true }], offloading = [{ strategy = 'model' }] }",
            ["recipe.m.matrix: found 1 combinations, none of which is a valid recipe; at least one must be; m-compile"],
        ),
        (
            f"{{ dtype = ['float32', 'none'], quantization = {[_NAMED % (k, k) for k in range(2049)]} }}".replace(
                '"', ""
            ),
            ["recipe.m.matrix: found 4098 combinations; at most 4096; split it into several recipes"],
        ),
    ],
)
def test_a_mistake_is_told_at_its_path(matrix: str, expected: list[str]) -> None:
    found = mistakes(f'[recipe.m]\npipeline = "p"\nmatrix = {matrix}\n')
    assert len(found) == len(expected), found
    assert all(any(text in line for line in found) for text in expected), found


def test_a_mistake_of_the_recipe_itself_is_told_once_beside_those_of_entries() -> None:
    text = """
    [recipe.m]
    dtype = "bf"
    offload = 3
    matrix.offloading = ["none", { strategy = "modell" }, { strategy = "group" }]
    """
    found = mistakes(text)
    assert [line.partition(":")[0] for line in found] == [
        *("recipe.m.offload", "recipe.m.matrix.offloading[1].strategy", "recipe.m.pipeline", "recipe.m.dtype")
    ]


def test_a_part_that_never_goes_with_the_recipe_is_its_entrys_mistake() -> None:
    text = """
    [recipe.m]
    pipeline = "p"
    offloading = { strategy = "model" }
    matrix.compilation = ["none", { component = "x", fullgraph = true }]
    """
    (found,) = mistakes(text)
    assert found.startswith("recipe.m.matrix.compilation[1]")
    assert "puts hooks on" in found


def test_none_extends_a_matrix_or_one_of_its_combinations() -> None:
    text = """
    recipe.m = { pipeline = "p", matrix.dtype = ["float32"] }
    recipe.a.extends = "m"
    recipe.b.extends = "m-float32"
    """
    assert mistakes(text) == [
        (
            "recipe.a.extends: found 'm', a matrix; a matrix is several recipes, and none of them is extended: "
            "extend what they have in common"
        ),
        "recipe.b.extends: found 'm-float32'; known recipes: 'a'",
    ]


def test_a_combination_may_not_have_another_recipes_name() -> None:
    text = """
    recipe.m = { pipeline = "p", matrix.dtype = ["float32"] }
    recipe.m-float32.pipeline = "p"
    """
    (found,) = mistakes(text)
    assert found.startswith(
        "recipe.m.matrix: found a combination that is called 'm-float32', as one of [recipe.m-float"
    )


# What an installation refuses.


def refined(recipes: Matrix, refuse: Any) -> tuple[list[str], list[LeftOut], list[Any]]:
    matrix, wrong = recipes.refined(refuse)
    return [one.name for one in matrix.valid.values()], list(matrix.left_out), wrong


@pytest.fixture
def pipelines(tmp_path: Any) -> Matrix:
    path = tmp_path / "a.recipes.toml"
    path.write_text(
        'recipe.m.matrix = { pipeline = ["p", "q"], compilation = [{ component = "a" }, { name = "b", component = "b" }] }',
        encoding="utf-8",
    )
    matrix = load_tables(path).tables["m"]
    assert isinstance(matrix, Matrix)
    return matrix


def test_a_combination_that_the_installation_refuses_is_left_out(pipelines: Matrix) -> None:
    def refuse(recipe: Recipe) -> list[Problem]:
        component = recipe.compilation[0].component
        wrong = recipe.pipeline == "p" and component == "b"
        return [Problem("compilation.component", repr(component), "it has: a")] * wrong

    names, left_out, wrong = refined(pipelines, refuse)
    assert names == ["m-p-compile", "m-q-compile", "m-q-b"]
    assert left_out == [LeftOut("m-p-b", "compilation.component: found 'b'; it has: a")]
    assert wrong == []


def test_what_it_refuses_of_every_combination_of_an_entry_is_that_entrys_mistake_once(pipelines: Matrix) -> None:
    def refuse(recipe: Recipe) -> list[Problem]:
        found = [Problem("call.inputs", "'x:y'", "it must be importable")]
        if recipe.compilation[0].component == "b":
            found.append(Problem("compilation.component", "'b'", f"{recipe.pipeline} has: a"))
        return found

    _, left_out, wrong = refined(pipelines, refuse)
    assert [one.location for one in wrong] == [("call", "inputs"), ("matrix", "compilation", 1, "component")]
    assert left_out == []


def test_combinations_that_are_refused_one_after_the_other_leave_a_mistake(pipelines: Matrix) -> None:
    def refuse(recipe: Recipe) -> list[Problem]:
        return [Problem("pipeline", recipe.name, "never")]

    names, left_out, wrong = refined(pipelines, refuse)
    assert (names, len(left_out)) == ([], 4)
    assert [(one.location, one.found) for one in wrong] == [
        (("matrix",), "4 combinations, none of which is a valid recipe")
    ]


# Covering arrays.


@given(st.data())
def test_a_covering_array_has_each_pair_that_any_valid_combination_has_and_nothing_else(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    every = list(itertools.product(*map(range, sizes)))
    valid = [place for place in every if data.draw(st.booleans())]
    chosen = covering(valid, {str(axis): range(size) for axis, size in enumerate(sizes)})
    assert chosen == [place for place in valid if place in set(chosen)]
    pairs = [
        {pair for place in among for pair in itertools.combinations(enumerate(place), 2)} for among in (valid, chosen)
    ]
    assert pairs[0] == pairs[1]


def test_a_covering_array_is_much_smaller_and_the_same_in_every_process() -> None:
    code = """
from itertools import product
from pytest_diffopt.matrix import covering
print(covering([p for p in product(range(4), repeat=4) if p[0] != p[1] or p[2]], dict.fromkeys("abcd", range(4))))
"""
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert 16 <= printed[0].count("(") <= 32


def test_a_pair_that_the_library_gives_up_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covertable.make", lambda factors, **how: [{"a": 0, "b": 0}, {"a": 1, "b": 1}])
    valid = [(0, 0), (0, 1), (1, 0)]
    assert covering(valid, {"a": range(2), "b": range(2)}) == valid


def test_pairwise_in_a_file_takes_fewer_of_the_same_recipes() -> None:
    axes = """
    [recipe.m.matrix]
    dtype = ["float32", "float16", "bfloat16"]
    offloading = ["none", { strategy = "model" }, { strategy = "group" }]
    quantization = ["none", { backend = "bitsandbytes_8bit" }, { backend = "layerwise_casting" }]
    """
    every = loads_recipes('recipe.m.pipeline = "p"\n' + axes)
    some = loads_recipes('recipe.m.pipeline = "p"\n' + axes + 'combinations = "pairwise"\n')
    assert len(every) == 27
    assert 9 <= len(some) <= 12
    assert some == {name: every[name] for name in some}


def test_pairwise_without_its_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_diffopt.matrix.is_installed", lambda name: False)
    (found,) = mistakes('recipe.m = { pipeline = "p", matrix = { dtype = ["float32"], combinations = "pairwise" } }')
    assert found == (
        "recipe.m.matrix.combinations: found 'pairwise'; "
        "it needs covertable, which is not installed: pip install pytest-diffopt[matrix]"
    )


# In Python.


def test_combinations_take_parts_and_dicts_and_none() -> None:
    made = combinations(
        Recipe("m", "p", offloading=Offloading("sequential"), call=Call(calls=2)),
        compilation=[
            None,
            Compilation("x", fullgraph=True),
            {"name": "both", "value": [Compilation("x"), {"component": "y"}]},
        ],
        offloading=[None, {"name": "off", "strategy": "model"}],
    )
    assert [one.name for one in made] == ["m-bare", "m-off", "m-compile", "m-both", "m-both-off"]
    assert all(one.isolate and one.call.count == 2 for one in made)
    assert made[1] == Recipe("m-off", "p", offloading=Offloading("model"), call=Call(calls=2), isolate=True)
    assert [one.recipe for one in made.left_out] == ["m-compile-off"]
    assert "puts hooks on" in made.left_out[0].reason


def test_combinations_may_be_pairwise() -> None:
    axes: dict[str, Any] = {
        "dtype": ["float32", "float16"],
        "pipeline": ["p", "q"],
        "offloading": [None, Offloading("model")],
    }
    assert len(combinations(Recipe("m", "p"), **axes)) == 8
    assert len(combinations(Recipe("m", "p"), pairwise=True, **axes)) == 4


def test_mistakes_in_python_have_their_paths() -> None:
    with pytest.raises(RecipeError) as caught:
        combinations(Recipe("m", "p"), dtype=["float31"], offloadings=[None])
    lines = str(caught.value).splitlines()
    assert lines[0] == "combinations(...): 2 mistakes"
    assert lines[1].startswith("  offloadings: found an unknown key; did you mean 'offloading'? ")
    assert lines[2].startswith("  dtype[0]: found 'float31'; ")
    with pytest.raises(TypeError, match="combinations: found str; it takes a Recipe"):
        combinations("m", dtype=["float32"])  # type: ignore[arg-type]
