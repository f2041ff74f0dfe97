"""What other libraries remember of the devices of a process, forgotten when the simulated GPU comes and when it goes.

Their code runs as it stands. Nothing is imported for it; a library that is imported later is met then.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pytest_diffopt.accelerators.simulated.borrowing import Action, keep, set_for_a_while


def _forgetting(*paths: str) -> Action:
    """Functions that keep their first answer (``functools.cache``): asked before the GPU was there, it is wrong inside."""

    def forget(module: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
        for path in paths:
            found: Any = module
            for step in path.split("."):
                found = getattr(found, step, None)
            if (clear := getattr(found, "cache_clear", None)) is not None:
                clear()
                borrowed.callback(clear)

    return forget


def _forget_shared_state(state: Any, borrowed: contextlib.ExitStack) -> None:
    """Accelerate's states are shared by the process: one that was made in here names the device for good."""
    for name in ("PartialState", "AcceleratorState"):
        shared = getattr(getattr(state, name, None), "_shared_state", None)
        if isinstance(shared, dict):
            keep(shared, borrowed)
            shared.clear()


def _keeping(name: str) -> Action:
    """A dictionary of tensors: what was put into it on the GPU goes with the GPU."""

    def keep_table(module: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
        table = getattr(module, name, None)
        if isinstance(table, dict):
            keep(table, borrowed)

    return keep_table


def _know_the_device_map(pipeline_utils: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
    """``DiffusionPipeline.from_pretrained(device_map="cuda")``: its list was made when the module was imported."""
    names = getattr(pipeline_utils, "SUPPORTED_DEVICE_MAP", None)
    if isinstance(names, list) and "cuda" not in names:
        names.append("cuda")
        borrowed.callback(names.remove, "cuda")


@contextlib.contextmanager
def _with_no_gpu() -> Iterator[None]:
    with contextlib.ExitStack() as borrowed:
        set_for_a_while(torch.cuda, "is_available", lambda: False, borrowed)
        yield


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    # with a GPU it loads its CUDA library, which needs the driver; its kernels of other kinds run on the key as well
    "bitsandbytes": _with_no_gpu,
    # with one it has kernels in CUDA C++, which nothing here compiles
    "optimum.quanto.library.extensions": _with_no_gpu,
}
"""In which context a module is imported, by its name."""

ACTIONS: dict[str, Action] = {
    "accelerate.state": _forget_shared_state,
    "accelerate.utils.environment": _forgetting("check_cuda_fp8_capability"),
    "bitsandbytes.backends.default.ops": _forgetting("_get_4bit_quantize_bounds"),
    "bitsandbytes.backends.utils": _keeping("_code_4bit_cache"),
    "bitsandbytes.functional": _keeping("name2qmap"),
    "diffusers.pipelines.pipeline_utils": _know_the_device_map,
    "diffusers.utils.torch_utils": _forgetting("TorchDeviceBackend._detect_device_type", "get_device"),
    "torch._dynamo.variables.user_defined": _forgetting("UserDefinedClassVariable._in_graph_classes"),
    "torch._inductor.utils": _forgetting(
        "get_gpu_type",
        "is_big_gpu",
        "get_max_num_sms",
        "using_b200",
        "get_device_tflops",
        "_triton_supported_fp8_dtypes",
    ),
    "torch.utils._triton": _forgetting(
        "has_triton", "has_triton_tma_device", "has_datacenter_blackwell_tma_device", "has_triton_stable_tma_api"
    ),
    "torchao.ops": _forgetting("cached_compute_capability"),
    "transformers.utils": _forgetting("get_available_devices"),
    "transformers.utils.import_utils": _forgetting(
        *("is_torch_cuda_available", "is_torch_accelerator_available", "is_cuda_platform", "get_cuda_runtime_version"),
        *("is_torch_bf16_gpu_available", "is_torch_bf16_available_on_device", "is_torch_tf32_available"),
        *("is_flash_attn_2_available", "is_flash_attn_3_available", "is_flash_attn_4_available"),
    ),
}
"""What is done to a module, by its name; it is given back when the stack is closed."""
