"""Replicas: what they are made of, that their outputs are alive, and how a pipeline's name finds one."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas import (
    Family,
    Registry,
    cache_directory,
    cogvideox,
    ensure,
    families,
    flux,
    hub_cache_environment,
    hunyuan_video,
    known,
    ltx_video,
    qwen_image,
    register,
    resolve,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    tokenizers,
    unresolved,
    wan,
)
from pytest_diffopt.replicas.initialization import randomize, reproducible

BUILDS = [
    (flux.FAMILY, flux.DEV),
    (flux.FAMILY, flux.SCHNELL),
    (stable_diffusion.FAMILY, None),
    (stable_diffusion_xl.FAMILY, None),
    (stable_diffusion_xl.FAMILY, stable_diffusion_xl.TURBO),
    (stable_diffusion_3.FAMILY, stable_diffusion_3.MEDIUM_3),
    (stable_diffusion_3.FAMILY, stable_diffusion_3.MEDIUM),
    (stable_diffusion_3.FAMILY, None),
    (wan.FAMILY, None),
    (ltx_video.FAMILY, None),
    (cogvideox.FAMILY, cogvideox.SMALL),
    (cogvideox.FAMILY, None),
    (hunyuan_video.FAMILY, None),
    (qwen_image.FAMILY, None),
]

# Components' Linears whose outputs are no multiple of 128: patches of 2 x 2 latents of 16 channels, as in public.
PATCHES = {"transformer.proj_out"}
NARROW_OUTPUTS = {"tiny-wan": PATCHES, "tiny-sd3": PATCHES, "tiny-cogvideox": PATCHES, "tiny-hunyuanvideo": PATCHES}


def family(name: str = "tiny-mine", hub_ids: tuple[str, ...] = ("my-org/my-model",), **changes: Any) -> Family:
    fields: dict[str, Any] = {
        "name": name,
        "hub_ids": hub_ids,
        "components": ("transformer",),
        "pipeline_class": "MyPipeline",
        "default_size": (96, 96),
        "build": lambda hub_id: None,
    }
    return Family(**{**fields, **changes})


@pytest.fixture(scope="module", params=BUILDS, ids=lambda build: build[1] or build[0].name)
def built(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    made, hub_id = request.param
    pipeline = made.build(hub_id)
    pipeline.set_progress_bar_config(disable=True)
    return made, pipeline


def modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def run(made: Family, pipeline: Any, prompt: str = "a photo of a cat", seed: int = 0, **kwargs: Any) -> torch.Tensor:
    size = dict(zip(("height", "width", "num_frames"), made.default_size, strict=False))
    generator = torch.Generator("cpu").manual_seed(seed)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", **size, **kwargs}
    images: torch.Tensor = pipeline(prompt, generator=generator, **arguments)[0].float()
    return images


def shape(height: int, width: int, *frames: int) -> tuple[int, ...]:
    """Of one image, or of one video."""
    return (1, *frames, 3, height, width)


def change(of: torch.Tensor, against: torch.Tensor) -> float:
    return float((of - against).norm() / against.norm())


def test_importing_the_replicas_imports_no_library_that_builds_them() -> None:
    code = "import sys, pytest_diffopt.replicas; print(*({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_a_family_names_the_modules_and_the_class_of_its_pipeline(built: tuple[Family, Any]) -> None:
    made, pipeline = built
    assert set(modules(pipeline)) == set(made.components)
    assert type(pipeline).__name__ == made.pipeline_class


def test_every_parameter_is_float32_on_the_cpu_and_every_module_in_eval_mode(built: tuple[Family, Any]) -> None:
    for module in modules(built[1]).values():
        assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.float32, "cpu")}
        assert not module.training


def test_every_linear_has_sizes_that_quantization_backends_take(built: tuple[Family, Any]) -> None:
    linears = {
        f"{component}.{name}": layer
        for component, module in modules(built[1]).items()
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert len(linears) >= 40
    assert {name: layer.in_features for name, layer in linears.items() if layer.in_features % 128} == {}
    narrow = {name for name, layer in linears.items() if layer.out_features % 128}
    assert narrow == NARROW_OUTPUTS.get(built[0].name, set())


def test_no_parameter_is_constant(built: tuple[Family, Any]) -> None:
    parameters = {f"{c}.{n}": p for c, m in modules(built[1]).items() for n, p in m.named_parameters()}
    # T5's own initialization starts the scales of its norms at one, and leaves no other constant.
    t5 = tuple(
        f"{c}." for c, m in modules(built[1]).items() if type(m).__name__ in ("T5EncoderModel", "UMT5EncoderModel")
    )
    constant = {name for name, p in parameters.items() if p.numel() > 1 and p.min() == p.max()}
    assert {name for name in constant if not (name.startswith(t5) and "layer_norm" in name)} == set()


@pytest.mark.parametrize(("made", "hub_id"), BUILDS, ids=lambda value: str(getattr(value, "name", value)))
def test_two_builds_are_bitwise_equal(made: Family, hub_id: str | None) -> None:
    first, second = (modules(made.build(hub_id)) for _ in range(2))
    for component, module in first.items():
        state, other = module.state_dict(), second[component].state_dict()
        assert state.keys() == other.keys()
        assert [name for name in state if not torch.equal(state[name], other[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_is_alive_and_changes_with_prompt_and_seed(built: tuple[Family, Any], dtype: torch.dtype) -> None:
    made, pipeline = built
    core = pipeline.transformer if "transformer" in made.components else pipeline.unet
    outputs: list[torch.Tensor] = []
    hook = core.register_forward_hook(lambda module, arguments, output: outputs.append(output[0].float().clone()))
    try:
        pipeline.to(dtype)
        image = run(made, pipeline)
        predicted, steps = outputs[0], len(outputs)
        other_prompt, other_predicted = run(made, pipeline, "a photo of a dog"), outputs[steps]
        other_seed = run(made, pipeline, seed=1)
        again = run(made, pipeline)
    finally:
        hook.remove()
        pipeline.to(torch.float32)
    assert image.shape == shape(*made.default_size)
    assert torch.isfinite(image).all()
    assert image.std() > 0.05
    assert ((image <= 0) | (image >= 1)).float().mean() < 0.05  # else saturated: differences would be clipped away
    assert change(other_prompt, image) > 1e-2
    assert change(other_predicted, predicted) > 1e-2
    assert change(other_seed, image) > 1e-1
    assert torch.equal(again, image)


def test_bfloat16_stays_near_float32_so_that_parity_can_see_faults(built: tuple[Family, Any]) -> None:
    made, pipeline = built
    precise = run(made, pipeline)
    try:
        rounded = run(made, pipeline.to(torch.bfloat16))
    finally:
        pipeline.to(torch.float32)
    assert 0 < change(rounded, precise) < 2e-2


def test_few_steps_and_a_size_that_is_not_square_work(built: tuple[Family, Any]) -> None:
    made, pipeline = built
    size = (64, 128, 9)[: len(made.default_size)]
    arguments = dict(zip(("height", "width", "num_frames"), size, strict=False))
    # A schedule that ends where it was told to cannot be of one step: in public, too, it gives nothing but NaN.
    steps = 2 if "shift_terminal" in pipeline.scheduler.config and pipeline.scheduler.config.shift_terminal else 1
    assert run(made, pipeline, num_inference_steps=steps, **arguments).shape == shape(*size)


def test_the_frames_of_a_video_differ_and_a_longer_one_goes_on_to_the_largest_size() -> None:
    pipeline = wan.build()
    pipeline.set_progress_bar_config(disable=True)
    frames = run(wan.FAMILY, pipeline)[0]
    assert min(change(after, before) for before, after in itertools.pairwise(frames)) > 1e-2
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    latents = run(wan.FAMILY, pipeline, height=512, width=16, num_frames=125, **arguments)
    assert latents.shape == (1, 16, 32, 64, 2)
    assert torch.isfinite(latents).all()


def test_group_offloading_finds_several_blocks_in_wan() -> None:
    pipeline = wan.build()
    assert len(pipeline.transformer.blocks) == 3
    assert len(pipeline.text_encoder.encoder.block) == 2


def test_the_tables_of_wan_that_stay_on_a_device_weigh_little_beside_its_weights() -> None:
    transformer = wan.build().transformer
    stays = sum(buffer.nbytes for buffer in transformer.buffers())
    assert 0 < stays < 0.01 * sum(parameter.nbytes for parameter in transformer.parameters())


def test_wan_is_built_for_both_public_ids_alike() -> None:
    small, large = (modules(wan.build(hub_id))["transformer"].state_dict() for hub_id in wan.FAMILY.hub_ids)
    assert [name for name in small if not torch.equal(small[name], large[name])] == []


def test_each_text_encoder_of_flux_changes_the_image_alone() -> None:
    pipeline = flux.build(flux.DEV)
    pipeline.set_progress_bar_config(disable=True)
    image = run(flux.FAMILY, pipeline)
    assert change(run(flux.FAMILY, pipeline, prompt_2="a drawing of a house"), image) > 1e-2
    assert change(run(flux.FAMILY, pipeline, "a drawing of a house", prompt_2="a photo of a cat"), image) > 1e-2


def test_guidance_is_an_input_of_flux_dev_only() -> None:
    assert flux.build(flux.DEV).transformer.config.guidance_embeds is True
    assert flux.build(flux.SCHNELL.lower()).transformer.config.guidance_embeds is False


def test_building_gives_back_random_state_default_dtype_default_device_and_grad_mode() -> None:
    def state() -> tuple[Any, ...]:
        scalar = torch.empty(())
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            torch.get_default_dtype(),
            scalar.device,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    torch.manual_seed(1234)
    with torch.device("meta"), torch.inference_mode():
        torch.set_default_dtype(torch.float64)
        try:
            before = state()
            pipeline = stable_diffusion.build()
            after = state()
        finally:
            torch.set_default_dtype(torch.float32)
    assert before == after
    weight = pipeline.unet.conv_in.weight
    assert (weight.device.type, weight.dtype, weight.requires_grad) == ("cpu", torch.float32, True)
    assert not weight.is_inference()


def test_state_is_given_back_also_when_a_builder_raises() -> None:
    def build() -> None:
        with reproducible(7):
            torch.rand(3)
            torch.set_default_dtype(torch.float64)
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        build()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def test_random_values_of_a_parameter_do_not_depend_on_the_other_parameters() -> None:
    alone, together = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    randomize(torch.nn.ModuleDict({"a": alone}), gains={"a.weight": 2.0})
    randomize(torch.nn.ModuleDict({"b": torch.nn.Linear(3, 8), "a": together}), gains={"a.weight": 2.0})
    assert torch.equal(alone.weight, together.weight)
    assert alone.weight.std().item() == pytest.approx(2 / 8**0.5, rel=0.3)


def test_the_scale_of_a_norm_stays_near_one_however_many_dimensions_it_has() -> None:
    norm = torch.nn.Module()
    norm.gamma = torch.nn.Parameter(torch.ones(512, 1, 1, 1))
    randomize(norm)
    assert norm.gamma.mean().item() == pytest.approx(1, abs=0.03)
    assert norm.gamma.std().item() == pytest.approx(0.1, rel=0.2)


def test_clip_encodes_any_text_and_ends_with_its_highest_token() -> None:
    tokenizer = tokenizers.clip_tokenizer()
    ids = tokenizer("A photo, 42 Katzen: süß 猫!").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "aphoto,42katzen:süß猫!"
    assert (ids[0], ids[-1]) == (tokenizers.clip_vocabulary_size() - 2, tokenizers.clip_vocabulary_size() - 1)
    assert ids[-1] == tokenizer.eos_token_id == max(ids)
    assert len(tokenizer("photograph of an astronaut").input_ids) < len("photograph of an astronaut")


def test_t5_encodes_printable_characters_and_pads_with_zero() -> None:
    tokenizer = tokenizers.t5_tokenizer()
    ids = tokenizer("A cat, 7!", padding="max_length", max_length=16).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A cat, 7!"
    assert ids[-1] == tokenizer.pad_token_id == 0
    assert tokenizer("猫").input_ids[-2] == tokenizer.unk_token_id
    assert max(ids) < tokenizers.t5_vocabulary_size()


def test_a_registry_finds_names_and_hub_ids_in_any_case() -> None:
    mine = family()
    registry = Registry(mine)
    assert registry.find("TINY-mine") is mine
    assert registry.find("My-Org/MY-model") is mine
    assert registry.find("pytest-diffopt/tiny-mine") is mine
    assert registry.find("my-org/other") is None
    assert dict(registry.families) == {"tiny-mine": mine}


def test_registering_the_same_family_again_changes_nothing() -> None:
    mine = family()
    registry = Registry(mine)
    registry.register(mine)
    assert list(registry.families) == ["tiny-mine"]


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (family(hub_ids=()), "tiny-mine: 'tiny-mine' is taken by the replica family tiny-mine."),
        (
            family("tiny-yours", ("a/b", "MY-ORG/my-model")),
            "tiny-yours: 'MY-ORG/my-model' is taken by the replica family tiny-mine.",
        ),
    ],
)
def test_a_name_or_hub_id_that_is_taken_is_refused(second: Family, sentence: str) -> None:
    registry = Registry(family())
    with pytest.raises(ReplicaError) as raised:
        registry.register(second)
    assert str(raised.value) == sentence
    assert list(registry.families) == ["tiny-mine"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "org/tiny"}, "A family's name is a word without a slash, such as 'tiny-flux'; found 'org/tiny'."),
        ({"hub_ids": ("flux",)}, "tiny-mine: a hub id is written 'org/name'; found 'flux'."),
        (
            {"default_size": (0, 8)},
            "tiny-mine: default_size is (height, width) in pixels, or (height, width, frames); found (0, 8).",
        ),
        (
            {"default_size": (8, 8, 5, 1)},
            "tiny-mine: default_size is (height, width) in pixels, or (height, width, frames); found (8, 8, 5, 1).",
        ),
    ],
)
def test_a_family_that_cannot_be_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ReplicaError) as raised:
        family(**changes)
    assert str(raised.value) == sentence


def test_the_default_registry_knows_the_built_in_families() -> None:
    assert set(families()) >= {"tiny-flux", "tiny-sd", "tiny-wan"}
    assert known("wan-ai/wan2.1-t2v-14B-diffusers")
    assert known("tiny-flux")
    assert known("compvis/Stable-Diffusion-v1-4")
    assert not known("black-forest-labs/FLUX.2-dev")
    with pytest.raises(ReplicaError, match=r"tiny-flux: 'tiny-flux' is taken"):
        register(family("tiny-flux"))


def test_a_family_changes_its_hash_with_every_file_that_builds_it(tmp_path: Path) -> None:
    shared = tmp_path / "shared.py"
    shared.write_text("width = 1")
    mine = family(sources=(shared,))
    before = mine.source_hash()
    assert mine.source_hash() == before
    shared.write_text("width = 2")
    assert mine.source_hash() != before
    assert len(before) == 40
    shared.unlink()
    with pytest.raises(ReplicaError, match=r"tiny-mine: cannot read .*shared\.py, a source of the replica\."):
        mine.source_hash()


def test_a_builder_of_no_file_must_name_its_sources() -> None:
    scope: dict[str, Any] = {}
    exec("def build(hub_id):\n    return None\n", scope)
    with pytest.raises(ReplicaError) as raised:
        family(build=scope["build"]).source_hash()
    assert str(raised.value) == "tiny-mine: no file holds its builder; name those that do in Family(sources=...)."


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DIFFOPT_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/pytest-diffopt"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/pytest-diffopt"),
    ],
)
def test_the_cache_directory_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("DIFFOPT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)


def test_an_existing_directory_resolves_to_itself(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    resolved = resolve(str(tmp_path))
    assert (resolved.path_or_id, resolved.kind, resolved.family) == (str(tmp_path), "directory", None)


def test_a_directory_without_a_pipeline_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ReplicaError) as raised:
        resolve(str(tmp_path), allow_hub=True)
    assert str(raised.value) == (
        f"pipeline: found {str(tmp_path)!r}; the directory holds no diffusers pipeline: it lacks model_index.json"
    )


WAYS = (
    "Or give a directory with a model_index.json, a factory ('package.module:function'), or register a replica "
    "(the hook pytest_diffopt_register_replicas)"
)


def test_an_unknown_hub_id_is_refused_with_the_nearest_and_all_sorted_and_the_way_to_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    registry = Registry(
        family("tiny-far", ("my-org/my-model",)), family("tiny-flux", ("org/FLUX.1-a", "org/FLUX.1-dev"))
    )
    with pytest.raises(ReplicaError) as raised:
        resolve("org/FLUX.1-deb", registry=registry)
    assert str(raised.value) == (
        "pipeline: found 'org/FLUX.1-deb'; did you mean 'org/FLUX.1-dev' or 'org/FLUX.1-a'? "
        "hub ids with a replica: my-org/my-model, org/FLUX.1-a, org/FLUX.1-dev; "
        "it is not in the hub's cache on this machine, to download it: --diffopt-hub (allow_hub=True). " + WAYS
    )
    with pytest.raises(ReplicaError) as raised:
        resolve("tiny-fluks", registry=registry)
    assert str(raised.value) == (
        f"pipeline: found 'tiny-fluks'; did you mean 'tiny-flux' or 'tiny-far'? replicas: tiny-far, tiny-flux. {WAYS}"
    )


def test_a_full_size_model_is_no_pipeline_and_its_replica_is_named() -> None:
    assert unresolved("flux.1-dev", allow_hub=True) == (
        f"it is a full-size model, for forecast.model, and to run it a replica is needed: tiny-flux. {WAYS}"
    )


@pytest.mark.parametrize("pipeline", ["tiny-flux", "black-forest-labs/flux.1-DEV", "stabilityai/sdxl-turbo"])
def test_what_a_replica_stands_for_is_resolved_with_nothing_built(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(tmp_path))
    assert unresolved(pipeline) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["tiny-fluks", "./missing", "/missing/model", "a/b/c", "org/a--b", ""])
def test_what_is_neither_replica_nor_hub_id_is_refused_even_with_the_hub(wrong: str) -> None:
    with pytest.raises(ReplicaError, match=r"replicas: tiny-cogvideox, tiny-flux, .*\. Or give a directory with a "):
        resolve(wrong, allow_hub=True)


def test_with_the_hub_allowed_an_unknown_hub_id_stays_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    resolved = resolve("my-org/unheard.of", allow_hub=True)
    assert (resolved.path_or_id, resolved.kind, resolved.family) == ("my-org/unheard.of", "hub", None)


def test_a_repository_in_the_hub_cache_resolves_to_its_snapshot_if_it_is_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--my-org--cached"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    index = {"_class_name": "P", "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]}
    (snapshot / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ReplicaError, match="not in the hub's cache"):  # an interrupted download
        resolve("my-org/cached")
    (snapshot / "unet").mkdir()
    resolved = resolve("my-org/cached")
    assert (resolved.path_or_id, resolved.kind) == (str(snapshot), "hub")


def test_asking_for_an_unknown_replica_names_those_there_are() -> None:
    registry = Registry(family("tiny-a", ("o/a",)), family("tiny-b", ("o/b",)))
    with pytest.raises(ReplicaError) as raised:
        ensure("tiny-c", registry=registry)
    assert str(raised.value) == "No replica stands for 'tiny-c'; there are tiny-a, tiny-b."
    with pytest.raises(ReplicaError) as raised:
        hub_cache_environment(["o/c"], registry=registry)
    assert (
        str(raised.value)
        == "No replica stands for 'o/c'; did you mean 'o/b' or 'o/a'? hub ids with a replica: o/a, o/b"
    )
