"""Full-size models: that they have the public numbers of parameters, and that checkpoints of holes load like real ones."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import struct
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from pytest_diffopt.accelerators import select
from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.preparation.quantization import quantizers_accept
from pytest_diffopt.replicas import (
    Architecture,
    Description,
    Family,
    Published,
    Registry,
    cogvideox,
    flux,
    ltx_video,
    qwen_image,
    registry,
    resolve_full_size,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    text_encoders,
    tokenizers,
    wan,
    write_checkpoint,
)
from pytest_diffopt.replicas.checkpoint import PUBLISHED_SHARD_BYTES, stored_tensors
from pytest_diffopt.replicas.description import (
    Component,
    build_component,
    build_on_meta,
    component_class,
    kind,
    parameter_count,
    read_description,
)

NAMES = (
    "flux.1-dev",
    "flux.1-schnell",
    "sdxl",
    "sd3.5-medium",
    "sd3.5-large",
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b",
    "ltx-video",
    "cogvideox-2b",
    "cogvideox-5b",
    "qwen-image",
)

# The numbers as they were found in public, each with where.
FLUX_DEV = 11_901_408_320  # black-forest-labs/FLUX.1-dev, as tables of the hub's counts list it
FLUX_SCHNELL = FLUX_DEV - 10_229_760  # without guidance_embedder: 256 x 3072 + 3072 + 3072 x 3072 + 3072
# 9524621312 bytes of float16: text_encoder_3's index in stabilityai/stable-diffusion-3-medium-diffusers
T5_XXL = 4_762_310_656
CLIP_L = 123_060_480  # openai/clip-vit-large-patch14's text model, as Stable Diffusion's cards count it
CLIP_L_PROJECTION = CLIP_L + 768 * 768
CLIP_G = 694_659_840  # with its projection, as benchmarks of Stable Diffusion 3 list text_encoder_2
VAE_4 = 83_653_863  # as Stable Diffusion's cards count it
VAE_16 = VAE_4 + 9 * 512 * (12 + 24) + 24 - (8 * 8 + 8) - (4 * 4 + 4)  # 12 latent channels more, no quant_conv
UMT5_XXL = 5_680_910_336  # 256384 x 4096 + 24 x (4 x 4096^2 + 3 x 4096 x 10240 + 2 x 4096 + 32 x 64) + 4096
COGVIDEOX_VAE = (
    215_583_907  # as the table of zai-org/CogVideoX-2b's components that has its transformer's number lists it
)
WAN_VAE = 126_892_531  # counted by who trains with Wan2.1_VAE frozen

COUNTS: Mapping[str, Mapping[str, int]] = {
    "flux.1-dev": {"transformer": FLUX_DEV, "vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    "flux.1-schnell": {"transformer": FLUX_SCHNELL, "vae": VAE_16, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    # 2567463684: "unet params" in logs of diffusers' DreamBooth script for SDXL
    "sdxl": {"unet": 2_567_463_684, "vae": VAE_4, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    # 1418996800: counted by who trains beside the frozen model
    "wan2.1-t2v-1.3b": {"transformer": 1_418_996_800, "vae": WAN_VAE, "text_encoder": UMT5_XXL},
    # 14288491584: an expert of Wan-AI/Wan2.2-T2V-A14B-Diffusers, of the same architecture, as the same tables do
    "wan2.1-t2v-14b": {"transformer": 14_288_491_584, "vae": WAN_VAE, "text_encoder": UMT5_XXL},
    # 1923385472: a-r-r-o-w/finetrainers, docs/training/ltx_video.md, "trainable parameters" of a full finetuning
    "ltx-video": {"transformer": 1_923_385_472, "text_encoder": T5_XXL},
    # 1693783872: the same table
    "cogvideox-2b": {"transformer": 1_693_783_872, "vae": COGVIDEOX_VAE, "text_encoder": T5_XXL},
    # 5570283072: a-r-r-o-w/finetrainers, docs/training/cogvideox.md, "trainable parameters" of a full finetuning
    "cogvideox-5b": {"transformer": 5_570_283_072, "vae": COGVIDEOX_VAE, "text_encoder": T5_XXL},
    # 20430401088: Qwen/Qwen-Image-2512, as the same tables do; 8292166656: the hub's number of Qwen/Qwen2.5-VL-7B-Instruct
    "qwen-image": {"transformer": 20_430_401_088, "vae": WAN_VAE, "text_encoder": 8_292_166_656},
    "sd3.5-medium": {
        "vae": VAE_16,
        "text_encoder": CLIP_L_PROJECTION,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5_XXL,
    },
    "sd3.5-large": {
        "vae": VAE_16,
        "text_encoder": CLIP_L_PROJECTION,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5_XXL,
    },
}

# Where the public number is a rounded one: (size, component) → billions, and to how many decimals.
ROUNDED = {
    # "8.1 billion" and "2.5 billion": stability.ai/news/introducing-stable-diffusion-3-5, the table of positions included
    ("sd3.5-large", "transformer"): (8.1, 1),
    ("sd3.5-medium", "transformer"): (2.5, 1),
}

# Counted by nobody in public that could be found; the shapes follow from the converter that made the public files.
UNCOUNTED = {("ltx-video", "vae")}


@functools.cache
def on_meta(name: str) -> dict[str, torch.nn.Module]:
    return build_on_meta(registry.full_size(name))


def sized(architecture: Architecture, **configs: Any) -> Description:
    return architecture.sized("small", configs)


SMALL_VAE = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
SMALL_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def small(family: str) -> Description:
    """A full size's description with small numbers: the same classes, entries and tokenizers."""
    clip, t5 = text_encoders.tiny_clip(128), text_encoders.tiny_t5(128)
    if family == "flux":
        transformer = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
        transformer |= {"joint_attention_dim": 128, "pooled_projection_dim": 128, "guidance_embeds": True}
        vae = {**SMALL_VAE, **SMALL_BLOCKS, "latent_channels": 16}
        encoders = {"text_encoder": Published(clip, "", "bfloat16"), "text_encoder_2": Published(t5, "", "bfloat16")}
        weights = {"transformer": Published(transformer, "", "bfloat16"), "vae": Published(vae, "", "bfloat16")}
        return flux.ARCHITECTURE.sized("small-flux", {**weights, **encoders})
    if family == "sd":
        unet = {"block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 128}
        unet |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 2}
        unet |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
        return sized(stable_diffusion.ARCHITECTURE, unet=unet, vae={**SMALL_VAE, **SMALL_BLOCKS}, text_encoder=clip)
    if family == "sdxl":
        unet = {"block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 256}
        unet |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (1, 2)}
        unet |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1)}
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 176}
        vae = {**SMALL_VAE, **SMALL_BLOCKS}
        return sized(stable_diffusion_xl.ARCHITECTURE, unet=unet, vae=vae, text_encoder=clip, text_encoder_2=clip)
    if family == "sd3":
        transformer = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2, "sample_size": 32}
        transformer |= {"joint_attention_dim": 128, "caption_projection_dim": 16, "pooled_projection_dim": 256}
        transformer |= {"pos_embed_max_size": 16, "dual_attention_layers": (0,)}
        vae = {**SMALL_VAE, **SMALL_BLOCKS}
        encoders = {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": t5}
        return sized(stable_diffusion_3.ARCHITECTURE, transformer=transformer, vae=vae, **encoders)
    if family == "wan":
        transformer = {
            "num_attention_heads": 1,
            "num_layers": 1,
            "ffn_dim": 128,
            "text_dim": 128,
            "rope_max_seq_len": 32,
        }
        vae = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        return sized(wan.ARCHITECTURE, transformer=transformer, vae=vae, text_encoder=t5)
    if family == "cogvideox":
        transformer = {"num_attention_heads": 1, "num_layers": 1, "time_embed_dim": 16, "text_embed_dim": 128}
        transformer |= {"sample_width": 4, "sample_height": 4, "sample_frames": 5}
        vae = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
        return sized(cogvideox.ARCHITECTURE, transformer=transformer, vae=vae, text_encoder=t5)
    if family == "ltx":
        transformer = {"in_channels": 8, "out_channels": 8, "attention_head_dim": 8, "num_attention_heads": 2}
        transformer |= {"num_layers": 1, "cross_attention_dim": 16, "caption_channels": 128}
        vae: dict[str, Any] = {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "layers_per_block": (1,) * 5}
        vae |= {"decoder_block_out_channels": (8, 8, 8, 8), "decoder_layers_per_block": (1,) * 5}
        return sized(ltx_video.ARCHITECTURE, transformer=transformer, vae=vae, text_encoder=t5)
    assert family == "qwen"
    full = registry.full_size("qwen-image").components["text_encoder"].config
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {**full["text_config"], **narrow, "num_hidden_layers": 1, "max_window_layers": 1, "vocab_size": 151936}
    text["rope_scaling"] = {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}
    vision = {**full["vision_config"], "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    vision |= {"out_hidden_size": 64, "fullatt_block_indexes": [0]}
    transformer = {"in_channels": 64, "out_channels": 16, "joint_attention_dim": 64, "num_attention_heads": 1}
    return sized(
        qwen_image.ARCHITECTURE,
        transformer={**transformer, "num_layers": 1},
        vae={"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        text_encoder=Published({**full, "text_config": text, "vision_config": vision}, "", "bfloat16"),
    )


FAMILIES = ("flux", "sd", "sdxl", "sd3", "wan", "ltx", "cogvideox", "qwen")


def files_of(directory: Path) -> dict[str, Path]:
    return {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}


def header_of(file: Path) -> dict[str, Any]:
    with file.open("rb") as read:
        (length,) = struct.unpack("<Q", read.read(8))
        header: dict[str, Any] = json.loads(read.read(length))
    header.pop("__metadata__")
    return header


def test_these_are_the_full_sizes() -> None:
    assert set(registry.full_sizes) == set(NAMES) == set(COUNTS)


@pytest.mark.parametrize(
    ("name", "component", "count"),
    [(name, component, count) for name, counts in COUNTS.items() for component, count in counts.items()],
)
def test_a_component_has_the_public_number_of_parameters(name: str, component: str, count: int) -> None:
    assert parameter_count(on_meta(name)[component]) == count


@pytest.mark.parametrize(("name", "component"), ROUNDED)
def test_a_component_has_the_public_number_of_parameters_within_its_rounding(name: str, component: str) -> None:
    billions, decimals = ROUNDED[name, component]
    stored = sum(tensor.numel() for tensor in stored_tensors(on_meta(name)[component]).values())
    assert round(stored / 1e9, decimals) == billions


def test_every_component_with_weights_is_counted_but_one() -> None:
    modules = {(name, component) for name in NAMES for component in on_meta(name)}
    counted = {(name, component) for name, counts in COUNTS.items() for component in counts}
    assert modules - counted - set(ROUNDED) == UNCOUNTED


@pytest.mark.parametrize("name", NAMES)
def test_a_full_size_takes_no_memory_and_has_its_published_dtype(name: str) -> None:
    components = registry.full_size(name).components
    for component, module in on_meta(name).items():
        tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert {str(tensor.dtype) for tensor in tensors} == {f"torch.{components[component].dtype}"}
        assert not module.training


@pytest.mark.parametrize("name", NAMES)
def test_a_full_size_has_every_component_that_its_pipeline_asks_for(name: str) -> None:
    description = registry.full_size(name)
    pipeline = getattr(diffusers, description.pipeline_class)
    components, _ = pipeline._get_signature_keys(pipeline)
    optional = {*pipeline._optional_components, *description.options}
    assert set(components) - optional <= set(description.components) <= set(components)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_of_a_full_sizes_config_is_one_that_its_class_knows(name: str) -> None:
    unknown = []
    for part, component in registry.full_size(name).components.items():
        if kind(component) == "tokenizer":
            continue
        found = component_class(component)
        if component.library == "diffusers":
            known = set(inspect.signature(found.__init__).parameters)
        else:
            known = set(dir(found.config_class()))
        unknown += [f"{part}.{key}" for key in component.config if key not in known]
    assert unknown == []


@pytest.mark.parametrize("name", NAMES)
def test_every_config_of_a_full_size_says_where_it_was_read(name: str) -> None:
    components = registry.full_size(name).components
    sources = {part: c.source for part, c in components.items() if kind(c) in ("module", "scheduler")}
    assert {part for part, source in sources.items() if source.count(": ") != 1 or "/" not in source} == set()


@pytest.mark.parametrize(
    "family", [f for f in registry.families.values() if f.full_sizes], ids=lambda family: family.name
)
def test_a_replica_and_its_full_sizes_have_the_same_classes_and_stand_for_the_same_hub_ids(family: Family) -> None:
    assert {full.hub_id for full in family.full_sizes} <= set(family.hub_ids)
    replica = family.build(None)
    for full in family.full_sizes:
        assert full.pipeline_class == type(replica).__name__
        classes = {part: component.class_name for part, component in full.components.items()}
        # transformers calls both tokenizers of T5 by one name
        assert {part: name.removesuffix("Fast") for part, name in classes.items()} == {
            part: type(component).__name__.removesuffix("Fast")
            for part, component in replica.components.items()
            if component is not None
        }


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_of_a_full_size_make_only_ids_that_its_text_encoders_know(name: str) -> None:
    components = registry.full_size(name).components
    for part, component in components.items():
        if kind(component) != "tokenizer":
            continue
        config = components[part.replace("tokenizer", "text_encoder")].config
        tokenizer = build_component(component)
        ids = tokenizer("a photo of a cat, 7 Äpfel!", truncation=True).input_ids
        assert 5 < len(ids) <= 77
        assert max(ids) < config.get("text_config", config)["vocab_size"]
        assert len(tokenizer) <= config.get("text_config", config)["vocab_size"]


def test_the_prompt_around_a_users_makes_as_many_tokens_as_qwen_image_cuts_off() -> None:
    tokenizer = tokenizers.qwen2_tokenizer()
    pipeline = diffusers.QwenImagePipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=tokenizer, transformer=None
    )
    before, after = pipeline.prompt_template_encode.split("{}")
    assert len(tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx == 34
    assert len(tokenizer(after).input_ids) == 5


def test_the_prompt_around_a_users_makes_as_many_tokens_as_hunyuan_video_cuts_off() -> None:
    template = import_module("diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video").DEFAULT_PROMPT_TEMPLATE
    tokenizer = tokenizers.llama_tokenizer()
    before, after = template["template"].split("{}")
    cut = len(tokenizer(before).input_ids)
    assert cut == template["crop_start"] == 95
    ids = tokenizer(f"{before}A cat, 7 Äpfel 猫!{after}").input_ids
    assert tokenizer.decode(ids[cut:]) == "A cat, 7 Äpfel 猫!<|eot_id|>"
    assert len(ids[cut:]) < 20


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_holes_loads_with_the_shapes_and_dtypes_of_its_description(family: str, tmp_path: Path) -> None:
    description = small(family)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        write_checkpoint(description, tmp_path / "checkpoint"), torch_dtype=torch.bfloat16, low_cpu_mem_usage=True
    )
    assert type(pipeline).__name__ == description.pipeline_class
    assert {part for part, loaded in pipeline.components.items() if loaded is not None} >= set(description.components)
    for part, meta in build_on_meta(description).items():
        loaded = pipeline.components[part]
        shapes = {name: tuple(tensor.shape) for name, tensor in meta.named_parameters()}
        assert {name: tuple(tensor.shape) for name, tensor in loaded.named_parameters()} == shapes
        assert parameter_count(loaded) == parameter_count(meta) > 0
        assert all(not parameter.any() for parameter in loaded.parameters())  # else not read from the hole
        assert torch.bfloat16 in {parameter.dtype for parameter in loaded.parameters()}


def test_a_checkpoint_of_holes_takes_the_real_quantizer(tmp_path: Path) -> None:
    written = write_checkpoint(small("flux"), tmp_path / "checkpoint")
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    with quantizers_accept(select("cpu")):
        transformer = diffusers.FluxTransformer2DModel.from_pretrained(
            written, subfolder="transformer", quantization_config=config, torch_dtype=torch.bfloat16
        )
    layer = transformer.transformer_blocks[0].attn.to_q
    assert type(layer).__name__ == "Linear4bit"
    assert (layer.weight.dtype, layer.weight.numel()) == (torch.uint8, 128 * 128 // 2)


def test_a_full_size_checkpoint_takes_almost_no_room_and_is_cut_as_the_public_one(tmp_path: Path) -> None:
    flux_dev = registry.full_size("flux.1-dev")
    written = write_checkpoint(flux_dev, tmp_path / "flux", max_shard_bytes=PUBLISHED_SHARD_BYTES)
    stats = [file.stat() for file in files_of(written).values()]
    weights_bytes = sum(t.nbytes for m in on_meta("flux.1-dev").values() for t in stored_tensors(m).values())
    assert sum(stat.st_size for stat in stats) > weights_bytes > 30 * 2**30
    assert sum(stat.st_blocks for stat in stats) * 512 < weights_bytes / 10_000
    # as lllyasviel/stable-diffusion-webui-forge keeps the public index: three files
    index = json.loads((written / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        f"diffusion_pytorch_model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
    }
    assert index["metadata"]["total_size"] == 2 * FLUX_DEV
    assert len(list((written / "text_encoder_2").glob("*.safetensors"))) == 2


def test_two_checkpoints_of_a_description_are_equal_byte_for_byte(tmp_path: Path) -> None:
    first, second = (files_of(write_checkpoint(small("flux"), tmp_path / name)) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name].read_bytes() != second[name].read_bytes()] == []


@pytest.mark.parametrize("limit_bytes", [4_000, 1])
def test_shards_hold_every_weight_once_within_the_limit_and_load(limit_bytes: int, tmp_path: Path) -> None:
    description = small("flux")
    written = write_checkpoint(description, tmp_path / "cut", max_shard_bytes=limit_bytes)
    tensors = stored_tensors(build_on_meta(description)["vae"])
    shards = [header_of(file) for file in sorted((written / "vae").glob("*.safetensors"))]
    assert len(shards) > 2
    assert [name for shard in shards for name in shard] == list(tensors)
    sizes_bytes = [sum(tensors[name].nbytes for name in shard) for shard in shards]
    alone = [len(shard) == 1 for shard in shards]
    assert all(size <= limit_bytes or one for size, one in zip(sizes_bytes, alone, strict=True))
    assert parameter_count(diffusers.AutoencoderKL.from_pretrained(written, subfolder="vae")) == sum(
        tensor.numel() for tensor in tensors.values()
    )


def test_a_tied_weight_is_stored_once_under_the_public_name(tmp_path: Path) -> None:
    written = write_checkpoint(small("wan"), tmp_path / "wan")
    names = set(header_of(written / "text_encoder/model.safetensors"))
    assert "shared.weight" in names
    assert "encoder.embed_tokens.weight" not in names


def test_a_tensor_that_is_no_parameter_but_saved_is_in_the_checkpoint_and_in_the_published_dtype(
    tmp_path: Path,
) -> None:
    written = write_checkpoint(small("sd3"), tmp_path / "sd3")
    stored = header_of(written / "transformer/diffusion_pytorch_model.safetensors")
    assert stored["pos_embed.pos_embed"] == {
        "dtype": "F32",
        "shape": [1, 16 * 16, 16],
        "data_offsets": stored["pos_embed.pos_embed"]["data_offsets"],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_config_files_alone_describes_what_the_checkpoint_did(family: str, tmp_path: Path) -> None:
    description = small(family)
    written = write_checkpoint(description, tmp_path / "only-configs")
    for name, file in files_of(written).items():
        if name.endswith(".safetensors"):
            file.unlink()
    read = resolve_full_size(str(written))
    assert (read.name, read.pipeline_class) == ("only-configs", description.pipeline_class)
    assert read.options == description.options
    assert read.components.keys() == description.components.keys()
    counts = {part: parameter_count(module) for part, module in build_on_meta(read).items()}
    assert counts == {part: parameter_count(module) for part, module in build_on_meta(description).items()}
    again = write_checkpoint(read, tmp_path / "again")
    assert type(diffusers.DiffusionPipeline.from_pretrained(again)).__name__ == description.pipeline_class


def test_a_tokenizer_without_a_folder_is_made_in_memory(tmp_path: Path) -> None:
    written = write_checkpoint(small("flux"), tmp_path / "flux")
    shutil.rmtree(written / "tokenizer")
    again = write_checkpoint(read_description(written), tmp_path / "again")
    assert len(diffusers.DiffusionPipeline.from_pretrained(again).tokenizer) == tokenizers.clip_vocabulary_size()


def test_every_config_file_that_is_missing_is_named(tmp_path: Path) -> None:
    written = write_checkpoint(small("flux"), tmp_path / "flux")
    (written / "transformer/config.json").unlink()
    (written / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(ReplicaError) as raised:
        resolve_full_size(str(written))
    assert str(raised.value) == (
        f"The directory {str(written)!r} lacks transformer/config.json, scheduler/scheduler_config.json, "
        f"which its model_index.json asks for."
    )


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("model_index.json", None, "holds no diffusers pipeline: it lacks model_index.json."),
        ("model_index.json", "[]", "holds no JSON object but a list."),
        ("model_index.json", "{", "cannot be read as JSON"),
        ("model_index.json", '{"a": 1}', "names no pipeline class: its '_class_name' is None."),
        ("model_index.json", '{"_class_name": "P", "vae": ["diffusers", "Nothing"]}', "has no Nothing."),
        (
            "model_index.json",
            '{"_class_name": "P", "vae": ["mine", "Vae"]}',
            "mine.Vae is of no known library; allowed: diffusers, transformers.",
        ),
        ("vae/config.json", '{"quantization_config": {}}', "is of a checkpoint that is quantized already"),
    ],
)
def test_a_directory_that_describes_no_pipeline_is_refused(
    file: str, content: str | None, sentence: str, tmp_path: Path
) -> None:
    written = write_checkpoint(small("flux"), tmp_path / "flux")
    if content is None:
        (written / file).unlink()
    else:
        (written / file).write_text(content)
    with pytest.raises(ReplicaError) as raised:
        resolve_full_size(str(written))
    assert sentence in str(raised.value)


def test_a_config_that_its_class_refuses_is_told_with_the_pipeline_and_the_component(tmp_path: Path) -> None:
    wrong = sized(
        flux.ARCHITECTURE,
        transformer={"num_attention_heads": "many"},
        vae={},
        text_encoder=text_encoders.tiny_clip(),
        text_encoder_2=text_encoders.tiny_t5(),
    )
    with pytest.raises(
        ReplicaError, match=r"^small, transformer: diffusers\.FluxTransformer2DModel cannot be built from"
    ):
        build_on_meta(wrong)


def test_a_component_that_only_files_describe_is_copied_and_never_invented(tmp_path: Path) -> None:
    extractor = Component("transformers.CLIPImageProcessor")
    with pytest.raises(ReplicaError, match="is loaded from files; it cannot be built from a config"):
        build_component(extractor)
    with pytest.raises(
        ReplicaError, match="No tokenizer made in memory stands for GemmaTokenizer; there are CLIPTokenizer,"
    ):
        build_component(Component("transformers.GemmaTokenizer"))


def test_a_checkpoint_is_written_into_a_new_directory_only(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    with pytest.raises(ReplicaError) as raised:
        write_checkpoint(small("flux"), tmp_path)
    assert str(raised.value) == (
        f"The directory {str(tmp_path)!r} is not empty; a checkpoint is written into a new one."
    )
    assert os.listdir(tmp_path) == ["there"]


def test_a_shard_of_no_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplicaError, match="max_shard_bytes is a positive number of bytes; found 0 for diffusers"):
        write_checkpoint(small("flux"), tmp_path / "flux", max_shard_bytes=0)


@pytest.mark.parametrize(
    "spelling", ["flux.1-dev", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev", "Black-Forest-Labs/flux.1-DEV"]
)
def test_a_full_size_is_found_by_name_and_hub_id_in_any_case(spelling: str) -> None:
    assert resolve_full_size(spelling) is registry.full_sizes["flux.1-dev"]


def test_an_unknown_full_size_is_refused_with_the_nearest_and_all_names() -> None:
    with pytest.raises(ReplicaError) as raised:
        resolve_full_size("flux-dev")
    assert str(raised.value) == (
        "No full-size model is called 'flux-dev'. Did you mean 'flux.1-dev'? There are flux.1-dev, flux.1-schnell, "
        "sdxl, sd3.5-medium, sd3.5-large, wan2.1-t2v-1.3b, wan2.1-t2v-14b, ltx-video, cogvideox-2b, cogvideox-5b, "
        "qwen-image, and their hub ids."
    )


def test_a_snapshot_in_the_hubs_cache_with_config_files_alone_is_a_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--my-org--my-flux"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    write_checkpoint(small("flux"), repository / "snapshots/c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = resolve_full_size("my-org/my-flux")
    assert (found.name, found.pipeline_class) == ("my-org/my-flux", "FluxPipeline")


def test_a_third_partys_family_brings_its_full_sizes_and_may_not_take_anothers_name() -> None:
    def family(name: str, *full_sizes: Description) -> Family:
        return Family(name, (), ("transformer",), "P", (8, 8), lambda hub_id: None, full_sizes=full_sizes)

    mine = Description("mine", "P", {}, hub_id="my-org/mine")
    known = Registry(family("tiny-mine", mine))
    assert known.find_full_size("MY-ORG/mine") is known.full_size("Mine") is mine
    with pytest.raises(ReplicaError) as raised:
        known.register(family("tiny-yours", Description("yours", "P", {}, hub_id="my-org/MINE")))
    assert str(raised.value) == "yours: 'my-org/mine' is taken by the full size mine."
    assert (list(known.families), list(known.full_sizes)) == (["tiny-mine"], ["mine"])
    known.register_full_size(mine)
    with pytest.raises(ReplicaError, match=r"a word without a slash, such as 'flux\.1-dev'; found 'a/b'"):
        known.register_full_size(Description("a/b", "P", {}))


def test_a_size_that_lacks_a_component_or_has_one_too_many_is_refused() -> None:
    with pytest.raises(ReplicaError) as raised:
        Architecture("P", {"a": "x.A", "b": "x.B", "c": "x.C"}, {"c": {}}).sized("odd", {"a": {}, "d": {}})
    assert str(raised.value) == "odd: P is made of a, b, c; configs are missing for b and too many for d."
