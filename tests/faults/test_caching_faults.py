"""Faults of caches: one that never engages, that nothing carries, that was taken off, or that keeps what a call left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pytest_diffopt import Caching, Call, Compilation, Offloading, Recipe, Verdict
from pytest_diffopt.accelerators import select
from pytest_diffopt.checks import parity
from pytest_diffopt.checks.session import Session
from pytest_diffopt.errors import PreparationError
from pytest_diffopt.preparation.caching import cache_hooks, caching_of
from pytest_diffopt.preparation.pipeline import prepared
from pytest_diffopt.replicas import ensure

CALL = Call(num_inference_steps=4, sizes=(32, 32), kwargs={"max_sequence_length": 32})
ALWAYS = {"spatial_attention_timestep_skip_range": (-1, 1001)}
TAYLOR = Caching("transformer", "taylorseer_cache", {"cache_interval": 2, "disable_cache_before_step": 1})


def first_block(threshold: float = 10.0) -> Caching:
    return Caching("transformer", "first_block_cache", {"threshold": threshold})


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    held = Session(select("sim"))
    yield held
    held.release()


def flux(cls: Any = None) -> Any:
    from diffusers import FluxPipeline

    return (cls or FluxPipeline).from_pretrained(ensure("tiny-flux"))


def verdict(session: Session, caching: Caching, pipeline: Any = "tiny-flux", **fields: Any) -> Verdict:
    recipe = Recipe("cached", pipeline, **{"call": CALL, "caching": caching, **fields})
    return session.judge(recipe, "caching")


HEALTHY = {
    "first_block_cache": (first_block(), 27),
    "pyramid_attention_broadcast": (Caching("transformer", "pyramid_attention_broadcast", ALWAYS), 24),
    "faster_cache": (
        Caching(
            "transformer",
            "faster_cache",
            {"is_guidance_distilled": True, "spatial_attention_timestep_skip_range": (-1, 990)},
        ),
        None,
    ),
    "mag_cache": (
        Caching(
            "transformer",
            "mag_cache",
            {"threshold": 10.0, "mag_ratios": [1.0], "num_inference_steps": 4, "retention_ratio": 0.0},
        ),
        36,
    ),
    "taylorseer_cache": (TAYLOR, 24),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_cache_that_reuses_and_begins_anew_passes(session: Session, kind: str) -> None:
    caching, reused = HEALTHY[kind]
    found = verdict(session, caching)
    assert found.status == "passed", found.text
    assert found.figures["reused"] == reused or (reused is None and found.figures["reused"] > 0)
    assert f"transformer's {kind} reused {found.figures['reused']} of " in found.sentence


@pytest.mark.parametrize(
    "fields",
    [
        {"offloading": Offloading("model")},
        {"offloading": Offloading("group", offload_type="leaf_level")},
        {"compilation": Compilation("vae", backend="eager")},
    ],
    ids=["model", "group", "compiled"],
)
def test_a_cached_recipe_is_compared_with_a_cached_reference(session: Session, fields: dict[str, Any]) -> None:
    recipe = Recipe("cached", "tiny-flux", call=CALL, caching=first_block(), **fields)
    verdicts = {one.check: one for one in session.judge_all(recipe)}
    for check in ("caching", "parity", "state"):
        assert verdicts[check].status == "passed", verdicts[check].text
    assert ("in the eager reference" in verdicts["caching"].sentence) == ("compilation" in fields)


@pytest.mark.parametrize(
    ("kind", "scope", "said"),
    [
        ("first_block_cache", "module", "compiled code ran in all 12 calls of transformer ("),
        ("first_block_cache", "repeated_blocks", "calls of transformer ("),
        ("taylorseer_cache", "module", "compiled code ran in all 6 calls of transformer ("),
        ("pyramid_attention_broadcast", "repeated_blocks", "compiled code ran in all 48 calls of transformer ("),
    ],
)
def test_a_step_that_is_reused_has_nothing_to_compile(session: Session, kind: str, scope: Any, said: str) -> None:
    compilation = Compilation("transformer", backend="eager", scope=scope)
    recipe = Recipe("cached", "tiny-flux", call=CALL, caching=HEALTHY[kind][0], compilation=compilation)
    verdicts = {one.check: one for one in session.judge_all(recipe)}
    assert {one.status for one in verdicts.values()} == {"passed"}, "\n".join(one.text for one in verdicts.values())
    assert said in verdicts["engagement"].sentence
    assert (", and a cache answered" in verdicts["engagement"].sentence) == (
        kind != "pyramid_attention_broadcast" and " 12 " not in said
    )


@pytest.mark.parametrize("scope", ["module", "repeated_blocks"])
def test_a_cache_whose_hooks_keep_every_block_from_being_compiled_fails(session: Session, scope: Any) -> None:
    """diffusers' MagCache marks its hooks with ``torch.compiler.disable``, and the blocks run inside of them."""
    compilation = Compilation("transformer", backend="eager", scope=scope)
    recipe = Recipe("cached", "tiny-flux", call=CALL, caching=HEALTHY["mag_cache"][0], compilation=compilation)
    found = session.judge(recipe, "engagement")
    assert (found.status, found.sentence) == ("failed", "compiled code of transformer never ran")


def test_a_threshold_under_which_every_step_computes_fails(session: Session) -> None:
    found = verdict(session, first_block(0.0))
    assert found.status == "failed"
    assert found.sentence == "transformer's first_block_cache never engaged: all 48 runs under its hooks computed"
    assert found.evidence == ("transformer: with threshold = 0.0 and 4 steps a call no step is reused",)


def test_a_cache_that_asks_for_what_the_pipeline_does_not_tell_fails(session: Session) -> None:
    """diffusers' SeaCache on Flux computes every step, and says so in a log line."""
    assert "never engaged" in verdict(session, Caching("transformer", "sea_cache", {"threshold": 10.0})).sentence


def test_a_cache_that_no_module_carries_fails(session: Session) -> None:
    """diffusers' TaylorSeer knows layers whose name ends with ``attn``; Wan's are called ``attn1`` and ``attn2``."""
    found = verdict(session, TAYLOR, "tiny-wan", call=Call(num_inference_steps=2, calls=2))
    assert found.sentence == (
        "nothing in transformer carries the hooks of its taylorseer_cache: no module is one that it knows"
    )


def test_hooks_that_a_call_takes_off_fail(session: Session) -> None:
    from diffusers import FluxPipeline

    class TakesOff(FluxPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            if self.transformer.is_cache_enabled:
                self.transformer.disable_cache()
            return result

    found = verdict(session, first_block(), lambda: flux(TakesOff))
    assert found.status == "failed"
    assert found.sentence.startswith("4 of 4 hooks of transformer's first_block_cache were gone after the calls")


def keeping(keep: Callable[[Any], None]) -> Callable[[], Any]:
    from diffusers import FluxPipeline

    class Keeps(FluxPipeline):
        def maybe_free_model_hooks(self) -> None:
            keep(self)

    return lambda: flux(Keeps)


def test_a_state_that_is_kept_between_calls_fails(session: Session) -> None:
    found = verdict(session, first_block(), keeping(lambda pipeline: None))
    assert found.status == "failed"
    assert found.sentence.startswith("call 1 began with what another call had left in the first_block_cache")


def test_a_state_that_is_kept_in_part_changes_the_output_and_fails(session: Session) -> None:
    """Its first step computes, as it must; what it predicts after is of the call before."""

    def keep_the_factors(pipeline: Any) -> None:
        for _, hook in cache_hooks(pipeline.transformer, "taylorseer_cache"):
            for state in hook.state_manager._state_cache.values():
                state.current_step = -1

    found = verdict(session, TAYLOR, keeping(keep_the_factors))
    assert found.status == "failed"
    assert found.sentence.startswith("call 1 gave another output than call 0 with the same inputs, by ")


def test_a_cache_of_another_kind_that_a_factory_enabled_fails(session: Session) -> None:
    def factory() -> Any:
        from diffusers.hooks import FirstBlockCacheConfig

        pipeline = flux()
        pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        return pipeline

    found = verdict(session, TAYLOR, factory)
    assert found.sentence == "transformer has a first_block_cache, not the taylorseer_cache that was asked for"
    assert verdict(session, first_block(), factory).status == "passed"


def test_diffusers_faster_cache_fails_where_the_branches_run_one_by_one(session: Session) -> None:
    """It halves every batch, also where the pipeline calls the transformer with one branch, as Flux and Wan do."""
    found = verdict(session, Caching("transformer", "faster_cache"))
    said = "the recipe did not run: IndexError: tuple index out of range (while running call 0, in transformer)"
    assert found.sentence == said


def test_what_only_shows_inside_a_module_is_unverified(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_diffopt.checks import caching as check

    monkeypatch.setattr(check, "UNSEEN", {"first_block_cache"})
    found = verdict(session, first_block())
    assert found.status == "unverified"


def test_a_copy_for_the_yardstick_has_a_cache_of_its_own(session: Session) -> None:
    def factory() -> Any:
        return flux()

    recipe = Recipe("cached", factory, call=CALL, caching=first_block())
    seen = session.observe(recipe)
    assert seen.failure is None
    assert seen.precise_outputs, seen.notes
    precise = {output.key: output for output in seen.precise_outputs}
    results = [output for output in seen.outputs if output.component == ""]
    uncached = {o.key: o for o in session.observe(recipe.replace(caching=())).outputs}
    for output in results:
        near, far = (parity.distance(output, other[output.key]).rms for other in (precise, uncached))
        assert near < 1e-4 < far


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_cache_is_read_off_a_live_component_and_taken_off(kind: str) -> None:
    caching, _ = HEALTHY[kind]
    pipeline = flux()
    before = [module.forward for module in pipeline.transformer.modules()]
    recipe = Recipe("cached", lambda: pipeline, call=CALL, caching=caching)
    assert caching_of(pipeline.transformer) is None
    with prepared(recipe, select("cpu")) as live:
        transformer = live.components["transformer"]
        found = caching_of(transformer)
        assert found is not None
        given = dict(caching.kwargs)
        if kind == "pyramid_attention_broadcast":
            given["spatial_attention_block_skip_range"] = 2  # what diffusers takes where none is given
        if kind == "mag_cache":
            given["mag_ratios"] = [1.0] * 4  # as many as there are steps
        assert Caching("transformer", *found) == Caching("transformer", kind, given)
        live.release()
    assert caching_of(pipeline.transformer) is None
    assert [module.forward for module in pipeline.transformer.modules()] == before
    assert list(cache_hooks(pipeline.transformer, kind)) == []


def test_a_cache_that_was_applied_directly_is_read_too() -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    transformer = flux().transformer
    apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=0.2))
    assert caching_of(transformer) == ("first_block_cache", {"threshold": 0.2})


@pytest.mark.parametrize(
    ("caching", "pipeline", "mistake"),
    [
        (Caching("unet", "first_block_cache"), "tiny-flux", "caching.component: found 'unet'; the pipeline has: "),
        (
            Caching("unet", "first_block_cache"),
            "tiny-sd",
            "caching.component: unet is a UNet2DConditionModel, which has no enable_cache(); no component has",
        ),
        (
            Caching("model", "pyramid_attention_broadcast"),
            lambda: flux().transformer,
            "caching: pyramid_attention_broadcast asks for the timestep, which FluxTransformer2DModel does not tell",
        ),
    ],
)
def test_what_takes_no_cache_is_refused(caching: Caching, pipeline: Any, mistake: str) -> None:
    recipe = Recipe("cached", pipeline, call=Call(inputs={"x": torch.ones(1)}), caching=caching)
    with pytest.raises(PreparationError) as caught, prepared(recipe, select("cpu")):
        pass
    assert str(caught.value).startswith(mistake)
