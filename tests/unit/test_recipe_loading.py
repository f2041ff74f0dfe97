"""Recipe files: what they inherit, and every mistake in them at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pytest_diffopt.errors import RecipeError
from pytest_diffopt.recipe import Call, Compilation, ForecastBudget, Offloading, Quantization, Recipe
from pytest_diffopt.recipe_loading import load_recipes, loads_recipes

LADDER = """
[recipe.flux-nf4]
pipeline = "tiny-flux"
dtype = "bfloat16"
[recipe.flux-nf4.quantization]
backend = "bitsandbytes_4bit"
components = ["transformer", "text_encoder_2"]
kwargs = { bnb_4bit_quant_type = "nf4", bnb_4bit_compute_dtype = "bfloat16" }

[recipe.flux-nf4-compile]
extends = "flux-nf4"
dynamo = { capture_dynamic_output_shape_ops = true }
compilation = { component = "transformer", mode = "max-autotune", fullgraph = true, memory_format = "channels_last" }

[recipe.flux-nf4-compile-offload]
extends = "flux-nf4"
dynamo = { cache_size_limit = 1000, capture_dynamic_output_shape_ops = true }
compilation = { component = "transformer" }
offloading = { strategy = "model" }
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        loads_recipes(text)
    return [str(problem) for problem in caught.value.problems]


def mistakes_of_file(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipes(path)
    assert caught.value.source == str(path)
    return [str(problem) for problem in caught.value.problems]


# What is read.


def test_a_ladder_of_recipes_is_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "flux.recipes.toml"
    path.write_text(LADDER)
    recipes = load_recipes(path)
    assert list(recipes) == ["flux-nf4", "flux-nf4-compile", "flux-nf4-compile-offload"]
    quantization = Quantization(
        "bitsandbytes_4bit",
        ("transformer", "text_encoder_2"),
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    )
    assert recipes["flux-nf4"] == Recipe("flux-nf4", "tiny-flux", "bfloat16", quantization)
    assert recipes["flux-nf4-compile"] == Recipe(
        "flux-nf4-compile",
        "tiny-flux",
        "bfloat16",
        quantization,
        Compilation("transformer", mode="max-autotune", fullgraph=True, memory_format="channels_last"),
        dynamo={"capture_dynamic_output_shape_ops": True},
    )
    offloaded = recipes["flux-nf4-compile-offload"]
    assert offloaded.dynamo["recompile_limit"] == 1000
    assert (offloaded.quantization, offloaded.offloading) == (quantization, Offloading("model"))


def test_a_file_may_begin_with_a_byte_order_mark_and_end_lines_as_windows_does(tmp_path: Path) -> None:
    path = tmp_path / "a.recipes.toml"
    path.write_bytes('\ufeff[recipe.a]\r\npipeline = "größe"\r\n'.encode())
    assert load_recipes(path) == {"a": Recipe("a", "größe")}


def test_compilations_may_be_an_array_of_tables() -> None:
    text = """
    recipe.a.pipeline = "p"
    [[recipe.a.compilation]]
    component = "unet"
    [[recipe.a.compilation]]
    component = "vae"
    """
    assert loads_recipes(text)["a"].compilation == (Compilation("unet"), Compilation("vae"))


def test_a_child_may_stand_before_its_parents() -> None:
    text = """
    recipe.grandchild.extends = "child"
    recipe.child = { extends = "parent", dtype = "float16" }
    recipe.parent.pipeline = "p"
    """
    assert loads_recipes(text) == {
        "grandchild": Recipe("grandchild", "p", "float16"),
        "child": Recipe("child", "p", "float16"),
        "parent": Recipe("parent", "p"),
    }


def test_a_chain_may_be_long() -> None:
    links = "\n".join(f'[recipe.r{k}]\nextends = "r{k + 1}"' for k in range(300))
    recipes = loads_recipes(f'{links}\n[recipe.r300]\npipeline = "p"\n')
    assert recipes["r0"] == Recipe("r0", "p")


def test_tables_are_merged_and_lists_and_compilations_replaced() -> None:
    text = """
    [recipe.parent]
    pipeline = "p"
    compilation = { component = "unet", mode = "default" }
    call = { prompts = ["a", "b"], kwargs = { guidance_scale = 1.0, nested = { a = 1, compilation = { x = 1 } } } }
    [recipe.child]
    extends = "parent"
    compilation = { component = "vae" }
    call = { prompts = ["c"], kwargs = { nested = { b = 2, compilation = { y = 2 } } } }
    """
    child = loads_recipes(text)["child"]
    assert child.compilation == (Compilation("vae"),)
    nested = {"a": 1, "b": 2, "compilation": {"x": 1, "y": 2}}
    assert child.call == Call(["c"], kwargs={"guidance_scale": 1.0, "nested": nested})


def test_later_parents_win_over_earlier_ones() -> None:
    text = """
    recipe.one = { pipeline = "p", dtype = "float16", dynamo = { verbose = true } }
    recipe.two = { pipeline = "q", dynamo = { recompile_limit = 9 } }
    recipe.child.extends = ["one", "two"]
    """
    dynamo = {"verbose": True, "recompile_limit": 9}
    assert loads_recipes(text)["child"] == Recipe("child", "q", "float16", dynamo=dynamo)


@pytest.mark.parametrize(
    ("theirs", "own"), [("cache_size_limit", "recompile_limit"), ("recompile_limit", "cache_size_limit")]
)
def test_a_child_may_use_the_other_name_of_a_limit_that_it_inherits(theirs: str, own: str) -> None:
    text = f"""
    recipe.parent = {{ pipeline = "p", dynamo = {{ {theirs} = 8 }} }}
    recipe.child = {{ extends = "parent", dynamo = {{ {own} = 1000 }} }}
    """
    assert loads_recipes(text)["child"].dynamo == {"recompile_limit": 1000}


def test_without_drops_what_is_inherited_and_keeps_what_is_given() -> None:
    text = """
    [recipe.parent]
    pipeline = "p"
    quantization = { backend = "bitsandbytes_4bit", kwargs = { bnb_4bit_quant_type = "nf4" } }
    offloading = { strategy = "model" }
    dynamo = { verbose = true }
    [recipe.child]
    extends = "parent"
    without = ["quantization", "offloading"]
    quantization = { backend = "bitsandbytes_8bit" }
    [recipe.other]
    extends = "parent"
    without = "dynamo"
    """
    recipes = loads_recipes(text)
    child = recipes["child"]
    assert (child.quantization, child.offloading) == (Quantization("bitsandbytes_8bit"), None)
    assert child.dynamo == {"verbose": True}
    assert recipes["other"].dynamo == {}


# Mistakes in recipes.


def test_all_mistakes_of_a_file_are_named_in_the_order_of_its_recipes(tmp_path: Path) -> None:
    path = tmp_path / "flux.recipes.toml"
    path.write_text("""
    defaults = 1
    [recipe.flux]
    pipeline = "tiny-flux"
    extends = "bass"
    compilation = { component = "transformer", mode = "max-autotuned" }
    [recipe.two]
    pipeline = ""
    [[recipe.two.compilation]]
    component = "unet"
    [[recipe.two.compilation]]
    component = "vae"
    fullgraph = 1
    [recipe.base]
    pipeline = "p"
    name = "b"
    """)
    with pytest.raises(RecipeError) as caught:
        load_recipes(path)
    assert str(caught.value) == "\n".join(
        [
            f"{path}: 6 mistakes",
            "  defaults: found an unknown key; allowed keys: recipe",
            "  recipe.flux.extends: found 'bass'; did you mean 'base'? known recipes: 'two', 'base'",
            (
                "  recipe.flux.compilation.mode: found 'max-autotuned'; did you mean 'max-autotune'? "
                "allowed: 'default', 'reduce-overhead', 'max-autotune' or 'max-autotune-no-cudagraphs'"
            ),
            (
                "  recipe.two.pipeline: found ''; a replica's name, a local directory, a hub id, "
                'or "package.module:factory" (identifiers both)'
            ),
            "  recipe.two.compilation[1].fullgraph: found 1; true or false",
            (
                "  recipe.base.name: found an unknown key; allowed keys: "
                "extends, without, pipeline, dtype, quantization, compilation, offloading, dynamo, call, contract, "
                "order, known_faults, forecast, vae_tiling, vae_slicing, attention, caching, exclusive, isolate, "
                "requires, reference, matrix"
            ),
        ]
    )


def test_a_mistake_that_children_inherit_is_named_once_where_it_stands() -> None:
    children = "\n".join(f'[recipe.child{k}]\nextends = "parent"' for k in range(3))
    text = f'{children}\n[recipe.grandchild]\nextends = "child0"\n[recipe.parent]\npipeline = "p"\ndtype = "int8"\n'
    assert mistakes(text) == ["recipe.parent.dtype: found 'int8'; allowed: 'float32', 'float16' or 'bfloat16'"]


def test_a_mistake_that_a_child_writes_again_is_named_again() -> None:
    text = """
    recipe.parent = { pipeline = "p", dtype = "int8", compilation = { mode = "default" } }
    recipe.child = { extends = "parent", dtype = "int8", compilation = { mode = "default" } }
    """
    assert [mistake.split(":")[0] for mistake in mistakes(text)] == [
        "recipe.parent.dtype",
        "recipe.parent.compilation.component",
        "recipe.child.dtype",
        "recipe.child.compilation.component",
    ]


def test_a_mistake_that_only_the_combination_makes_is_named_at_the_child_with_the_way_out() -> None:
    text = """
    recipe.parent = { pipeline = "p", compilation = { component = "unet", fullgraph = true } }
    recipe.child = { extends = "parent", offloading = { strategy = "model" } }
    """
    (mistake,) = mistakes(text)
    assert mistake.startswith("recipe.child.compilation.fullgraph: found true with scope = 'module' on 'unet', ")
    assert mistake.endswith("or fullgraph = false (it is inherited: without = ['compilation'] drops it)")


def test_keys_of_an_inherited_backend_are_refused_with_the_way_out() -> None:
    text = """
    recipe.parent = { pipeline = "p", quantization.backend = "bitsandbytes_4bit", quantization.kwargs.load_in_4bit = true }
    recipe.child = { extends = "parent", quantization.backend = "bitsandbytes_8bit" }
    """
    (mistake,) = mistakes(text)
    assert mistake.startswith("recipe.child.quantization.kwargs.load_in_4bit: found a key of bitsandbytes_4bit; ")
    assert mistake.endswith("(it is inherited: without = ['quantization'] drops it)")


def test_a_cycle_is_named_once_and_hides_no_other_mistake() -> None:
    text = """
    recipe.before.extends = "b"
    recipe.b = { extends = "c" }
    recipe.a = { extends = "b", dtype = "int8" }
    recipe.c = { extends = "a" }
    """
    assert mistakes(text) == [
        "recipe.b.extends: found b -> c -> a -> b; extends may not come back to itself",
        "recipe.a.dtype: found 'int8'; allowed: 'float32', 'float16' or 'bfloat16'",
    ]


def test_a_recipe_that_extends_itself_is_a_cycle() -> None:
    assert mistakes('[recipe.a]\nextends = "a"') == [
        "recipe.a.extends: found a -> a; extends may not come back to itself"
    ]


def test_each_of_several_cycles_is_named() -> None:
    text = "\n".join(f'recipe.{one}.extends = "{other}"' for one, other in ("ab", "ba", "cd", "dc"))
    assert mistakes(text) == [
        "recipe.a.extends: found a -> b -> a; extends may not come back to itself",
        "recipe.c.extends: found c -> d -> c; extends may not come back to itself",
    ]


def test_what_an_unknown_parent_may_have_given_is_not_missed() -> None:
    assert mistakes('[recipe.a]\nextends = "b"\n[recipe.c]\nextends = "a"\nquantization.components = "unet"') == [
        "recipe.a.extends: found 'b'; known recipes: 'c'"
    ]
    assert mistakes('[recipe.a]\nextends = "b"\ncompilation = {}') == [
        "recipe.a.extends: found 'b'; known recipes: none",
        "recipe.a.compilation.component: found nothing; it must be given",
    ]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("extends = 3", "extends: found 3; a string, or a list of strings"),
        ("extends = ['b', 3]", "extends: found ['b', 3]; a string, or a list of strings"),
        ("extends = 'b'\nwithout = true", "without: found True; a string, or a list of strings"),
        (
            "extends = 'b'\nwithout = 'compilaton'",
            (
                "without: found 'compilaton'; did you mean 'compilation'? "
                "allowed: 'compilation', 'offloading', 'quantization', 'dynamo'"
            ),
        ),
        ("without = 'dynamo'", "without: found ['dynamo']; it drops inherited parts: it needs extends"),
        (
            "compilaton = {}",
            (
                "compilaton: found an unknown key; did you mean 'compilation'? allowed keys: "
                "extends, without, pipeline, dtype, quantization, compilation, offloading, dynamo, call, contract, "
                "order, known_faults, forecast, vae_tiling, vae_slicing, attention, caching, exclusive, isolate, "
                "requires, reference, matrix"
            ),
        ),
        ("compilation = ['unet']", "compilation[0]: found 'unet'; a table of: component, scope, backend, mode, "),
        (
            "call.kwargs.day = 2024-02-03",
            "call.kwargs.day: found datetime.date(2024, 2, 3); write a date or time as a ",
        ),
        (
            "contract.max_memory = '1 gig'",
            "contract.max_memory: found '1 gig'; write bytes as an int, or a number with ",
        ),
    ],
)
def test_a_wrong_table_is_named(table: str, expected: str) -> None:
    (mistake,) = mistakes(f"recipe.b.pipeline = 'p'\n[recipe.a]\npipeline = 'p'\n{table}")
    assert mistake.startswith(f"recipe.a.{expected}")


def test_names_that_are_no_bare_keys_are_quoted_in_paths() -> None:
    assert mistakes('[recipe."a.b"]\npipeline = 3')[0].startswith('recipe."a.b".pipeline: found 3; ')
    (mistake,) = mistakes('[recipe."a::b"]\npipeline = "p"')
    assert mistake.startswith("""recipe."a::b": found 'a::b'; a string that is not empty, on one line, """)


# Mistakes in files.


def test_other_tables_than_recipes_are_refused() -> None:
    assert mistakes('[recipes.a]\npipeline = "p"') == [
        "recipes: found an unknown key; did you mean 'recipe'? allowed keys: recipe"
    ]
    assert mistakes("recipe = 3") == ["recipe: found 3; tables [recipe.NAME]"]
    assert mistakes("[recipe]\na = 3")[0].startswith("recipe.a: found 3; a table of: extends, without, pipeline, ")


def test_a_file_without_recipes_is_refused() -> None:
    assert mistakes(" \n") == ["<string>: found an empty file; at least one table [recipe.NAME]"]
    for text in ("# only a comment", "[recipe]"):
        assert mistakes(text) == ["recipe: found no recipes; at least one table [recipe.NAME]"]


def test_a_syntax_error_is_located_by_line_and_column() -> None:
    assert mistakes("[recipe.a]\npipeline 'x'") == [
        "line 2, column 10: found \"pipeline 'x'\"; TOML: expected '=' after a key in a key/value pair"
    ]
    (mistake,) = mistakes("[recipe.a]\npipeline = [")
    assert mistake.startswith("line 2, column 13: found the end of the file; TOML: ")
    (mistake,) = mistakes("[recipe.a]\n[recipe.a]")
    assert mistake.startswith("line 2, column 10: found '[recipe.a]'; TOML: cannot declare ")


def test_numbers_that_are_too_long_for_python_are_refused() -> None:
    (mistake,) = mistakes(f"x = {'1' * 5000}")
    assert mistake.startswith("<string>: found text that TOML cannot hold; Exceeds the limit (4300")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.recipes.toml"
    assert mistakes_of_file(path) == [f"{path}: found no such file; a TOML file with tables [recipe.NAME]"]


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert mistakes_of_file(tmp_path) == [f"{tmp_path}: found a directory; a TOML file with tables [recipe.NAME]"]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.recipes.toml"
    path.write_text(LADDER)

    def denied(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert mistakes_of_file(path) == [
        f"{path}: found a file that cannot be read ({os.strerror(errno.EACCES)}); a file that can be read"
    ]


def test_a_file_that_is_not_utf8_is_refused_with_the_offset_of_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.recipes.toml"
    path.write_bytes(b'[recipe.a]\npipeline = "gr\xf6\xdfe"\n')
    assert mistakes_of_file(path) == [f"{path}: found byte 0xf6 at byte offset 25; UTF-8 text"]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.recipes.toml"
    path.write_bytes(b"")
    assert mistakes_of_file(path) == [f"{path}: found an empty file; at least one table [recipe.NAME]"]


def test_a_forecast_is_inherited_key_by_key() -> None:
    recipes = loads_recipes("""
    [recipe.a]
    pipeline = "tiny-flux"
    [recipe.a.forecast]
    model = "flux.1-dev"
    max_memory = "16GiB"
    kwargs = { guidance_scale = 3.5 }
    [recipe.b]
    extends = "a"
    forecast = { max_memory = "12GiB", kwargs = { max_sequence_length = 256 } }
    [recipe.c]
    extends = "b"
    without = "quantization"
    """)
    kwargs = {"guidance_scale": 3.5, "max_sequence_length": 256}
    assert recipes["b"].forecast == ForecastBudget("flux.1-dev", "12GiB", kwargs=kwargs)
    assert recipes["c"].forecast == recipes["b"].forecast


def test_a_forecast_that_promises_nothing_is_a_mistake_where_it_stands() -> None:
    with pytest.raises(RecipeError) as caught:
        loads_recipes('[recipe.a]\npipeline = "p"\nforecast = { model = "flux.1-dev" }\n[recipe.b]\nextends = "a"\n')
    assert [problem.path for problem in caught.value.problems] == ["recipe.a.forecast.max_memory"]
