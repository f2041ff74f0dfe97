"""torch.compile on the simulated GPU: Inductor's C++ code for the CPU, called on the GPU's tensors.

Inductor would write Triton for it. Here its table of backends has the C++ one for ``cuda``, and the places that take
``cuda`` for a device with Triton do not.
"""

from __future__ import annotations

import contextlib
import hashlib
import types
from pathlib import Path
from typing import Any

import torch

from pytest_diffopt.accelerators.simulated.borrowing import Action, keep, set_for_a_while


def _use_cpp(module: types.ModuleType, borrowed: contextlib.ExitStack) -> None:
    """Once ``torch._inductor.compile_fx`` is imported, the last of modules that import each other."""
    from torch._inductor import codecache, config, cpp_builder, cudagraph_utils, scheduler, utils
    from torch._inductor.codegen import common, cpp, cpp_utils, wrapper

    common.init_backend_registration()

    class OnTheDevice:
        def _generate_kernel_call_helper(
            self, kernel_name: str, call_args: Any, *, device: Any = None, **more: Any
        ) -> None:
            from torch._inductor.virtualized import V

            device = device or V.graph.get_current_device_or_throw()
            if device.type == "cuda":
                device = torch.device("cpu")  # a C++ kernel is called with pointers: no stream, no Triton launcher
            super()._generate_kernel_call_helper(kernel_name, call_args, device=device, **more)  # type: ignore[misc]

    class Subgraph(OnTheDevice, wrapper.SubgraphPythonWrapperCodegen):  # type: ignore[misc, unused-ignore]
        pass

    class Wrapper(OnTheDevice, wrapper.PythonWrapperCodegen):  # type: ignore[misc, unused-ignore]
        @staticmethod
        def create(is_subgraph: bool, subgraph_name: Any, parent_wrapper: Any, partition_signatures: Any = None) -> Any:
            if is_subgraph:
                return Subgraph(subgraph_name, parent_wrapper, partition_signatures)
            return Wrapper()  # type: ignore[no-untyped-call]

    class Overrides(common.DeviceOpOverrides):  # type: ignore[misc, unused-ignore]
        def import_get_raw_stream_as(self, name: str) -> str:
            return f"def {name}(_):\n    return 0\n"

        def set_device(self, device_idx: int) -> str:
            return f"torch.cuda.set_device({device_idx})"

        def synchronize(self) -> str:
            return "torch.cuda.synchronize()"

        def device_guard(self, device_idx: int) -> str:
            return f"torch.cuda.device({device_idx})"

    keep(common.device_codegens, borrowed)
    keep(common.device_op_overrides_dict, borrowed)
    keep(cpp_utils.DEVICE_TO_ATEN, borrowed)
    common.register_backend_for_device("cuda", cpp.CppScheduling, Wrapper)
    common.register_device_op_overrides("cuda", Overrides())

    # Fusion asks whether a node runs on the CPU, by name.
    def is_cpu(self: Any) -> bool:
        device = self.get_device()
        return device is not None and device.type in ("cpu", "cuda")

    set_for_a_while(scheduler.BaseSchedulerNode, "is_cpu", is_cpu, borrowed)

    # some passes ask whether it is Triton that code for CUDA is written in: it fuses softmax otherwise
    borrowed.enter_context(config.patch(cuda_backend="cpp"))

    gpus = list(utils.GPU_TYPES)
    utils.GPU_TYPES.remove("cuda")
    borrowed.callback(utils.GPU_TYPES.__setitem__, slice(None), gpus)

    # it allocates on the current device, which is another where there are several
    needs_guard = utils.device_need_guard
    set_for_a_while(scheduler, "device_need_guard", lambda device: device == "cuda" or needs_guard(device), borrowed)

    original = utils.get_current_backend

    def get_current_backend(device_type: str | None = None) -> str:
        from torch._inductor.virtualized import V

        device_type = device_type or V.graph.get_current_device_or_throw().type
        return str(config.cpu_backend) if device_type == "cuda" else str(original(device_type))

    for holder in (utils, common, scheduler):
        set_for_a_while(holder, "get_current_backend", get_current_backend, borrowed)

    # its graphs of kernels would be captured
    def no_graphs(*args: object, **kwargs: object) -> str:
        return "the simulated GPU records no graphs of kernels"

    set_for_a_while(cudagraph_utils, "check_multiple_devices_or_any_cpu_nodes", no_graphs, borrowed)

    # its C++ is the host's, without a CUDA build's headers and libraries
    options = cpp_builder.get_cpp_torch_device_options

    def of_the_host(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return options("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    set_for_a_while(cpp_builder, "get_cpp_torch_device_options", of_the_host, borrowed)

    # code for this device is never that of a real GPU of the same name, nor that of another version of this module
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    system = codecache.CacheBase.get_system

    def get_system() -> dict[str, Any]:
        theirs = system()
        return {**theirs, "hash": f"{theirs['hash']}-simulated-{version}"}

    system.cache_clear()
    borrowed.callback(system.cache_clear)
    set_for_a_while(codecache.CacheBase, "get_system", staticmethod(get_system), borrowed)


ACTIONS: dict[str, Action] = {"torch._inductor.compile_fx": _use_cpp}
"""What is done to a module, by its name; it is given back when the stack is closed."""
