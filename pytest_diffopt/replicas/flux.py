"""black-forest-labs' FLUX.1: tiny-flux, with the classes and the schedulers of the public repositories, and those."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description, Published
from pytest_diffopt.replicas.family import Family

DEV = "black-forest-labs/FLUX.1-dev"
SCHNELL = "black-forest-labs/FLUX.1-schnell"

ARCHITECTURE = Architecture(
    pipeline_class="FluxPipeline",
    classes={
        "transformer": "diffusers.FluxTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
        "text_encoder": "transformers.CLIPTextModel",
        "tokenizer": "transformers.CLIPTokenizer",
        "text_encoder_2": "transformers.T5EncoderModel",
        "tokenizer_2": "transformers.T5TokenizerFast",
    },
    shared={
        "transformer": {"patch_size": 1, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)},
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "scheduler": {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15},
        "tokenizer": {"max_length": 77},
        "tokenizer_2": {"max_length": 512},
    },
)

# Every layer's input is a multiple of 128: what torchao's groups and bitsandbytes' CPU kernels need.
_CLIP_WIDTH = 128
_T5_WIDTH = 256
_LATENT_CHANNELS = 32  # FLUX.1 has 16; four of them packed give the transformer's 128 inputs


def _schedule(schnell: bool) -> dict[str, Any]:
    return {"shift": 1.0 if schnell else 3.0, "use_dynamic_shifting": not schnell}


def _tiny(schnell: bool) -> Description:
    return ARCHITECTURE.sized(
        "tiny-flux",
        {
            "transformer": {
                "in_channels": 4 * _LATENT_CHANNELS,
                "num_layers": 2,
                "num_single_layers": 2,
                "num_attention_heads": 2,
                "joint_attention_dim": _T5_WIDTH,
                "pooled_projection_dim": _CLIP_WIDTH,
                "guidance_embeds": not schnell,
            },
            "vae": {
                "block_out_channels": (32, 32, 32, 128),
                "layers_per_block": 1,
                "latent_channels": _LATENT_CHANNELS,
                "norm_num_groups": 8,
                "sample_size": 64,
            },
            "scheduler": _schedule(schnell),
            "text_encoder": text_encoders.tiny_clip(_CLIP_WIDTH),
            "text_encoder_2": text_encoders.tiny_t5(_T5_WIDTH),
        },
    )


def _full(name: str, hub_id: str, transformer_source: str, scheduler_source: str) -> Description:
    schnell = hub_id == SCHNELL
    transformer = {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": not schnell,
    }
    vae = {
        "act_fn": "silu",
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "force_upcast": True,
    }
    return ARCHITECTURE.sized(
        name,
        {
            "transformer": Published(transformer, transformer_source, "bfloat16"),
            "vae": Published(vae, "edkamesh/FluX-optimized: vae/config.json", "bfloat16"),
            "scheduler": Published(_schedule(schnell), scheduler_source),
            "text_encoder": Published(text_encoders.CLIP_L, text_encoders.CLIP_L_SOURCE, "bfloat16"),
            "text_encoder_2": Published(text_encoders.T5_XXL, text_encoders.T5_XXL_SOURCE, "bfloat16"),
        },
        hub_id=hub_id,
        default_size=(1024, 1024),
    )


_FORGE = "lllyasviel/stable-diffusion-webui-forge: backend/huggingface"

FULL_SIZES = (
    _full(
        "flux.1-dev",
        DEV,
        f"{_FORGE}/{DEV}/transformer/config.json",
        f"{_FORGE}/{DEV}/scheduler/scheduler_config.json",
    ),
    _full(
        "flux.1-schnell",
        SCHNELL,
        f"{_FORGE}/{SCHNELL}/transformer/config.json",
        "edkamesh/FluX-optimized: scheduler/scheduler_config.json",
    ),
)


def build(hub_id: str | None = None) -> Any:
    """A seeded ``FluxPipeline`` on the CPU in float32; distilled like FLUX.1-dev unless ``hub_id`` is schnell's.

    An image must be a multiple of 16 pixels high and wide, as with the public pipeline.
    """
    schnell = hub_id is not None and hub_id.casefold() == SCHNELL.casefold()
    tiny = _tiny(schnell)
    with initialization.reproducible():
        components = description.build_components(tiny)
        transformer = components["transformer"]
        initialization.randomize(transformer)
        initialization.smooth_in_time(transformer.time_text_embed.timestep_embedder.linear_1)
        if not schnell:
            initialization.smooth_in_time(transformer.time_text_embed.guidance_embedder.linear_1)
        initialization.randomize(components["vae"], gains={"decoder.conv_out.weight": 0.4})
        text_encoders.enliven(components["text_encoder"])
        text_encoders.enliven(components["text_encoder_2"])
        return description.build_pipeline(tiny, components)


FAMILY = Family(
    name="tiny-flux",
    hub_ids=(DEV, SCHNELL, "black-forest-labs/FLUX.1-Krea-dev"),
    components=("text_encoder", "text_encoder_2", "transformer", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(96, 96),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="2 double and 2 single blocks of width 256; 32 latent channels where FLUX.1 has 16.",
    full_sizes=FULL_SIZES,
)
