"""Each place where another library lists devices: what it does with the simulated one, and that it is given back.

A case's action is run with every adaptation, and with every one but its own: so no adaptation is there for nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.accelerators.simulated import adapted_libraries, libraries
from pytest_diffopt.replicas import ensure

pytest.importorskip("diffusers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

# For versions before the installed ones, or whose answer is the same in them.
WITHOUT_A_CASE = {
    "diffusers.hooks.group_offloading:apply_group_offloading",  # asks the device's module in 0.42
    "accelerate.utils.modeling:get_balanced_memory",  # counts devices by their type in 1.2
}


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    """Accelerate remembers the first device that it was asked for."""
    state = importlib.import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------------------------- cases


def four_bit() -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def eight_bit() -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def quantizer_of_diffusers(bits: int) -> Any:
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    return BnB4BitDiffusersQuantizer(four_bit()) if bits == 4 else BnB8BitDiffusersQuantizer(eight_bit())


def quantizer_of_transformers(bits: int) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    kind = Bnb4BitHfQuantizer if bits == 4 else Bnb8BitHfQuantizer
    return kind(BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8))


def floats_again() -> Any:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(
        ensure("tiny-flux"), subfolder="transformer", torch_dtype=torch.bfloat16, quantization_config=four_bit()
    )
    model.to("cpu")
    model.dequantize()
    return type(model.transformer_blocks[0].attn.to_q).__name__, model.device.type


class Pipeline:
    """Makes a pipeline of one layer; diffusers is imported when it is called."""

    def __new__(cls) -> Any:
        from diffusers import DiffusionPipeline, ModelMixin

        class Model(ModelMixin):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(8, 8)

        class OneLayer(DiffusionPipeline):  # type: ignore[misc]
            model_cpu_offload_seq = "model"

            def __init__(self, model: Any) -> None:
                super().__init__()
                self.register_modules(model=model)

        return OneLayer(Model())


def moved_while_it_is_offloaded() -> None:
    pipeline = Pipeline()
    pipeline.enable_sequential_cpu_offload(device="sim")
    pipeline.to("sim")


def modular_moved_while_it_is_offloaded() -> None:
    from accelerate import cpu_offload
    from diffusers.modular_pipelines.modular_pipeline import ModularPipeline

    layer = cpu_offload(torch.nn.Linear(8, 8), execution_device="sim")
    pipeline: Any = types.SimpleNamespace(components={"layer": layer}, hf_device_map=None)
    ModularPipeline.to(pipeline, "sim")


def left_in_the_cache() -> Any:
    sim: Any = torch.sim  # type: ignore[attr-defined]
    sim.set_caching_allocator(True)
    torch.empty(2**22, device="sim")  # freed at once, and kept by the cache
    return sim


def free_with_what_is_cached() -> bool:
    from transformers.integrations.accelerate import get_max_memory

    sim = left_in_the_cache()
    assert sim.memory_reserved() >= 2**24
    return bool(get_max_memory()[0] == sim.mem_get_info()[0] + sim.memory_reserved() - sim.memory_allocated())


def cached_after_clearing() -> int:
    from accelerate.utils.memory import clear_device_cache

    sim = left_in_the_cache()
    clear_device_cache()
    return int(sim.memory_reserved() - sim.memory_allocated())


def warmed_up_bytes() -> int:
    from transformers import T5EncoderModel
    from transformers.modeling_utils import caching_allocator_warmup

    sim: Any = torch.sim  # type: ignore[attr-defined]
    with torch.device("meta"):
        model = T5EncoderModel(T5EncoderModel.config_class(num_layers=1, vocab_size=10**6))
    sim.set_memory_limit(int(1.2 * 2**30) + 2**20 + sim.memory_allocated())
    sim.reset_peak_memory_stats()
    before = sim.memory_allocated()
    caching_allocator_warmup(model, dict.fromkeys(model.state_dict(), "sim"), None)
    # not more than the device has, less 1.2 GiB
    return int((sim.max_memory_allocated() - before) / (2**20 + before) + 0.01)


def quantized_when_it_is_set() -> torch.dtype:
    import bitsandbytes as bnb
    from accelerate.utils.modeling import set_module_tensor_to_device

    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    set_module_tensor_to_device(layer, "weight", "sim:0", value=torch.ones(64, 64, dtype=torch.float16))
    return layer.weight.dtype  # type: ignore[no-any-return]


def devices_with_memory() -> list[Any]:
    from accelerate.utils.modeling import get_max_memory

    return list(get_max_memory())


def device_of_the_scaler() -> str:
    from accelerate.utils.modeling import get_grad_scaler

    return str(get_grad_scaler()._device)


def layers_quantized_by_accelerate() -> tuple[str, torch.dtype]:
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    config = BnbQuantizationConfig(load_in_8bit=True, torch_dtype=torch.float32, skip_modules=[])
    model = load_and_quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
    return str(model[0].weight.device), model[0].weight.dtype


def device_map_of_accelerate() -> Any:
    from accelerate.utils.bnb import BnbQuantizationConfig, get_quantized_model_device_map

    config = BnbQuantizationConfig(load_in_8bit=True, skip_modules=[], keep_in_fp32_modules=[])
    return get_quantized_model_device_map(torch.nn.Linear(8, 8), config)


def default_device_of_accelerate() -> str:
    from accelerate import PartialState

    return str(PartialState().default_device.type)


def trained_in_half_precision() -> tuple[str, bool]:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="fp16")
    model, optimizer = accelerator.prepare(
        layer := torch.nn.Linear(8, 1, bias=False), torch.optim.SGD(layer.parameters(), lr=1.0)
    )
    before = model.weight.detach().clone()
    # small: the scaler multiplies by 2**16, and half precision ends there
    accelerator.backward(model(torch.ones(1, 8, device=accelerator.device)).sum() * 2**-8)
    optimizer.step()
    return accelerator.device.type, not torch.equal(before, model.weight.detach())


def offloaded_without_naming_a_device() -> str:
    pipeline = Pipeline()
    pipeline.enable_model_cpu_offload()
    return str(pipeline._offload_device)


def pipeline_loaded_onto_the_device() -> tuple[Any, Any]:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(ensure("tiny-sd"), device_map="sim", torch_dtype=torch.float32)
    return pipeline.hf_device_map, pipeline.unet.device.type


def both_sides_in_float8() -> str:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    layer = torch.nn.Linear(32, 32).to(torch.bfloat16)
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False))
    return type(layer.weight).__name__


FILES: list[Path] = []


def read_from_a_file() -> list[Any]:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.arange(6.0).reshape(2, 3)}, file := FILES[0] / "weights.safetensors")
    tensors = [load_file(file, device="sim:1")["a"]]
    with safe_open(file, framework="pt", device=torch.device("sim", 1)) as opened:  # type: ignore[arg-type]
        assert list(opened.keys()) == ["a"]
        assert opened.get_slice("a").get_shape() == [2, 3]
        tensors += [opened.get_tensor("a"), torch.stack([opened.get_slice("a")[0], opened.get_slice("a")[1]])]
    with safe_open(file, framework="pt") as opened:
        assert opened.get_tensor("a").device.type == "cpu"
    return [(str(tensor.device), tensor.tolist()) for tensor in tensors]


@dataclass(frozen=True)
class Case:
    """What an action returns when everything is adapted; an exception counts as its first words."""

    action: Callable[[], Any]
    expected: Any

    def outcome(self) -> Any:
        try:
            return self.action()
        except Exception as error:
            return str(error)[:60]


OFFLOADED = "It seems like you have activated sequential model offloading"
DIFFUSERS = "diffusers.quantizers.bitsandbytes.bnb_quantizer"
MODELING = "accelerate.utils.modeling"
CASES = {
    f"{DIFFUSERS}:BnB4BitDiffusersQuantizer.validate_environment": Case(
        lambda: quantizer_of_diffusers(4).validate_environment(), None
    ),
    f"{DIFFUSERS}:BnB8BitDiffusersQuantizer.validate_environment": Case(
        lambda: quantizer_of_diffusers(8).validate_environment(), None
    ),
    f"{DIFFUSERS}:BnB4BitDiffusersQuantizer.update_device_map": Case(
        lambda: quantizer_of_diffusers(4).update_device_map(None), {"": "sim:0"}
    ),
    f"{DIFFUSERS}:BnB8BitDiffusersQuantizer.update_device_map": Case(
        lambda: quantizer_of_diffusers(8).update_device_map(None), {"": "sim:0"}
    ),
    f"{DIFFUSERS}:BnB4BitDiffusersQuantizer._dequantize": Case(floats_again, ("Linear", "cpu")),
    "diffusers.pipelines.pipeline_utils:DiffusionPipeline.to": Case(moved_while_it_is_offloaded, OFFLOADED),
    "diffusers.modular_pipelines.modular_pipeline:ModularPipeline.to": Case(
        modular_moved_while_it_is_offloaded, OFFLOADED
    ),
    "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer.update_device_map": Case(
        lambda: quantizer_of_transformers(4).update_device_map(None), {"": 0}
    ),
    "transformers.quantizers.quantizer_bnb_8bit:Bnb8BitHfQuantizer.update_device_map": Case(
        lambda: quantizer_of_transformers(8).update_device_map(None), {"": 0}
    ),
    "transformers.integrations.accelerate:get_max_memory": Case(free_with_what_is_cached, True),
    "transformers.modeling_utils:caching_allocator_warmup": Case(warmed_up_bytes, 1),
    "accelerate.utils.memory:clear_device_cache": Case(cached_after_clearing, 0),
    f"{MODELING}:set_module_tensor_to_device": Case(quantized_when_it_is_set, torch.int8),
    f"{MODELING}:get_max_memory": Case(devices_with_memory, [0, 1, "cpu"]),
    f"{MODELING}:get_grad_scaler": Case(device_of_the_scaler, "sim"),
    "accelerate.utils.bnb:load_and_quantize_model": Case(layers_quantized_by_accelerate, ("sim:0", torch.int8)),
    "accelerate.utils.bnb:get_quantized_model_device_map": Case(device_map_of_accelerate, {"": 0}),
    "accelerate.state:PartialState.default_device": Case(default_device_of_accelerate, "sim"),
    "torchao.float8.inference:_check_hardware_support": Case(both_sides_in_float8, "Float8Tensor"),
    "accelerate.accelerator:Accelerator.__init__": Case(trained_in_half_precision, ("sim", True)),
    "diffusers.utils.torch_utils:_adapt_get_device": Case(offloaded_without_naming_a_device, "sim:0"),
    "diffusers.pipelines.pipeline_utils:_adapt_device_map": Case(pipeline_loaded_onto_the_device, ("sim", "sim")),
    "safetensors:_adapt_safe_open": Case(read_from_a_file, [("sim:1", [[0, 1, 2], [3, 4, 5]])] * 3),
}
ROWS = {
    f"{module}:{one if isinstance(one, str) else one.__name__}"
    for table in (libraries.XPU_BRANCHES, libraries.OTHERS)
    for module, row in table.items()
    for one in row
}


@pytest.fixture
def imported_before_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """diffusers as it is when it was asked for its device, and made its lists, before the device was there."""
    from diffusers.pipelines import pipeline_utils
    from diffusers.utils.torch_utils import TorchDeviceBackend

    monkeypatch.setattr(pipeline_utils, "SUPPORTED_DEVICE_MAP", ["balanced", "cpu", "cpu"])
    FILES.append(tmp_path)
    with pytest.MonkeyPatch.context() as before:
        before.setattr(torch.accelerator, "is_available", lambda: False)
        TorchDeviceBackend._detect_device_type.cache_clear()
        assert TorchDeviceBackend._detect_device_type() == "cpu"
    yield
    TorchDeviceBackend._detect_device_type.cache_clear()
    FILES.clear()


@pytest.mark.usefixtures("imported_before_the_device")
@pytest.mark.parametrize("row", CASES)
def test_each_adaptation_is_what_makes_its_case_work(row: str, sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[row]
    with adapted_libraries():
        assert case.outcome() == case.expected
    sim.set_caching_allocator(False)
    sim.empty_cache()
    sim.set_memory_limit(None)
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    module, _, name = row.partition(":")
    for table in (libraries.XPU_BRANCHES, libraries.OTHERS):
        if module in table:
            others = tuple(one for one in table[module] if name not in (one, getattr(one, "__name__", "")))
            monkeypatch.setitem(table, module, others)
    with adapted_libraries():
        assert case.outcome() != case.expected


def test_every_adaptation_has_a_case() -> None:
    assert set(CASES) | WITHOUT_A_CASE | {"accelerate.state:_adapt_shared_state"} == ROWS


# --------------------------------------------------------------------------------------------------------- giving back


def everything_that_is_adapted() -> dict[str, Any]:
    found: dict[str, Any] = {"finders": list(sys.meta_path)}
    for name, paths in libraries.XPU_BRANCHES.items():
        module = importlib.import_module(name)
        for path in paths:
            function = libraries._find(module, path)
            assert function is not None, f"{name}.{path}"
            found[f"{name}.{path}"] = function.__code__
            found[f"{name} names"] = sorted(function.__globals__)
    found["safe_open"] = {
        name: module.safe_open
        for name, module in list(sys.modules.items())
        if "safe_open" in getattr(module, "__dict__", {})
    }
    pipeline_utils = importlib.import_module("diffusers.pipelines.pipeline_utils")
    found["device map"] = list(pipeline_utils.SUPPORTED_DEVICE_MAP)
    found["device"] = vars(pipeline_utils.get_device.__globals__["TorchDeviceBackend"])["_detect_device_type"]
    found["state"] = dict(importlib.import_module("accelerate.state").PartialState._shared_state)
    return found


@pytest.mark.usefixtures("imported_before_the_device")
def test_everything_is_given_back_also_after_a_raise() -> None:
    from accelerate import PartialState

    before = everything_that_is_adapted()
    with pytest.raises(ZeroDivisionError), adapted_libraries():
        assert PartialState().device.type == "sim"
        inside = everything_that_is_adapted()
        raise ZeroDivisionError
    after = everything_that_is_adapted()
    assert after == before
    unchanged = {f"{name}.{path}" for row in WITHOUT_A_CASE for name, _, path in [row.partition(":")]}
    changed = {name for name in before if inside[name] != before[name]}
    assert {name for name in before if not name.endswith(" names")} - changed <= unchanged


def test_a_state_of_accelerate_that_was_there_before_stays() -> None:
    from accelerate import PartialState

    on_the_host = PartialState(cpu=True)
    with adapted_libraries():
        pass
    assert PartialState._shared_state["device"] == on_the_host.device == torch.device("cpu")


def test_the_last_one_out_gives_back_what_the_first_one_in_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils.modeling import get_max_memory

    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(adapted_libraries())
        with monkeypatch.context() as patched:  # the second one in does nothing
            patched.setattr(libraries, "_adapt", None)
            second.enter_context(adapted_libraries())
        first.close()
        assert 0 in get_max_memory()
    assert 0 not in get_max_memory()


def test_an_adaptation_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything_that_is_adapted()

    def failing(module: Any, borrowed: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(libraries.OTHERS, "safetensors", (*libraries.OTHERS["safetensors"], failing))
    with pytest.raises(ZeroDivisionError), adapted_libraries():
        pass
    assert everything_that_is_adapted() == before
    monkeypatch.undo()
    with adapted_libraries():
        assert everything_that_is_adapted() != before
    assert everything_that_is_adapted() == before


# ------------------------------------------------------------------------------------- the code that is taken for sim


def test_older_libraries_that_ask_for_one_device_after_the_other_take_the_branch_of_xpu() -> None:
    def stream_of(onload_device: str) -> str:  # as diffusers 0.37 asks
        if torch.cuda.is_available():
            return "cuda"
        if hasattr(torch, "xpu") and torch.xpu.is_available():
            return f"xpu:{torch.device('xpu').type}"
        raise ValueError("Using streams for data transfer requires a CUDA device, or an Intel XPU device.")

    with contextlib.ExitStack() as borrowed:
        libraries._exchange_code(stream_of, borrowed)
        assert stream_of("sim") == "sim:sim"
    with pytest.raises(ValueError, match="an Intel XPU device"):
        stream_of("sim")


def test_the_get_device_of_older_diffusers_forgets_the_host_and_then_the_device() -> None:
    @functools.cache
    def get_device() -> str:
        if torch.cuda.is_available():
            return "cuda"
        if hasattr(torch, "xpu") and torch.xpu.is_available():
            return "xpu"
        return "cpu"

    assert get_device() == "cpu"
    with contextlib.ExitStack() as borrowed:
        libraries._adapt_get_device(types.SimpleNamespace(get_device=get_device), borrowed)  # type: ignore[arg-type]
        assert get_device() == "sim"
    assert get_device() == "cpu"


def test_lists_of_devices_keep_what_they_had_and_arguments_are_exchanged() -> None:
    assert libraries._constant_with_sim(("cuda", "xpu")) == ("cuda", "xpu", "sim")
    assert libraries._constant_with_sim(frozenset({"cpu", "xpu"})) == {"cpu", "xpu", "sim"}
    assert libraries._constant_with_sim(("xpu",)) == ("sim",)
    for other in ("an xpu", "xpus", "MULTI_XPU", 1, None, ("cuda", "mps")):
        assert libraries._constant_with_sim(other) == other


# ------------------------------------------------------------------------------------------------------- whole flows


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


@pytest.mark.usefixtures("imported_before_the_device")
def test_offloading_finds_the_device_and_lowers_the_peak(sim: Any) -> None:
    with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
        flux().enable_model_cpu_offload()
    with adapted_libraries():
        peaks = {}
        images = []
        for way in ("whole", "model", "group", "sequential"):
            pipeline = flux()
            if way == "whole":
                pipeline.to("sim")
            elif way == "group":
                pipeline.enable_group_offload(
                    onload_device=torch.device("sim"), offload_type="leaf_level", use_stream=True
                )
            else:
                getattr(pipeline, f"enable_{way}_cpu_offload")()
            sim.reset_peak_memory_stats()
            images.append(image(pipeline))
            peaks[way] = sim.max_memory_allocated()
            del pipeline
            gc.collect()
    assert peaks["whole"] > peaks["model"] > peaks["group"]
    assert peaks["model"] > peaks["sequential"]
    for one in images[1:]:
        torch.testing.assert_close(one, images[0])


def test_quantized_models_are_loaded_onto_the_device_without_naming_it() -> None:
    import bitsandbytes as bnb
    from diffusers import FluxTransformer2DModel
    from transformers import BitsAndBytesConfig, T5EncoderModel

    folder = ensure("tiny-flux")
    with adapted_libraries():
        for config, kind in ((four_bit(), bnb.nn.Linear4bit), (eight_bit(), bnb.nn.Linear8bitLt)):
            transformer = FluxTransformer2DModel.from_pretrained(
                folder, subfolder="transformer", torch_dtype=torch.bfloat16, quantization_config=config
            )
            assert isinstance(transformer.transformer_blocks[0].attn.to_q, kind)
            assert {str(parameter.device) for parameter in transformer.parameters()} == {"sim:0"}
        encoder = T5EncoderModel.from_pretrained(
            folder, subfolder="text_encoder_2", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
    assert {str(parameter.device) for parameter in encoder.parameters()} == {"sim:0"}


def test_a_model_is_shared_out_over_two_devices_the_host_and_the_disk(tmp_path: Path) -> None:
    import accelerate

    def model() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))

    x = torch.ones(1, 16)
    with adapted_libraries():
        parts = accelerate.infer_auto_device_map(model(), max_memory={0: 2300, 1: 1100, "cpu": 10**6})
        assert set(parts.values()) == {0, 1, "cpu"}
        for device_map in (parts, {"0": 0, "1": 1, "2": "cpu", "3": "disk"}):
            shared = accelerate.dispatch_model(model(), device_map, offload_dir=tmp_path)
            torch.testing.assert_close(shared(x).cpu(), model()(x))
            held = [str(layer.weight.device) for layer in shared]
            assert held[0] == "sim:0"
            assert "sim:1" in held
            assert held[-1] == "meta"
        balanced = accelerate.utils.get_balanced_memory(model())
        assert 0 < balanced[0] < balanced[1]


def test_a_pipeline_is_balanced_over_the_devices() -> None:
    from diffusers import DiffusionPipeline

    with adapted_libraries():
        pipeline = DiffusionPipeline.from_pretrained(
            ensure("tiny-flux"), device_map="balanced", torch_dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        assert set(pipeline.hf_device_map.values()) == {0, 1}
        assert pipeline.transformer.device == torch.device("sim", pipeline.hf_device_map["transformer"])
        made = image(pipeline)
    torch.testing.assert_close(made, image(flux()))


def test_exported_programs_run_on_the_device() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).to("sim")
    x = torch.ones(2, 8, device="sim")
    program = torch.export.export(model, (x,)).module()
    assert program(x).device == x.device
    assert torch.equal(program(x), model(x))


# --------------------------------------------------------------------------------------------------- in other processes


def run(code: str, folder: Path, **environment: str) -> list[str]:
    root = str(Path(libraries.__file__).parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_what_is_imported_later_is_adapted_while_the_context_is_open(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
from pytest_diffopt.accelerators.simulated import adapted_libraries
before = list(sys.meta_path)
print("accelerate" in sys.modules, "safetensors" in sys.modules, "pytest" in sys.modules)
with adapted_libraries():
    importlib.util.find_spec("accelerate.utils.memory")  # looking for a module is not importing it
    from accelerate.utils import get_max_memory
    import accelerate.utils.modeling as modeling
    print(list(get_max_memory()))
    inside = modeling.safe_open
import safetensors
from accelerate.utils.bnb import get_quantized_model_device_map
print(list(get_max_memory()))
print(modeling.safe_open is safetensors.safe_open, inside is safetensors.safe_open)
print("xpu" in get_quantized_model_device_map.__code__.co_names, sys.meta_path == before)
"""
    assert run(code, tmp_path) == ["False False False", "[0, 1, 'cpu']", "['cpu']", "True False", "True True"]


def test_diffusers_own_test_suite_takes_the_device_from_the_file_that_is_shipped(tmp_path: Path) -> None:
    # not imported here: that would adapt this process for good
    shutil.copy(Path(libraries.__file__).with_name("diffusers_spec.py"), tmp_path)
    code = """
import torch
import diffusers.utils.testing_utils as testing
print(testing.torch_device, testing.BACKEND_DEVICE_COUNT["sim"](), testing.BACKEND_SUPPORTS_TRAINING["sim"])
held = torch.ones(256, device=testing.torch_device)
print(testing.BACKEND_MAX_MEMORY_ALLOCATED["sim"]())
del held
testing.BACKEND_RESET_PEAK_MEMORY_STATS["sim"]()
print(testing.BACKEND_MAX_MEMORY_ALLOCATED["sim"]())
testing.BACKEND_EMPTY_CACHE["sim"]()
draws = []
for _ in range(2):
    testing.BACKEND_MANUAL_SEED["sim"](7)
    draws.append(torch.randn(4, device="sim").tolist())
print(draws[0] == draws[1])
from accelerate.utils import get_max_memory
print(list(get_max_memory()))
"""
    variables = {
        "DIFFUSERS_TEST_BACKEND": "pytest_diffopt.accelerators.simulated",
        "DIFFUSERS_TEST_DEVICE": "sim",
        "DIFFUSERS_TEST_DEVICE_SPEC": "diffusers_spec.py",
    }
    assert run(code, tmp_path, **variables) == ["sim 2 True", "1024", "0", "True", "[0, 1, 'cpu']"]


def test_the_variable_adapts_at_the_import_and_takes_nothing_but_0_and_1(tmp_path: Path) -> None:
    code = """
import pytest_diffopt.accelerators.simulated as simulated
from accelerate.utils import get_max_memory
simulated.adapt_libraries()
with simulated.adapted_libraries():
    pass
print(list(get_max_memory()))
"""
    assert run(code, tmp_path, DIFFOPT_SIM_ADAPT="1") == ["[0, 1, 'cpu']"]
    code = """
try:
    import pytest_diffopt.accelerators.simulated
except ValueError as error:
    print(error)
"""
    assert run(code, tmp_path, DIFFOPT_SIM_ADAPT="yes") == ["DIFFOPT_SIM_ADAPT: found 'yes'; it takes 0 or 1"]
