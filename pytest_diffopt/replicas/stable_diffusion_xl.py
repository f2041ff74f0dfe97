"""Stability AI's Stable Diffusion XL: tiny-sdxl, with the public repositories' classes and schedulers, and the base."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description, Published
from pytest_diffopt.replicas.family import ComponentRepository, Family, Variant

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
TURBO = "stabilityai/sdxl-turbo"

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

_CLIP_WIDTH = 128  # of each of the two encoders, whose hidden states the UNet reads side by side
_SIZE_WIDTH = 64  # of each of six numbers: sizes and a corner


def _tiny(turbo: bool) -> Description:
    return ARCHITECTURE.sized(
        "tiny-sdxl",
        {
            "unet": {
                "sample_size": 12,
                "block_out_channels": (128, 128),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "transformer_layers_per_block": (1, 1),
                "attention_head_dim": (2, 2),  # the number of heads, in this class
                "cross_attention_dim": 2 * _CLIP_WIDTH,
                "addition_time_embed_dim": _SIZE_WIDTH,
                "projection_class_embeddings_input_dim": _CLIP_WIDTH + 6 * _SIZE_WIDTH,
            },
            "vae": {
                "block_out_channels": (32, 32, 32, 128),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "sample_size": 96,
            },
            "scheduler": {"timestep_spacing": "trailing"} if turbo else {},
            "text_encoder": text_encoders.tiny_clip(_CLIP_WIDTH),
            "text_encoder_2": text_encoders.tiny_clip(_CLIP_WIDTH),
        },
    )


def build(hub_id: str | None = None) -> Any:
    """A seeded ``StableDiffusionXLPipeline`` on the CPU in float32; with the scheduler of SDXL Turbo if ``hub_id`` is that.

    An image must be a multiple of 16 pixels high and wide: 8 of the VAE, 2 of the UNet.
    """
    from diffusers import EulerAncestralDiscreteScheduler

    turbo = hub_id is not None and hub_id.casefold() == TURBO.casefold()
    tiny = _tiny(turbo)
    with initialization.reproducible():
        components = description.build_components(tiny)
        initialization.randomize(components["unet"])
        initialization.smooth_in_time(components["unet"].time_embedding.linear_1)
        initialization.randomize(components["vae"], gains={"decoder.conv_out.weight": 0.4})
        text_encoders.enliven(components["text_encoder"])
        text_encoders.enliven(components["text_encoder_2"], seed=1)
        if turbo:
            components["scheduler"] = EulerAncestralDiscreteScheduler.from_config(components["scheduler"].config)
        return description.build_pipeline(tiny, components)


FAMILY = Family(
    name="tiny-sdxl",
    hub_ids=(BASE, TURBO),
    components=("text_encoder", "text_encoder_2", "unet", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(96, 96),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="A UNet of two levels of width 128, the second with attention.",
    full_sizes=FULL_SIZES,
    variants=(Variant("fp16", (BASE, TURBO), ("text_encoder", "text_encoder_2", "unet", "vae")),),
    component_repositories=(ComponentRepository("madebyollin/sdxl-vae-fp16-fix", "vae", {"force_upcast": False}),),
)
