"""A program: a replica in every placement, computed and dry; what the device counted, as JSON on the last line of its output.

``python -m tests.simulated.dry_and_wet REPLICA``
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pytest_diffopt.accelerators import simulated
from pytest_diffopt.accelerators.simulated import simulated_cuda
from pytest_diffopt.libraries import import_libraries

SIZES = {"tiny-flux": (32, 32), "tiny-sd": (64, 64), "tiny-wan": (32, 32, 5)}
REAL_BYTES = (64 * 1024, 8 * 1024)


def _group(level: str, stream: bool) -> Callable[[Any], object]:
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    return lambda pipeline: pipeline.enable_group_offload(
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
    "leaf": _group("leaf_level", False),
    "leaf, stream": _group("leaf_level", True),
    "block": _group("block_level", False),
    "block, stream": _group("block_level", True),
}


def _by_block(pipeline: Any) -> None:
    pipeline.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)


def _whole_model(pipeline: Any) -> None:
    pipeline.transformer.compile(backend="eager")


COMPILED: dict[str, Callable[[Any], None]] = {"blocks, aot_eager": _by_block, "whole model, eager": _whole_model}


@dataclass(frozen=True)
class Case:
    """A recipe in miniature; ``real_bytes`` are the dry runs to compare it with."""

    dtype: torch.dtype
    placement: str
    real_bytes: tuple[int, ...] = REAL_BYTES
    nf4: bool = False
    compiled: str = ""

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), self.placement, "nf4" if self.nf4 else "", self.compiled]
        return "; ".join(word for word in words if word)


def cases(replica: str) -> list[Case]:
    """Every placement in float32, two of them in bfloat16; the smaller size tells more, so the other has but one case."""
    found = [Case(torch.float32, name, REAL_BYTES if name == "whole" else REAL_BYTES[1:]) for name in PLACEMENTS]
    found += [Case(torch.bfloat16, name, REAL_BYTES[1:]) for name in ("whole", "leaf, stream")]
    if replica == "tiny-flux":
        found += [Case(torch.bfloat16, name, REAL_BYTES[1:], nf4=True) for name in ("whole", "model")]
        found += [Case(torch.float32, "whole", REAL_BYTES[:1], compiled=name) for name in COMPILED]
    return found


def counters() -> dict[str, int]:
    stats = torch.cuda.memory_stats()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "live_bytes": torch.cuda.memory_allocated(),
        "allocations": stats["allocation.all.allocated"],
        "allocated_total_bytes": stats["allocated_bytes.all.allocated"],
        **simulated.transfer_stats(),
        "kernels": simulated.kernel_count(),
    }


def load(replica: str, case: Case) -> Any:
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    from pytest_diffopt.replicas import ensure

    more: dict[str, Any] = {}
    if case.nf4:
        more["quantization_config"] = PipelineQuantizationConfig(
            quant_backend="bitsandbytes_4bit",
            quant_kwargs={
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": case.dtype,
            },
            components_to_quantize=["transformer", "text_encoder_2"],
        )
    pipeline = DiffusionPipeline.from_pretrained(ensure(replica), torch_dtype=case.dtype, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(replica: str, case: Case) -> dict[str, Any]:
    """The counters after loading and placing, and after a call, above what was there before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    begin()
    pipeline = load(replica, case)
    PLACEMENTS[case.placement](pipeline)
    if case.compiled:
        torch._dynamo.reset()
        COMPILED[case.compiled](pipeline)
    gc.collect()
    placed = counters()
    begin()
    size = dict(zip(("height", "width", "num_frames"), SIZES[replica], strict=False))
    result = pipeline(
        "a cat", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0), **size
    )
    shape = [list(getattr(result, name)[0].shape) for name in ("images", "frames") if hasattr(result, name)]
    del result
    called = counters()
    for figures in (placed, called):
        for name in ("peak_bytes", "live_bytes"):
            figures[name] -= before
    return {"placed": placed, "called": called, "shape": shape}


def begin() -> None:
    simulated.reset_counts()
    torch.cuda.reset_peak_memory_stats()


def main(replica: str) -> dict[str, Any]:
    """Case → ``"wet"`` and the size of the largest real block → figures; ``"guesses"`` of the dry runs."""
    found: dict[str, Any] = {}
    if any(case.nf4 for case in cases(replica)):
        load(replica, Case(torch.bfloat16, "whole", nf4=True)).to("cuda")  # bitsandbytes keeps its tables for good
    for case in cases(replica):
        row: dict[str, Any] = {"wet": measure(replica, case), "guesses": []}
        for real_bytes in case.real_bytes:
            with simulated.dry(real_bytes=real_bytes) as run:
                row[str(real_bytes)] = measure(replica, case)
            row["guesses"] += run.guesses
        found[str(case)] = row
    return found


if __name__ == "__main__":
    import_libraries()
    gc.freeze()  # to look at what is imported costs half a second each time
    with simulated_cuda():
        torch.cuda.init()
        print(json.dumps(main(sys.argv[1])))
