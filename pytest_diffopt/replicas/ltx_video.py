"""Lightricks' LTX-Video: tiny-ltx, with the classes of its first release of 2 billion parameters, and that."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description, Published
from pytest_diffopt.replicas.family import Family

HUB_ID = "Lightricks/LTX-Video"

ARCHITECTURE = Architecture(
    pipeline_class="LTXPipeline",
    classes={
        "transformer": "diffusers.LTXVideoTransformer3DModel",
        "vae": "diffusers.AutoencoderKLLTXVideo",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
        "tokenizer": "transformers.T5TokenizerFast",
        "text_encoder": "transformers.T5EncoderModel",
    },
    shared={
        "transformer": {
            "patch_size": 1,
            "patch_size_t": 1,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_out_bias": True,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-06,
            "qk_norm": "rms_norm_across_heads",
        },
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": 4,
            "patch_size_t": 1,
            "encoder_causal": True,
            "decoder_causal": False,
            "resnet_norm_eps": 1e-06,
            "scaling_factor": 1.0,
            "timestep_conditioning": False,
        },
        "scheduler": {
            "base_image_seq_len": 1024,
            "max_image_seq_len": 4096,
            "base_shift": 0.95,
            "max_shift": 2.05,
            "shift_terminal": 0.1,
            "use_dynamic_shifting": True,
        },
        "tokenizer": {"max_length": 128},
    },
)

_SOURCE = "huggingface/diffusers: scripts/convert_ltx_to_diffusers.py"

_TRANSFORMER = {
    "in_channels": 128,
    "out_channels": 128,
    "attention_head_dim": 64,
    "num_attention_heads": 32,
    "num_layers": 28,
    "cross_attention_dim": 2048,
    "caption_channels": 4096,
}

_VAE = {
    "latent_channels": 128,
    "block_out_channels": (128, 256, 512, 512),
    "decoder_block_out_channels": (128, 256, 512, 512),
    "layers_per_block": (4, 3, 3, 3, 4),
    "decoder_layers_per_block": (4, 3, 3, 3, 4),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False, False, False, False, False),
    "upsample_residual": (False, False, False, False),
    "upsample_factor": (1, 1, 1, 1),
}

FULL_SIZES = (
    ARCHITECTURE.sized(
        "ltx-video",
        {
            "transformer": Published(_TRANSFORMER, _SOURCE, "float32"),
            "vae": Published(_VAE, _SOURCE, "float32"),
            "scheduler": Published({}, _SOURCE),
            "text_encoder": Published(text_encoders.T5_XXL, text_encoders.T5_XXL_SOURCE, "float32"),
        },
        hub_id=HUB_ID,
        default_size=(512, 704, 161),
    ),
)

_WIDTH = 256
_T5_WIDTH = 256


def _tiny() -> Description:
    return ARCHITECTURE.sized(
        "tiny-ltx",
        {
            "transformer": {
                "in_channels": 128,
                "out_channels": 128,
                "attention_head_dim": 64,
                "num_attention_heads": _WIDTH // 64,
                "num_layers": 3,
                "cross_attention_dim": _WIDTH,
                "caption_channels": _T5_WIDTH,
            },
            # The scaling is the public one, 32 pixels and 8 frames to a latent.
            "vae": {
                "latent_channels": 128,
                "block_out_channels": (16, 16, 16, 32),
                "decoder_block_out_channels": (16, 16, 16, 32),
                "layers_per_block": (1,) * 5,
                "decoder_layers_per_block": (1,) * 5,
                "spatio_temporal_scaling": (True, True, True, False),
                "decoder_spatio_temporal_scaling": (True, True, True, False),
            },
            "text_encoder": text_encoders.tiny_t5(_T5_WIDTH),
        },
    )


def build(hub_id: str | None = None) -> Any:
    """A seeded ``LTXPipeline`` on the CPU in float32; the same for every ``hub_id``.

    A video must be a multiple of 32 pixels high and wide and have ``8 n + 1`` frames, as with the public pipeline.
    """
    tiny = _tiny()
    with initialization.reproducible():
        components = description.build_components(tiny)
        transformer = components["transformer"]
        initialization.randomize(transformer)
        initialization.smooth_in_time(transformer.time_embed.emb.timestep_embedder.linear_1)
        initialization.randomize(components["vae"], gains={"decoder.conv_out.*weight": 0.4})
        text_encoders.enliven(components["text_encoder"])
        return description.build_pipeline(tiny, components)


FAMILY = Family(
    name="tiny-ltx",
    hub_ids=(HUB_ID,),
    components=("text_encoder", "transformer", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(96, 96, 9),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="3 blocks of width 256; a VAE of the public scaling with one residual block a level.",
    full_sizes=FULL_SIZES,
)
