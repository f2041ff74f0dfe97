"""Hypothesis strategies that generate valid recipes, and their parts, all of which TOML can hold.

For the author of a tool that takes recipes::

    from hypothesis import given
    from pytest_diffopt.recipe import Recipe
    from pytest_diffopt.recipe_loading import loads_recipes
    from pytest_diffopt.strategies import recipes

    @given(recipes())
    def test_a_recipe_survives_toml(recipe: Recipe) -> None:
        assert loads_recipes(recipe.to_toml()) == {recipe.name: recipe}

They are valid, not feasible: a generated pipeline is a name that need not exist. Narrow them with ``map`` or
``filter``, or give one field with ``recipes().map(lambda recipe: recipe.replace(pipeline="tiny-flux"))``.
"""

from __future__ import annotations

from typing import Any

from pytest_diffopt.extras import needs

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"pytest_diffopt.strategies {needs('hypothesis')}") from error

from pytest_diffopt.denoising import ATTENTION_BACKENDS
from pytest_diffopt.recipe import (
    ORDER,
    Caching,
    Call,
    Compilation,
    Contract,
    ForecastBudget,
    Offloading,
    Quantization,
    Recipe,
)

__all__ = [
    "cachings",
    "calls",
    "compilations",
    "contracts",
    "forecast_budgets",
    "offloadings",
    "quantizations",
    "recipes",
    "several_quantizations",
]

_COMPONENTS = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2")
_DTYPES = ("float32", "float16", "bfloat16")

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # UTF-8 has no lone surrogates
_numbers = st.floats(allow_nan=False)
_scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | _numbers | _text
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3), max_leaves=6
)
_tables = st.dictionaries(_text, _values, max_size=3)
_positive_numbers = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
_component_lists = st.none() | st.lists(st.sampled_from(_COMPONENTS), min_size=1, max_size=3, unique=True)
_module_lists = st.lists(st.sampled_from(["proj_out", "lm_head", "time_embed"]), max_size=2, unique=True)


_Fields = st.SearchStrategy[dict[str, Any]]


def _some(required: dict[str, st.SearchStrategy[Any]], optional: dict[str, st.SearchStrategy[Any]]) -> _Fields:
    """A strategy for keyword arguments: the required ones, and any of the optional ones."""
    return st.fixed_dictionaries(required, optional=optional)


def quantizations() -> st.SearchStrategy[Quantization]:
    """Quantizations of each backend, with any of the keys that it takes."""
    common = {"components": _component_lists, "skip_modules": _module_lists}
    four_bit = {
        "load_in_4bit": st.just(True),
        "bnb_4bit_quant_type": st.sampled_from(["nf4", "fp4"]),
        "bnb_4bit_compute_dtype": st.sampled_from(_DTYPES),
        "bnb_4bit_use_double_quant": st.booleans(),
        "bnb_4bit_quant_storage": st.sampled_from(["uint8", "bfloat16"]),
    }
    eight_bit = {
        "load_in_8bit": st.just(True),
        "llm_int8_threshold": st.floats(0, 100),
        "llm_int8_skip_modules": _module_lists,
        "llm_int8_enable_fp32_cpu_offload": st.booleans(),
        "llm_int8_has_fp16_weight": st.booleans(),
    }
    quanto = {
        "weights_dtype": st.sampled_from(["int8", "int4", "int2", "float8"]),
        "modules_to_not_convert": _module_lists,
    }
    casting = {
        "storage_dtype": st.sampled_from(["float8_e4m3fn", "float8_e5m2"]),
        "compute_dtype": st.sampled_from(_DTYPES),
        "skip_modules_pattern": st.lists(st.sampled_from(["norm", "^proj_out$"]), max_size=2, unique=True),
        "skip_modules_classes": st.lists(st.sampled_from(["Embedding", "LayerNorm"]), max_size=2, unique=True),
        "non_blocking": st.booleans(),
    }
    backends: dict[str, st.SearchStrategy[dict[str, Any]]] = {
        "bitsandbytes_4bit": _some({}, four_bit),
        "bitsandbytes_8bit": _some({}, eight_bit),
        "torchao": st.one_of([_torchao(name) for name in ("int8wo", "int8dq", "int4wo", "IntxWeightOnlyConfig")]),
        "quanto": _some({}, quanto),
        "layerwise_casting": _some({}, casting),
    }
    file = {"file": st.sampled_from(["./own.gguf", "owner/model/weights-Q4_K_S.gguf"])}
    one_component = {"components": st.sampled_from(_COMPONENTS).map(lambda name: [name])}
    out_of_a_file = _some(
        {
            "backend": st.just("gguf"),
            **one_component,
            "kwargs": _some(file, {"compute_dtype": st.sampled_from(_DTYPES)}),
        },
        {"skip_modules": _module_lists},
    )
    tables = [
        _some({"backend": st.just(name), "kwargs": keys}, common)
        if name == "torchao"  # it has an argument that must be given
        else _some({"backend": st.just(name)}, common | {"kwargs": keys})
        for name, keys in backends.items()
    ]
    return st.one_of([*tables, out_of_a_file]).map(lambda fields: Quantization(**fields))


def _torchao(name: str) -> _Fields:
    arguments: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "int8wo": {"granularity": st.sampled_from(["PerRow", "PerTensor", "PerGroup(64)"])},
        "int8dq": {"act_mapping_type": st.sampled_from(["SYMMETRIC", "ASYMMETRIC"])},
        "int4wo": {"group_size": st.sampled_from([32, 64, 128, 256])},
        "IntxWeightOnlyConfig": {"weight_dtype": st.sampled_from(["int2", "int4", "int8"])},
    }
    return _some({"quant_type": st.just(name)}, arguments[name] | {"modules_to_not_convert": _module_lists})


def several_quantizations() -> st.SearchStrategy[list[Quantization]]:
    """Two backends, each with components of its own."""
    halves = st.tuples(quantizations(), quantizations())
    return halves.map(
        lambda pair: [
            Quantization(one.backend, [name], one.kwargs, one.skip_modules)
            for one, name in zip(pair, _COMPONENTS, strict=False)
        ]
    )


def compilations() -> st.SearchStrategy[Compilation]:
    """Compilations of one component, by the name of a backend, with a mode or options."""
    common = {
        "scope": st.sampled_from(["module", "repeated_blocks"]),
        "backend": st.sampled_from(["inductor", "eager", "aot_eager", "package.module:backend"]),
        "fullgraph": st.booleans(),
        "dynamic": st.none() | st.booleans(),
        "memory_format": st.sampled_from([None, "contiguous_format", "channels_last", "channels_last_3d"]),
    }
    modes = st.sampled_from([None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
    component = {"component": st.sampled_from(_COMPONENTS)}
    return (_some(component, common | {"mode": modes}) | _some(component, common | {"options": _tables})).map(
        lambda fields: Compilation(**fields)
    )


def offloadings() -> st.SearchStrategy[Offloading]:
    """Offloadings of each strategy, with any of the fields that it takes."""
    components = {"components": _component_lists}
    group = components | {"non_blocking": st.booleans(), "offload_to_disk_path": _text.filter(bool)}
    streamed = group | {"record_stream": st.booleans(), "low_cpu_mem_usage": st.booleans()}
    blocks = {"offload_type": st.just("block_level"), "num_blocks_per_group": st.integers(1, 8)}
    leaves = {"offload_type": st.sampled_from([None, "leaf_level"])}
    of_group = {"strategy": st.just("group")}
    return st.one_of(
        _some({"strategy": st.sampled_from(["model", "sequential"])}, components),
        *(_some(of_group | kind, group) for kind in (blocks, leaves)),
        *(_some(of_group | kind | {"use_stream": st.just(True)}, streamed) for kind in (blocks, leaves)),
    ).map(lambda fields: Offloading(**fields))


def cachings() -> st.SearchStrategy[Caching]:
    """Caches of one component, of each kind, with some of the keys that it takes."""
    steps, threshold = st.integers(1, 8), st.floats(0, 10)
    span = st.tuples(st.integers(-1, 400), st.integers(401, 1001))
    keys: dict[str, tuple[dict[str, st.SearchStrategy[Any]], dict[str, st.SearchStrategy[Any]]]] = {
        "first_block_cache": ({}, {"threshold": threshold}),
        "pyramid_attention_broadcast": (
            {},
            {"spatial_attention_block_skip_range": steps, "spatial_attention_timestep_skip_range": span},
        ),
        "faster_cache": ({}, {"spatial_attention_block_skip_range": steps, "is_guidance_distilled": st.booleans()}),
        "mag_cache": (
            {"mag_ratios": st.lists(threshold, min_size=1, max_size=4)},
            {"threshold": threshold, "num_inference_steps": steps},
        ),
        "taylorseer_cache": ({}, {"cache_interval": steps, "taylor_factors_dtype": st.sampled_from(_DTYPES)}),
        "sea_cache": ({}, {"threshold": threshold, "residual_order": st.sampled_from([0, 1])}),
        "text_kv_cache": ({}, {}),
    }
    component = {"component": st.sampled_from(_COMPONENTS)}
    return st.one_of(
        [_some(component | {"kind": st.just(kind), "kwargs": _some(*taken)}, {}) for kind, taken in keys.items()]
    ).map(lambda fields: Caching(**fields))


def calls() -> st.SearchStrategy[Call]:
    """Calls with prompts, sizes and plain keyword arguments; inputs are plain data, never tensors."""
    side = st.integers(1, 2048)
    return _some(
        {},
        {
            "prompts": st.lists(_text, min_size=1, max_size=4),
            "sizes": st.none() | st.lists(st.tuples(side, side) | st.tuples(side, side, side), min_size=1, max_size=3),
            "num_inference_steps": st.integers(1, 50),
            "calls": st.none() | st.integers(1, 10),
            "seed": st.integers(0, 2**63 - 1),
            "kwargs": _tables,
            "inputs": st.none() | st.lists(_tables, min_size=1, max_size=3),
        },
    ).map(lambda fields: Call(**fields))


def forecast_budgets() -> st.SearchStrategy[ForecastBudget]:
    """Budgets of a forecast: a limit, a card or both, and any of the other fields."""
    side = st.integers(1, 2048)
    limit = {"max_memory": st.integers(1, 2**40) | st.just("16GiB")}
    card = {"gpu": st.sampled_from(["rtx-4090", "A100 80GB"])}
    others = {
        "model": st.none() | st.sampled_from(["flux.1-dev", "owner/model", "./local"]),
        "sizes": st.none() | st.lists(st.tuples(side, side) | st.tuples(side, side, side), min_size=1, max_size=3),
        "num_inference_steps": st.none() | st.integers(1, 50),
        "assume": _tables,
        "kwargs": _tables,
    }
    return (_some(limit, others | card) | _some(card, others)).map(lambda fields: ForecastBudget(**fields))


def contracts() -> st.SearchStrategy[Contract]:
    """Contracts that give any of the limits."""
    count = st.none() | st.integers(0, 1000)
    sizes = st.builds("{}{}".format, st.integers(1, 999), st.sampled_from(["B", "KB", "MB", "GB", "MiB", "GiB"]))
    return _some(
        {},
        {
            "max_graph_breaks": count,
            "allowed_break_files": st.none()
            | st.lists(st.sampled_from(["accelerate/hooks.py", "hooks.py"]), max_size=2),
            "max_recompiles": count,
            "max_recompiles_after_warmup": count,
            "warmup_calls": st.none() | st.integers(0, 5),
            "parity_multiple": st.none() | _positive_numbers,
            "max_memory_ratio": st.none() | _positive_numbers,
            "max_host_syncs_per_step": st.none() | st.integers(0, 100),
            "max_memory": st.none() | st.integers(1, 2**40) | sizes,
            "max_host_memory": st.none() | st.integers(1, 2**40) | sizes,
            "parity_dtype": st.sampled_from([None, "float32", "float64"]),
        },
    ).map(lambda fields: Contract(**fields))


def _names() -> st.SearchStrategy[str]:
    marks = st.characters(exclude_categories=["C", "Z"], exclude_characters="/[]:")
    return st.sampled_from(["flux-nf4", "a.b", "with space", 'a"quote']) | st.text(marks, min_size=1, max_size=12)


def _without_fullgraph_under_hooks(fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("offloading") is None:
        return fields
    plain = [Compilation(**compilation.given() | {"fullgraph": False}) for compilation in fields.get("compilation", ())]
    return {**fields, "compilation": plain}


def recipes() -> st.SearchStrategy[Recipe]:
    """Recipes with any of the parts."""
    settings = st.dictionaries(st.sampled_from(["capture_scalar_outputs", "verbose", "specialize_int"]), st.booleans())
    limits = st.dictionaries(st.sampled_from(["recompile_limit", "accumulated_recompile_limit"]), st.integers(1, 1000))
    return (
        _some(
            {
                "name": _names(),
                "pipeline": st.sampled_from(["tiny-flux", "owner/model", "./local", "package.module:make"]),
            },
            {
                "dtype": st.none() | st.sampled_from(_DTYPES),
                "quantization": st.none() | quantizations() | several_quantizations(),
                "compilation": st.lists(compilations(), max_size=3, unique_by=lambda made: made.component),
                "offloading": st.none() | offloadings(),
                "dynamo": st.builds(lambda a, b: a | b, settings, limits),
                "call": calls(),
                "contract": contracts(),
                "order": st.permutations(ORDER),
                "forecast": st.none() | forecast_budgets(),
                "vae_tiling": st.booleans() | st.integers(32, 2048),
                "vae_slicing": st.booleans(),
                "attention": st.none()
                | st.sampled_from(ATTENTION_BACKENDS)
                | st.dictionaries(st.sampled_from(_COMPONENTS), st.sampled_from(ATTENTION_BACKENDS), min_size=1),
                "caching": st.lists(cachings(), max_size=2, unique_by=lambda made: made.component),
                "exclusive": st.booleans(),
                "isolate": st.booleans(),
                "requires": st.lists(st.sampled_from(["torchao", "gguf>=0.10", "diffusers>=0.41,<1"]), max_size=2),
            },
        )
        .map(_without_fullgraph_under_hooks)
        .map(lambda fields: Recipe(**fields))
    )
