"""tiny-sd: Stable Diffusion 1.x, with the classes of the public repositories and a scheduler of any number of steps."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pytest_diffopt.replicas import initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.family import Family

_WIDTH = 128


def build(hub_id: str | None = None) -> Any:
    """A seeded ``StableDiffusionPipeline`` on the CPU in float32, no safety checker; the same for every ``hub_id``.

    An image must be a multiple of 16 pixels high and wide: 8 of the VAE, 2 of the UNet.
    """
    # By name, since diffusers is typed in part only: what comes from a module so imported is Any.
    diffusers = import_module("diffusers")

    with initialization.reproducible():
        unet = diffusers.UNet2DConditionModel(
            sample_size=12,
            in_channels=4,
            out_channels=4,
            # The first width is also the input of the time embedding's Linear: a multiple of 128, as all inputs are.
            block_out_channels=(_WIDTH, _WIDTH),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,  # the number of heads, in this class
            cross_attention_dim=_WIDTH,
            norm_num_groups=32,
        )
        vae = diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 128),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=96,
            scaling_factor=0.18215,
        )
        initialization.randomize(unet)
        initialization.randomize(vae, gains={"decoder.conv_out.weight": 0.4})
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        return diffusers.StableDiffusionPipeline(
            vae=vae.eval(),
            text_encoder=text_encoders.clip_text_encoder(_WIDTH),
            tokenizer=tokenizers.clip_tokenizer(),
            unet=unet.eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


FAMILY = Family(
    name="tiny-sd",
    hub_ids=(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
    ),
    components=("text_encoder", "unet", "vae"),
    pipeline_class="StableDiffusionPipeline",
    default_size=(96, 96),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__),
    notes="A UNet of two levels of width 128; DDIM where the public repositories have PNDM; no safety checker.",
)
