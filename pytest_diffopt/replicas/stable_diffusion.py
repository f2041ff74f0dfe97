"""Stable Diffusion 1.x: tiny-sd, with the classes of the public repositories and a scheduler of any number of steps."""

from __future__ import annotations

from typing import Any

from pytest_diffopt.replicas import description, initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.description import Architecture, Description
from pytest_diffopt.replicas.family import ComponentRepository, Family, Variant

ARCHITECTURE = Architecture(
    pipeline_class="StableDiffusionPipeline",
    classes={
        "unet": "diffusers.UNet2DConditionModel",
        "vae": "diffusers.AutoencoderKL",
        "scheduler": "diffusers.DDIMScheduler",
        "text_encoder": "transformers.CLIPTextModel",
        "tokenizer": "transformers.CLIPTokenizer",
    },
    shared={
        "unet": {"in_channels": 4, "out_channels": 4, "norm_num_groups": 32},
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": 4,
            "scaling_factor": 0.18215,
        },
        "scheduler": {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
        "tokenizer": {"max_length": 77},
    },
    options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)

_WIDTH = 128


def _tiny() -> Description:
    return ARCHITECTURE.sized(
        "tiny-sd",
        {
            "unet": {
                "sample_size": 12,
                # The first width is also the input of the time embedding's Linear: a multiple of 128, as all inputs are.
                "block_out_channels": (_WIDTH, _WIDTH),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 1,
                "attention_head_dim": 2,  # the number of heads, in this class
                "cross_attention_dim": _WIDTH,
            },
            "vae": {
                "block_out_channels": (32, 32, 32, 128),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "sample_size": 96,
            },
            "text_encoder": text_encoders.tiny_clip(_WIDTH),
        },
    )


def build(hub_id: str | None = None) -> Any:
    """A seeded ``StableDiffusionPipeline`` on the CPU in float32, no safety checker; the same for every ``hub_id``.

    An image must be a multiple of 16 pixels high and wide: 8 of the VAE, 2 of the UNet.
    """
    tiny = _tiny()
    with initialization.reproducible():
        components = description.build_components(tiny)
        initialization.randomize(components["unet"])
        initialization.randomize(components["vae"], gains={"decoder.conv_out.weight": 0.4})
        text_encoders.enliven(components["text_encoder"])
        return description.build_pipeline(tiny, components)


V1_5 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5")

FAMILY = Family(
    name="tiny-sd",
    hub_ids=(*V1_5, "CompVis/stable-diffusion-v1-4"),
    components=("text_encoder", "unet", "vae"),
    pipeline_class=ARCHITECTURE.pipeline_class,
    default_size=(96, 96),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__, description.__file__),
    notes="A UNet of two levels of width 128; DDIM where the public repositories have PNDM; no safety checker.",
    variants=(Variant("fp16", V1_5, ("text_encoder", "unet", "vae")),),
    component_repositories=(
        ComponentRepository("stabilityai/sd-vae-ft-ema", "vae"),
        ComponentRepository("stabilityai/sd-vae-ft-mse", "vae"),
    ),
)
