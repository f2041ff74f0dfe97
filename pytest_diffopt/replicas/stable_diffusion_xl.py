"""Stability AI's Stable Diffusion XL in its full size; it has no replica yet."""

from __future__ import annotations

from pytest_diffopt.replicas import text_encoders
from pytest_diffopt.replicas.description import Architecture, Published

BASE = "stabilityai/stable-diffusion-xl-base-1.0"

ARCHITECTURE = Architecture(
    pipeline_class="StableDiffusionXLPipeline",
    classes={
        "unet": "diffusers.UNet2DConditionModel",
        "vae": "diffusers.AutoencoderKL",
        "scheduler": "diffusers.EulerDiscreteScheduler",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "tokenizer": "transformers.CLIPTokenizer",
        "tokenizer_2": "transformers.CLIPTokenizer",
    },
    shared={
        "unet": {
            "in_channels": 4,
            "out_channels": 4,
            "addition_embed_type": "text_time",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "use_linear_projection": True,
        },
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": 4,
            "scaling_factor": 0.13025,
        },
        "scheduler": {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
        "tokenizer": {"max_length": 77},
        "tokenizer_2": {"max_length": 77},
    },
    options={"force_zeros_for_empty_prompt": True},
)

_UNET = {
    "act_fn": "silu",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}

_VAE = {
    "act_fn": "silu",
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "force_upcast": True,
}

FULL_SIZES = (
    ARCHITECTURE.sized(
        "sdxl",
        {
            "unet": Published(_UNET, "dvlab-research/ControlNeXt: ControlNeXt-SDXL/models/unet.py", "float32"),
            # The repository's own says force_upcast, the copy for the VAE that half precision does not overflow does not.
            "vae": Published(_VAE, "vladmandic/automatic: configs/sdxl/vae/config.json", "float32"),
            "scheduler": Published({}, f"{BASE}: scheduler/scheduler_config.json"),
            "text_encoder": Published(text_encoders.CLIP_L, text_encoders.CLIP_L_SOURCE, "float32"),
            "text_encoder_2": Published(text_encoders.CLIP_G, text_encoders.CLIP_G_SOURCE, "float32"),
        },
        hub_id=BASE,
        default_size=(1024, 1024),
    ),
)
