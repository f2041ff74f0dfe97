"""Zhipu AI's CogVideoX: tiny-cogvideox, with the classes and the scheduler of the public repositories, and those."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description, Published
from pytest_diffopt.replicas.family import Family

SMALL = "THUDM/CogVideoX-2b"
LARGE = "THUDM/CogVideoX-5b"

ARCHITECTURE = Architecture(
    pipeline_class="CogVideoXPipeline",
    classes={
        "transformer": "diffusers.CogVideoXTransformer3DModel",
        "vae": "diffusers.AutoencoderKLCogVideoX",
        "scheduler": "diffusers.CogVideoXDDIMScheduler",
        "tokenizer": "transformers.T5Tokenizer",
        "text_encoder": "transformers.T5EncoderModel",
    },
    shared={
        "transformer": {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "attention_head_dim": 64,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 226,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
        },
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "temporal_compression_ratio": 4,
        },
        "scheduler": {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
        },
        "tokenizer": {"max_length": 226},
    },
)

_CONVERTER = "huggingface/diffusers: scripts/convert_cogvideox_to_diffusers.py"


def _of_size(large: bool) -> dict[str, dict[str, Any]]:
    """What differs between the two public models besides their size: positions, and how latents are scaled."""
    return {
        "transformer": {"use_rotary_positional_embeddings": large},
        "vae": {"scaling_factor": 0.7 if large else 1.15258426},
        "scheduler": {"snr_shift_scale": 1.0 if large else 3.0},
    }


def _full(name: str, hub_id: str, heads: int, layers: int, dtype: str) -> Description:
    of_size = _of_size(hub_id == LARGE)
    transformer = {
        "num_attention_heads": heads,
        "num_layers": layers,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
    }
    vae = {
        "block_out_channels": (128, 256, 256, 512),
        "layers_per_block": 3,
        "norm_num_groups": 32,
        "sample_height": 480,
        "sample_width": 720,
    }
    return ARCHITECTURE.sized(
        name,
        {
            "transformer": Published({**transformer, **of_size["transformer"]}, _CONVERTER, dtype),
            "vae": Published({**vae, **of_size["vae"]}, _CONVERTER, dtype),
            "scheduler": Published(of_size["scheduler"], _CONVERTER),
            "text_encoder": Published(text_encoders.T5_XXL, text_encoders.T5_XXL_SOURCE, dtype),
        },
        hub_id=hub_id,
        default_size=(480, 720, 49),
    )


FULL_SIZES = (
    _full("cogvideox-2b", SMALL, heads=30, layers=30, dtype="float16"),
    _full("cogvideox-5b", LARGE, heads=48, layers=42, dtype="bfloat16"),
)

_WIDTH = 256
_T5_WIDTH = 256


def _tiny(large: bool) -> Description:
    of_size = _of_size(large)
    return ARCHITECTURE.sized(
        "tiny-cogvideox",
        {
            "transformer": {
                "num_attention_heads": _WIDTH // 64,
                "num_layers": 3,
                "time_embed_dim": 128,
                "text_embed_dim": _T5_WIDTH,
                "sample_width": 8,
                "sample_height": 8,
                "sample_frames": 9,
                **of_size["transformer"],
            },
            "vae": {
                "block_out_channels": (8, 8, 8, 16),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "sample_height": 64,
                "sample_width": 64,
                **of_size["vae"],
            },
            "scheduler": of_size["scheduler"],
            "text_encoder": text_encoders.tiny_t5(_T5_WIDTH),
        },
    )


def build(hub_id: str | None = None) -> Any:
    """A seeded ``CogVideoXPipeline`` on the CPU in float32, with the positions and scales of CogVideoX-5b unless ``hub_id``
    is 2b's.

    A video must be a multiple of 16 pixels high and wide and have ``4 n + 1`` frames, as with the public pipelines.
    """
    large = hub_id is None or not hub_id.casefold().endswith("-2b")
    tiny = _tiny(large)
    with initialization.reproducible():
        components = description.build_components(tiny)
        transformer = components["transformer"]
        initialization.randomize(transformer)
        initialization.smooth_in_time(transformer.time_embedding.linear_1)
        initialization.randomize(components["vae"], gains={"decoder.conv_out.*weight": 0.08 if large else 0.12})
        text_encoders.enliven(components["text_encoder"])
        return description.build_pipeline(tiny, components)


FAMILY = Family(
    name="tiny-cogvideox",
    hub_ids=(SMALL, LARGE, "zai-org/CogVideoX-2b", "zai-org/CogVideoX-5b"),
    components=("text_encoder", "transformer", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(64, 64, 9),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="3 blocks of width 256; a VAE of width 8 with one residual block a level.",
    full_sizes=FULL_SIZES,
)
