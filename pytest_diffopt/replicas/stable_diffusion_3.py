"""Stability AI's Stable Diffusion 3 and 3.5: tiny-sd3, with the public repositories' classes, and 3.5 in its full sizes."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description, Published
from pytest_diffopt.replicas.family import Family, Variant

MEDIUM_3 = "stabilityai/stable-diffusion-3-medium-diffusers"
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

# Every layer's input is a multiple of 128. T5's is that of both CLIPs side by side: the narrower ones are padded to it.
_CLIP_WIDTH = 128
_T5_WIDTH = 256
_WIDTH = 128


def _tiny(hub_id: str) -> Description:
    transformer: dict[str, Any] = {
        "attention_head_dim": 64,
        "num_attention_heads": _WIDTH // 64,
        "num_layers": 2,
        "joint_attention_dim": _T5_WIDTH,
        "caption_projection_dim": _WIDTH,
        "pooled_projection_dim": 2 * _CLIP_WIDTH,
        "sample_size": 12,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0,) if hub_id == MEDIUM else (),
    }
    if hub_id == MEDIUM_3:
        transformer["qk_norm"] = None
    return ARCHITECTURE.sized(
        "tiny-sd3",
        {
            "transformer": transformer,
            "vae": {
                "block_out_channels": (32, 32, 32, 128),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "sample_size": 96,
            },
            "text_encoder": text_encoders.tiny_clip(_CLIP_WIDTH),
            "text_encoder_2": text_encoders.tiny_clip(_CLIP_WIDTH),
            "text_encoder_3": text_encoders.tiny_t5(_T5_WIDTH),
        },
    )


def build(hub_id: str | None = None) -> Any:
    """A seeded ``StableDiffusion3Pipeline`` on the CPU in float32, with what the transformer of ``hub_id`` has in public.

    Stable Diffusion 3 has no norms of queries and keys, 3.5-medium a second attention in its first layers; None means
    3.5-large. An image must be a multiple of 16 pixels high and wide, as with the public pipelines; at most 512 pixels.
    """
    wanted = LARGE if hub_id is None else hub_id.casefold()
    tiny = _tiny(next((known for known in (MEDIUM_3, MEDIUM) if known.casefold() == wanted), LARGE))
    with initialization.reproducible():
        components = description.build_components(tiny)
        initialization.randomize(components["transformer"])
        initialization.smooth_in_time(components["transformer"].time_text_embed.timestep_embedder.linear_1)
        initialization.randomize(components["vae"], gains={"decoder.conv_out.weight": 0.4})
        text_encoders.enliven(components["text_encoder"])
        text_encoders.enliven(components["text_encoder_2"], seed=1)
        text_encoders.enliven(components["text_encoder_3"])
        return description.build_pipeline(tiny, components)


FAMILY = Family(
    name="tiny-sd3",
    hub_ids=(MEDIUM_3, MEDIUM, LARGE, "stabilityai/stable-diffusion-3.5-large-turbo"),
    components=("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(96, 96),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="2 joint blocks of width 128; 512 pixels at most.",
    full_sizes=FULL_SIZES,
    variants=(Variant("fp16", (MEDIUM_3,), ("text_encoder", "text_encoder_2", "text_encoder_3")),),
)
