"""Faults of attention backends: layers that nobody told, that ignore what they are told, or that are told otherwise later."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pytest_diffopt import Call, Compilation, Offloading, Recipe, Verdict
from pytest_diffopt.accelerators import select
from pytest_diffopt.checks.session import Session
from pytest_diffopt.errors import PreparationError
from pytest_diffopt.preparation.attention import attention_of
from pytest_diffopt.preparation.pipeline import prepared
from pytest_diffopt.replicas import ensure

CALL = Call(num_inference_steps=1, sizes=(32, 32), kwargs={"max_sequence_length": 32})


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    held = Session(select("sim"))
    yield held
    held.release()


def flux(cls: Any = None) -> Any:
    from diffusers import FluxPipeline

    return (cls or FluxPipeline).from_pretrained(ensure("tiny-flux"))


def verdict(session: Session, pipeline: Any = "tiny-flux", attention: Any = None, **fields: Any) -> Verdict:
    asked = attention or {"transformer": "_native_math"}
    recipe = Recipe("attends", pipeline, **{"call": CALL, "attention": asked, **fields})
    return session.judge(recipe, "attention")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"offloading": Offloading("model")},
        {"compilation": Compilation("transformer", backend="eager", fullgraph=True)},
    ],
    ids=["plain", "offloaded", "compiled"],
)
def test_a_backend_that_every_layer_used_passes(session: Session, fields: dict[str, Any]) -> None:
    found = verdict(session, **fields)
    assert found.status == "passed", found.text
    seen = ", in the eager reference" if "compilation" in fields else ""
    assert found.sentence == f"4 layers attended 12 times, all as asked: transformer by _native_math{seen}"


def test_the_other_checks_of_a_recipe_with_a_backend_pass(session: Session) -> None:
    recipe = Recipe(
        "attends",
        "tiny-flux",
        dtype="bfloat16",
        call=CALL,
        attention={"transformer": "_native_flash"},
        compilation=Compilation("transformer", backend="eager", fullgraph=True),
    )
    verdicts = session.judge_all(recipe)
    assert {one.status for one in verdicts} == {"passed"}, [one.text for one in verdicts]
    parity = next(one for one in verdicts if one.check == "parity")
    assert "against float" in parity.sentence, (
        "flash attention takes no float32, and the yardstick is there all the same"
    )


def test_one_name_is_for_all_that_can_be_told_and_the_rest_is_said(session: Session) -> None:
    found = verdict(session, attention="_native_math")
    assert found.status == "passed"
    assert "all as asked: transformer by _native_math" in found.sentence
    assert found.evidence == (
        "vae: AttnProcessor2_0 does not ask diffusers' dispatcher and computes by itself (decoder.mid_block.attentions.0, …)",
    )


def test_a_component_of_old_processors_is_told(session: Session) -> None:
    found = verdict(session, attention={"vae": "_native_math"})
    assert (found.status, found.sentence) == ("failed", "1 of 1 attention layer of vae ignored _native_math")
    everything = verdict(session, "tiny-sd", "_native_math", call=Call(num_inference_steps=1))
    assert everything.sentence == "no attention layer used _native_math: none that ran can be told"
    assert "unet: AttnProcessor2_0 does not ask" in everything.text


def _processor(dispatch: Callable[..., Any], *, told: bool) -> Any:
    """Flux's own processor, but for what it calls in the dispatcher's place."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    original: Any = FluxAttnProcessor.__call__
    call = types.FunctionType(original.__code__, {**original.__globals__, "dispatch_attention_fn": dispatch})
    call.__defaults__, call.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    fields: dict[str, Any] = {"__call__": call, "_parallel_config": None}
    return type("Fused", (), fields | ({"_attention_backend": None} if told else {"_attention_backend_": None}))()


def _by_itself(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask).transpose(1, 2)


def _by_another(*args: Any, **kwargs: Any) -> torch.Tensor:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    return dispatch_attention_fn(*args, **{**kwargs, "backend": AttentionBackendName.NATIVE})


def with_processor(dispatch: Callable[..., Any]) -> Callable[[], Any]:
    def factory() -> Any:
        pipeline = flux()
        pipeline.transformer.transformer_blocks[0].attn.processor = _processor(dispatch, told=True)
        return pipeline

    return factory


def test_a_fused_processor_that_ignores_what_it_is_told_fails(session: Session) -> None:
    found = verdict(session, with_processor(_by_itself))
    assert found.sentence == "1 of 4 attention layers of transformer ignored _native_math"
    assert "Fused was told, and did not ask diffusers' dispatcher" in found.text
    assert found.status == "failed"


def test_a_layer_that_attends_by_another_backend_fails(session: Session) -> None:
    found = verdict(session, with_processor(_by_another))
    assert found.sentence == "of 12 attentions of transformer, 3 by native, not by _native_math"
    assert "transformer.transformer_blocks.0.attn: by native in call 0" in found.evidence


def test_a_backend_that_a_call_exchanges_fails_compiled_or_not(session: Session) -> None:
    from diffusers import FluxPipeline

    class Exchanges(FluxPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            self.transformer.set_attention_backend("native")
            return result

    def factory() -> Any:
        return flux(Exchanges)

    found = verdict(session, factory)
    assert found.sentence == "of 12 attentions of transformer, 8 by native, not by _native_math"
    compiled = verdict(session, factory, compilation=Compilation("transformer", backend="eager"))
    assert compiled.status == "failed"


def test_a_component_that_never_attends_fails(session: Session) -> None:
    from diffusers import FluxPipeline

    class Skips(FluxPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return (torch.randn(1, 3, 8, 8, generator=kwargs["generator"]),)

    found = verdict(session, lambda: flux(Skips))
    assert found.status == "failed"
    assert "no attention layer of" in found.sentence


def test_the_backend_is_set_and_given_back() -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active = _AttentionBackendRegistry._active_backend
    pipeline = flux()
    transformer: Any = pipeline.transformer
    assert attention_of(transformer) is None
    recipe = Recipe("attends", lambda: pipeline, call=CALL, attention={"transformer": "_native_math"})
    with prepared(recipe, select("cpu")) as live:
        assert attention_of(live.components["transformer"]) == "_native_math"
        live.release()
        assert attention_of(transformer) is None
        assert _AttentionBackendRegistry._active_backend == active
    transformer.transformer_blocks[0].attn.processor._attention_backend = "native"
    assert attention_of(transformer) is None, "layers that differ have no one backend"


@pytest.mark.parametrize(
    ("attention", "mistake"),
    [
        ({"unet": "native"}, "attention: found 'unet'; the pipeline has: "),
        ({"text_encoder": "native"}, "attention: text_encoder is a CLIPTextModel, which has no set_attention_backend"),
        (
            {"transformer": "sage"},
            "attention: transformer cannot use 'sage': Sage Attention backend 'sage' is not usable",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(attention: Any, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", False)
    recipe = Recipe("attends", flux, call=CALL, attention=attention)
    with pytest.raises(PreparationError) as caught, prepared(recipe, select("cpu")):
        pass
    assert str(caught.value).startswith(mistake)
