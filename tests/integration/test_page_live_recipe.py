"""The recipe of a live pipeline is read off what is really on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.documentation import live_recipe
from pytest_diffopt.documentation.confinement import confine_writes
from pytest_diffopt.documentation.interception import CompileCall, Interception
from pytest_diffopt.preparation.offloading import offloading_of
from pytest_diffopt.recipe import Offloading, Recipe
from pytest_diffopt.recipe_loading import loads_recipes
from pytest_diffopt.replicas import cache


@pytest.fixture
def pipeline() -> Iterator[Any]:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(cache.ensure("tiny-sd")), torch_dtype=torch.bfloat16)
    yield pipeline
    pipeline.remove_all_hooks()


def components(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def read(pipeline: Any, seen: Interception | None = None, **more: Any) -> live_recipe.LiveRecipe:
    return live_recipe.read("page", pipeline, components(pipeline), seen or Interception(), {}, **more)


def test_a_plain_pipeline_is_a_plain_recipe_that_names_its_repository(pipeline: Any) -> None:
    found = read(pipeline)
    assert found.recipe.pipeline == "pytest-diffopt/tiny-sd"
    assert found.recipe.dtype == "bfloat16"
    assert (found.configures, found.beside) == ((), ())
    assert live_recipe.described(found.recipe) == "plain"


def test_a_call_is_said_as_far_as_a_recipe_can(pipeline: Any) -> None:
    said = {"prompt": ["a cat", "a dog"], "height": 64, "width": 32, "num_inference_steps": 4, "guidance_scale": 5.0}
    call = read(pipeline, arguments={**said, "generator": object(), "output_type": "np"}).recipe.call
    assert (call.prompts, call.sizes, call.num_inference_steps) == (("a cat",), ((64, 32),), 4)
    assert dict(call.kwargs) == {"guidance_scale": 5.0}


def compiled(module: torch.nn.Module, method: str = "_call_impl", **kwargs: Any) -> CompileCall:
    return CompileCall(id(module), method, f"{type(module).__name__}.{method}", kwargs)


def test_compiled_components_and_blocks_are_told_apart(pipeline: Any) -> None:
    block = next(m for m in pipeline.unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    seen = Interception(
        compiles=[compiled(pipeline.vae, mode="max-autotune", fullgraph=True), compiled(block, dynamic=True)],
        memory_formats={id(pipeline.vae): "channels_last"},
    )
    vae, unet = sorted(read(pipeline, seen).recipe.compilation, key=lambda one: one.scope)
    assert (vae.component, vae.mode, vae.fullgraph, vae.memory_format) == ("vae", "max-autotune", True, "channels_last")
    assert (unet.component, unet.scope, unet.dynamic) == ("unet", "repeated_blocks", True)


def test_methods_and_functions_that_are_compiled_by_themselves_are_named(pipeline: Any) -> None:
    seen = Interception(compiles=[compiled(pipeline.vae, "decode"), CompileCall(0, "", "step", {})])
    found = read(pipeline, seen)
    assert [(one.component, one.scope) for one in found.recipe.compilation] == [
        ("vae.decode", "module"),
        ("step", "factory"),
    ]
    assert found.beside == ()


def test_model_offloading_is_read_off_its_hooks(pipeline: Any) -> None:
    pipeline.enable_model_cpu_offload(device="cpu")
    assert read(pipeline).recipe.offloading == Offloading("model")
    pipeline.remove_all_hooks()
    assert read(pipeline).recipe.offloading is None


def test_sequential_offloading_is_read_off_its_hooks(pipeline: Any) -> None:
    pipeline.enable_sequential_cpu_offload(device="cpu")
    assert read(pipeline).recipe.offloading == Offloading("sequential")


def test_group_offloading_is_read_off_its_settings(pipeline: Any) -> None:
    pipeline.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2
    )
    found = read(pipeline)
    assert found.recipe.offloading == Offloading(
        "group", components=["unet"], offload_type="block_level", num_blocks_per_group=2
    )
    assert live_recipe.described(found.recipe) == "group offloading (block_level)"
    pipeline.vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert read(pipeline).beside == (
        "vae is offloaded in another way (offload_type = leaf_level, num_blocks_per_group = None)",
    )


def test_a_device_map_is_no_offloading(pipeline: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipeline.unet, execution_device="cpu")
    assert offloading_of(pipeline.unet) == Offloading("sequential")
    pipeline.unet.hf_device_map = {"conv_in": 0, "conv_out": "cpu"}
    assert offloading_of(pipeline.unet) is None


def test_switches_of_the_vae_are_read(pipeline: Any) -> None:
    pipeline.vae.enable_tiling()
    pipeline.vae.enable_slicing()
    found = read(pipeline)
    assert (found.recipe.vae_tiling, found.recipe.vae_slicing) == (True, True)
    assert found.configures == ("VAE tiling", "VAE slicing")


def test_a_component_from_elsewhere_is_named(pipeline: Any) -> None:
    pipeline.vae.register_to_config(_name_or_path="org/other-vae")
    assert read(pipeline).beside == ("vae comes from org/other-vae",)


def test_the_toml_is_a_recipe_file_with_what_it_cannot_say_as_comments(pipeline: Any) -> None:
    pipeline.enable_model_cpu_offload(device="cpu")
    found = read(pipeline, Interception(compiles=[CompileCall(0, "", "step", {})]))
    text = live_recipe.toml_of(found, ["page.md, line 3"])
    assert text.splitlines()[:2] == ["# page.md, line 3", "# step is compiled, which is no component"]
    (recipe,) = loads_recipes(text).values()
    assert recipe.content_hash == found.recipe.replace(compilation=()).content_hash


def test_what_toml_cannot_hold_becomes_a_comment() -> None:
    recipe = Recipe("page", "tiny-sd", compilation={"component": "unet", "backend": lambda graph, inputs: graph})
    assert loads_recipes_none(live_recipe.toml_of(live_recipe.LiveRecipe(recipe)))


def loads_recipes_none(text: str) -> bool:
    return all(line.startswith("#") for line in text.splitlines() if line)


# Files.

_WRITES = """
import os, subprocess, sys
from pathlib import Path
from pytest_diffopt.documentation.confinement import confine_writes
inside, outside = Path(sys.argv[1]), Path(sys.argv[2])
if not confine_writes((str(inside), "/dev", str(inside / "not there"))):
    sys.exit(77)
(inside / "a").write_text("x")
(inside / "a").rename(inside / "b")
(inside / "b").unlink()
open("/dev/null", "w").close()
refused = []
for name, attempt in {
    "write": lambda: (outside / "new").write_text("x"),
    "overwrite": lambda: (outside / "old").write_text("x"),
    "rename": lambda: (outside / "old").rename(outside / "other"),
    "delete": lambda: (outside / "old").unlink(),
    "folder": lambda: (outside / "folder").mkdir(),
    "tensors": lambda: __import__("safetensors.numpy").numpy.save_file({"x": __import__("numpy").ones(2)}, outside / "t"),
    "child": lambda: subprocess.run([sys.executable, "-c", f"open({str(outside / 'child')!r}, 'w')"], check=True,
                                    stderr=subprocess.DEVNULL),
}.items():
    try:
        attempt()
    except Exception:
        refused.append(name)
print(" ".join(refused), (outside / "old").read_text())
"""


def test_a_confined_process_writes_in_its_folder_alone(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "old").write_text("as it was")
    ran = subprocess.run([sys.executable, "-c", _WRITES, inside, outside], capture_output=True, text=True)
    if ran.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert ran.stdout.strip() == "write overwrite rename delete folder tensors child as it was", ran.stderr
    assert [path.name for path in outside.iterdir()] == ["old"]


def test_nothing_is_confined_on_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert confine_writes(("/",)) is False
