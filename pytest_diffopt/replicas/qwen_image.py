"""Alibaba's Qwen-Image: tiny-qwen-image, with the classes and the scheduler of the public repository, and that."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description, Published
from pytest_diffopt.replicas.family import Family

HUB_ID = "Qwen/Qwen-Image"

ARCHITECTURE = Architecture(
    pipeline_class="QwenImagePipeline",
    classes={
        "transformer": "diffusers.QwenImageTransformer2DModel",
        "vae": "diffusers.AutoencoderKLQwenImage",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
        "text_encoder": "transformers.Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "transformers.Qwen2Tokenizer",
    },
    shared={
        "transformer": {
            "patch_size": 2,
            "attention_head_dim": 128,
            "axes_dims_rope": (16, 56, 56),
            "guidance_embeds": False,
        },
        "scheduler": {
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "base_shift": 0.5,
            "max_shift": 0.9,
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "shift_terminal": 0.02,
            "time_shift_type": "exponential",
            "use_dynamic_shifting": True,
        },
        "tokenizer": {"max_length": 131072},
    },
)

_TRANSFORMER = {
    "in_channels": 64,
    "out_channels": 16,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
}

_VAE = {
    "z_dim": 16,
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],  # a list, which the class adds to
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}

_TEXT_ENCODER: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
    "text_config": {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "model_type": "qwen2_5_vl_text",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_channels": 3,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}

FULL_SIZES = (
    ARCHITECTURE.sized(
        "qwen-image",
        {
            "transformer": Published(
                _TRANSFORMER, "kohya-ss/musubi-tuner: src/musubi_tuner/qwen_image/qwen_image_model.py", "bfloat16"
            ),
            "vae": Published(
                _VAE,
                "huggingface/diffusers: src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py",
                "bfloat16",
            ),
            "scheduler": Published(
                {},
                "Haoming02/sd-webui-forge-classic: backend/huggingface/Qwen/Qwen-Image/scheduler/scheduler_config.json",
            ),
            "text_encoder": Published(
                _TEXT_ENCODER, "modelscope/DiffSynth-Studio: diffsynth/models/qwen_image_text_encoder.py", "bfloat16"
            ),
        },
        hub_id=HUB_ID,
        default_size=(1024, 1024),
    ),
)

_WIDTH = 256
_LATENT_CHANNELS = 32  # Qwen-Image has 16; four of them packed give the transformer's 128 inputs


def _tiny_text_encoder() -> dict[str, Any]:
    # More than the tokenizer's, as in public: the output of a Linear as well, a multiple of 128.
    vocabulary_size = 128 * (tokenizers.qwen2_vocabulary_size() // 128 + 1)
    text = {
        "vocab_size": vocabulary_size,
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": 2,
        "max_window_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 1,
        "hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 128,
        "out_hidden_size": _WIDTH,
        "fullatt_block_indexes": [0],
    }
    # What stands for pictures has ids that the tokenizer never makes: the pipeline gives none.
    pictures = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        **_TEXT_ENCODER,
        **{name: vocabulary_size - 1 - place for place, name in enumerate(pictures)},
        "text_config": {**_TEXT_ENCODER["text_config"], **text},
        "vision_config": {**_TEXT_ENCODER["vision_config"], **vision},
    }


def _tiny() -> Description:
    return ARCHITECTURE.sized(
        "tiny-qwen-image",
        {
            "transformer": {
                "in_channels": 4 * _LATENT_CHANNELS,
                "out_channels": _LATENT_CHANNELS,
                "joint_attention_dim": _WIDTH,
                "num_attention_heads": _WIDTH // 128,
                "num_layers": 2,
            },
            "vae": {
                "z_dim": _LATENT_CHANNELS,
                "base_dim": 8,
                "num_res_blocks": 1,
                "latents_mean": [0.0] * _LATENT_CHANNELS,
                "latents_std": [2.0] * _LATENT_CHANNELS,
            },
            "text_encoder": _tiny_text_encoder(),
        },
    )


def build(hub_id: str | None = None) -> Any:
    """A seeded ``QwenImagePipeline`` on the CPU in float32; the same for every ``hub_id``.

    An image must be a multiple of 16 pixels high and wide, as with the public pipeline.
    """
    tiny = _tiny()
    with initialization.reproducible():
        components = description.build_components(tiny)
        transformer = components["transformer"]
        # Only attention carries the prompt to the image, whose tokens are more.
        initialization.randomize(transformer, gains={"*.add_v_proj.weight": 4.0, "*.add_k_proj.weight": 2.0})
        initialization.smooth_in_time(transformer.time_text_embed.timestep_embedder.linear_1)
        initialization.randomize(components["vae"], gains={"decoder.conv_out.weight": 0.8})
        text_encoders.enliven(components["text_encoder"])
        return description.build_pipeline(tiny, components)


FAMILY = Family(
    name="tiny-qwen-image",
    hub_ids=(HUB_ID, "Qwen/Qwen-Image-2512"),
    components=("text_encoder", "transformer", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(96, 96),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="2 blocks of width 256; 32 latent channels where Qwen-Image has 16; 2 layers of text encoder, 1 for pictures.",
    full_sizes=FULL_SIZES,
)
