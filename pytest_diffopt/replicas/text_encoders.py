"""The text encoders that several families share, sized for the tokenizers of :mod:`.tokenizers`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pytest_diffopt.replicas import initialization, tokenizers


def clip_text_encoder(width: int = 128) -> Any:
    """A ``CLIPTextModel`` of two layers; ``width`` (a multiple of 128) is that of its hidden and its pooled output."""
    transformers = import_module("transformers")
    vocabulary_size = tokenizers.clip_vocabulary_size()
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=vocabulary_size - 1,
    )
    encoder = transformers.CLIPTextModel(config)
    initialization.randomize(encoder)
    return encoder.eval()


def t5_encoder(width: int = 256) -> Any:
    """A ``T5EncoderModel`` of two layers; ``width`` (a multiple of 128) is that of its output.

    Keeps the weights that transformers draws from the global generator: they allow for T5's unscaled attention.
    """
    transformers = import_module("transformers")
    encoder = transformers.T5EncoderModel(transformers.T5Config(**_t5_settings(width)))
    return _with_silent_padding(encoder)


def umt5_encoder(width: int = 256) -> Any:
    """A ``UMT5EncoderModel``, as :func:`t5_encoder`; each of its two layers has a table of relative positions."""
    transformers = import_module("transformers")
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**_t5_settings(width)))
    return _with_silent_padding(encoder)


def _t5_settings(width: int) -> dict[str, Any]:
    return {
        "vocab_size": tokenizers.t5_vocabulary_size(),
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 4 * width,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def _with_silent_padding(encoder: Any) -> Any:
    # Most of a prompt's 512 tokens are padding: with nothing of its own, it carries what it attends to, the prompt.
    encoder.shared.weight.data[encoder.config.pad_token_id] = 0
    return encoder.eval()
