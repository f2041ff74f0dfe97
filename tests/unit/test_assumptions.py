"""What a forecast may assume: mistakes are named, sentences have versions, and transformers is as before afterwards."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch

from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.forecasting import assumptions
from pytest_diffopt.forecasting.assumptions import Assumptions, assumed

INSTALLED = version("transformers")
NAMES = "transformers, t5_wo_float32, convolution_workspace, attention, cublas_workspace"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Another version of transformers as the installed one."""
    monkeypatch.setattr(assumptions.importlib.metadata, "version", lambda name: request.param)
    return str(request.param)


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_assumed_are_the_defaults(nothing: dict[str, object] | None) -> None:
    assert assumed(nothing) == Assumptions()


def test_what_is_assumed_is_read() -> None:
    read = assumed(
        {
            "transformers": "4.55",
            "t5_wo_float32": False,
            "convolution_workspace": "none",
            "attention": "math",
            "cublas_workspace": False,
        }
    )
    assert read == Assumptions("4.55", False, "none", "math", False)


@pytest.mark.parametrize(
    ("assume", "sentence"),
    [
        (
            {"transformer": "4.55"},
            f"A forecast cannot assume 'transformer'. Did you mean 'transformers'? It can assume {NAMES}.",
        ),
        ({"cuda": "12"}, f"A forecast cannot assume 'cuda'. It can assume {NAMES}."),
        ({"transformers": 4.55}, 'A forecast cannot assume transformers = 4.55. It takes a version as text, "4.55".'),
        (
            {"transformers": "old"},
            "A forecast cannot assume transformers = 'old'. It takes a version as text, \"4.55\".",
        ),
        ({"t5_wo_float32": 1}, "A forecast cannot assume t5_wo_float32 = 1. It takes True or False."),
        ({"attention": "flash"}, 'A forecast cannot assume attention = \'flash\'. It takes "cuda", "math" or "fused".'),
        (
            {"convolution_workspace": True},
            'A forecast cannot assume convolution_workspace = True. It takes "expected" or "none".',
        ),
    ],
)
def test_a_mistake_is_refused_by_its_name(assume: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DiffoptError) as raised:
        assumed(assume)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("transformers", "plain", "quantized"),
    [
        ("4.55", False, True),
        ("4.57.3", False, True),
        ("5.0", True, True),
        ("5.1", False, False),
        ("5.23.0", False, False),
    ],
)
def test_wo_is_kept_in_float32_as_each_version_does(transformers: str, plain: bool, quantized: bool) -> None:
    of_version = Assumptions(transformers=transformers)
    assert of_version.keeps_wo(text_encoder_is_quantized=False) is plain
    assert of_version.keeps_wo(text_encoder_is_quantized=True) is quantized


def test_the_flag_stands_above_the_version() -> None:
    assert not Assumptions(transformers="4.55", t5_wo_float32=False).keeps_wo(text_encoder_is_quantized=True)
    assert Assumptions(transformers="5.23", t5_wo_float32=True).keeps_wo(text_encoder_is_quantized=False)


@pytest.mark.parametrize("installed", ["5.23.0"], indirect=True)
@pytest.mark.parametrize(
    ("assume", "quantized", "sentences"),
    [
        (
            {},
            False,
            ("The wo layers of a T5 encoder are bfloat16, as transformers 5.23.0, which is installed, loads them.",),
        ),
        (
            {"transformers": "4.55"},
            True,
            (
                "The wo layers of a quantized T5 encoder are float32, as transformers 4.55 loads them (5.23.0 is installed).",
            ),
        ),
        (
            {"t5_wo_float32": True, "convolution_workspace": "none", "attention": "math", "cublas_workspace": False},
            False,
            (
                "The wo layers of a T5 encoder are float32, as assumed (transformers 5.23.0 is installed).",
                "Convolutions take no workspace, as assumed.",
                "Attention is computed step by step, as assumed.",
                "cuBLAS's workspace is not counted, as assumed.",
            ),
        ),
    ],
)
def test_the_sentences_say_what_was_assumed_and_of_which_version(
    installed: str, assume: dict[str, object], quantized: bool, sentences: tuple[str, ...]
) -> None:
    assert assumed(assume).sentences(text_encoder_is_quantized=quantized) == sentences


@pytest.mark.parametrize("installed", ["5.23.0"], indirect=True)
def test_with_no_t5_its_layers_are_not_spoken_of(installed: str) -> None:
    assert Assumptions().sentences(text_encoder_is_quantized=True, has_t5=False) == ()
    assert Assumptions(transformers="4.55", attention="fused").sentences(
        text_encoder_is_quantized=True, has_t5=False
    ) == (
        "transformers 5.23.0 is installed; nothing of 4.55 that matters here is known.",
        "Attention is computed by kernels that take no memory of their own, as assumed.",
    )


def plan(model: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Which modules of a new encoder would be loaded in which dtype."""
    import transformers

    config = getattr(transformers, f"{model}Config")(
        d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        encoder = getattr(transformers, f"{model}EncoderModel")(config)
    return encoder._get_dtype_plan(dtype)  # type: ignore[no-any-return]


@pytest.mark.skipif(
    not hasattr(__import__("transformers").PreTrainedModel, "_get_dtype_plan"), reason="transformers < 5.1"
)
@pytest.mark.parametrize("model", ["T5", "UMT5"])
def test_in_force_an_encoder_is_loaded_as_the_older_version_does(model: str) -> None:
    older = Assumptions(transformers="4.55")
    with older.in_force(text_encoder_is_quantized=True):
        assert plan(model, torch.bfloat16) == {"wo": torch.float32}
    assert plan(model, torch.bfloat16) == {}
    with older.in_force(text_encoder_is_quantized=False):
        assert plan(model, torch.bfloat16) == {}
    assert plan(model, torch.float16) == {"wo": torch.float32}


def owned() -> list[dict[str, Any]]:
    from transformers import PreTrainedModel, T5EncoderModel, T5PreTrainedModel, UMT5EncoderModel, UMT5PreTrainedModel

    holders = (PreTrainedModel, T5EncoderModel, T5PreTrainedModel, UMT5EncoderModel, UMT5PreTrainedModel)
    return [{name: value for name, value in vars(holder).items() if "keep_in_fp32" in name} for holder in holders]


def test_transformers_is_as_before_afterwards_and_after_a_raise() -> None:
    before = owned()
    with (
        pytest.raises(RuntimeError, match="while loading"),
        Assumptions(t5_wo_float32=True).in_force(text_encoder_is_quantized=False),
    ):
        assert owned() != before
        raise RuntimeError("while loading")
    assert owned() == before


def test_nothing_is_touched_where_the_installed_version_does_as_assumed() -> None:
    before = owned()
    with Assumptions().in_force(text_encoder_is_quantized=True):
        assert owned() == before


@pytest.mark.parametrize("installed", ["5.0.0"], indirect=True)
def test_a_version_that_cannot_be_told_otherwise_says_so(installed: str) -> None:
    with (
        pytest.raises(DiffoptError) as raised,
        Assumptions(t5_wo_float32=False).in_force(text_encoder_is_quantized=True),
    ):
        pass
    assert str(raised.value) == (
        "transformers 5.0.0 keeps the wo layers of T5 in float32, so a forecast cannot assume bfloat16. "
        "Install transformers 5.1 or later."
    )
