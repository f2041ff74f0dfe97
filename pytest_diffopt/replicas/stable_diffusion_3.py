"""Stability AI's Stable Diffusion 3.5 in its full sizes; it has no replica yet."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import text_encoders
from pytest_diffopt.replicas.description import Architecture, Description, Published

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
LARGE = "stabilityai/stable-diffusion-3.5-large"

ARCHITECTURE = Architecture(
    pipeline_class="StableDiffusion3Pipeline",
    classes={
        "transformer": "diffusers.SD3Transformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
        "text_encoder": "transformers.CLIPTextModelWithProjection",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "text_encoder_3": "transformers.T5EncoderModel",
        "tokenizer": "transformers.CLIPTokenizer",
        "tokenizer_2": "transformers.CLIPTokenizer",
        "tokenizer_3": "transformers.T5TokenizerFast",
    },
    shared={
        "transformer": {"in_channels": 16, "out_channels": 16, "patch_size": 2, "qk_norm": "rms_norm"},
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "scheduler": {"num_train_timesteps": 1000, "shift": 3.0},
        "tokenizer": {"max_length": 77},
        "tokenizer_2": {"max_length": 77},
        "tokenizer_3": {"max_length": 512},
    },
)

_FORGE_LARGE = f"lllyasviel/stable-diffusion-webui-forge: backend/huggingface/{LARGE}"


def _full(name: str, hub_id: str, source: str, transformer: dict[str, Any]) -> Description:
    every = {
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "sample_size": 128,
    }
    vae = {
        "act_fn": "silu",
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "force_upcast": True,
    }
    return ARCHITECTURE.sized(
        name,
        {
            "transformer": Published({**every, **transformer}, source, "bfloat16"),
            "vae": Published(vae, f"{_FORGE_LARGE}/vae/config.json", "bfloat16"),
            "scheduler": Published({}, f"{_FORGE_LARGE}/scheduler/scheduler_config.json"),
            "text_encoder": Published(text_encoders.CLIP_L, text_encoders.CLIP_L_SOURCE, "float16"),
            "text_encoder_2": Published(text_encoders.CLIP_G, text_encoders.CLIP_G_SOURCE, "float16"),
            "text_encoder_3": Published(text_encoders.T5_XXL, text_encoders.T5_XXL_SOURCE, "float16"),
        },
        hub_id=hub_id,
        default_size=(1024, 1024),
    )


FULL_SIZES = (
    _full(
        "sd3.5-medium",
        MEDIUM,
        # Tenstorrent's loader of Comfy-Org/stable-diffusion-3.5-fp8 spells the medium one out.
        f"{MEDIUM}: transformer/config.json",
        {
            "num_attention_heads": 24,
            "num_layers": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    _full(
        "sd3.5-large",
        LARGE,
        f"{_FORGE_LARGE}/transformer/config.json",
        {
            "num_attention_heads": 38,
            "num_layers": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "dual_attention_layers": (),
        },
    ),
)
