"""Families as documentation pages use them: public indexes, single components, variants, pipelines made of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas import (
    ComponentRepository,
    Family,
    Registry,
    Variant,
    ensure,
    families,
    hub_cache_environment,
    known,
    registry,
    resolve,
)
from pytest_diffopt.replicas.cache import MANIFEST, is_whole

T5 = "transformers.T5EncoderModel"
CLIP = "transformers.CLIPTextModel"
PROJECTED_CLIP = "transformers.CLIPTextModelWithProjection"
EULER = "diffusers.FlowMatchEulerDiscreteScheduler"

FLUX = {
    "scheduler": EULER,
    "text_encoder": CLIP,
    "text_encoder_2": T5,
    "tokenizer": "transformers.CLIPTokenizer",
    "tokenizer_2": "transformers.T5TokenizerFast",
    "transformer": "diffusers.FluxTransformer2DModel",
    "vae": "diffusers.AutoencoderKL",
}
SDXL = {
    "scheduler": "diffusers.EulerDiscreteScheduler",
    "text_encoder": CLIP,
    "text_encoder_2": PROJECTED_CLIP,
    "tokenizer": "transformers.CLIPTokenizer",
    "tokenizer_2": "transformers.CLIPTokenizer",
    "unet": "diffusers.UNet2DConditionModel",
    "vae": "diffusers.AutoencoderKL",
}
SD3 = {
    "scheduler": EULER,
    "text_encoder": PROJECTED_CLIP,
    "text_encoder_2": PROJECTED_CLIP,
    "text_encoder_3": T5,
    "tokenizer": "transformers.CLIPTokenizer",
    "tokenizer_2": "transformers.CLIPTokenizer",
    "tokenizer_3": "transformers.T5TokenizerFast",
    "transformer": "diffusers.SD3Transformer2DModel",
    "vae": "diffusers.AutoencoderKL",
}
WAN = {
    "scheduler": "diffusers.UniPCMultistepScheduler",
    "text_encoder": "transformers.UMT5EncoderModel",
    "tokenizer": "transformers.T5TokenizerFast",
    "transformer": "diffusers.WanTransformer3DModel",
    "vae": "diffusers.AutoencoderKLWan",
}
LTX = {
    "scheduler": EULER,
    "text_encoder": T5,
    "tokenizer": "transformers.T5Tokenizer",
    "transformer": "diffusers.LTXVideoTransformer3DModel",
    "vae": "diffusers.AutoencoderKLLTXVideo",
}
COGVIDEOX = {
    "scheduler": "diffusers.CogVideoXDDIMScheduler",
    "text_encoder": T5,
    "tokenizer": "transformers.T5Tokenizer",
    "transformer": "diffusers.CogVideoXTransformer3DModel",
    "vae": "diffusers.AutoencoderKLCogVideoX",
}
HUNYUAN_VIDEO = {
    "scheduler": EULER,
    "text_encoder": "transformers.LlamaModel",
    "text_encoder_2": CLIP,
    "tokenizer": "transformers.LlamaTokenizerFast",
    "tokenizer_2": "transformers.CLIPTokenizer",
    "transformer": "diffusers.HunyuanVideoTransformer3DModel",
    "vae": "diffusers.AutoencoderKLHunyuanVideo",
}
QWEN_IMAGE = {
    "scheduler": EULER,
    "text_encoder": "transformers.Qwen2_5_VLForConditionalGeneration",
    "tokenizer": "transformers.Qwen2Tokenizer",
    "transformer": "diffusers.QwenImageTransformer2DModel",
    "vae": "diffusers.AutoencoderKLQwenImage",
}

# The classes of the public model_index.json. Sources: lllyasviel/stable-diffusion-webui-forge, backend/huggingface, keeps
# those of FLUX.1-dev and both of Stable Diffusion 3; the others are what diffusers' scripts that convert the public weights
# (convert_*_to_diffusers.py) build and save. SDXL Turbo's differs in its scheduler.
PUBLIC_INDEXES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", FLUX),
    "black-forest-labs/FLUX.1-schnell": ("FluxPipeline", FLUX),
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", SDXL),
    "stabilityai/sdxl-turbo": (
        "StableDiffusionXLPipeline",
        {**SDXL, "scheduler": "diffusers.EulerAncestralDiscreteScheduler"},
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("StableDiffusion3Pipeline", SD3),
    "stabilityai/stable-diffusion-3.5-medium": ("StableDiffusion3Pipeline", SD3),
    "stabilityai/stable-diffusion-3.5-large": ("StableDiffusion3Pipeline", SD3),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("WanPipeline", WAN),
    "Lightricks/LTX-Video": ("LTXPipeline", LTX),
    "THUDM/CogVideoX-2b": ("CogVideoXPipeline", COGVIDEOX),
    "THUDM/CogVideoX-5b": ("CogVideoXPipeline", COGVIDEOX),
    "hunyuanvideo-community/HunyuanVideo": ("HunyuanVideoPipeline", HUNYUAN_VIDEO),
    "Qwen/Qwen-Image": ("QwenImagePipeline", QWEN_IMAGE),
}


@pytest.fixture(scope="module", autouse=True)
def replica_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("replicas")
        patch.setenv("DIFFOPT_CACHE_DIR", str(directory))
        yield directory


def loaded_class(library: str, name: str) -> Any:
    """transformers calls both tokenizers of one model by one name."""
    return getattr(import_module(library), name)


@pytest.mark.parametrize("hub_id", PUBLIC_INDEXES)
def test_a_replica_has_the_classes_of_the_public_index_and_weighs_little(hub_id: str) -> None:
    snapshot = ensure(hub_id)
    index = json.loads((snapshot / "model_index.json").read_text())
    pipeline_class, classes = PUBLIC_INDEXES[hub_id]
    assert index["_class_name"] == pipeline_class
    written = {part: loaded_class(*entry) for part, entry in index.items() if isinstance(entry, list) and entry[0]}
    assert written == {part: loaded_class(*path.split(".")) for part, path in classes.items()}
    files = [file for file in snapshot.rglob("*") if file.is_file()]
    once = {file.stat().st_ino: file.stat().st_size for file in files}
    assert sum(once.values()) < 52 * 2**20


@pytest.mark.parametrize("hub_id", ["stabilityai/stable-diffusion-xl-base-1.0", "runwayml/stable-diffusion-v1-5"])
def test_weights_under_a_second_name_take_no_room_and_belong_to_the_snapshot(hub_id: str) -> None:
    snapshot = ensure(hub_id)
    manifest = json.loads((snapshot / MANIFEST).read_text())["files"]
    family = registry.find(hub_id)
    assert family is not None
    (variant,) = family.variants
    assert set(variant.components) == set(family.components)
    for component in variant.components:
        (second,) = (snapshot / component).glob("*.fp16.safetensors")
        first = second.with_name(second.name.replace(".fp16", ""))
        assert {f"{component}/{file.name}" for file in (first, second)} <= manifest.keys()
        assert first.samefile(second)
    second.unlink()
    assert not is_whole(snapshot)
    assert ensure(hub_id) == snapshot
    assert second.is_file()


def test_where_files_cannot_be_linked_they_are_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "link", refuse)
    snapshot = ensure("tiny-sd")
    (second,) = (snapshot / "vae").glob("*.fp16.safetensors")
    first = second.with_name("diffusion_pytorch_model.safetensors")
    assert not first.samefile(second)
    assert first.read_bytes() == second.read_bytes()


def test_a_variant_that_the_public_repository_lacks_is_missing_here_too() -> None:
    diffusers = import_module("diffusers")
    with pytest.raises(ValueError, match="no such modeling files are available"):
        diffusers.DiffusionPipeline.from_pretrained(ensure("Lightricks/LTX-Video"), variant="fp16")
    # Stable Diffusion 3 has its text encoders twice, and nothing else.
    snapshot = ensure("stabilityai/stable-diffusion-3-medium-diffusers")
    twice = {file.parent.name for file in snapshot.glob("*/*.fp16.safetensors")}
    assert twice == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.fp16\.bin"):
        diffusers.SD3Transformer2DModel.from_pretrained(snapshot, subfolder="transformer", variant="fp16")
    assert list(ensure("stabilityai/stable-diffusion-3.5-large").glob("*/*.fp16.safetensors")) == []


CODE = """
import json, torch
from diffusers import (AutoencoderKL, AutoencoderKLCogVideoX, AutoModel, AutoPipelineForImage2Image,
    AutoPipelineForInpainting, AutoPipelineForText2Image, CogVideoXPipeline, DiffusionPipeline,
    LTXVideoTransformer3DModel, QwenImagePipeline, SD3Transformer2DModel, StableDiffusionXLPipeline)
from PIL import Image
from transformers import (CLIPTextModel, CLIPTextModelWithProjection, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer,
    T5EncoderModel)
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
FLUX = "black-forest-labs/FLUX.1-dev"
half = {"torch_dtype": torch.float16}
found = {}

def name(key, made, *more):
    found[key] = [type(made).__name__, *more]
    return made

vae = name("vae", AutoencoderKL.from_pretrained("madebyollin/sdxl-vae-fp16-fix", **half))
found["vae"] += [vae.config.force_upcast, str(vae.dtype)]
pipeline = name("fp16", StableDiffusionXLPipeline.from_pretrained(BASE, vae=vae, variant="fp16", use_safetensors=True, **half))
found["fp16"] += [str(pipeline.unet.dtype), str(pipeline.text_encoder_2.dtype)]
pipeline.set_progress_bar_config(disable=True)
small = {"num_inference_steps": 2, "output_type": "pt", "height": 96, "width": 96}
found["fp16"].append(bool(torch.isfinite(pipeline("a cat", **small).images).all()))
turbo = name("turbo", AutoPipelineForText2Image.from_pretrained("stabilityai/sdxl-turbo", variant="fp16", **half))
found["turbo"].append(type(turbo.scheduler).__name__)
name("text", AutoPipelineForText2Image.from_pretrained(FLUX, torch_dtype=torch.bfloat16))
picture = Image.new("RGB", (96, 96), (200, 40, 90))
for key, hub_id in {"sdxl": BASE, "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5", "flux": FLUX, "sd3": SD3}.items():
    made = name(key, AutoPipelineForImage2Image.from_pretrained(hub_id))
    made.set_progress_bar_config(disable=True)
    size = {"height": 96, "width": 96} if key in ("flux", "sd3") else {}  # else theirs is what the public ones make
    images = [made(p, image=picture, **size, strength=0.7, generator=torch.Generator().manual_seed(0), num_inference_steps=3,
        output_type="pt").images for p in ("a cat", "a dog")]
    found[key] += [list(images[0].shape), bool((images[0] - images[1]).abs().max() > 1e-3)]
inpaint = name("inpaint", AutoPipelineForInpainting.from_pipe(AutoPipelineForText2Image.from_pretrained(BASE)))
inpaint.set_progress_bar_config(disable=True)
found["inpaint"].append(list(inpaint("a cat", image=picture, mask_image=Image.new("L", (96, 96), 255), **small).images.shape))
name("unet", AutoModel.from_pretrained(BASE, subfolder="unet", variant="fp16", **half))
name("transformer", AutoModel.from_pretrained("Qwen/Qwen-Image", subfolder="transformer"))
name("vae alone", AutoencoderKL.from_pretrained(SD3, subfolder="vae"))
name("t5", T5EncoderModel.from_pretrained(SD3, subfolder="text_encoder_3", variant="fp16", **half))
name("clip", CLIPTextModel.from_pretrained(BASE, subfolder="text_encoder"))
name("clip 2", CLIPTextModelWithProjection.from_pretrained(BASE, subfolder="text_encoder_2", variant="fp16"))
name("mmdit", SD3Transformer2DModel.from_pretrained(SD3, subfolder="transformer"))
name("ltx", LTXVideoTransformer3DModel.from_pretrained("Lightricks/LTX-Video", subfolder="transformer"))
name("cog", AutoencoderKLCogVideoX.from_pretrained("zai-org/CogVideoX-5b", subfolder="vae"))
name("cog 2", CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-2b", **half))
name("vl", Qwen2_5_VLForConditionalGeneration.from_pretrained("Qwen/Qwen-Image", subfolder="text_encoder"))
name("words", Qwen2Tokenizer.from_pretrained("Qwen/Qwen-Image", subfolder="tokenizer"))
print(json.dumps(found))
"""


def test_a_fresh_process_loads_what_pages_load_with_no_patch(tmp_path: Path) -> None:
    environment = hub_cache_environment(
        [
            "stabilityai/stable-diffusion-xl-base-1.0",
            "stabilityai/sdxl-turbo",
            "madebyollin/sdxl-vae-fp16-fix",
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "black-forest-labs/FLUX.1-dev",
            "Qwen/Qwen-Image",
            "Lightricks/LTX-Video",
            "zai-org/CogVideoX-5b",
            "THUDM/CogVideoX-2b",
        ]
    )
    root = Path(__file__).parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", CODE], env=variables, text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    image = [1, 3, 96, 96]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "vae": ["AutoencoderKL", False, "torch.float16"],
        "fp16": ["StableDiffusionXLPipeline", "torch.float16", "torch.float16", True],
        "turbo": ["StableDiffusionXLPipeline", "EulerAncestralDiscreteScheduler"],
        "text": ["FluxPipeline"],
        "sdxl": ["StableDiffusionXLImg2ImgPipeline", image, True],
        "sd": ["StableDiffusionImg2ImgPipeline", image, True],
        "flux": ["FluxImg2ImgPipeline", image, True],
        "sd3": ["StableDiffusion3Img2ImgPipeline", image, True],
        "inpaint": ["StableDiffusionXLInpaintPipeline", image],
        "unet": ["UNet2DConditionModel"],
        "transformer": ["QwenImageTransformer2DModel"],
        "vae alone": ["AutoencoderKL"],
        "t5": ["T5EncoderModel"],
        "clip": ["CLIPTextModel"],
        "clip 2": ["CLIPTextModelWithProjection"],
        "mmdit": ["SD3Transformer2DModel"],
        "ltx": ["LTXVideoTransformer3DModel"],
        "cog": ["AutoencoderKLCogVideoX"],
        "cog 2": ["CogVideoXPipeline"],
        "vl": ["Qwen2_5_VLForConditionalGeneration"],
        "words": ["Qwen2Tokenizer"],
    }


def test_a_repository_of_one_component_holds_the_familys_weights_and_its_own_config() -> None:
    diffusers = import_module("diffusers")
    alone = diffusers.AutoencoderKL.from_pretrained(ensure("Madebyollin/SDXL-vae-fp16-fix"))
    family = families()["tiny-sdxl"].build(None).vae
    assert (alone.config.force_upcast, family.config.force_upcast) == (False, True)
    state, other = alone.state_dict(), family.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


def test_a_repository_of_one_component_is_known_but_is_no_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert known("madebyollin/SDXL-vae-fp16-fix")
    with pytest.raises(ReplicaError) as raised:
        resolve("madebyollin/sdxl-vae-fp16-fix")
    assert str(raised.value) == (
        "pipeline: found 'madebyollin/sdxl-vae-fp16-fix'; "
        "it is a component alone, the vae of tiny-sdxl: name a pipeline"
    )


@pytest.mark.parametrize(
    ("name", "controlled"),
    [
        ("tiny-sd", "StableDiffusionControlNetPipeline"),
        ("tiny-sdxl", "StableDiffusionXLControlNetPipeline"),
    ],
)
def test_a_controlnet_made_of_the_unet_runs_with_it(name: str, controlled: str) -> None:
    diffusers = import_module("diffusers")
    family = families()[name]
    plain = family.build(None)
    controlnet = diffusers.ControlNetModel.from_unet(plain.unet)
    torch.nn.init.eye_(controlnet.controlnet_mid_block.weight.flatten(1))  # zeros would leave the image as it is
    pipeline = getattr(diffusers, controlled).from_pipe(plain, controlnet=controlnet)
    height, width, *_ = family.default_size
    call = {"prompt": "a", "num_inference_steps": 1, "height": height, "width": width, "output_type": "np"}
    control = torch.linspace(0, 1, height * width).reshape(1, 1, height, width).expand(1, 3, -1, -1)
    images = [
        pipeline(image=control, generator=torch.Generator().manual_seed(0), **call).images,
        plain(generator=torch.Generator().manual_seed(0), **call).images,
    ]
    assert images[0].shape == images[1].shape == (1, height, width, 3)
    assert abs(images[0] - images[1]).max() > 1e-3


def test_the_guide_lists_every_replica_with_its_size_and_hub_ids() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for made in families().values():
        height, width, *frames = made.default_size
        size = f"{height}×{width}" + "".join(f", {number} frames" for number in frames)
        ids = ", ".join(f"`{hub_id}`" for hub_id in made.hub_ids)
        assert f"| `{made.name}` | {size} | {ids} |" in guide
        assert [alone.hub_id for alone in made.component_repositories if f"`{alone.hub_id}`" not in guide] == []


def family(**changes: Any) -> Family:
    fields: dict[str, Any] = {"hub_ids": ("o/a",), "components": ("unet", "vae"), "pipeline_class": "P"}
    return Family("tiny-mine", **{**fields, "default_size": (8, 8), "build": lambda hub_id: None, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"variants": (Variant("fp16", ("o/b",), ("vae",)),)},
            "tiny-mine: o/b is none of the family's hub ids, which are o/a.",
        ),
        (
            {"variants": (Variant("fp16", ("o/a",), ("transformer", "vae")),)},
            "tiny-mine: transformer is none of the family's components, which are unet, vae.",
        ),
        (
            {"component_repositories": (ComponentRepository("o/c", "text_encoder"),)},
            "tiny-mine: text_encoder is none of the family's components, which are unet, vae.",
        ),
        (
            {"component_repositories": (ComponentRepository("c", "vae"),)},
            "tiny-mine: a hub id is written 'org/name'; found 'c'.",
        ),
    ],
)
def test_a_variant_or_a_repository_of_what_the_family_lacks_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ReplicaError) as raised:
        family(**changes)
    assert str(raised.value) == sentence


def test_a_repository_of_one_component_is_one_familys() -> None:
    alone = ComponentRepository("o/vae", "vae")
    own = Registry(family(component_repositories=(alone,)))
    found = own.find_component("O/VAE")
    assert found is not None
    assert (found[0].name, found[1]) == ("tiny-mine", alone)
    assert own.find("o/vae") is None
    for taken in ({"hub_ids": ("o/VAE",)}, {"hub_ids": (), "component_repositories": (alone,)}):
        other = Family(**{**vars(family()), "name": "tiny-yours", "component_repositories": (), **taken})
        with pytest.raises(ReplicaError, match=r"tiny-yours: 'o/(vae|VAE)' is taken by the replica family tiny-mine\."):
            own.register(other)


def test_a_model_that_names_no_blocks_is_compiled_by_its_lists_and_that_is_said() -> None:
    """diffusers' own ``compile_repeated_blocks()`` raises for it."""
    from pytest_diffopt import Call, Compilation, Recipe, check

    def engagement(name: str) -> Any:
        compilation = Compilation("transformer", scope="repeated_blocks", backend="eager")
        recipe = Recipe("blocks", name, compilation=compilation, call=Call(num_inference_steps=2))
        return next(one for one in check(recipe) if one.check == "engagement")

    pipeline = import_module("diffusers").DiffusionPipeline.from_pretrained(resolve("tiny-cogvideox").path_or_id)
    with pytest.raises(ValueError, match="_repeated_blocks"):
        pipeline.transformer.compile_repeated_blocks(backend="eager")
    verdict = engagement("tiny-cogvideox")
    assert verdict.status == "passed"
    assert "diffusers' compile_repeated_blocks() refuses CogVideoXTransformer3DModel" in verdict.sentence
    assert "refuses" not in engagement("tiny-flux").sentence
