"""Wan-AI's Wan2.1 text-to-video: tiny-wan, with the classes and the scheduler of the public repositories, and those."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description, Published
from pytest_diffopt.replicas.family import Family

SMALL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
LARGE = "Wan-AI/Wan2.1-T2V-14B-Diffusers"

ARCHITECTURE = Architecture(
    pipeline_class="WanPipeline",
    classes={
        "transformer": "diffusers.WanTransformer3DModel",
        "vae": "diffusers.AutoencoderKLWan",
        "scheduler": "diffusers.UniPCMultistepScheduler",
        "tokenizer": "transformers.T5TokenizerFast",
        "text_encoder": "transformers.UMT5EncoderModel",
    },
    shared={
        "transformer": {
            "patch_size": (1, 2, 2),
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "freq_dim": 256,
        },
        "vae": {"z_dim": 16},
        "scheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "tokenizer": {"max_length": 512},
    },
)

_TEXT_WIDTH = 256


def _tiny() -> Description:
    return ARCHITECTURE.sized(
        "tiny-wan",
        {
            "transformer": {
                "num_attention_heads": 2,
                "text_dim": _TEXT_WIDTH,
                "ffn_dim": 512,
                "num_layers": 3,
                # The tables of positions shrink with the weights: they never leave a device, and must not weigh there.
                "rope_max_seq_len": 32,
            },
            "vae": {"base_dim": 8, "num_res_blocks": 1},
            "text_encoder": text_encoders.tiny_t5(_TEXT_WIDTH),
        },
    )


def _full(name: str, hub_id: str, heads: int, layers: int, ffn_dim: int) -> Description:
    transformer = {
        "num_attention_heads": heads,
        "num_layers": layers,
        "ffn_dim": ffn_dim,
        "text_dim": 4096,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "qk_norm": "rms_norm_across_heads",
        "added_kv_proj_dim": None,
        "image_dim": None,
        "rope_max_seq_len": 1024,
    }
    vae = {
        "base_dim": 96,
        "dim_mult": [1, 2, 4, 4],  # a list, which the class adds to
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
    }
    converter = "huggingface/diffusers: scripts/convert_wan_to_diffusers.py"
    return ARCHITECTURE.sized(
        name,
        {
            "transformer": Published(transformer, converter, "float32"),
            "vae": Published(
                vae, "huggingface/diffusers: src/diffusers/models/autoencoders/autoencoder_kl_wan.py", "float32"
            ),
            "scheduler": Published({}, f"{hub_id}: scheduler/scheduler_config.json"),
            "text_encoder": Published(text_encoders.UMT5_XXL, text_encoders.UMT5_XXL_SOURCE, "float32"),
        },
        hub_id=hub_id,
        default_size=(480, 832, 81),
    )


FULL_SIZES = (
    _full("wan2.1-t2v-1.3b", SMALL, heads=12, layers=30, ffn_dim=8960),
    _full("wan2.1-t2v-14b", LARGE, heads=40, layers=40, ffn_dim=13824),
)


def build(hub_id: str | None = None) -> Any:
    """A seeded ``WanPipeline`` on the CPU in float32; the same for every ``hub_id``, which differ in size alone.

    A video must be a multiple of 16 pixels high and wide and have ``4 n + 1`` frames, as with the public pipeline;
    at most 512 pixels and 125 frames.
    """
    tiny = _tiny()
    with initialization.reproducible():
        components = description.build_components(tiny)
        transformer = components["transformer"]
        initialization.randomize(transformer)
        initialization.smooth_in_time(transformer.condition_embedder.time_embedder.linear_1)
        initialization.randomize(components["vae"], gains={"decoder.conv_out.weight": 0.5})
        text_encoders.enliven(components["text_encoder"])
        return description.build_pipeline(tiny, components)


FAMILY = Family(
    name="tiny-wan",
    hub_ids=(SMALL, LARGE),
    components=("text_encoder", "transformer", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(64, 64, 5),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="3 blocks of width 256; a VAE of base width 8 with one residual block a level; 512 pixels, 125 frames at most.",
    full_sizes=FULL_SIZES,
)
