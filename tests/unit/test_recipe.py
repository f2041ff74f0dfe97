"""Recipes and their parts: what they accept, what they refuse and how they say it, and what they are equal by."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from pytest_diffopt.denoising import Caching
from pytest_diffopt.errors import RecipeError
from pytest_diffopt.recipe import (
    Call,
    Compilation,
    Contract,
    ForecastBudget,
    Offloading,
    Quantization,
    Recipe,
)
from pytest_diffopt.recipe_loading import loads_recipes
from pytest_diffopt.strategies import recipes


def mistakes(build: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build(*args, **kwargs)
    return [str(problem) for problem in caught.value.problems]


def make_pipeline() -> None:
    """Stands for an importable factory."""


def make_inputs() -> dict[str, int]:
    return {"x": 1}


def full() -> Recipe:
    return Recipe(
        "flux",
        "tiny-flux",
        dtype="bfloat16",
        quantization=Quantization("bitsandbytes_4bit", ["transformer"], {"bnb_4bit_quant_type": "nf4"}),
        compilation=[Compilation("transformer", mode="max-autotune"), Compilation("vae")],
        offloading=Offloading("model", ["text_encoder"]),
        dynamo={"recompile_limit": 1000},
        call=Call(calls=4),
        contract=Contract(max_recompiles=2),
    )


# Construction.


def test_positions_keywords_and_nested_dicts_make_the_same_recipe() -> None:
    by_dict = Recipe(
        name="flux",
        pipeline="tiny-flux",
        dtype="torch.bfloat16",
        quantization={
            "backend": "bitsandbytes_4bit",
            "components": "transformer",
            "kwargs": {"bnb_4bit_quant_type": "nf4", "load_in_4bit": True},
        },
        compilation=({"component": "transformer", "mode": "max-autotune"}, {"component": "vae"}),
        offloading={"strategy": "model", "components": ["text_encoder"]},
        dynamo={"cache_size_limit": 1000},
        call={"calls": 4},
        contract={"max_recompiles": 2},
    )
    assert by_dict == full()
    assert hash(by_dict) == hash(full())
    assert isinstance(by_dict.quantization, Quantization)


def test_one_compilation_stands_for_a_list_of_one() -> None:
    alone = Recipe("a", "tiny", compilation=Compilation("unet"))
    assert alone.compilation == (Compilation("unet"),)
    assert alone == Recipe("a", "tiny", compilation={"component": "unet"})
    assert Recipe("a", "tiny", compilation=None).compilation == ()


def test_a_recipe_and_its_tables_are_frozen() -> None:
    recipe = full()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]
    dynamo: Any = recipe.dynamo
    changes: dict[str, list[Any]] = {
        "update": [{"a": 1}],
        "pop": ["recompile_limit"],
        "__setitem__": ["a", 1],
        "__delitem__": ["a"],
        "clear": [],
    }
    for change, arguments in changes.items():
        with pytest.raises(TypeError, match=r"a recipe is frozen: make another one with recipe\.replace"):
            getattr(dynamo, change)(*arguments)
    assert recipe == full()


def test_what_the_caller_changes_afterwards_does_not_change_the_recipe() -> None:
    nested: dict[str, Any] = {"options": {"list": [1]}}
    call = Call(kwargs=nested)
    nested["options"]["list"].append(2)
    nested["more"] = 1
    assert call == Call(kwargs={"options": {"list": [1]}})


def test_recipes_survive_copies_and_pickles() -> None:
    for duplicate in (copy.copy(full()), copy.deepcopy(full()), pickle.loads(pickle.dumps(full()))):
        assert duplicate == full()
        assert duplicate.content_hash == full().content_hash


def test_a_recipe_prints_only_what_was_given() -> None:
    assert repr(full()) == (
        "Recipe('flux', 'tiny-flux', dtype='bfloat16', "
        "quantization=Quantization('bitsandbytes_4bit', components=('transformer',), "
        "kwargs={'bnb_4bit_quant_type': 'nf4'}), "
        "compilation=(Compilation('transformer', mode='max-autotune'), Compilation('vae')), "
        "offloading=Offloading('model', components=('text_encoder',)), dynamo={'recompile_limit': 1000}, "
        "call=Call(calls=4), contract=Contract(max_recompiles=2))"
    )
    assert repr(Recipe("a", make_pipeline)).endswith("test_recipe:make_pipeline)")
    assert len(repr(Call(kwargs={"long": "x" * 10_000}))) < 100


# Mistakes.


def test_mistakes_in_every_part_are_named_at_once() -> None:
    assert mistakes(
        Recipe,
        "a::b",
        "module:",
        dtype="float64",
        quantization={"backend": "bitsandbytes_4bits", "components": []},
        compilation=[{"component": "unet", "fullgraph": "yes"}, {"mode": "max-autotuned"}],
        offloading={"strategy": "model", "use_stream": True},
        dynamo={"cache_size_limit": -1},
        call={"num_inference_steps": 1.5, "seed": True},
        contract=3,
        compilaton=1,
    ) == [
        "name: found 'a::b'; a string that is not empty, on one line, without '::', '/', '[' or ']': it names a test",
        (
            "pipeline: found 'module:'; a replica's name, a local directory, a hub id, "
            'or "package.module:factory" (identifiers both)'
        ),
        "dtype: found 'float64'; did you mean 'float16'? allowed: 'float32', 'float16' or 'bfloat16'",
        (
            "quantization.backend: found 'bitsandbytes_4bits'; did you mean 'bitsandbytes_4bit'? "
            "allowed: 'bitsandbytes_4bit', 'bitsandbytes_8bit', 'torchao', 'quanto', 'gguf' or 'layerwise_casting'"
        ),
        "quantization.components: found []; a component, or a list of at least one; leave it out for all",
        "compilation[0].fullgraph: found 'yes'; true or false",
        "compilation[1].component: found nothing; it must be given",
        (
            "compilation[1].mode: found 'max-autotuned'; did you mean 'max-autotune'? "
            "allowed: 'default', 'reduce-overhead', 'max-autotune' or 'max-autotune-no-cudagraphs'"
        ),
        "offloading.use_stream: found True with strategy = 'model'; only strategy = 'group' takes it",
        "dynamo.cache_size_limit: found -1; an int >= 1",
        "call.num_inference_steps: found 1.5; an int >= 1",
        "call.seed: found True; an int >= 0",
        (
            "contract: found 3; a table of: max_graph_breaks, allowed_break_files, max_recompiles, "
            "max_recompiles_after_warmup, warmup_calls, parity_multiple, max_memory_ratio, max_memory, "
            "max_host_memory, max_host_syncs_per_step, parity_dtype"
        ),
        (
            "compilaton: found an unknown key; did you mean 'compilation'? allowed keys: "
            "name, pipeline, dtype, quantization, compilation, offloading, dynamo, call, contract, order, known_faults, "
            "forecast, vae_tiling, vae_slicing, attention, caching, exclusive, isolate, requires, reference"
        ),
    ]


def test_the_error_names_its_source_and_counts_its_mistakes() -> None:
    with pytest.raises(RecipeError) as caught:
        Offloading("modell")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Offloading(...): 1 mistake\n"
        "  strategy: found 'modell'; did you mean 'model'? allowed: 'model', 'sequential' or 'group'"
    )
    assert isinstance(caught.value, ValueError)


def test_arguments_are_bound_as_by_any_function() -> None:
    assert mistakes(Recipe, *"abcdefghijklmnopqrstu") == [
        (
            "Recipe: found 21 positional arguments; it takes 20: "
            "name, pipeline, dtype, quantization, compilation, offloading, dynamo, call, contract, order, known_faults, "
            "forecast, vae_tiling, vae_slicing, attention, caching, exclusive, isolate, requires, reference"
        )
    ]
    assert mistakes(Recipe, "a", "tiny", name="b") == ["name: found two values; by position or by name"]
    assert mistakes(Recipe) == ["name: found nothing; it must be given", "pipeline: found nothing; it must be given"]


@pytest.mark.parametrize("name", ["", "  ", "a::b", "a\nb", "a/b", "a[0]", "a]", "a\tb", "\ud800", 3, None])
def test_a_name_that_cannot_name_a_test_is_refused(name: Any) -> None:
    (mistake,) = mistakes(Recipe, name, "tiny")
    assert mistake.startswith("name: found ")


@pytest.mark.parametrize("name", ["flux-nf4", "a.b", "a:b", "with space", "größe"])
def test_a_name_may_be_any_other_line(name: str) -> None:
    assert Recipe(name, "tiny").name == name


@pytest.mark.parametrize("pipeline", ["", " ", ":", "a:", ":b", "a:b:c", "a-b:c", "a.:c", "https://x.y/z", 3, None])
def test_a_pipeline_that_names_nothing_is_refused(pipeline: Any) -> None:
    (mistake,) = mistakes(Recipe, "a", pipeline)
    assert mistake.startswith("pipeline: found ")


@pytest.mark.parametrize(
    "pipeline", ["tiny-flux", "owner/model", "./local", "C:\\models\\flux", "a.b:make", "a:B.make"]
)
def test_a_pipeline_is_named_by_replica_directory_hub_id_or_factory(pipeline: str) -> None:
    assert Recipe("a", pipeline).pipeline == pipeline


def test_a_module_that_exists_already_is_refused_since_each_observation_needs_a_fresh_one() -> None:
    torch = pytest.importorskip("torch")
    (mistake,) = mistakes(Recipe, "a", torch.nn.Linear(1, 1))
    assert mistake == (
        "pipeline: found torch.nn.modules.linear:Linear; a callable that makes the module anew, e.g. lambda: MyModel()"
    )
    assert Recipe("a", torch.nn.Identity).pipeline is torch.nn.Identity


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (
            {"bnb_4bit_quant_type": "nf"},
            "kwargs.bnb_4bit_quant_type: found 'nf'; did you mean 'nf4'? allowed: 'nf4', 'fp4'",
        ),
        (
            {"bnb_4bit_compute_dtype": "float8"},
            (
                "kwargs.bnb_4bit_compute_dtype: found 'float8'; did you mean 'float32'? "
                "allowed: 'float32', 'float16', 'bfloat16'"
            ),
        ),
        ({"bnb_4bit_use_double_quant": 1}, "kwargs.bnb_4bit_use_double_quant: found 1; true or false"),
        ({"load_in_4bit": False}, "kwargs.load_in_4bit: found False; true, or leave it out: the backend implies it"),
        (
            {"bnb_4bit_quant_typ": "nf4"},
            (
                "kwargs.bnb_4bit_quant_typ: found an unknown key; did you mean 'bnb_4bit_quant_type'? allowed keys: "
                "load_in_4bit, bnb_4bit_quant_type, bnb_4bit_compute_dtype, bnb_4bit_use_double_quant, "
                "llm_int8_skip_modules, bnb_4bit_quant_storage"
            ),
        ),
        (
            {"llm_int8_threshold": 6.0},
            (
                "kwargs.llm_int8_threshold: found a key of bitsandbytes_8bit; bitsandbytes_4bit takes: "
                "load_in_4bit, bnb_4bit_quant_type, bnb_4bit_compute_dtype, bnb_4bit_use_double_quant, "
                "llm_int8_skip_modules, bnb_4bit_quant_storage"
            ),
        ),
        ("nf4", "kwargs: found 'nf4'; a table"),
        ({3: 4}, "kwargs: found the key 3; keys are strings"),
    ],
)
def test_a_wrong_key_of_4bit_quantization_is_named(kwargs: Any, expected: str) -> None:
    assert mistakes(Quantization, "bitsandbytes_4bit", None, kwargs) == [expected]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"llm_int8_threshold": "6"}, "kwargs.llm_int8_threshold: found '6'; a finite number >= 0"),
        ({"llm_int8_threshold": float("nan")}, "kwargs.llm_int8_threshold: found nan; a finite number >= 0"),
        ({"llm_int8_skip_modules": "proj"}, "kwargs.llm_int8_skip_modules: found 'proj'; a list of strings"),
        ({"llm_int8_has_fp16_weight": "no"}, "kwargs.llm_int8_has_fp16_weight: found 'no'; true or false"),
        (
            {"load_in_4bit": True},
            (
                "kwargs.load_in_4bit: found a key of bitsandbytes_4bit; bitsandbytes_8bit takes: load_in_8bit, "
                "llm_int8_threshold, llm_int8_skip_modules, llm_int8_enable_fp32_cpu_offload, llm_int8_has_fp16_weight"
            ),
        ),
    ],
)
def test_a_wrong_key_of_8bit_quantization_is_named(kwargs: Any, expected: str) -> None:
    assert mistakes(Quantization, "bitsandbytes_8bit", None, kwargs) == [expected]


def test_quantization_keys_are_kept_as_the_libraries_want_them() -> None:
    quantization = Quantization(
        "bitsandbytes_8bit",
        kwargs={"load_in_8bit": True, "llm_int8_threshold": 6, "llm_int8_skip_modules": ("proj_out",)},
    )
    assert quantization.kwargs == {"llm_int8_threshold": 6.0, "llm_int8_skip_modules": ["proj_out"]}
    assert type(quantization.kwargs["llm_int8_threshold"]) is float


def test_torch_dtypes_are_kept_as_their_names() -> None:
    torch = pytest.importorskip("torch")
    kwargs = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": "torch.uint8"}
    quantization = Quantization("bitsandbytes_4bit", kwargs=kwargs)
    assert quantization.kwargs == {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}
    assert Recipe("a", "tiny", torch.float16).dtype == "float16"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"component": ""}, "component: found ''; a string that is not empty"),
        ({"component": 3}, "component: found 3; a string"),
        ({"scope": "blocks"}, "scope: found 'blocks'; allowed: 'module', 'repeated_blocks' or 'factory'"),
        ({"dynamic": "auto"}, "dynamic: found 'auto'; true or false"),
        ({"fullgraph": None}, "fullgraph: found None; true or false"),
        (
            {"memory_format": "channel_last"},
            (
                "memory_format: found 'channel_last'; did you mean 'channels_last'? "
                "allowed: 'contiguous_format', 'channels_last' or 'channels_last_3d'"
            ),
        ),
        (
            {"mode": "default", "options": {}},
            "options: found options together with mode = 'default'; mode or options: torch.compile refuses both together",
        ),
        (
            {"backend": "a:"},
            "backend: found 'a:'; a name of torch._dynamo.list_backends(), \"package.module:function\", or a callable",
        ),
    ],
)
def test_a_wrong_compilation_is_named(fields: dict[str, Any], expected: str) -> None:
    assert mistakes(Compilation, **{"component": "unet", **fields}) == [expected]


@pytest.mark.parametrize("strategy", ["model", "sequential"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offload_type", "leaf_level"),
        ("num_blocks_per_group", 2),
        ("use_stream", True),
        ("record_stream", True),
        ("non_blocking", True),
        ("low_cpu_mem_usage", True),
        ("offload_to_disk_path", "/tmp"),
    ],
)
def test_a_field_of_group_offloading_is_refused_elsewhere(strategy: str, field: str, value: object) -> None:
    expected = f"{field}: found {value!r} with strategy = {strategy!r}; only strategy = 'group' takes it"
    assert mistakes(Offloading, strategy, **{field: value}) == [expected]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"record_stream": True}, "record_stream: found True without use_stream; it needs use_stream = true"),
        ({"low_cpu_mem_usage": True}, "low_cpu_mem_usage: found True without use_stream; it needs use_stream = true"),
        (
            {"num_blocks_per_group": 2},
            (
                "num_blocks_per_group: found 2 with offload_type = 'leaf_level'; "
                "only offload_type = 'block_level' takes it"
            ),
        ),
        ({"offload_type": "block_level", "num_blocks_per_group": 0}, "num_blocks_per_group: found 0; an int >= 1"),
        ({"offload_type": "blocks"}, "offload_type: found 'blocks'; allowed: 'block_level' or 'leaf_level'"),
    ],
)
def test_a_wrong_group_offloading_is_named(fields: dict[str, Any], expected: str) -> None:
    assert mistakes(Offloading, "group", **fields) == [expected]


def test_group_offloading_is_by_leaf_unless_said_otherwise() -> None:
    assert Offloading("group").resolved_offload_type == "leaf_level"
    assert Offloading("group", offload_type="block_level").resolved_offload_type == "block_level"
    assert Offloading("model").resolved_offload_type is None


@pytest.mark.parametrize(
    ("strategy", "hook"),
    [
        ("model", "accelerate's CpuOffload.pre_forward"),
        ("sequential", "accelerate's AlignDevicesHook.pre_forward"),
        ("group", "diffusers' ModuleGroup.onload_"),
    ],
)
def test_fullgraph_of_a_whole_module_under_offloading_hooks_is_refused_with_what_works(
    strategy: str, hook: str
) -> None:
    compilation = {"component": "transformer", "fullgraph": True}
    assert mistakes(Recipe, "a", "tiny", compilation=compilation, offloading={"strategy": strategy}) == [
        (
            "compilation.fullgraph: found true with scope = 'module' on 'transformer', "
            f"which offloading strategy = '{strategy}' puts hooks on; "
            f"Dynamo refuses the torch.compiler.disable()d {hook}: "
            "write scope = 'repeated_blocks' with fullgraph, or fullgraph = false"
        )
    ]


def test_fullgraph_under_offloading_is_refused_only_where_hooks_are() -> None:
    listed = [Compilation("vae"), Compilation("transformer", fullgraph=True)]
    (mistake,) = mistakes(Recipe, "a", "tiny", compilation=listed, offloading=Offloading("group", "transformer"))
    assert mistake.startswith("compilation[1].fullgraph: ")
    assert Recipe("a", "tiny", compilation=listed, offloading=Offloading("group", "vae")).offloading is not None
    blocks = Compilation("transformer", scope="repeated_blocks", fullgraph=True)
    assert Recipe("a", "tiny", compilation=blocks, offloading=Offloading("model")).compilation == (blocks,)


def test_a_component_is_compiled_once() -> None:
    twice = [Compilation("unet"), Compilation("vae"), Compilation("unet", backend="eager")]
    assert mistakes(Recipe, "a", "tiny", compilation=twice) == [
        "compilation[2].component: found 'unet', which compilation[0] compiles already; compile each component once"
    ]


@pytest.mark.parametrize(
    ("dynamo", "expected"),
    [
        ({"recompile_limit": 0}, "dynamo.recompile_limit: found 0; an int >= 1"),
        ({"recompile_limit": True}, "dynamo.recompile_limit: found True; an int >= 1"),
        ({"accumulated_cache_size_limit": -3}, "dynamo.accumulated_cache_size_limit: found -3; an int >= 1"),
        ({"verbose": [1]}, "dynamo.verbose: found [1]; true, false, a number or a string"),
        (
            {"cache_size_limit": 8, "recompile_limit": 9},
            (
                "dynamo.cache_size_limit: found 8 together with recompile_limit = 9; "
                "only one of them: cache_size_limit is the old name of recompile_limit"
            ),
        ),
    ],
)
def test_a_wrong_dynamo_setting_is_named_as_it_was_written(dynamo: dict[str, Any], expected: str) -> None:
    assert mistakes(Recipe, "a", "tiny", dynamo=dynamo) == [expected]


def test_old_names_of_the_recompile_limits_become_the_new_ones() -> None:
    old: dict[str, Any] = {"cache_size_limit": 8, "recompile_limit": 8, "accumulated_cache_size_limit": 64}
    recipe = Recipe("a", "tiny", dynamo=old)
    assert recipe.dynamo == {"recompile_limit": 8, "accumulated_recompile_limit": 64}
    assert recipe == Recipe("a", "tiny", dynamo={"accumulated_recompile_limit": 64, "recompile_limit": 8})


# Calls.


def test_by_default_three_calls_run_the_same_prompt_twice_and_then_another() -> None:
    call = Call()
    assert call.count == 3
    assert call.prompt(0) == call.prompt(1) != call.prompt(2)
    assert call.size(0) is None


def test_calls_take_prompts_sizes_and_inputs_in_turn() -> None:
    call = Call(prompts="one", sizes=[(64, 64), (64, 32, 9)], inputs=[{"x": 0}, {"x": 1}])
    assert [call.prompt(k) for k in range(3)] == ["one"] * 3
    assert [call.size(k) for k in range(3)] == [(64, 64), (64, 32, 9), (64, 64)]
    assert [call.model_inputs(k) for k in range(3)] == [{"x": 0}, {"x": 1}, {"x": 0}]


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (Call(), 3),
        (Call("one"), 3),
        (Call(prompts=["a"] * 4), 4),
        (Call(sizes=[(8, 8)] * 5), 5),
        (Call(inputs=[{}] * 6), 6),
        (Call(inputs=dict), 3),
        (Call(prompts=["a"] * 4, calls=2), 2),
    ],
)
def test_every_prompt_size_and_input_is_run_unless_the_calls_are_counted(call: Call, count: int) -> None:
    assert call.count == count


def test_one_size_stands_for_a_list_of_one() -> None:
    assert Call(sizes=(64, 32)).sizes == ((64, 32),)
    assert Call(sizes=[64, 32, 9]) == Call(sizes=[[64, 32, 9]])


def test_a_callable_makes_the_inputs_and_gets_the_number_of_the_call_if_it_takes_one() -> None:
    assert Call(inputs=lambda k: {"k": k}).model_inputs(2) == {"k": 2}
    assert Call(inputs=lambda: {"k": "none"}).model_inputs(2) == {"k": "none"}
    assert Call(inputs=lambda **given: {"given": given}).model_inputs(2) == {"given": {}}


def test_a_call_gets_a_dict_of_its_own() -> None:
    call = Call(inputs={"x": 1})
    call.model_inputs(0)["x"] = 2
    assert call.model_inputs(0) == {"x": 1}


def test_inputs_that_are_no_dict_are_refused() -> None:
    allowed = "a dict of the model's keyword arguments, a list of these, or a callable that makes one"
    assert mistakes(Call(inputs=lambda: [1]).model_inputs, 1) == [f"call.inputs: found [1] for call 1; {allowed}"]  # type: ignore[arg-type,return-value]
    assert mistakes(Call().model_inputs, 0) == [f"call.inputs: found nothing; {allowed}"]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a", 3]}, "prompts[1]"),
        ({"prompts": {"a", "b"}}, "prompts"),
        ({"sizes": []}, "sizes"),
        ({"sizes": [64]}, "sizes"),
        ({"sizes": [64, 0]}, "sizes"),
        ({"sizes": [(64, 64), (64, True)]}, "sizes[1]"),
        ({"sizes": [(64, 64), 64]}, "sizes[1]"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"calls": 0}, "calls"),
        ({"seed": -1}, "seed"),
        ({"kwargs": []}, "kwargs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{}, 3]}, "inputs[1]"),
        ({"inputs": 3}, "inputs"),
    ],
)
def test_a_wrong_call_is_named(fields: dict[str, Any], path: str) -> None:
    (mistake,) = mistakes(Call, **fields)
    assert mistake.startswith(f"{path}: found ")


# Content.

_CHANGES: dict[str, Any] = {
    "pipeline": "tiny-sdxl",
    "dtype": "float16",
    "quantization": None,
    "compilation": (),
    "offloading": None,
    "dynamo": {"recompile_limit": 1001},
    "call": Call(calls=5),
    "vae_tiling": True,
    "vae_slicing": True,
    "attention": {"transformer": "_native_math"},
    "caching": Caching("transformer", "first_block_cache"),
}


@pytest.mark.parametrize("wrong", [3, ["torchao", 3], "torchao >> 1", "", "torchao @ https://a.b/c.whl"])
def test_what_pip_would_not_take_for_a_requirement_is_refused(wrong: Any) -> None:
    (mistake,) = mistakes(Recipe, "r", "tiny-flux", requires=wrong)
    assert mistake.startswith("requires")
    assert mistake.endswith("; a package and its versions, 'torchao>=0.18', or a list of them")


def test_what_is_required_changes_nothing_of_what_is_observed() -> None:
    requiring = full().replace(requires=["torchao>=0.18", "gguf"])
    assert requiring.requires == ("torchao>=0.18", "gguf")
    assert requiring.content_hash == full().content_hash
    assert requiring.without("compilation").requires == requiring.requires
    assert Recipe("r", "tiny-flux", requires="gguf").requires == ("gguf",)


def test_equal_recipes_have_one_content_hash() -> None:
    assert full().content_hash == full().content_hash
    assert len(full().content_hash) == 64


@pytest.mark.parametrize("field", _CHANGES)
def test_the_content_hash_changes_with_what_is_observed(field: str) -> None:
    changed = full().replace(**{field: _CHANGES[field]})
    assert changed.content_hash != full().content_hash
    assert changed != full()


_PART_CHANGES: dict[type[Any], tuple[dict[str, Any], dict[str, Any]]] = {
    Quantization: (
        {"backend": "bitsandbytes_8bit"},
        {
            "backend": "bitsandbytes_4bit",
            "components": ["vae"],
            "kwargs": {"llm_int8_threshold": 5.0},
            "skip_modules": ["proj"],
        },
    ),
    Compilation: (
        {"component": "unet"},
        {
            "component": "vae",
            "scope": "repeated_blocks",
            "backend": "eager",
            "mode": "default",
            "fullgraph": True,
            "dynamic": False,
            "memory_format": "channels_last",
            "options": {},
        },
    ),
    Offloading: (
        {"strategy": "group", "offload_type": "block_level", "use_stream": True},
        {
            "strategy": "model",
            "components": ["vae"],
            "offload_type": None,
            "num_blocks_per_group": 2,
            "use_stream": False,
            "record_stream": True,
            "non_blocking": True,
            "low_cpu_mem_usage": True,
            "offload_to_disk_path": "/tmp",
        },
    ),
    Call: (
        {},
        {
            "prompts": ["a"],
            "sizes": [8, 8],
            "num_inference_steps": 4,
            "calls": 3,
            "seed": 1,
            "kwargs": {"a": 1},
            "inputs": {"a": 1},
        },
    ),
    ForecastBudget: (
        {"max_memory": "1GiB"},
        {
            "model": "flux.1-dev",
            "max_memory": "2GiB",
            "gpu": "t4",
            "sizes": [8, 8],
            "num_inference_steps": 4,
            "assume": {"a": 1},
            "kwargs": {"a": 1},
        },
    ),
}


@pytest.mark.parametrize(
    ("part", "field"),
    [
        pytest.param(part, field, id=f"{part.__name__}.{field}")
        for part in _PART_CHANGES
        for field in _PART_CHANGES[part][1]
    ],
)
def test_a_part_differs_in_each_of_its_fields(part: type[Any], field: str) -> None:
    base, changes = _PART_CHANGES[part]
    assert set(changes) == {each.name for each in dataclasses.fields(part)}, "a field has no change here"
    changed = {**base, field: changes[field]}
    if changed.get("strategy") == "model":
        changed = {"strategy": "model"}
    assert part(**changed) != part(**base)
    assert part(**base) == part(**base)


def test_the_content_hash_does_not_change_with_the_name_or_the_contract_but_equality_does() -> None:
    for other in (full().replace(name="other"), full().replace(contract=Contract())):
        assert other.content_hash == full().content_hash
        assert other != full()


def test_the_content_hash_is_the_same_in_every_process_for_what_toml_can_hold() -> None:
    # Recorded baselines are found by it: a change of this value makes all of them unknown.
    assert full().content_hash == "cedd78d81af249c7d0d205e6083f2a8968423e4a9050747b8ddfa25109e911e3"


@pytest.mark.parametrize("tiling", [1, 31, "true", None, 64.0])
def test_tiles_are_true_false_or_a_side_in_pixels(tiling: Any) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe("a", "tiny", vae_tiling=tiling)
    assert error.value.problems[0].path == "vae_tiling"
    assert error.value.problems[0].allowed == "true, false, or the side of a tile in pixels, an int >= 32"
    assert Recipe("a", "tiny", vae_tiling=32).vae_tiling == 32


def test_values_that_python_takes_for_equal_stay_apart() -> None:
    kinds = [Call(kwargs={"x": value}).__hash__() for value in (1, True, 1.0, "1", [1], None)]
    assert len(set(kinds)) == len(kinds)
    assert Call(kwargs={"x": (1, 2)}) == Call(kwargs={"x": [1, 2]}), "TOML has only lists"
    assert Call(kwargs={"x": float("nan")}) == Call(kwargs={"x": float("nan")})


def test_closures_of_one_name_are_told_apart_and_stay_so_when_one_is_gone() -> None:
    def factory(number: int) -> Callable[[], int]:
        return lambda: number

    first, second = factory(1), factory(2)
    assert Recipe("a", first) == Recipe("a", first)
    assert Recipe("a", first) != Recipe("a", second)
    hashes = {Recipe("a", factory(number)).content_hash for number in range(50)}
    assert len(hashes) == 50, "an id was used again"


def test_an_importable_function_counts_by_its_name_until_another_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("module_of_a_factory")
    monkeypatch.setitem(sys.modules, "module_of_a_factory", module)
    exec("def make(): return 1", module.__dict__)
    first = Recipe("a", module.make)
    exec("def make(): return 2", module.__dict__)
    second = Recipe("a", module.make)
    assert first != second
    assert first == Recipe("a", first.pipeline)


def test_bound_methods_partials_and_objects_that_cannot_be_referenced_weakly_count_by_identity() -> None:
    class Maker:
        __slots__ = ()

        def __call__(self) -> None: ...

        def make(self) -> None: ...

    one, other = Maker(), Maker()
    assert Recipe("a", one.make) == Recipe("a", one.make)
    assert Recipe("a", one.make) != Recipe("a", other.make)
    assert Recipe("a", one) != Recipe("a", other)
    partial = functools.partial(one.make)
    assert Recipe("a", partial) == Recipe("a", partial) != Recipe("a", functools.partial(one.make))


def test_tensors_count_by_dtype_shape_and_elements() -> None:
    torch = pytest.importorskip("torch")

    def content(value: Any) -> str:
        return Recipe("a", "tiny", call=Call(inputs={"x": value})).content_hash

    ones = torch.ones(2, 3)
    assert content(ones) == content(torch.ones(2, 3)) == content(torch.ones(3, 2).T)
    assert content(torch.tensor(1.0, dtype=torch.bfloat16)) == content(torch.tensor(1.0, dtype=torch.bfloat16))
    others = [
        ones * 2,
        torch.ones(3, 2),
        ones.double(),
        ones.bfloat16(),
        ones.numpy() * 2,
        torch.ones(2, 3, device="meta"),
    ]
    assert len({content(value) for value in [ones, *others]}) == 1 + len(others)


def test_tensors_that_have_no_plain_elements_count_by_identity() -> None:
    torch = pytest.importorskip("torch")
    one, other = (torch.ones(2, device="meta") for _ in range(2))
    assert Call(inputs={"x": one}) == Call(inputs={"x": one})
    assert Call(inputs={"x": one}) != Call(inputs={"x": other})
    sparse = torch.eye(2).to_sparse()
    assert Call(inputs={"x": sparse}) == Call(inputs={"x": sparse})


def test_numpy_arrays_count_by_dtype_shape_and_elements() -> None:
    numpy = pytest.importorskip("numpy")
    assert Call(inputs={"x": numpy.ones(3)}) == Call(inputs={"x": numpy.ones(3)})
    assert Call(inputs={"x": numpy.ones(3)}) != Call(inputs={"x": numpy.zeros(3)})
    assert Call(inputs={"x": numpy.ones(4)}) != Call(inputs={"x": numpy.ones((2, 2))})


# Other recipes.


def test_a_recipe_without_parts_keeps_the_rest_and_says_so_in_its_name() -> None:
    bare = full().without("offloading", "compilation")
    assert bare.name == "flux without compilation, offloading"
    assert (bare.compilation, bare.offloading) == ((), None)
    assert (bare.quantization, bare.dynamo) == (full().quantization, full().dynamo)
    assert full().without("dynamo", "quantization").to_dict().keys() == {
        *("name", "pipeline", "dtype", "compilation", "offloading", "call", "contract")
    }
    assert full().without() == full()


def test_an_unknown_part_cannot_be_left_out() -> None:
    assert mistakes(full().without, "compilaton", "call") == [
        (
            "without: found 'compilaton'; did you mean 'compilation'? "
            "allowed: 'compilation', 'offloading', 'quantization', 'dynamo'"
        ),
        "without: found 'call'; allowed: 'compilation', 'offloading', 'quantization', 'dynamo'",
    ]


def test_a_replaced_field_is_checked_like_a_given_one() -> None:
    assert full().replace(dtype="float16").dtype == "float16"
    assert mistakes(full().replace, dtyp="float16")[0].startswith("dtyp: found an unknown key; did you mean 'dtype'?")
    fullgraph = Compilation("text_encoder", fullgraph=True)
    assert mistakes(full().replace, compilation=fullgraph)[0].startswith("compilation.fullgraph: ")


# Data.


@settings(deadline=None, max_examples=60)
@given(recipes())
def test_a_recipe_survives_toml_and_json(recipe: Recipe) -> None:
    assert loads_recipes(recipe.to_toml()) == {recipe.name: recipe}
    assert loads_recipes(recipe.to_toml())[recipe.name].content_hash == recipe.content_hash
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_defaults_are_left_out_of_the_data() -> None:
    recipe = Recipe("a", "tiny", compilation=Compilation("unet", fullgraph=True), call=Call(), dynamo={})
    assert recipe.to_dict() == {
        "name": "a",
        "pipeline": "tiny",
        "compilation": [{"component": "unet", "fullgraph": True}],
    }
    assert (
        recipe.to_toml()
        == '[recipe.a]\npipeline = "tiny"\n\n[recipe.a.compilation]\ncomponent = "unet"\nfullgraph = true\n'
    )


def test_callables_are_shown_in_data_by_their_names() -> None:
    recipe = Recipe("a", make_pipeline, call=Call(inputs=make_inputs))
    reference = f"{__name__}:make_pipeline"
    assert recipe.to_dict() == {"name": "a", "pipeline": reference, "call": {"inputs": f"{__name__}:make_inputs"}}


def test_what_toml_cannot_hold_is_refused_with_the_reason() -> None:
    recipe = Recipe("a", make_pipeline, compilation=Compilation("unet", backend=lambda graph, inputs: graph))
    assert mistakes(recipe.to_toml) == [
        (
            f"pipeline: found {__name__}:make_pipeline; "
            f"TOML holds no callables: write '{__name__}:make_pipeline', which is imported when the recipe runs"
        ),
        (
            f"compilation[0].backend: found {__name__}:"
            "test_what_toml_cannot_hold_is_refused_with_the_reason.<locals>.<lambda>; "
            'TOML holds no callables: write "package.module:function", which is imported when the recipe runs'
        ),
    ]
    assert mistakes(Recipe("a", "tiny", call=Call(kwargs={"x": [None]})).to_toml) == [
        "call.kwargs.x[0]: found None; TOML has no null: leave the key out"
    ]


def test_tensors_are_shown_in_data_and_refused_in_toml() -> None:
    torch = pytest.importorskip("torch")
    recipe = Recipe("a", "tiny", call=Call(inputs={"x": torch.ones(2, 3)}))
    assert recipe.to_dict()["call"] == {"inputs": [{"x": "Tensor(torch.float32, [2, 3])"}]}
    (mistake,) = mistakes(recipe.to_toml)
    assert mistake.startswith("call.inputs[0].x: found tensor(")
    assert mistake.endswith("; TOML holds no tensors: make them in a callable, and keep the recipe in Python")


def test_data_that_is_no_recipe_is_refused() -> None:
    assert mistakes(Recipe.from_dict, ["a"]) == ["Recipe: found ['a']; a dict of its fields"]
    assert mistakes(Recipe.from_dict, {"name": "a"}) == ["pipeline: found nothing; it must be given"]


def test_a_models_inputs_may_be_named_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text("def inputs(k):\n    return {'x': k}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert Call(inputs="made_here:inputs").model_inputs(2) == {"x": 2}
    with pytest.raises(RecipeError, match=r"call\.inputs: found 'made_here:nothing'; it must be importable"):
        Call(inputs="made_here:nothing").model_inputs(0)
    with pytest.raises(RecipeError, match=r"inputs: found 'not a reference'; a table of keyword arguments, a list"):
        Call(inputs="not a reference")


# The forecast.


def test_a_forecast_is_a_part_like_the_others_and_changes_nothing_that_is_observed() -> None:
    budget = ForecastBudget("flux.1-dev", "16GiB", "rtx-4090", [1024, 1024], 28, {"a": [1]}, {"guidance_scale": 3.5})
    given_as_a_table = {
        "model": "flux.1-dev",
        "max_memory": "16GiB",
        "gpu": "rtx-4090",
        "sizes": [[1024, 1024]],
        "num_inference_steps": 28,
        "assume": {"a": [1]},
        "kwargs": {"guidance_scale": 3.5},
    }
    recipe = full().replace(forecast=given_as_a_table)
    assert recipe.forecast == budget
    assert recipe != full()
    assert recipe.content_hash == full().content_hash
    assert loads_recipes(recipe.to_toml()) == {"flux": recipe}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.without("quantization", "offloading", "compilation", "dynamo").forecast == budget


def test_every_mistake_in_a_forecast_is_named() -> None:
    table = {
        "model": "",
        "max_memory": "16 gigs",
        "gpu": 4090,
        "sizes": [1024],
        "num_inference_steps": 0,
        "assume": 3,
        "kwargs": [1],
        "steps": 4,
    }
    sizes = "(height, width) or (height, width, frames), positive ints; or a list of these"
    units = "write bytes as an int, or a number with one of: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
    keys = "model, max_memory, gpu, sizes, num_inference_steps, assume, kwargs"
    assert mistakes(Recipe, "a", "tiny", forecast=table) == [
        "forecast.model: found ''; a string that is not empty",
        f"forecast.max_memory: found '16 gigs'; {units}",
        "forecast.gpu: found 4090; a string",
        f"forecast.sizes: found [1024]; {sizes}",
        "forecast.num_inference_steps: found 0; an int >= 1",
        "forecast.assume: found 3; a table",
        "forecast.kwargs: found [1]; a table",
        f"forecast.steps: found an unknown key; allowed keys: {keys}",
    ]
    assert mistakes(Recipe, "a", "tiny", forecast=16) == [f"forecast: found 16; a table of: {keys}"]


def test_a_forecast_promises_a_limit_or_a_card() -> None:
    nothing = "found nothing; max_memory, gpu or both must be given: what the full-size recipe may take"
    assert mistakes(ForecastBudget, "flux.1-dev") == [f"max_memory: {nothing}"]
    assert mistakes(Recipe, "a", "tiny", forecast={}) == [f"forecast.max_memory: {nothing}"]
    assert ForecastBudget(gpu="t4").max_memory is None
