"""Healthy pipelines of public classes, compiled and offloaded as their documentation says: no check raises a false alarm."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from pytest_diffopt import Call, Compilation, Offloading, Quantization, Recipe, check
from pytest_diffopt.checks.session import Session
from pytest_diffopt.replicas import families


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    held = Session()
    yield held
    held.release()


def made_of(name: str, kind: str, **more: Any) -> Any:
    """A pipeline of another class, out of a replica's components; ``controlnet="Class"`` makes one for its denoiser."""

    def factory(dtype: torch.dtype | None = None) -> Any:
        import diffusers

        pipe = families()[name].build()
        given = dict(pipe.components)
        for key, value in more.items():
            if key == "controlnet":
                denoiser = given.get("unet") or given["transformer"]
                of = "from_unet" if "unet" in given else "from_transformer"
                given[key] = getattr(getattr(diffusers, value), of)(denoiser)
            else:
                given[key] = value
        made = getattr(diffusers, kind)
        takes = inspect.signature(made.__init__).parameters
        made = made(**{key: value for key, value in given.items() if key in takes})
        return made.to(dtype) if dtype is not None else made

    return factory


def animated(dtype: torch.dtype | None = None) -> Any:
    import diffusers

    pipe = families()["tiny-sd"].build()
    adapter = diffusers.MotionAdapter(
        block_out_channels=pipe.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=pipe.unet.config.norm_num_groups,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    parts = {key: value for key, value in pipe.components.items() if key not in ("safety_checker",)}
    made = diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter)
    return made.to(dtype) if dtype is not None else made


def class_conditional() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    vae = families()["tiny-sd"].build().vae
    made = diffusers.DiTPipeline(transformer.eval(), vae, diffusers.DDIMScheduler())

    class Takes(type(made)):  # type: ignore[misc]
        """Called with a prompt, as recipes call."""

        def __call__(self, prompt: str, num_inference_steps: int, generator: Any, output_type: str) -> Any:
            return super().__call__([len(prompt)], 1.0, generator, num_inference_steps, output_type)

    made.__class__ = Takes
    return made


MODEL, LEAVES = Offloading("model"), Offloading("group", offload_type="leaf_level", use_stream=True)
SEQUENTIAL = Offloading("sequential")
PICTURE: Mapping[str, Any] = {"image": "picture", "strength": 0.99}
MASKED = {**PICTURE, "mask_image": "mask"}
SMALL = {"height": 64, "width": 64}


def compiled(component: str, **more: Any) -> Compilation:
    return Compilation(component, **{"backend": "eager", "fullgraph": True, **more})


PIPELINES: dict[str, tuple[Any, Mapping[str, Any], Mapping[str, Any]]] = {
    "SD ControlNet, model offloading": (
        made_of(
            "tiny-sd", "StableDiffusionControlNetPipeline", controlnet="ControlNetModel", requires_safety_checker=False
        ),
        {"image": "control"},
        {"offloading": MODEL},
    ),
    "SD inpainting, compiled and offloaded leaf by leaf": (
        made_of("tiny-sd", "StableDiffusionInpaintPipeline", requires_safety_checker=False),
        MASKED,
        {
            "offloading": LEAVES,
            "compilation": compiled("unet", fullgraph=False, scope="repeated_blocks"),
            "dynamo": {"cache_size_limit": 1000},  # as the documentation says: each block has hooks of its own
        },
    ),
    "SD picture to picture, the decoder compiled": (
        made_of("tiny-sd", "StableDiffusionImg2ImgPipeline", requires_safety_checker=False),
        PICTURE,
        {"compilation": [compiled("unet"), compiled("vae.decode")]},
    ),
    "SD PAG, sequential offloading": (
        made_of("tiny-sd", "StableDiffusionPAGPipeline", requires_safety_checker=False, pag_applied_layers="mid"),
        {"pag_scale": 3.0},
        {"offloading": SEQUENTIAL},
    ),
    "AnimateDiff, model offloading": (animated, {**SMALL, "num_frames": 4}, {"offloading": MODEL}),
    "SDXL inpainting, nf4 and model offloading": (
        made_of("tiny-sdxl", "StableDiffusionXLInpaintPipeline"),
        MASKED,
        {
            "offloading": MODEL,
            "quantization": Quantization("bitsandbytes_4bit", ["unet"], {"bnb_4bit_quant_type": "nf4"}),
        },
    ),
    "SDXL ControlNet, compiled whole": (
        made_of("tiny-sdxl", "StableDiffusionXLControlNetPipeline", controlnet="ControlNetModel"),
        {"image": "control"},
        {"compilation": [compiled("unet"), compiled("controlnet")]},
    ),
    "SD3 picture to picture, leaves with a stream": (
        made_of("tiny-sd3", "StableDiffusion3Img2ImgPipeline"),
        PICTURE,
        {"offloading": LEAVES},
    ),
    "Flux inpainting, blocks compiled": (
        made_of("tiny-flux", "FluxInpaintPipeline"),
        {**MASKED, "max_sequence_length": 64},
        {"compilation": compiled("transformer", scope="repeated_blocks")},
    ),
    "SD3 inpainting, model offloading": (
        made_of("tiny-sd3", "StableDiffusion3InpaintPipeline"),
        MASKED,
        {"offloading": MODEL},
    ),
    "Flux picture to picture, compiled whole": (
        made_of("tiny-flux", "FluxImg2ImgPipeline"),
        {**PICTURE, "max_sequence_length": 64},
        {"compilation": compiled("transformer")},
    ),
    "LTX picture to video, model offloading": (
        made_of("tiny-ltx", "LTXImageToVideoPipeline"),
        {"image": "picture", "max_sequence_length": 64},
        {"offloading": MODEL},
    ),
    "Qwen-Image picture to picture, leaf by leaf": (
        made_of("tiny-qwen-image", "QwenImageImg2ImgPipeline"),
        PICTURE,
        {"offloading": LEAVES},
    ),
    "DiT, compiled whole": (class_conditional, {}, {"compilation": compiled("transformer")}),
}
SIZES = {"LTX": (64, 64, 9)}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_healthy_pipeline_passes_every_check(session: Session, name: str) -> None:
    pipeline, kwargs, fields = PIPELINES[name]
    sizes = SIZES.get(name.split()[0], (64, 64))
    call = Call(num_inference_steps=3, sizes=(sizes,), kwargs=kwargs)
    verdicts = check(Recipe("healthy", pipeline, call=call, **fields), session=session)
    wrong = [verdict for verdict in verdicts if verdict.status != "passed"]
    assert not wrong, "\n".join(verdict.text for verdict in wrong)
