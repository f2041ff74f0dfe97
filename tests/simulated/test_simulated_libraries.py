"""bitsandbytes, safetensors, diffusers and accelerate on the device."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.accelerators.simulated import adapted_libraries


def test_four_bit_layers_have_the_bits_of_the_hosts_kernels() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64)
    x = torch.randn(3, 128)

    def run(device: str) -> torch.Tensor:
        layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
        layer.load_state_dict(plain.state_dict())
        layer = layer.to(device)
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        # the layer's own path for the host repacks weights: the kernels are what is compared
        out = torch.nn.functional.linear(x.to(device), weight, layer.bias)
        if device == "sim":
            assert layer.weight.data.nbytes == 128 * 64 // 2
            assert torch.equal(layer(x.to(device)), out)
        return out.detach().cpu()

    assert torch.equal(run("cpu"), run("sim"))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bit_layers_have_the_bits_of_the_default_kernels(threshold: float) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from bitsandbytes.autograd._functions import MatMul8bitLt

    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64)
    x = torch.randn(3, 128, dtype=torch.float16)
    layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("sim")
    on_sim = layer(x.to("sim"))
    # a layer on the host dequantizes its weight and multiplies; the device runs what CUDA runs
    state = bnb.MatmulLtState()
    state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(plain.weight.detach().half())
    state.has_fp16_weights, state.threshold = False, threshold
    host = MatMul8bitLt.apply(x, state.CB, None, plain.bias.detach().half(), state)
    assert torch.equal(layer.weight.data.cpu(), state.CB)
    assert torch.equal(host, on_sim.detach().cpu())


def test_safetensors_load_onto_the_device_while_it_is_adapted(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "weights.safetensors"
    safetensors.save_file({"a": torch.arange(4.0)}, file)
    original = safetensors.load_file
    with pytest.raises(ZeroDivisionError), adapted_libraries():
        loaded = safetensors.load_file(file, device="sim:1")["a"]
        assert loaded.device == torch.device("sim:1")
        assert loaded.tolist() == [0, 1, 2, 3]
        assert safetensors.load_file(file)["a"].device.type == "cpu"
        raise ZeroDivisionError
    assert safetensors.load_file is original


def test_a_pipeline_gives_the_hosts_image_and_offloading_lowers_its_peak(sim: Any) -> None:
    pytest.importorskip("diffusers")
    from diffusers import DiffusionPipeline

    from pytest_diffopt.replicas import ensure

    folder = ensure("tiny-flux")

    def load() -> Any:
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                for parameter in part.parameters():
                    # Out of the file's memory: MKL's last bits depend on how a matrix is aligned.
                    parameter.data = parameter.data.clone()
        return pipeline

    def image(pipeline: Any) -> torch.Tensor:
        torch.manual_seed(0)
        made: torch.Tensor = pipeline(
            "a cat sits", num_inference_steps=2, height=32, width=32, output_type="pt",
            max_sequence_length=16, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        return made.cpu()

    host = image(load())
    base = sim.memory_allocated()
    peaks = {}
    for way in ("whole", "offloaded", "whole again", "offloaded again"):
        pipeline = load()
        weights = sum(
            t.numel() * t.element_size()
            for part in pipeline.components.values()
            if isinstance(part, torch.nn.Module)
            for t in (*part.parameters(), *part.buffers())
        )
        if way.startswith("whole"):
            pipeline.to("sim")
            assert sim.memory_allocated() - base >= weights * 0.99
        else:
            pipeline.enable_model_cpu_offload(device="sim")
        sim.reset_peak_memory_stats()
        assert torch.equal(image(pipeline), host)
        peaks[way] = sim.max_memory_allocated() - base
        if way.startswith("offloaded"):
            pipeline.maybe_free_model_hooks()
            left = [t for t in vars(pipeline.scheduler).values() if isinstance(t, torch.Tensor) and t.is_sim]
            assert sim.memory_allocated() - base == sum(t.nbytes for t in left) == 20
        left = []
        del pipeline
        gc.collect()
        assert sim.memory_allocated() == base
    assert peaks["offloaded"] < peaks["whole"]
    assert (peaks["whole"], peaks["offloaded"]) == (peaks["whole again"], peaks["offloaded again"])
