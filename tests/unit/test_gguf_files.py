"""Tiny .gguf files: valid blocks of every type, the public names, and found where the libraries look for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas import cache, ggml_types, gguf_files

gguf = pytest.importorskip("gguf")

DEV = "city96/FLUX.1-dev-gguf"


@pytest.mark.parametrize(
    ("kind", "share"),  # of the weights' spread: the root of the mean square of what is lost, with some room
    [("Q2_K", 0.36), ("Q3_K", 0.2), ("Q4_K", 0.09), ("Q5_K", 0.045), ("Q6_K", 0.022), ("Q8_0", 0.006)],
)
def test_blocks_are_what_both_readers_take_them_for(kind: str, share: float) -> None:
    import torch
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32) * 0.05
    stored, of = ggml_types.stored(weights, kind)
    block, size = gguf.GGML_QUANT_SIZES[of]
    assert (of.name, stored.shape) == (kind, (64, 512 // block * size))
    read = gguf.quants.dequantize(stored, of)
    assert np.sqrt(np.mean((read - weights) ** 2)) < share * 0.05
    by_diffusers = dequantize_gguf_tensor(GGUFParameter(torch.from_numpy(stored.copy()), quant_type=of))
    assert np.abs(by_diffusers.float().numpy() - read).max() < 1e-3  # diffusers reads scales in half precision


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_constant_and_empty_rows_have_no_scale_and_are_read_as_they_were(kind: str) -> None:
    weights = np.zeros((2, 256), np.float32)
    weights[1] = 0.5
    stored, of = ggml_types.stored(weights, kind)
    assert np.abs(gguf.quants.dequantize(stored, of) - weights).max() < 0.02


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("flux1-dev-Q2_K.gguf", ("Q2_K", False)),
        ("flux1-dev-Q4_K_S.gguf", ("Q4_K", False)),
        ("flux1-dev-Q5_K_M.gguf", ("Q5_K", True)),
        ("flux1-dev-Q8_0.gguf", ("Q8_0", False)),
        ("flux1-dev-F16.gguf", ("F16", False)),
    ],
)
def test_a_files_name_says_its_type(filename: str, expected: tuple[str, bool]) -> None:
    assert ggml_types.of_file_name(filename) == expected


def test_rows_that_are_too_short_fall_back_as_in_llama_cpp() -> None:
    kinds = {rows: ggml_types.stored(np.ones((4, rows), np.float32), "Q4_K")[1].name for rows in (256, 128, 24)}
    assert kinds == {256: "Q4_K", 128: "Q5_0", 24: "F16"}


def test_what_cannot_be_written_is_refused_with_what_can() -> None:
    with pytest.raises(ReplicaError, match="names no type that a replica is written in"):
        gguf_files.ensure_gguf(DEV, "flux1-dev-IQ4_XS.gguf")
    with pytest.raises(ReplicaError, match="No replica stands for 'a/b'"):
        gguf_files.ensure_gguf("a/b", "c-Q8_0.gguf")
    with pytest.raises(ReplicaError, match="is no file on this machine, and no replica stands for its repository"):
        gguf_files.resolve("https://huggingface.co/a/b/blob/main/c-Q8_0.gguf")


def test_a_recipes_file_is_a_path_or_an_address_in_every_form(tmp_path: Path) -> None:
    own = tmp_path / "own.gguf"
    own.touch()
    assert gguf_files.resolve(str(own)) == str(own)
    path = gguf_files.resolve(f"{DEV}/flux1-dev-Q4_K_M.gguf")
    for form in ("https://huggingface.co/{}/blob/main/{}", "https://huggingface.co/{}/resolve/main/{}", "{}/{}"):
        assert gguf_files.resolve(form.format(DEV, "flux1-dev-Q4_K_M.gguf")) == path
    address = f"https://huggingface.co/{DEV}/blob/main/flux1-dev-Q4_K_M.gguf"
    assert gguf_files.resolve(address, allow_hub=True) == address


def test_a_mixed_file_has_several_types_and_keeps_what_the_public_ones_keep() -> None:
    path = gguf_files.ensure_gguf(DEV, "flux1-dev-Q4_K_M.gguf")
    written = path.stat().st_mtime_ns
    assert gguf_files.ensure_gguf(DEV, "flux1-dev-Q4_K_M.gguf").stat().st_mtime_ns == written
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["double_blocks.0.img_attn.qkv.weight"] == "Q4_K"
    assert types["single_blocks.1.linear2.weight"] == "Q5_K"
    assert (types["img_in.weight"], types["final_layer.linear.weight"]) == ("BF16", "F16")
    assert types["double_blocks.0.img_attn.norm.key_norm.scale"] == types["img_in.bias"] == "F32"


AS_IN_THE_DOCUMENTATION = """
import torch
from pytest_diffopt.replicas import gguf_files
from diffusers import FluxPipeline, FluxTransformer2DModel, GGUFQuantizationConfig

with gguf_files.loadable():
    loaded = FluxTransformer2DModel.from_single_file(
        "https://huggingface.co/city96/FLUX.1-dev-gguf/blob/main/flux1-dev-Q8_0.gguf",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    )
dense = FluxTransformer2DModel.from_pretrained("black-forest-labs/FLUX.1-dev", subfolder="transformer")
loaded.dequantize()
for name, parameter in dense.named_parameters():
    lost = (loaded.get_parameter(name).float() - parameter).abs().max()
    assert lost <= 0.02 * parameter.abs().max(), name
print("the replica's weights")
"""


def test_the_address_of_the_documentation_loads_offline_with_the_weights_of_the_replica() -> None:
    gguf_files.ensure_gguf(DEV, "flux1-dev-Q8_0.gguf")
    environment = {**os.environ, "HF_HUB_CACHE": str(cache.hub_directory()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", AS_IN_THE_DOCUMENTATION]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stdout.splitlines()[-1:] == ["the replica's weights"], ran.stderr


def test_the_conversion_of_diffusers_is_given_back_and_reads_public_widths_as_before() -> None:
    from diffusers.loaders import single_file_model

    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    before = entry["checkpoint_mapping_fn"]
    with pytest.raises(RuntimeError, match="inside"), gguf_files.loadable():
        assert entry["checkpoint_mapping_fn"] is not before
        raise RuntimeError("inside")
    assert entry["checkpoint_mapping_fn"] is before
