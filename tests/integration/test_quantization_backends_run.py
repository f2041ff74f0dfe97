"""tiny-flux in every backend on the simulated device: loaded by the libraries, compiled, offloaded, and judged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers.models.attention_dispatch  # noqa: F401  its import sets a global that the snapshots compare
import pytest

from pytest_diffopt import Call, Compilation, Offloading, Quantization, Recipe, Verdict, check
from pytest_diffopt.accelerators import select
from pytest_diffopt.checks.session import Session
from pytest_diffopt.preparation.pipeline import prepared
from pytest_diffopt.preparation.quantization import quantization_of

pytest.importorskip("torchao")
pytest.importorskip("optimum.quanto")
pytest.importorskip("gguf")

QUIET = {"set_inductor_config": False}
FILE = "https://huggingface.co/city96/FLUX.1-dev-gguf/blob/main/flux1-dev-{}.gguf"
BOTH = ["transformer", "text_encoder_2"]
BACKENDS: dict[str, Quantization] = {
    "int8wo": Quantization("torchao", BOTH, {"quant_type": "int8wo", **QUIET}),
    "int8dq": Quantization("torchao", "transformer", {"quant_type": "int8dq", **QUIET}),
    "quanto": Quantization("quanto", BOTH, {"weights_dtype": "int8"}),
    "Q8_0": Quantization("gguf", "transformer", {"file": FILE.format("Q8_0"), "compute_dtype": "bfloat16"}),
    "Q2_K": Quantization("gguf", "transformer", {"file": FILE.format("Q2_K"), "compute_dtype": "bfloat16"}),
    "casting": Quantization(
        "layerwise_casting", "transformer", {"storage_dtype": "float8_e4m3fn", "compute_dtype": "bfloat16"}
    ),
}
SENTENCES = {
    "int8wo": "62 layers of transformer, text_encoder_2 in int8, 8.134 bits a weight",
    "int8dq": "50 layers of transformer in int8, 8.13 bits a weight",
    "quanto": "62 layers of transformer, text_encoder_2 in int8, 8.054 bits a weight",
    "Q8_0": "40 layers of transformer in Q8_0, 8.5 bits a weight",
    "Q2_K": "40 layers of transformer in Q2_K, 2.625 bits a weight",
    "casting": "40 layers of transformer in float8_e4m3fn, 8.0 bits a weight",
}
SMALL = Call(sizes=[(64, 64)], num_inference_steps=2, kwargs={"max_sequence_length": 32})


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    held = Session(select("sim"))
    yield held
    held.release()


def recipe(quantization: Any, **parts: Any) -> Recipe:
    fields: dict[str, Any] = {"pipeline": "tiny-flux", "dtype": "bfloat16", "call": SMALL, **parts}
    return Recipe("backend", quantization=quantization, **fields)


def judged(session: Session, one: Recipe) -> dict[str, Verdict]:
    return {verdict.check: verdict for verdict in session.judge_all(one)}


def texts(verdicts: dict[str, Verdict]) -> str:
    return "\n".join(verdict.text for verdict in verdicts.values())


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "casting"])
def test_every_backend_compiles_in_one_graph(session: Session, name: str) -> None:
    backend = "aot_eager" if name == "int8wo" else "eager"
    verdicts = judged(
        session, recipe(BACKENDS[name], compilation=Compilation("transformer", backend=backend, fullgraph=True))
    )
    assert {verdict.status for verdict in verdicts.values()} == {"passed"}, texts(verdicts)
    assert verdicts["quantization"].sentence == SENTENCES[name]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_leaves_the_device_with_its_inner_tensors(session: Session, name: str) -> None:
    offloaded = recipe(BACKENDS[name], offloading=Offloading("model"))
    verdicts = judged(session, offloaded)
    assert {verdict.status for verdict in verdicts.values()} == {"passed"}, texts(verdicts)
    assert verdicts["quantization"].sentence == SENTENCES[name]
    observation = session.observe(offloaded)
    assert observation.memory is not None
    assert observation.memory.residency is not None
    transformer = next(one for one in observation.components if one.name == "transformer")
    held = max(phase.weights.get("transformer", 0) for phase in observation.memory.residency.phases[1:])
    # every byte of it was there as weights: what is inside wrappers as well
    assert transformer.bytes <= held <= 1.1 * transformer.bytes + 2**16


@pytest.mark.parametrize("name", ["int8dq", "Q2_K", "casting"])
def test_group_offloading_takes_what_is_inside_too(session: Session, name: str) -> None:
    verdicts = judged(session, recipe(BACKENDS[name], offloading=Offloading("group")))
    assert {verdict.status for verdict in verdicts.values()} == {"passed"}, texts(verdicts)
    assert verdicts["memory"].figures["ratio"] < 0.3


def test_two_backends_in_one_recipe(session: Session) -> None:
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    both = [BACKENDS["int8dq"], Quantization("bitsandbytes_4bit", "text_encoder_2", nf4)]
    verdicts = judged(session, recipe(both))
    assert {verdict.status for verdict in verdicts.values()} == {"passed"}, texts(verdicts)
    assert verdicts["quantization"].sentence.startswith("62 layers of transformer, text_encoder_2 in int8, nf4")


def test_a_mixed_file_is_told_by_the_type_of_each_layer(session: Session) -> None:
    mixed = Quantization("gguf", "transformer", {"file": FILE.format("Q4_K_M"), "compute_dtype": "bfloat16"})
    verdicts = judged(session, recipe(mixed))
    assert verdicts["quantization"].sentence == "40 layers of transformer in Q4_K (34), Q5_K (6), 4.755 bits a weight"


# What the libraries break: a verdict with the cause, in what they say themselves.


@pytest.mark.parametrize(
    ("quantization", "parts", "cause"),
    [
        (BACKENDS["quanto"], {"offloading": Offloading("group")}, "Expected all tensors to be on the same device"),
        (
            BACKENDS["quanto"],
            {"offloading": Offloading("sequential")},
            "WeightQBytesTensor.__new__() missing 6 required",
        ),
        (BACKENDS["Q8_0"], {"offloading": Offloading("sequential")}, "KeyError: None"),
        (
            BACKENDS["casting"],
            {"compilation": Compilation("transformer", backend="eager", fullgraph=True)},
            "Attempted to use `torch.nn.Parameter()` constructor with Dynamo",
        ),
        (Quantization("torchao", "transformer", {"quant_type": "int4wo", **QUIET}), {}, "Requires mslk >= 1.0.0"),
    ],
    ids=["quanto, group", "quanto, sequential", "gguf, sequential", "casting, compiled", "int4 without its kernels"],
)
def test_what_a_library_breaks_is_told_with_its_own_words(
    session: Session, quantization: Quantization, parts: dict[str, Any], cause: str
) -> None:
    verdicts = judged(session, recipe(quantization, **parts))
    assert verdicts["parity"].status == "failed"
    assert cause in "\n".join(verdict.text for verdict in verdicts.values())  # in the first of them, with its place


def test_torchao_sets_inductor_for_good_unless_it_is_told_not_to(session: Session) -> None:
    loud = recipe(Quantization("torchao", "transformer", {"quant_type": "int8wo"}))
    verdict = judged(session, loud)["state"]
    assert verdict.status == "failed"
    assert "torch._inductor.config.coordinate_descent_tuning: False → True, while preparing" in verdict.evidence


# A live module says how it was quantized.

FOUR_BIT = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("backend", "kwargs", "told"),
    [
        ("bitsandbytes_4bit", FOUR_BIT, None),
        ("bitsandbytes_8bit", {"llm_int8_threshold": 5.0}, None),
        ("torchao", {"quant_type": "Int8WeightOnlyConfig"}, None),
        ("torchao", {"quant_type": "Int8DynamicActivationInt8WeightConfig"}, None),
        ("torchao", {"quant_type": "Int8WeightOnlyConfig", "granularity": "PerGroup(32)"}, None),
        ("torchao", {"quant_type": "Float8WeightOnlyConfig", "weight_dtype": "float8_e5m2"}, None),
        (
            "torchao",
            {"quant_type": "IntxWeightOnlyConfig", "weight_dtype": "int4", "granularity": "PerGroup(32)"},
            None,
        ),
        ("quanto", {"weights_dtype": "int2"}, None),
        ("quanto", {"weights_dtype": "float8"}, None),
        ("gguf", {"file": FILE.format("Q8_0"), "compute_dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}),
        ("layerwise_casting", {"storage_dtype": "float8_e5m2", "compute_dtype": "bfloat16"}, None),
    ],
)
def test_a_live_module_says_how_it_was_quantized(backend: Any, kwargs: dict[str, Any], told: Any) -> None:
    one = recipe(Quantization(backend, "transformer", kwargs))
    with prepared(one, select("cpu")) as live:
        said = quantization_of(live.components["transformer"])
        assert quantization_of(live.components["text_encoder_2"]) is None
    assert said == (backend, told or kwargs)
    if told is None:  # what it says is a recipe's
        assert Quantization(backend, "transformer", said[1]).kwargs == one.quantizations[0].kwargs


def test_a_module_that_was_dequantized_is_not_quantized() -> None:
    with prepared(recipe(BACKENDS["int8dq"]), select("cpu")) as live:
        transformer: Any = live.components["transformer"]
        transformer.dequantize()
        assert quantization_of(transformer) is None


# Names in a skip list: transformers compares the beginning of a path, and leaves out what it would have kept itself.


@pytest.mark.parametrize(
    ("skips", "status", "said"),
    [
        ([], "passed", "layers of text_encoder in nf4"),
        (["model.visual"], "passed", "the skip list replaces transformers' own, so text_encoder.lm_head is too"),
        (["visual"], "failed", "transformers compares the beginning of a path: write 'model.visual', not 'visual'"),
    ],
)
def test_a_skip_list_of_a_text_encoder(skips: list[str], status: str, said: str) -> None:
    kwargs = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": skips} if skips else {"bnb_4bit_quant_type": "nf4"}
    quantization = Quantization("bitsandbytes_4bit", ["text_encoder"], kwargs)
    recipe = Recipe(
        "qwen", "tiny-qwen-image", dtype="bfloat16", call=Call(num_inference_steps=2), quantization=quantization
    )
    verdict = next(one for one in check(recipe) if one.check == "quantization")
    assert verdict.status == status
    assert said in verdict.text
    assert ("lm_head" in verdict.sentence) == (skips == ["model.visual"])
