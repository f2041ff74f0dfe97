"""A program: tiny-flux in every placement, and what the device counted, as JSON on the last line of its output.

``python -m tests.simulated.measured_pipelines THREADS``
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from pytest_diffopt.accelerators.simulated import simulated_cuda
from pytest_diffopt.libraries import import_libraries


def _group(pipeline: Any, level: str, stream: bool) -> None:
    pipeline.vae.to("cuda"), pipeline.text_encoder.to("cuda"), pipeline.text_encoder_2.to("cuda")
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type=level,
        use_stream=stream,
        **blocks,
    )


PLACEMENTS: dict[str, Callable[[Any], object]] = {
    "whole": lambda pipeline: pipeline.to("cuda"),
    "model": lambda pipeline: pipeline.enable_model_cpu_offload(device="cuda"),
    "sequential": lambda pipeline: pipeline.enable_sequential_cpu_offload(device="cuda"),
    "leaf": lambda pipeline: _group(pipeline, "leaf_level", False),
    "leaf, stream": lambda pipeline: _group(pipeline, "leaf_level", True),
    "block": lambda pipeline: _group(pipeline, "block_level", False),
    "block, stream": lambda pipeline: _group(pipeline, "block_level", True),
}


def load() -> Any:
    from diffusers import DiffusionPipeline

    from pytest_diffopt.replicas import ensure

    pipeline = DiffusionPipeline.from_pretrained(ensure("tiny-flux"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for module in modules(pipeline):
        for parameter in module.parameters():
            # Out of the file's memory: MKL's last bits depend on how a matrix is aligned.
            parameter.data = parameter.data.clone()
    return pipeline


def modules(pipeline: Any) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def image(pipeline: Any) -> torch.Tensor:
    torch.manual_seed(0)
    made: torch.Tensor = pipeline(
        "a cat sits",
        num_inference_steps=2,
        height=32,
        width=32,
        output_type="pt",
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
    ).images
    return made.cpu()


def tensors_bytes() -> int:
    """The bytes of every tensor on the device that Python knows of, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cuda":
            storages[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def measure() -> dict[str, Any]:
    """For each placement: bytes before and after, live, at the peak, and the image's digest."""
    host = hashlib.sha256(image(load()).numpy().tobytes()).hexdigest()
    measured: dict[str, Any] = {"host": host}
    for name, place in PLACEMENTS.items():
        gc.collect()
        base = torch.cuda.memory_allocated()
        pipeline = load()
        weights = sum(t.nbytes for m in modules(pipeline) for t in (*m.parameters(), *m.buffers()))
        place(pipeline)
        resident, counted = torch.cuda.memory_allocated() - base, tensors_bytes() - base
        torch.cuda.reset_peak_memory_stats()
        digest = hashlib.sha256(image(pipeline).numpy().tobytes()).hexdigest()
        peak = torch.cuda.max_memory_allocated() - base
        torch.cuda.reset_peak_memory_stats()
        again = hashlib.sha256(image(pipeline).numpy().tobytes()).hexdigest()
        second_peak = torch.cuda.max_memory_allocated() - base
        after, counted_after = torch.cuda.memory_allocated() - base, tensors_bytes() - base
        del pipeline
        gc.collect()
        measured[name] = {
            "weight_bytes": weights,
            "resident_bytes": resident,
            "counted_bytes": counted,
            "peak_bytes": peak,
            "second_peak_bytes": second_peak,
            "after_bytes": after,
            "counted_after_bytes": counted_after,
            "left_bytes": torch.cuda.memory_allocated() - base,
            "images": [digest, again],
        }
    return measured


if __name__ == "__main__":
    import_libraries()
    gc.freeze()  # to look at what is imported costs half a second each time
    torch.set_num_threads(int(sys.argv[1]))
    with simulated_cuda():
        torch.cuda.init()
        print(json.dumps(measure()))
