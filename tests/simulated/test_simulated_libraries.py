"""bitsandbytes, safetensors, diffusers, transformers and accelerate as they stand: nothing of them is changed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.replicas import ensure


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
        if device == "cuda":
            assert layer.weight.data.nbytes == 128 * 64 // 2
            assert torch.equal(layer(x.to(device)), out)
        return out.detach().cpu()

    assert torch.equal(run("cpu"), run("cuda"))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bit_layers_have_the_bits_of_the_default_kernels(threshold: float) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from bitsandbytes.autograd._functions import MatMul8bitLt

    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64)
    x = torch.randn(3, 128, dtype=torch.float16)
    layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cuda")
    on_gpu = layer(x.to("cuda"))
    # a layer on the host dequantizes its weight and multiplies; the device runs what CUDA runs
    state = bnb.MatmulLtState()
    state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(plain.weight.detach().half())
    state.has_fp16_weights, state.threshold = False, threshold
    host = MatMul8bitLt.apply(x, state.CB, None, plain.bias.detach().half(), state)
    assert torch.equal(layer.weight.data.cpu(), state.CB)
    assert torch.equal(host, on_gpu.detach().cpu())


def test_a_pipeline_gives_the_hosts_image_and_offloading_lowers_its_peak() -> None:
    pytest.importorskip("diffusers")
    from diffusers import DiffusionPipeline

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
    base = torch.cuda.memory_allocated()
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
            pipeline.to("cuda")
            assert torch.cuda.memory_allocated() - base >= weights * 0.99
        else:
            pipeline.enable_model_cpu_offload()
        torch.cuda.reset_peak_memory_stats()
        assert torch.equal(image(pipeline), host)
        peaks[way] = torch.cuda.max_memory_allocated() - base
        if way.startswith("offloaded"):
            pipeline.maybe_free_model_hooks()
            left = [t for t in vars(pipeline.scheduler).values() if isinstance(t, torch.Tensor) and t.is_cuda]
            assert torch.cuda.memory_allocated() - base == sum(t.nbytes for t in left) == 20
        left = []
        del pipeline
        gc.collect()
        assert torch.cuda.memory_allocated() == base
    assert peaks["offloaded"] < peaks["whole"]
    assert (peaks["whole"], peaks["offloaded"]) == (peaks["whole again"], peaks["offloaded again"])


def four_bit() -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def eight_bit() -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def flux() -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(ensure("tiny-flux"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pipeline: Any) -> torch.Tensor:
    made: torch.Tensor = pipeline(
        "a cat sits", num_inference_steps=1, height=32, width=32, output_type="pt",
        max_sequence_length=16, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return made.cpu()


def test_offloading_finds_the_device_and_lowers_the_peak() -> None:
    peaks = {}
    images = []
    for way in ("whole", "model", "group", "sequential"):
        pipeline = flux()
        if way == "whole":
            pipeline.to("cuda")
        elif way == "group":
            pipeline.enable_group_offload(
                onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True
            )
        else:
            getattr(pipeline, f"enable_{way}_cpu_offload")()
        torch.cuda.reset_peak_memory_stats()
        images.append(image(pipeline))
        peaks[way] = torch.cuda.max_memory_allocated()
        del pipeline
        gc.collect()
    assert peaks["whole"] > peaks["model"] > peaks["group"]
    assert peaks["model"] > peaks["sequential"]
    for one in images[1:]:
        torch.testing.assert_close(one, images[0])


def test_quantized_models_are_loaded_onto_the_device_without_naming_it() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from diffusers import FluxTransformer2DModel
    from transformers import BitsAndBytesConfig, T5EncoderModel

    folder = ensure("tiny-flux")
    for config, kind in ((four_bit(), bnb.nn.Linear4bit), (eight_bit(), bnb.nn.Linear8bitLt)):
        transformer = FluxTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=torch.bfloat16, quantization_config=config
        )
        assert isinstance(transformer.transformer_blocks[0].attn.to_q, kind)
        assert {str(parameter.device) for parameter in transformer.parameters()} == {"cuda:0"}
    encoder = T5EncoderModel.from_pretrained(
        folder, subfolder="text_encoder_2", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    assert {str(parameter.device) for parameter in encoder.parameters()} == {"cuda:0"}


def test_a_model_is_shared_out_over_two_devices_the_host_and_the_disk(tmp_path: Path) -> None:
    import accelerate

    def model() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))

    x = torch.ones(1, 16)
    parts = accelerate.infer_auto_device_map(model(), max_memory={0: 2300, 1: 1100, "cpu": 10**6})
    assert set(parts.values()) == {0, 1, "cpu"}
    for device_map in (parts, {"0": 0, "1": 1, "2": "cpu", "3": "disk"}):
        shared = accelerate.dispatch_model(model(), device_map, offload_dir=tmp_path)
        torch.testing.assert_close(shared(x).cpu(), model()(x))
        held = [str(layer.weight.device) for layer in shared]
        assert held[0] == "cuda:0"
        assert "cuda:1" in held
        assert held[-1] == "meta"
    balanced = accelerate.utils.get_balanced_memory(model())
    assert 0 < balanced[0] < balanced[1]


def test_a_pipeline_is_loaded_onto_the_device_or_balanced_over_two() -> None:
    from diffusers import DiffusionPipeline

    whole = DiffusionPipeline.from_pretrained(ensure("tiny-sd"), device_map="cuda", torch_dtype=torch.float32)
    assert whole.hf_device_map == "cuda"
    assert whole.unet.device.type == "cuda"
    pipeline = DiffusionPipeline.from_pretrained(ensure("tiny-flux"), device_map="balanced", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert set(pipeline.hf_device_map.values()) == {0, 1}
    assert pipeline.transformer.device == torch.device("cuda", pipeline.hf_device_map["transformer"])
    torch.testing.assert_close(image(pipeline), image(flux()))


def test_a_file_is_read_onto_the_device_that_is_named(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.arange(6.0).reshape(2, 3)}, file := tmp_path / "weights.safetensors")
    tensors = [load_file(file, device="cuda:1")["a"]]
    with safe_open(file, framework="pt", device="cuda:1") as opened:
        slices = opened.get_slice("a")
        tensors += [opened.get_tensor("a"), torch.stack([slices[0], slices[1]])]
    for tensor in tensors:
        assert (str(tensor.device), tensor.tolist()) == ("cuda:1", [[0, 1, 2], [3, 4, 5]])
    assert load_file(file)["a"].device.type == "cpu"


def test_accelerate_trains_in_half_precision() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="fp16")
    layer = torch.nn.Linear(8, 1, bias=False)
    model, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    # small: the scaler multiplies by 2**16, and half precision ends there
    accelerator.backward(model(torch.ones(1, 8, device=accelerator.device)).sum() * 2**-8)
    optimizer.step()
    assert accelerator.device.type == "cuda"
    assert not torch.equal(before, model.weight.detach())
