"""Lightricks' LTX-Video, its first release of 2 billion parameters, in its full size; it has no replica yet."""

from __future__ import annotations

from pytest_diffopt.replicas import text_encoders
from pytest_diffopt.replicas.description import Architecture, Published

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
