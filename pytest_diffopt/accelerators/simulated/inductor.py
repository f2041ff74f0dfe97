"""torch.compile on the simulated device: Inductor's C++ code for the CPU, called on the device's tensors.

Nothing is imported until torch imports its own compiler: :func:`register_with_compilers` waits for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pytest_diffopt.accelerators.simulated.imports import AfterImport


def register_with_compilers() -> None:
    """Make Dynamo and Inductor know the device, each as soon as it is imported."""
    AfterImport(
        {
            "torch._subclasses.fake_impls": lambda module: _foretell_convolutions(),
            "torch._dynamo.device_interface": lambda module: _register_interface(),
            # the last: the modules import each other
            "torch._inductor.compile_fx": lambda module: _register_inductor(),
        }
    ).start()


def _foretell_convolutions() -> None:
    """FakeTensors say of the device's convolutions what ``kernels.cpp`` does; torch says contiguous for a third party's."""
    from torch._subclasses import fake_impls

    aten = torch.ops.aten
    backward = aten.convolution_backward.default
    torch_c: Any = torch._C
    like_the_host = torch_c._ConvBackend.Mkldnn
    known: dict[Any, Any] = fake_impls.op_implementations_dict

    def foretelling(original: Callable[..., Any]) -> Callable[..., Any]:
        def convolution(fake_mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(fake_mode, func, *args, **kwargs)
            at = 1 if func is backward else 0  # where input and weight stand
            tensors = [
                args[at + i] if len(args) > at + i else kwargs[name] for i, name in enumerate(("input", "weight"))
            ]
            if tensors[0].device.type != "sim" or tensors[1].dim() not in (4, 5):
                return result
            with fake_mode:
                format = torch_c._conv_determine_backend_memory_format(*tensors, like_the_host)
                if func is backward:
                    return *(t if t is None else t.to(memory_format=format) for t in result[:2]), result[2]
                return result.to(memory_format=format)

        return convolution

    for op in (aten.convolution.default, aten._convolution.default, aten._convolution.deprecated, backward):
        if op in known:
            known[op] = foretelling(known[op])


def _register_interface() -> None:
    from torch._dynamo import device_interface

    face = torch.sim  # type: ignore[attr-defined]

    class Worker:
        set_device = staticmethod(face.set_device)
        current_device = staticmethod(face.current_device)
        get_device_properties = staticmethod(face.get_device_properties)

    names = (
        *("Event", "Stream", "device", "current_device", "set_device", "device_count", "is_available", "stream"),
        *("current_stream", "set_stream", "synchronize", "get_device_properties", "memory_allocated"),
        *("is_bf16_supported",),
    )
    members: dict[str, Any] = {
        name: value if isinstance(value := getattr(face, name), type) else staticmethod(value) for name in names
    }
    members |= {
        "Worker": Worker,
        "exchange_device": staticmethod(face._exchange_device),
        "maybe_exchange_device": staticmethod(face._maybe_exchange_device),
        "get_compute_capability": staticmethod(lambda device=None: ""),
        "get_raw_stream": staticmethod(lambda device_index: 0),
        "is_dtype_supported": classmethod(lambda cls, dtype, including_emulation=False: True),
        "is_triton_capable": staticmethod(lambda device=None: False),
        "set_stream_by_id": staticmethod(
            lambda **known: face.set_stream(face.Stream(**known)),
        ),
    }
    interface = type("SimInterface", (device_interface.DeviceInterface,), members)
    device_interface.register_interface_for_device("sim", interface)
    for index in range(face.device_count()):
        device_interface.register_interface_for_device(f"sim:{index}", interface)


def _register_inductor() -> None:
    from torch._inductor import config, scheduler, utils
    from torch._inductor.codegen import common, cpp, cpp_utils, wrapper

    common.init_backend_registration()

    class OnTheDevice:
        def _generate_kernel_call_helper(
            self, kernel_name: str, call_args: Any, *, device: Any = None, **more: Any
        ) -> None:
            from torch._inductor.virtualized import V

            device = device or V.graph.get_current_device_or_throw()
            if device.type == "sim":
                device = torch.device("cpu")  # a C++ kernel is called with pointers: no stream, no Triton launcher
            super()._generate_kernel_call_helper(kernel_name, call_args, device=device, **more)  # type: ignore[misc]

        def make_allocation(self, name: str, device: torch.device, *given: Any, **more: Any) -> str:
            line: str = super().make_allocation(name, device, *given, **more)  # type: ignore[misc]
            # without the index a buffer would be on whichever device is current
            return line.replace("device='sim'", f"device='{device}'")

    class SimSubgraph(OnTheDevice, wrapper.SubgraphPythonWrapperCodegen):  # type: ignore[misc, unused-ignore]
        pass

    class SimWrapper(OnTheDevice, wrapper.PythonWrapperCodegen):  # type: ignore[misc, unused-ignore]
        @staticmethod
        def create(is_subgraph: bool, subgraph_name: Any, parent_wrapper: Any, partition_signatures: Any = None) -> Any:
            if is_subgraph:
                return SimSubgraph(subgraph_name, parent_wrapper, partition_signatures)
            return SimWrapper()  # type: ignore[no-untyped-call]

    class SimOverrides(common.DeviceOpOverrides):  # type: ignore[misc, unused-ignore]
        def import_get_raw_stream_as(self, name: str) -> str:
            return f"def {name}(_):\n    return 0\n"

        def set_device(self, device_idx: int) -> str:
            return f"torch.sim.set_device({device_idx})"

        def synchronize(self) -> str:
            return "torch.sim.synchronize()"

        def device_guard(self, device_idx: int) -> str:
            return f"torch.sim.device({device_idx})"

    common.register_backend_for_device("sim", cpp.CppScheduling, SimWrapper)
    common.register_device_op_overrides("sim", SimOverrides())
    cpp_utils.DEVICE_TO_ATEN["sim"] = "at::kPrivateUse1"

    # Fusion asks whether a node runs on the CPU, by name.
    def is_cpu(self: Any) -> bool:
        device = self.get_device()
        return device is not None and device.type in ("cpu", "sim")

    scheduler.BaseSchedulerNode.is_cpu = is_cpu  # type: ignore[method-assign]

    # Any device that Inductor does not know is taken for one with Triton.
    original = utils.get_current_backend

    def get_current_backend(device_type: str | None = None) -> str:
        from torch._inductor.virtualized import V

        device_type = device_type or V.graph.get_current_device_or_throw().type
        return str(config.cpu_backend) if device_type == "sim" else str(original(device_type))

    for module in (utils, common, scheduler):
        setattr(module, "get_current_backend", get_current_backend)  # noqa: B010  (each imported it by its name)
