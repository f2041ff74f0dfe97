"""Real pipelines, quantized, compiled and hooked: the structure that the libraries really have, and no false alarm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pytest_diffopt import Call, Compilation, Observation, Offloading, Quantization, Recipe, Verdict
from pytest_diffopt.checks.session import Session
from pytest_diffopt.preparation.borrowed_state import differences, take_snapshot

NF4 = Quantization(
    "bitsandbytes_4bit",
    components=["transformer", "text_encoder_2"],
    kwargs={"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
)
SMALL = Call(sizes=[(64, 64)], kwargs={"max_sequence_length": 32})
DYNAMIC_SHAPES = {"capture_dynamic_output_shape_ops": True}
FLUX: dict[str, Any] = {"pipeline": "black-forest-labs/FLUX.1-dev", "dtype": "bfloat16", "call": SMALL}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    held = Session()
    yield held
    held.release()


def judged(session: Session, recipe: Recipe) -> tuple[dict[str, Verdict], Observation]:
    before = take_snapshot()
    verdicts = {verdict.check: verdict for verdict in session.judge_all(recipe)}
    assert differences(before, take_snapshot(), with_random=True) == []
    return verdicts, session.observe(recipe)


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
    assert verdicts.pop("memory").status == "unverified"
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
