"""tiny-wan: Wan-AI's Wan2.1 text-to-video, with the classes and the scheduler settings of the public repositories."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pytest_diffopt.replicas import initialization, text_encoders, tokenizers
from pytest_diffopt.replicas.family import Family

_TEXT_WIDTH = 256


def build(hub_id: str | None = None) -> Any:
    """A seeded ``WanPipeline`` on the CPU in float32; the same for every ``hub_id``, which differ in size alone.

    A video must be a multiple of 16 pixels high and wide and have ``4 n + 1`` frames, as with the public pipeline;
    at most 512 pixels and 125 frames.
    """
    # By name, since diffusers is typed in part only: what comes from a module so imported is Any.
    diffusers = import_module("diffusers")

    with initialization.reproducible():
        transformer = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=128,
            in_channels=16,
            out_channels=16,
            text_dim=_TEXT_WIDTH,
            freq_dim=256,
            ffn_dim=512,
            num_layers=3,
            # The tables of positions shrink with the weights: they never leave a device, and must not weigh there.
            rope_max_seq_len=32,
        )
        vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
        initialization.randomize(transformer)
        initialization.smooth_in_time(transformer.condition_embedder.time_embedder.linear_1)
        initialization.randomize(vae, gains={"decoder.conv_out.weight": 0.5})
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        return diffusers.WanPipeline(
            tokenizer=tokenizers.t5_tokenizer(),
            text_encoder=text_encoders.umt5_encoder(_TEXT_WIDTH),
            vae=vae.eval(),
            scheduler=scheduler,
            transformer=transformer.eval(),
        )


FAMILY = Family(
    name="tiny-wan",
    hub_ids=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    components=("text_encoder", "transformer", "vae"),
    pipeline_class="WanPipeline",
    default_size=(64, 64, 5),
    build=build,
    sources=(initialization.__file__, text_encoders.__file__, tokenizers.__file__),
    notes="3 blocks of width 256; a VAE of base width 8 with one residual block a level; 512 pixels, 125 frames at most.",
)
