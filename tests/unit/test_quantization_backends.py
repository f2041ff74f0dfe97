"""What recipes may say of each backend, and what the check makes of the layers that were written down."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from pytest_diffopt import Quantization, Recipe
from pytest_diffopt.errors import RecipeError
from pytest_diffopt.observation.observation import Layer
from pytest_diffopt.quantization_backends import BACKENDS, DISTRIBUTIONS
from pytest_diffopt.quantization_backends.torchao import CONFIGS, SHORT_NAMES
from pytest_diffopt.recipe import QuantizationBackend
from pytest_diffopt.recipe_loading import loads_recipes


def problems(make: Any) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        make()
    return [f"{problem.path}: found {problem.found}; {problem.allowed}" for problem in raised.value.problems]


def test_recipes_accept_the_backends_that_there_are() -> None:
    assert get_args(QuantizationBackend) == tuple(BACKENDS)
    assert DISTRIBUTIONS == ("bitsandbytes", "torchao", "optimum-quanto", "gguf")


@pytest.mark.parametrize(
    ("backend", "kwargs", "expected"),
    [
        (
            "torchao",
            {"quant_type": "Int8WeightOnlyConfg"},
            "did you mean 'Int8WeightOnlyConfig'? allowed: " + ", ".join(map(repr, CONFIGS)),
        ),
        (
            "torchao",
            {"quant_type": "int8wo", "group_size": 128},
            "kwargs.group_size: found a key of another quant_type; 'int8wo' takes: quant_type, granularity, ",
        ),
        (
            "torchao",
            {"quant_type": "int8dq", "granularity": "PerGroup(32)"},
            "kwargs.granularity: found 'PerGroup(32)'; allowed: 'PerRow', 'PerTensor'",
        ),
        (
            "torchao",
            {"quant_type": "int4wo", "int4_choose_qparams_algorithm": "hqq"},
            "found 'hqq' with 'plain'; torchao has hqq for int4_packing_format = 'tile_packed_to_4d' alone",
        ),
        ("torchao", {}, "kwargs.quant_type: found nothing; torchao needs a config's name: 'Int8WeightOnlyConfig'"),
        (
            "quanto",
            {"weights_dtype": "int16"},
            "kwargs.weights_dtype: found 'int16'; did you mean 'int8'? allowed: 'int8', 'int4', 'int2', 'float8'",
        ),
        ("quanto", {"bnb_4bit_quant_type": "nf4"}, "found a key of bitsandbytes_4bit; quanto takes: weights_dtype"),
        ("gguf", {"file": "weights.safetensors"}, "a .gguf file: its path, or its address on the hub"),
        ("gguf", {}, "kwargs.file: found nothing; gguf needs a .gguf file"),
        ("layerwise_casting", {"storage_dtype": "int8"}, "allowed: 'float8_e4m3fn', 'float8_e5m2'"),
        ("layerwise_casting", {"skip_modules_pattern": ["("]}, "found '('; a regular expression ("),
        ("layerwise_casting", {"skip_modules_classes": ["torch.nn.LayerNorm"]}, "the name of a class, without its"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(backend: Any, kwargs: Any, expected: str) -> None:
    assert expected in "\n".join(problems(lambda: Quantization(backend, ["transformer"], kwargs)))


@pytest.mark.parametrize(
    ("backend", "given", "kept"),
    [
        *(("torchao", {"quant_type": short}, {"quant_type": long}) for short, long in SHORT_NAMES.items()),
        ("quanto", {"weights_dtype": "int4"}, {"weights_dtype": "int4"}),
        ("gguf", {"file": "c.gguf", "compute_dtype": "torch.float16"}, {"file": "c.gguf", "compute_dtype": "float16"}),
        (
            "layerwise_casting",
            {"skip_modules_pattern": "norm", "skip_modules_classes": "Embedding"},
            {"skip_modules_pattern": ["norm"], "skip_modules_classes": ["Embedding"]},
        ),
    ],
)  # fmt: skip
def test_arguments_are_kept_in_one_form_and_survive_toml(backend: Any, given: Any, kept: Any) -> None:
    recipe = Recipe("r", "tiny-flux", quantization=Quantization(backend, ["transformer"], given))
    assert recipe.quantizations[0].kwargs == kept
    assert loads_recipes(recipe.to_toml()) == {"r": recipe}


def test_torchao_objects_are_written_down_by_their_names() -> None:
    ao = pytest.importorskip("torchao.quantization")
    kwargs = {
        "quant_type": "IntxWeightOnlyConfig",
        "granularity": ao.PerGroup(64),
        "mapping_type": ao.MappingType.SYMMETRIC,
    }
    kept = Quantization("torchao", kwargs=kwargs).kwargs
    assert dict(kept) == {
        "quant_type": "IntxWeightOnlyConfig",
        "granularity": "PerGroup(64)",
        "mapping_type": "SYMMETRIC",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_of_torchao_takes_what_a_recipe_may_say(name: str) -> None:
    fields = set(pytest.importorskip("torchao.quantization").__dict__[name].__dataclass_fields__)
    assert set(CONFIGS[name]) <= fields


# Several backends in one recipe.

INT8 = {"backend": "torchao", "components": ["transformer"], "kwargs": {"quant_type": "int8wo"}}
NF4 = {"backend": "bitsandbytes_4bit", "components": ["text_encoder_2"]}


def test_several_backends_stand_in_an_array_of_tables() -> None:
    recipe = Recipe("r", "tiny-flux", quantization=[INT8, NF4])
    assert recipe.quantization == recipe.quantizations
    assert [one.backend for one in recipe.quantizations] == ["torchao", "bitsandbytes_4bit"]
    assert recipe.to_toml().count("[[recipe.r.quantization]]") == 2
    assert loads_recipes(recipe.to_toml()) == {"r": recipe}
    assert recipe.replace(dtype="bfloat16").quantizations == recipe.quantizations
    assert recipe.without("quantization").quantizations == ()


def test_none_and_one_are_what_they_were() -> None:
    one = Recipe("r", "tiny-flux", quantization=NF4)
    assert isinstance(one.quantization, Quantization)
    assert one == Recipe("r", "tiny-flux", quantization=[NF4])
    assert Recipe("r", "tiny-flux", quantization=[]).quantization is None
    assert (Recipe("r", "tiny-flux").quantization, Recipe("r", "tiny-flux").quantizations) == (None, ())
    # written down before a recipe could have several
    assert Recipe("a", "tiny-flux", quantization=Quantization("bitsandbytes_4bit")).content_hash == (
        "355826768578d2fbc4d9b68f135f92fd7bdf8008958ac29fe03b4b9354bb5366"
    )


def test_the_backend_of_a_component_is_found() -> None:
    recipe = Recipe("r", "tiny-flux", quantization=[INT8, NF4])
    found = {name: recipe.quantization_for(name) for name in ("transformer", "text_encoder_2", "vae")}
    assert {name: one.backend if one else "" for name, one in found.items()} == {
        "transformer": "torchao",
        "text_encoder_2": "bitsandbytes_4bit",
        "vae": "",
    }
    everything = Recipe("r", "tiny-flux", quantization=Quantization("quanto")).quantization_for("vae")
    assert everything is not None
    assert everything.backend == "quanto"


@pytest.mark.parametrize(
    ("several", "expected"),
    [
        (
            [INT8, {**NF4, "components": ["transformer"]}],
            "[1].components: found 'transformer', which quantization[0] quantizes already; quantize each component once",
        ),
        (
            [INT8, {"backend": "quanto"}],
            "quantization[1].components: found nothing; several backends name their components: 'all' is for one alone",
        ),
        ("torchao", "quantization: found 'torchao'; a table, or a list of tables"),
        ([INT8, {"backend": "quanta"}], "quantization[1].backend: found 'quanta'; did you mean 'quanto'?"),
        (
            {"backend": "gguf", "components": ["a", "b"], "kwargs": {"file": "a.gguf"}},
            "quantization.components: found 2 of them; exactly one: a .gguf file holds one component",
        ),
    ],
)
def test_a_wrong_list_is_named_with_both_of_its_sides(several: Any, expected: str) -> None:
    assert expected in "\n".join(problems(lambda: Recipe("r", "tiny-flux", quantization=several)))


# What the check says of layers.


def layer(library: str, form: str, **more: Any) -> Layer:
    fields: dict[str, Any] = {"weight_bytes": 128 * 256, "state_bytes": 512, **more}
    return Layer("m", "l", "Linear", form, "int8", fields.pop("compute_dtype", ""), 256, 128, library=library, **fields)


INT8_ROWS = {"granularity": "PerRow"}


@pytest.mark.parametrize(
    ("backend", "kwargs", "stored", "wrong"),
    [
        ("torchao", {"quant_type": "int8wo"}, layer("torchao", "int8", **INT8_ROWS), ""),
        (
            "torchao",
            {"quant_type": "int8dq"},
            layer("torchao", "int8", **INT8_ROWS),
            "leaves activations as they are, though Int8DynamicActivationInt8WeightConfig quantizes them to int8",
        ),
        (
            "torchao",
            {"quant_type": "int8wo"},
            layer("torchao", "int8", activations="int8", **INT8_ROWS),
            "quantizes activations to int8, though Int8WeightOnlyConfig leaves them",
        ),
        ("torchao", {"quant_type": "int8wo"}, layer("torchao", "float8_e4m3fn", **INT8_ROWS), "not int8"),
        (
            "torchao",
            {"quant_type": "int4wo", "group_size": 32},
            layer("torchao", "int4", granularity="PerGroup(128)"),
            "its scales are PerGroup(128), not PerGroup(32)",
        ),
        ("torchao", {"quant_type": "int4wo", "group_size": 256}, layer("torchao", "int4", granularity="PerRow"), ""),
        (
            "torchao",
            {"quant_type": "float8wo", "weight_dtype": "float8_e5m2"},
            layer("torchao", "float8_e4m3fn", **INT8_ROWS),
            "in float8_e4m3fn, not float8_e5m2 (Float8WeightOnlyConfig)",
        ),
        (
            "torchao",
            {"quant_type": "IntxWeightOnlyConfig", "weight_dtype": "int4"},
            layer("torchao", "int4 in int8", **INT8_ROWS),
            "",
        ),
        (
            "torchao",
            {"quant_type": "int8wo"},
            layer("torchao", "int8", state_bytes=0, **INT8_ROWS),
            "scales are missing",
        ),
        ("quanto", {}, layer("quanto", "int8"), ""),
        ("quanto", {"weights_dtype": "float8"}, layer("quanto", "float8_e4m3fn"), ""),
        ("quanto", {"weights_dtype": "int4"}, layer("quanto", "int8"), "in int8, not int4"),
        ("quanto", {}, layer("quanto", "int8", activations="int8"), "though weights alone were asked for"),
        ("gguf", {"file": "a.gguf", "compute_dtype": "bfloat16"}, layer("gguf", "Q4_0", compute_dtype="bfloat16"), ""),
        (
            "gguf",
            {"file": "a.gguf", "compute_dtype": "bfloat16"},
            layer("gguf", "Q4_0", compute_dtype="float32"),
            "computes in float32, not bfloat16",
        ),
        ("layerwise_casting", {}, layer("layerwise_casting", "float8_e4m3fn"), ""),
        (
            "layerwise_casting",
            {"storage_dtype": "float8_e5m2"},
            layer("layerwise_casting", "float8_e4m3fn"),
            "stored in float8_e4m3fn, not float8_e5m2",
        ),
    ],
)
def test_what_is_wrong_with_a_layer_is_said(backend: Any, kwargs: Any, stored: Layer, wrong: str) -> None:
    said = BACKENDS[backend].wrong(Quantization(backend, ["m"], kwargs), stored)
    assert (said == "") == (wrong == "")
    assert wrong in said


@pytest.mark.parametrize(
    ("backend", "stored", "most"),
    [
        ("torchao", layer("torchao", "int8", granularity="PerRow"), 128 * 256 + 8 * 128 + 64),
        ("torchao", layer("torchao", "int4", granularity="PerGroup(32)"), 128 * 128 + 8 * 128 * 8 + 64),
        ("quanto", layer("quanto", "int2", granularity="PerGroup(128)"), 128 * 64 + 8 * 128 * 2),
        ("gguf", layer("gguf", "Q4_0"), 128 * 256 // 32 * 18),
        ("layerwise_casting", layer("layerwise_casting", "float8_e4m3fn"), 128 * 256),
    ],
)
def test_a_layer_takes_no_more_than_its_format(backend: str, stored: Layer, most: int) -> None:
    pytest.importorskip("gguf")
    assert BACKENDS[backend].most_bytes(stored) == most


def test_a_forecast_of_a_backend_whose_kernels_are_not_known_is_refused() -> None:
    from pytest_diffopt.errors import ForecastError
    from pytest_diffopt.forecasting.running import forecast

    with pytest.raises(
        ForecastError, match=r"r: what torchao takes is not forecast yet; of the backends bitsandbytes_4bit"
    ):
        forecast(Recipe("r", "tiny-flux", dtype="bfloat16", quantization=INT8), model="flux.1-dev")
