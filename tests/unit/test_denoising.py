"""Attention backends and caches in recipes: the names are the installed diffusers', and mistakes are refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pytest_diffopt import Caching, Recipe
from pytest_diffopt.checks import checks_for
from pytest_diffopt.denoising import ATTENTION_BACKENDS, CACHING_KEYS
from pytest_diffopt.errors import RecipeError
from pytest_diffopt.installation import problems_with_installation
from pytest_diffopt.preparation.caching import CONFIGS
from pytest_diffopt.recipe_loading import loads_recipes


def mistakes(make: Any, *args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        make(*args, **kwargs)
    return [str(problem) for problem in caught.value.problems]


def test_the_backends_are_those_of_diffusers() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert {name.value for name in AttentionBackendName} == set(ATTENTION_BACKENDS)


@pytest.mark.parametrize("kind", CACHING_KEYS)
def test_a_kind_takes_what_diffusers_config_takes_but_callables(kind: str) -> None:
    from diffusers import hooks

    fields = {one.name: str(one.type) for one in dataclasses.fields(getattr(hooks, CONFIGS[kind]))}
    plain = {name for name, declared in fields.items() if "Callable" not in declared and not name.startswith("_")}
    assert plain == set(CACHING_KEYS[kind])
    assert set(CONFIGS) == set(CACHING_KEYS)


def test_an_unknown_backend_lists_the_allowed_ones() -> None:
    (text,) = mistakes(Recipe, "a", "tiny-flux", attention="_native_eficient")
    assert text.startswith("attention: found '_native_eficient'; did you mean '_native_efficient'? allowed: 'native', ")
    assert "'xformers'" in text
    several = mistakes(Recipe, "a", "tiny-flux", attention={"transformer": "nativ", "vae": 3})
    assert [text.split(";")[0] for text in several] == [
        "attention.transformer: found 'nativ'",
        "attention.vae: found 3",
    ]
    assert mistakes(Recipe, "a", "tiny-flux", attention={})[0].startswith("attention: found {}; a backend's name")


@pytest.mark.parametrize(
    ("kind", "kwargs", "mistake"),
    [
        ("first_block_cache", {"treshold": 0.2}, "kwargs.treshold: found an unknown key; did you mean 'threshold'?"),
        ("first_block_cache", {"threshold": "0.2"}, "kwargs.threshold: found '0.2'; a finite number"),
        ("first_block_cache", {"threshold": float("inf")}, "kwargs.threshold: found inf; a finite number"),
        ("first_block", {}, "kind: found 'first_block'; did you mean 'first_block_cache'?"),
        (
            "pyramid_attention_broadcast",
            {"current_timestep_callback": print},
            "kwargs.current_timestep_callback: found an unknown key",
        ),
        (
            "pyramid_attention_broadcast",
            {"spatial_attention_timestep_skip_range": [1]},
            "kwargs.spatial_attention_timestep_skip_range: found [1]; two numbers",
        ),
        ("faster_cache", {"tensor_format": "BHWC"}, "kwargs.tensor_format: found 'BHWC'; 'BCFHW', 'BFCHW' or 'BCHW'"),
        ("faster_cache", {"is_guidance_distilled": 1}, "kwargs.is_guidance_distilled: found 1; true or false"),
        ("mag_cache", {}, "kwargs.mag_ratios: found nothing; they must be given"),
        ("mag_cache", {"mag_ratios": []}, "kwargs.mag_ratios: found []; a list of numbers"),
        ("taylorseer_cache", {"cache_interval": 0}, "kwargs.cache_interval: found 0; an int >= 1"),
        ("taylorseer_cache", {"taylor_factors_dtype": "int8"}, "kwargs.taylor_factors_dtype: found 'int8'; 'float32'"),
        ("taylorseer_cache", {"cache_identifiers": "a"}, "kwargs.cache_identifiers: found 'a'; a list of strings"),
        ("sea_cache", {"residual_order": 2}, "kwargs.residual_order: found 2; 0 or 1"),
        ("text_kv_cache", {"threshold": 1}, "kwargs.threshold: found an unknown key; allowed keys: none"),
    ],
)
def test_a_mistake_in_a_cache_is_refused_by_name(kind: str, kwargs: dict[str, Any], mistake: str) -> None:
    (text,) = mistakes(Caching, "transformer", kind, kwargs)
    assert text.startswith(mistake)


def test_two_caches_of_one_component_are_refused() -> None:
    twice = [Caching("transformer", "first_block_cache"), Caching("transformer", "sea_cache")]
    (text,) = mistakes(Recipe, "a", "tiny-flux", caching=twice)
    assert text == "caching[1].component: found 'transformer', which caching[0] names already; one cache each"


def test_torch_objects_are_kept_as_plain_data() -> None:
    by_name = Caching("transformer", "taylorseer_cache", {"taylor_factors_dtype": "float32"})
    assert Caching("transformer", "taylorseer_cache", {"taylor_factors_dtype": torch.float32}) == by_name
    ratios = Caching("transformer", "mag_cache", {"mag_ratios": torch.tensor([1.0, 0.5])})
    assert ratios.kwargs["mag_ratios"] == [1.0, 0.5]


def test_a_recipe_file_holds_both_and_a_child_replaces_them_whole() -> None:
    recipes = loads_recipes(
        """
        [recipe.base]
        pipeline = "tiny-flux"
        attention = { transformer = "_native_efficient" }
        caching = { component = "transformer", kind = "first_block_cache", kwargs = { threshold = 0.2 } }
        [recipe.child]
        extends = "base"
        attention = "native"
        caching = { component = "transformer", kind = "taylorseer_cache" }
        """
    )
    base, child = recipes["base"], recipes["child"]
    assert base.attention == {"transformer": "_native_efficient"}
    assert base.caching == (Caching("transformer", "first_block_cache", {"threshold": 0.2}),)
    assert (child.attention, child.caching) == ("native", (Caching("transformer", "taylorseer_cache"),))
    assert loads_recipes(base.to_toml()) == {"base": base}


def test_references_keep_both_and_the_content_counts_them_only_where_they_are_set() -> None:
    plain = Recipe("a", "tiny-flux")
    for field, value in {"attention": "native", "caching": {"component": "transformer", "kind": "sea_cache"}}.items():
        changed = plain.replace(**{field: value})
        assert changed.content_hash != plain.content_hash
        reference = changed.without("compilation", "offloading", "quantization", "dynamo")
        assert getattr(reference, field) == getattr(changed, field)
        assert checks_for(changed) == (field, "parity", "state")
    assert plain.replace(attention=None, caching=None).content_hash == plain.content_hash


def test_a_backend_whose_package_is_missing_is_refused_with_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    for name in ("_CAN_USE_FLASH_ATTN", "_CAN_USE_SAGE_ATTN", "_CAN_USE_XFORMERS_ATTN"):
        monkeypatch.setattr(attention_dispatch, name, False)
    wanted = {"transformer": "flash", "vae": "sage", "text_encoder": "xformers"}
    problems = problems_with_installation(Recipe("a", "tiny-flux", attention=wanted))
    assert [problem.path for problem in problems] == [f"recipe.attention.{name}" for name in wanted]
    for problem, package in zip(problems, ("flash-attn", "sageattention", "xformers"), strict=True):
        assert f"Please install `{package}" in problem.allowed
    assert problems_with_installation(Recipe("a", "tiny-flux", attention="_native_math")) == []


def test_components_that_are_not_there_are_refused() -> None:
    recipe = Recipe("a", "tiny-flux", attention={"unet": "native"}, caching=Caching("unet", "first_block_cache"))
    assert [str(problem).split(";")[0] for problem in problems_with_installation(recipe)] == [
        "recipe.attention: found 'unet'",
        "recipe.caching.component: found 'unet'",
    ]
