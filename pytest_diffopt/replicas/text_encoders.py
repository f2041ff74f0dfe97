"""The text encoders that several families share: their public configs, and those of replicas, for :mod:`.tokenizers`."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import initialization, tokenizers

_FORGE = "lllyasviel/stable-diffusion-webui-forge: backend/huggingface"

CLIP_L_SOURCE = f"{_FORGE}/stabilityai/stable-diffusion-3.5-large/text_encoder/config.json"
CLIP_G_SOURCE = f"{_FORGE}/stabilityai/stable-diffusion-3-medium-diffusers/text_encoder_2/config.json"
T5_XXL_SOURCE = f"{_FORGE}/black-forest-labs/FLUX.1-dev/text_encoder_2/config.json"
UMT5_XXL_SOURCE = "comfyanonymous/ComfyUI: comfy/text_encoders/umt5_config_xxl.json"

_CLIP: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    # With 2, which no public vocabulary ends with, transformers looks for the highest id instead.
    "eos_token_id": 2,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}

CLIP_L: dict[str, Any] = {
    **_CLIP,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
"""OpenAI's CLIP ViT-L/14; its source is ``CLIP_L_SOURCE``."""

CLIP_G: dict[str, Any] = {
    **_CLIP,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
"""LAION's CLIP ViT-bigG/14; its source is ``CLIP_G_SOURCE``."""

T5_XXL: dict[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
"""Google's t5-v1_1-xxl, its encoder; its source is ``T5_XXL_SOURCE``."""

UMT5_XXL: dict[str, Any] = {**T5_XXL, "vocab_size": 256384}
"""Google's umt5-xxl, its encoder; its source is ``UMT5_XXL_SOURCE``, the feed-forward's name is that of T5."""


def tiny_clip(width: int = 128) -> dict[str, Any]:
    """Config of a ``CLIPTextModel`` of two layers; ``width``, a multiple of 128, is of its hidden and its pooled output."""
    vocabulary_size = tokenizers.clip_vocabulary_size()
    return {
        "vocab_size": vocabulary_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": vocabulary_size - 2,
        "eos_token_id": vocabulary_size - 1,
        "pad_token_id": vocabulary_size - 1,
    }


def tiny_t5(width: int = 256) -> dict[str, Any]:
    """Config of a ``T5EncoderModel`` or ``UMT5EncoderModel`` of two layers; ``width``, a multiple of 128, is of its output."""
    return {
        "vocab_size": tokenizers.t5_vocabulary_size(),
        "d_model": width,
        "d_kv": width // 2,
        "d_ff": 4 * width,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


def enliven(encoder: Any, *, seed: int = 0) -> None:
    """Random weights for a replica's text encoder, in place; encoders of one shape and one ``seed`` get the same.

    T5's are kept as transformers draws them from the global generator: they allow for T5's unscaled attention.
    """
    if encoder.config.model_type not in ("t5", "umt5"):
        initialization.randomize(encoder, seed=seed)
        return
    # Most of a prompt's 512 tokens are padding: with nothing of its own, it carries what it attends to, the prompt.
    encoder.shared.weight.data[encoder.config.pad_token_id] = 0
