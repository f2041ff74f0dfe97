"""Tencent's HunyuanVideo: tiny-hunyuanvideo, with the classes and the scheduler of the public repository."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description
from pytest_diffopt.replicas.family import Family

HUB_ID = "hunyuanvideo-community/HunyuanVideo"

ARCHITECTURE = Architecture(
    pipeline_class="HunyuanVideoPipeline",
    classes={
        "transformer": "diffusers.HunyuanVideoTransformer3DModel",
        "vae": "diffusers.AutoencoderKLHunyuanVideo",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
        "text_encoder": "transformers.LlamaModel",
        "tokenizer": "transformers.LlamaTokenizerFast",
        "text_encoder_2": "transformers.CLIPTextModel",
        "tokenizer_2": "transformers.CLIPTokenizer",
    },
    shared={
        "transformer": {
            "in_channels": 16,
            "out_channels": 16,
            "attention_head_dim": 128,
            "patch_size": 2,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "guidance_embeds": True,
            "rope_theta": 256.0,
            "rope_axes_dim": (16, 56, 56),
        },
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
            "scaling_factor": 0.476986,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 4,
        },
        "scheduler": {"shift": 7.0},
        "tokenizer": {"max_length": 256},
        "tokenizer_2": {"max_length": 77},
    },
)

_WIDTH = 256
_CLIP_WIDTH = 128


def _tiny() -> Description:
    llama = {
        "vocab_size": 128 * (tokenizers.llama_vocabulary_size() // 128 + 1),  # more than the tokenizer's, as in public
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": 3,  # the pipeline leaves out what the last two make
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return ARCHITECTURE.sized(
        "tiny-hunyuanvideo",
        {
            "transformer": {
                "num_attention_heads": _WIDTH // 128,
                "num_layers": 1,
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "mlp_ratio": 2.0,
                "text_embed_dim": _WIDTH,
                "pooled_projection_dim": _CLIP_WIDTH,
            },
            # Attention would ask for convolutions of 128 channels in three dimensions, which weigh more than all the rest.
            "vae": {
                "block_out_channels": (8, 8, 8, 16),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "mid_block_add_attention": False,
            },
            "text_encoder": llama,
            "text_encoder_2": text_encoders.tiny_clip(_CLIP_WIDTH),
        },
    )


def build(hub_id: str | None = None) -> Any:
    """A seeded ``HunyuanVideoPipeline`` on the CPU in float32; the same for every ``hub_id``.

    A video must be a multiple of 16 pixels high and wide and have ``4 n + 1`` frames, as with the public pipeline.
    """
    tiny = _tiny()
    with initialization.reproducible():
        components = description.build_components(tiny)
        transformer = components["transformer"]
        initialization.randomize(transformer)
        embedders = (transformer.time_text_embed, transformer.context_embedder.time_text_embed)
        for embedder in embedders:
            initialization.smooth_in_time(embedder.timestep_embedder.linear_1)
        initialization.smooth_in_time(transformer.time_text_embed.guidance_embedder.linear_1)
        initialization.randomize(components["vae"], gains={"decoder.conv_out.*weight": 0.4})
        text_encoders.enliven(components["text_encoder"])
        text_encoders.enliven(components["text_encoder_2"])
        return description.build_pipeline(tiny, components)


FAMILY = Family(
    name="tiny-hunyuanvideo",
    hub_ids=(HUB_ID,),
    components=("text_encoder", "text_encoder_2", "transformer", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(64, 64, 9),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="1 double and 2 single blocks of width 256; a VAE of width 8 without attention.",
)
