"""Real pipelines, quantized, compiled and hooked: the structure that the libraries really have, and no false alarm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers.models.attention_dispatch  # noqa: F401  its import sets a global that the snapshots compare
import pytest

from pytest_diffopt import Call, Compilation, Observation, Offloading, Quantization, Recipe, Verdict
from pytest_diffopt.accelerators import select
from pytest_diffopt.checks.parity import distance
from pytest_diffopt.checks.session import Session
from pytest_diffopt.preparation.borrowed_state import differences, take_snapshot

NF4 = Quantization(
    "bitsandbytes_4bit",
    components=["transformer", "text_encoder_2"],
    kwargs={"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
)
SMALL = Call(sizes=[(64, 64)], kwargs={"max_sequence_length": 32})
DYNAMIC_SHAPES = {"capture_dynamic_output_shape_ops": True}
WAN_NF4 = Quantization("bitsandbytes_4bit", components=["transformer", "text_encoder"], kwargs=dict(NF4.kwargs))
WAN: dict[str, Any] = {
    "pipeline": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "dtype": "bfloat16",
    "call": Call(num_inference_steps=2, kwargs={"max_sequence_length": 64}),
}
FLUX: dict[str, Any] = {"pipeline": "black-forest-labs/FLUX.1-dev", "dtype": "bfloat16", "call": SMALL}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    held = Session()
    yield held
    held.release()


@pytest.fixture(scope="module")
def on_the_host() -> Iterator[Session]:
    held = Session(select("cpu"))
    yield held
    held.release()


def judged(session: Session, recipe: Recipe) -> tuple[dict[str, Verdict], Observation]:
    before = take_snapshot()
    verdicts = {verdict.check: verdict for verdict in session.judge_all(recipe)}
    assert differences(before, take_snapshot(), with_random=True) == []
    return verdicts, session.observe(recipe)


def judged_on_the_host(session: Session, recipe: Recipe) -> tuple[dict[str, Verdict], Observation]:
    """The host has no memory apart: that check applies to what is quantized or offloaded, and cannot tell."""
    verdicts, observation = judged(session, recipe)
    if recipe.quantization is not None or recipe.offloading is not None:
        assert verdicts.pop("memory").status == "unverified"
    return verdicts, observation


def texts(verdicts: dict[str, Verdict]) -> str:
    return "\n".join(verdict.text for verdict in verdicts.values())


def test_quantized(session: Session) -> None:
    verdicts, observation = judged(session, Recipe("nf4", quantization=NF4, **FLUX))
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    assert verdicts["quantization"].sentence.startswith("62 layers of transformer, text_encoder_2 in nf4, 4.5")
    plain = [layer.path for layer in observation.layers if layer.component == "text_encoder_2" and not layer.format]
    assert all(path.endswith("wo") for path in plain)  # the library keeps T5's `wo` in float32


def test_quantized_and_compiled_whole(session: Session) -> None:
    compilation = Compilation("transformer", backend="eager", fullgraph=True, memory_format="channels_last")
    recipe = Recipe("whole", quantization=NF4, compilation=compilation, dynamo=DYNAMIC_SHAPES, **FLUX)
    verdicts, observation = judged(session, recipe)
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    record = observation.compiles
    assert (len(record.frames), record.graphs, len(record.recompiles), len(record.graph_breaks)) == (1, 1, 0, 0)
    assert verdicts["engagement"].figures["engaged_calls"] == 9  # three calls of three steps


def test_quantized_and_compiled_by_region_recompiles_once_and_that_is_healthy(session: Session) -> None:
    compilation = Compilation("transformer", scope="repeated_blocks", backend="eager", fullgraph=True)
    recipe = Recipe("regional", quantization=NF4, compilation=compilation, dynamo=DYNAMIC_SHAPES, **FLUX)
    verdicts, observation = judged(session, recipe)
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    record = observation.compiles
    assert (len(record.frames), record.graphs, len(record.recompiles)) == (3, 3, 1)
    assert "stride mismatch" in record.recompiles[0].guards[0]


def test_quantized_compiled_and_offloaded_breaks_in_the_hooks_alone(session: Session) -> None:
    recipe = Recipe(
        "offloaded",
        quantization=NF4,
        compilation=Compilation("transformer", backend="eager"),
        offloading=Offloading("model"),
        dynamo={"cache_size_limit": 1000, **DYNAMIC_SHAPES},
        **FLUX,
    )
    verdicts, observation = judged(session, recipe)
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    assert {b.place.file for b in observation.compiles.graph_breaks} == {"accelerate/hooks.py"}
    assert observation.compiles.graphs == 1


def test_offloaded_leaf_by_leaf_exhausts_the_limit_and_is_told_so(session: Session) -> None:
    recipe = Recipe(
        "sequential",
        pipeline="tiny-flux",
        call=SMALL,
        compilation=Compilation("transformer", backend="eager"),
        offloading=Offloading("sequential", components=["transformer"]),
    )
    verdicts, _ = judged(session, recipe)
    assert verdicts["recompiles"].status == "failed"
    assert "the recompile_limit is exhausted" in verdicts["recompiles"].sentence
    assert verdicts["engagement"].status == "failed"
    assert verdicts["parity"].status == "passed"  # the output matches all the same: only the structure shows it


def test_a_dynamic_shape_operator_without_its_setting_is_found_with_its_hint(session: Session) -> None:
    int8 = Quantization("bitsandbytes_8bit", components=["transformer"])
    recipe = Recipe("int8", quantization=int8, compilation=Compilation("transformer", backend="eager"), **FLUX)
    verdicts, _ = judged(session, recipe)
    assert verdicts["quantization"].status == "passed"
    assert verdicts["graph_breaks"].status == "failed"
    assert "capture_dynamic_output_shape_ops = True" in verdicts["graph_breaks"].text


def test_an_autoencoder_that_is_compiled_by_a_call_that_nobody_makes(session: Session) -> None:
    recipe = Recipe("vae", pipeline="tiny-flux", call=SMALL, compilation=Compilation("vae", backend="eager"))
    verdicts, _ = judged(session, recipe)
    assert verdicts["engagement"].status == "failed"
    assert "compiled code of vae never ran: its compiled call was never entered" in verdicts["engagement"].sentence


@pytest.mark.parametrize("scope", ["module", "repeated_blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_unet(session: Session, scope: str, dtype: str) -> None:
    compilation = Compilation("unet", scope=scope, backend="aot_eager", fullgraph=True)
    recipe = Recipe(f"unet-{scope}-{dtype}", pipeline="tiny-sd", dtype=dtype, compilation=compilation)
    verdicts, _ = judged(session, recipe)
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)


def test_a_component_that_the_pipeline_lacks_is_named_with_those_it_has(session: Session) -> None:
    recipe = Recipe("lacking", pipeline="tiny-flux", compilation=Compilation("unet", backend="eager"))
    verdicts, _ = judged(session, recipe)
    expected = "found 'unet'; the pipeline has: text_encoder, text_encoder_2, transformer, vae"
    assert expected in verdicts["engagement"].sentence


def test_other_components_are_observed_by_name_and_step(session: Session) -> None:
    observation = session.observe(Recipe("nf4", quantization=NF4, **FLUX))
    steps = {(o.component, o.step) for o in observation.outputs if o.call == 0}
    assert {("text_encoder", 0), ("text_encoder_2", 0), ("transformer", 2), ("vae", 0), ("", 0)} <= steps
    assert observation.precise_dtype == "float32"


def test_a_video_quantized_keeps_what_its_class_keeps_and_that_is_healthy(on_the_host: Session) -> None:
    verdicts, observation = judged_on_the_host(on_the_host, Recipe("wan", quantization=WAN_NF4, **WAN))
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    assert verdicts["quantization"].sentence.startswith("46 layers of transformer, text_encoder in nf4, 4.5")
    others = {(other.component, other.dtype): other.examples for other in observation.other_parameters}
    assert "blocks.2.scale_shift_table" in others["transformer", "float32"]
    assert ("text_encoder", "float32") not in others  # transformers keeps its list for float16 alone
    assert ("vae", "float32") not in others
    assert observation.precise_dtype == "float32"


def test_the_frames_of_a_video_are_compared_and_other_inputs_change_them(on_the_host: Session) -> None:
    observation = on_the_host.observe(Recipe("wan", quantization=WAN_NF4, **WAN))
    frames = {o.call: o for o in observation.outputs if o.component == ""}
    assert {(o.leaf, o.shape) for o in frames.values()} == {("frames", (1, 5, 3, 64, 64))}
    assert [call.kind for call in observation.calls] == ["call", "call", "call"]
    assert len({call.prompt for call in observation.calls}) > 1
    assert distance(frames[2], frames[0]).rms > 1e-2
    assert distance(frames[1], frames[0]).rms == 0


def test_the_sensitivity_run_changes_the_frames_of_a_video(on_the_host: Session) -> None:
    call = Call(prompts=["a cat"], num_inference_steps=1, calls=1, sizes=[(48, 32, 9)])
    verdicts, observation = judged_on_the_host(on_the_host, Recipe("wan-once", **{**WAN, "call": call}))
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    first, changed = (o for o in observation.outputs if o.component == "")
    assert [record.kind for record in observation.calls] == ["call", "sensitivity"]
    assert first.shape == (1, 9, 3, 48, 32)
    assert distance(changed, first).rms > 1e-1


@pytest.mark.parametrize("quantization", [None, WAN_NF4], ids=["plain", "nf4"])
@pytest.mark.parametrize(("scope", "runs"), [("module", 12), ("repeated_blocks", 36)])
def test_a_video_transformer_compiled(on_the_host: Session, scope: str, runs: int, quantization: Any) -> None:
    compilation = Compilation("transformer", scope=scope, backend="eager", fullgraph=True)
    recipe = Recipe("wan", quantization=quantization, compilation=compilation, dynamo=DYNAMIC_SHAPES, **WAN)
    verdicts, observation = judged_on_the_host(on_the_host, recipe)
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    assert (len(observation.compiles.frames), observation.compiles.graphs) == (1, 1)
    assert verdicts["engagement"].figures["engaged_calls"] == runs  # two passes a step, with the prompt and without
    assert verdicts["parity"].figures["yardstick"] == "against float32"


def test_a_video_of_another_length_recompiles_and_is_told_so(on_the_host: Session) -> None:
    call = Call(sizes=[(64, 64, 5), (64, 64, 9)], num_inference_steps=1)
    compilation = Compilation("transformer", backend="eager", fullgraph=True)
    verdicts, _ = judged_on_the_host(on_the_host, Recipe("wan", compilation=compilation, **{**WAN, "call": call}))
    assert verdicts["recompiles"].status == "failed"
    assert "size mismatch at index 2. expected 2, actual 3" in verdicts["recompiles"].text
    assert verdicts["parity"].status == "passed"


def test_a_video_pipeline_whose_autoencoder_stays_in_float32(on_the_host: Session) -> None:
    import torch
    from diffusers import DiffusionPipeline

    from pytest_diffopt.replicas import resolve

    def factory() -> Any:
        dtypes = {"vae": torch.float32, "default": torch.bfloat16}
        return DiffusionPipeline.from_pretrained(resolve("tiny-wan").path_or_id, torch_dtype=dtypes)

    call = Call(num_inference_steps=1, sizes=[(32, 32, 5)], kwargs={"max_sequence_length": 64})
    compilation = Compilation("transformer", backend="eager", fullgraph=True)
    recipe = Recipe("wan-as-published", pipeline=factory, quantization=WAN_NF4, compilation=compilation, call=call)
    verdicts, observation = judged_on_the_host(on_the_host, recipe)
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    assert {o.dtype for o in observation.outputs if o.component == "vae"} == {"float32"}
    assert {o.dtype for o in observation.outputs if o.component == "transformer"} == {"bfloat16"}


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_a_video_pipeline_offloaded_by_groups_on_the_host_gives_the_same_frames(
    on_the_host: Session, offload_type: str
) -> None:
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    offloading = Offloading("group", offload_type=offload_type, **blocks)
    verdicts, observation = judged_on_the_host(on_the_host, Recipe("wan", offloading=offloading, **WAN))
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    reference = on_the_host.observe(Recipe("wan", **WAN))
    frames = [[o.values for o in observed.outputs if o.component == ""] for observed in (observation, reference)]
    assert len(frames[0]) == 3
    assert frames[0] == frames[1]


@pytest.mark.parametrize("strategy", ["model", "group"])
def test_a_video_pipeline_offloaded_leaves_the_accelerator_with_its_feature_cache(strategy: str) -> None:
    session = Session(select("sim"))
    verdicts, observation = judged(session, Recipe("wan", offloading=Offloading(strategy), **WAN))
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    memory = observation.memory
    assert memory is not None
    # the scheduler keeps two predictions and a sample; the autoencoder's frames of 64 x 64 would be far more
    latents = 4 * 16 * 2 * 8 * 8
    left = {call.live_bytes - memory.before_bytes - sum(call.residency.values()) for call in memory.calls}
    assert len(left) == 1  # a noise that the observation keeps for itself must not be among them
    assert 0 < left.pop() <= 3 * latents + 64
    session.release()


# What diffusers' guides of each family combine; a prompt of another length is another shape to Qwen-Image.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny-sdxl": ("unet", "text_encoder_2", {}),
    "tiny-sd3": ("transformer", "text_encoder_3", {}),
    "tiny-ltx": ("transformer", "text_encoder", {}),
    "tiny-cogvideox": ("transformer", "text_encoder", {}),
    "tiny-hunyuanvideo": ("transformer", "text_encoder", {}),
    "tiny-qwen-image": ("transformer", "text_encoder", {"dynamic": True}),
}


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest) -> Iterator[tuple[Session, str, str, dict[str, Any], dict[str, Any]]]:
    name: str = request.param
    denoiser, encoder, how = OTHERS[name]
    quantization = Quantization("bitsandbytes_4bit", components=[denoiser, encoder], kwargs=dict(NF4.kwargs))
    recipe = {"pipeline": name, "dtype": "bfloat16", "quantization": quantization, "call": Call(num_inference_steps=2)}
    session = Session(select("sim"))
    yield session, name, denoiser, how, recipe
    session.release()


def test_another_family_quantized_and_compiled_whole(other: Any) -> None:
    session, _, denoiser, how, recipe = other
    compilation = Compilation(denoiser, backend="eager", fullgraph=True, **how)
    verdicts, observation = judged(session, Recipe("nf4", compilation=compilation, dynamo=DYNAMIC_SHAPES, **recipe))
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
    assert not observation.compiles.graph_breaks
    assert len({call.prompt for call in observation.calls}) > 1


def test_another_family_quantized_and_offloaded_by_components(other: Any) -> None:
    session, _, _, _, recipe = other
    verdicts, _ = judged(session, Recipe("model", offloading=Offloading("model"), **recipe))
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)


def test_another_family_offloaded_by_groups(other: Any) -> None:
    session, _, _, _, recipe = other
    offloading = Offloading("group", offload_type="leaf_level")
    verdicts, _ = judged(session, Recipe("group", offloading=offloading, **{**recipe, "quantization": None}))
    assert {v.status for v in verdicts.values()} == {"passed"}, texts(verdicts)
