"""tiny-flux: black-forest-labs' FLUX.1, with the classes and the scheduler settings of the public repositories."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pytest_diffopt.replicas import initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.family import Family

DEV = "black-forest-labs/FLUX.1-dev"
SCHNELL = "black-forest-labs/FLUX.1-schnell"

# Every layer's input is a multiple of 128: what torchao's groups and bitsandbytes' CPU kernels need.
_CLIP_WIDTH = 128
_T5_WIDTH = 256
_LATENT_CHANNELS = 32  # FLUX.1 has 16; four of them packed give the transformer's 128 inputs


def build(hub_id: str | None = None) -> Any:
    """A seeded ``FluxPipeline`` on the CPU in float32; distilled like FLUX.1-dev unless ``hub_id`` is schnell's.

    An image must be a multiple of 16 pixels high and wide, as with the public pipeline.
    """
    # By name, since diffusers is typed in part only: what comes from a module so imported is Any.
    diffusers = import_module("diffusers")

    schnell = hub_id is not None and hub_id.casefold() == SCHNELL.casefold()
    with initialization.reproducible():
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * _LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=128,
            num_attention_heads=2,
            joint_attention_dim=_T5_WIDTH,
            pooled_projection_dim=_CLIP_WIDTH,
            guidance_embeds=not schnell,
            axes_dims_rope=(16, 56, 56),
        )
        vae = diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 128),
            layers_per_block=1,
            latent_channels=_LATENT_CHANNELS,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        initialization.randomize(transformer)
        initialization.smooth_in_time(transformer.time_text_embed.timestep_embedder.linear_1)
        if not schnell:
            initialization.smooth_in_time(transformer.time_text_embed.guidance_embedder.linear_1)
        initialization.randomize(vae, gains={"decoder.conv_out.weight": 0.4})
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            max_image_seq_len=4096,
            base_shift=0.5,
            max_shift=1.15,
            shift=1.0 if schnell else 3.0,
            use_dynamic_shifting=not schnell,
        )
        return diffusers.FluxPipeline(
            scheduler=scheduler,
            vae=vae.eval(),
            text_encoder=text_encoders.clip_text_encoder(_CLIP_WIDTH),
            tokenizer=tokenizers.clip_tokenizer(),
            text_encoder_2=text_encoders.t5_encoder(_T5_WIDTH),
            tokenizer_2=tokenizers.t5_tokenizer(),
            transformer=transformer.eval(),
        )


FAMILY = Family(
    name="tiny-flux",
    hub_ids=(DEV, SCHNELL),
    components=("text_encoder", "text_encoder_2", "transformer", "vae"),
    pipeline_class="FluxPipeline",
    default_size=(96, 96),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__),
    notes="2 double and 2 single blocks of width 256; 32 latent channels where FLUX.1 has 16.",
)
