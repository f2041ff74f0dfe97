"""The simulated GPU is borrowed and given back: what stands before stands after, and each misuse is named."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.accelerators import simulated
from pytest_diffopt.accelerators.simulated import simulated_cuda
from pytest_diffopt.errors import DiffoptError, UnverifiableError

ENTERS = False  # see conftest.py

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")

CHANGED = (
    "torch",
    "torch._C",
    "torch._C._dynamo.guards",
    "torch._dynamo.device_interface",
    "torch._inductor.codecache",
    "torch._inductor.codegen.common",
    "torch._inductor.codegen.cpp_utils",
    "torch._inductor.compile_fx",
    "torch._inductor.cudagraph_utils",
    "torch._inductor.scheduler",
    "torch._inductor.utils",
    "torch.accelerator",
    "torch.backends.cuda",
    "torch.backends.cudnn",
    "torch.cuda",
    "torch.cuda.amp",
    "torch.cuda.graphs",
    "torch.cuda.memory",
    "torch.cuda.nvtx",
    "torch.cuda.random",
    "torch.cuda.streams",
    "torch.version",
    "accelerate.state",
)
"""Modules with names that are borrowed, and some beside them that are not."""


def names() -> dict[tuple[str, str], object]:
    """Everything that these modules and their classes hold, by its place; tables by what is in them."""
    found: dict[tuple[str, str], object] = {}
    for place in CHANGED:
        module = sys.modules.get(place) or importlib.import_module(place)
        for name, value in vars(module).items():
            found[place, name] = value
            if isinstance(value, type) and value.__module__.startswith(("torch", "accelerate")):
                found.update({(f"{place}.{name}", inner): one for inner, one in vars(value).items()})
            elif isinstance(value, dict) and not name.startswith("__"):
                found.update({(f"{place}.{name}", str(key)): one for key, one in value.items()})
            elif isinstance(value, list):
                found.update({(f"{place}.{name}", str(index)): one for index, one in enumerate(value)})
    return found


def state() -> dict[str, Any]:
    """What a program sees of CUDA."""
    cudnn: Any = torch.backends.cudnn
    return {
        "available": torch.cuda.is_available(),
        "devices": torch.cuda.device_count(),
        "initialized": torch.cuda.is_initialized(),
        "accelerator": torch._C._get_accelerator(),
        "accelerator available": torch.accelerator.is_available(),
        "accelerator's devices": torch.accelerator.device_count(),
        "cudnn": (cudnn.is_available(), cudnn.version(), torch._C._has_cudnn),
        "cuda": (torch.version.cuda, torch.backends.cuda.is_built(), torch._C._has_cuda),
        "pinned": torch.ones(2).is_pinned(),
        "supports bfloat16": torch.cuda.is_bf16_supported(),
        "meta path": list(sys.meta_path),
    }


@pytest.fixture
def untouched() -> Iterator[None]:
    """Names and state are the same after the test as before it."""
    for place in CHANGED:
        importlib.import_module(place)
    with simulated_cuda():  # what torch itself writes down at the first use of CUDA
        torch.ones(1, device="cuda") + 1
    gc.collect()
    before, seen = names(), state()
    yield
    gc.collect()
    after = names()
    assert {place for place in before.keys() ^ after.keys() if "cache" not in place[0]} == set()
    assert [place for place, value in before.items() if after[place] is not value] == []
    assert state() == seen
    assert not seen["available"]


def test_everything_is_given_back(untouched: None) -> None:
    for devices in (1, 3):
        with simulated_cuda("rtx-4090", devices=devices) as gpu:
            assert torch.cuda.is_available()
            assert torch.cuda.device_count() == gpu.devices == devices
            assert torch.accelerator.current_accelerator() == torch.device("cuda")
            assert simulated.current() is gpu
            (torch.ones(3, device="cuda", requires_grad=True) * 2).sum().backward()
            torch.cuda.synchronize()
        assert simulated.current() is None


def test_everything_is_given_back_after_a_raise(untouched: None) -> None:
    with pytest.raises(ZeroDivisionError), simulated_cuda():
        torch.cuda.set_device(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            raise ZeroDivisionError


def test_everything_is_given_back_where_entering_fails(untouched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_diffopt.accelerators.simulated import borrowing

    def fails(borrowed: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as changed:
        changed.setattr(borrowing, "_borrow_others", fails)
        with pytest.raises(ZeroDivisionError):
            simulated_cuda().__enter__()
    with simulated_cuda():
        assert torch.ones(1, device="cuda").item() == 1


def test_a_test_that_skips_without_a_gpu_goes_on_skipping() -> None:
    with simulated_cuda():
        assert torch.cuda.is_available()
    mark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    assert mark.args == (True,)
    with pytest.raises((AssertionError, RuntimeError), match=r"Torch not compiled with CUDA|Found no NVIDIA|CUDA"):
        torch.empty(2, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match=r"Torch not compiled with CUDA|Found no NVIDIA|CUDA"):
        torch.ones(2).cuda()


def left_bytes(device: int = 0) -> int:
    """What outlives other tests of this process."""
    gc.collect()
    with simulated_cuda(devices=2):
        torch.cuda.init()
        return torch.cuda.memory_allocated(device)


def test_each_entering_begins_anew() -> None:
    left = [left_bytes(0), left_bytes(1)]
    with simulated_cuda(memory="1GiB") as gpu:
        torch.manual_seed(5)
        torch.ones(100, device="cuda").cpu()
        gpu.set_memory_limit(100)
    with simulated_cuda("rtx-4090", devices=2) as gpu:
        torch.cuda.init()
        for index in range(2):
            assert torch.cuda.memory_allocated(index) == torch.cuda.max_memory_allocated(index) == left[index]
            assert set(gpu.transfer_stats(index).values()) == {0}
            assert gpu.kernel_count(index) == 0
        assert torch.cuda.current_device() == 0
        assert torch.cuda.get_device_properties(1).total_memory == gpu.memory_bytes > 20 * 2**30
        torch.empty(2**20, device="cuda")  # no limit


def test_a_gpu_has_the_memory_that_is_asked_for() -> None:
    left = left_bytes()
    for memory, expected in ((2**20, 2**20), ("2MiB", 2**21), ("1GiB", 2**30)):
        with simulated_cuda(memory=memory) as gpu:
            assert torch.cuda.get_device_properties(0).total_memory == gpu.memory_bytes == expected
            assert torch.cuda.mem_get_info() == (expected - left, expected)
            with pytest.raises(torch.cuda.OutOfMemoryError, match=r"^CUDA out of memory"):
                torch.empty(expected + 1, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(
    ("gpu", "capability", "bfloat16"),
    [("v100-16gb", (7, 0), False), ("t4", (7, 5), False), ("a100-80gb", (8, 0), True), ("rtx-5090", (12, 0), True)],
)
def test_a_gpu_is_the_one_that_is_named(gpu: str, capability: tuple[int, int], bfloat16: bool) -> None:
    from pytest_diffopt.accelerators.simulated.cards import properties_of

    properties = properties_of(gpu)
    with simulated_cuda(gpu):
        assert torch.cuda.get_device_name() == properties.name
        assert torch.cuda.get_device_properties(0).total_memory == properties.total_memory
        assert torch.cuda.get_device_capability() == capability
        assert torch.cuda.is_bf16_supported(including_emulation=False) is bfloat16
        assert torch.cuda.get_arch_list() == [f"sm_{capability[0]}{capability[1]}"]


# ------------------------------------------------------------------------------------------ what outlives the context


def test_a_tensor_that_outlives_its_gpu_is_freed_and_refused() -> None:
    left = left_bytes()
    with simulated_cuda():
        kept = torch.ones(1000, device="cuda")
        assert torch.cuda.memory_allocated() == left + 4000
    uses: list[Callable[[torch.Tensor], object]] = [
        lambda x: x + 1,
        lambda x: x.cpu(),
        lambda x: x[0].item(),
        lambda x: x.clone(),
        lambda x: x.fill_(2),
        lambda x: x.resize_(2000),
        lambda x: torch.ones(1000).copy_(x),
        lambda x: x.view(10, 100) @ x.view(100, 10),
        lambda x: torch.conv1d(x.view(1, 1, -1), x[:3].view(1, 1, 3)),
        repr,
    ]
    # a CUDA build without a GPU may ask for the driver first
    words = "PyTorch is not linked with support for cuda devices|CUDA driver version is insufficient"
    for use in uses:
        with pytest.raises(RuntimeError, match=words):
            use(kept)
    with simulated_cuda():
        torch.cuda.init()
        before = torch.cuda.memory_allocated()
        del kept
        gc.collect()
        assert before - torch.cuda.memory_allocated() == 4000
        assert torch.cuda.memory_allocated() == left


def test_threads_of_autograd_started_before_it_serve_it(run_alone: Callable[[str], str]) -> None:
    assert (
        run_alone("""
        w = torch.ones(3, requires_grad=True)
        (w * 2).sum().backward()  # the engine counts devices once, here
        with simulated_cuda(devices=2):
            for device in ("cuda:0", "cuda:1"):
                x = torch.ones(3, device=device, requires_grad=True)
                (x * 3).sum().backward()
                print(x.grad.tolist(), x.grad.device)
        """)
        == "[3.0, 3.0, 3.0] cuda:0\n[3.0, 3.0, 3.0] cuda:1\n"
    )


def test_an_import_alone_changes_nothing(run_alone: Callable[[str], str]) -> None:
    code = """
        print(sorted(name for name in sys.modules if name.startswith(("torch._inductor", "torch._dynamo"))) == before)
        print(torch.cuda.is_available(), torch.cuda.device_count(), torch._C._get_accelerator(), torch.version.cuda)
        print(hasattr(torch._C, "_cuda_getDeviceCount"), sys.meta_path == path)
        print([name for name in torch.ops.loaded_libraries])
        """
    builds = f"{torch.backends.cuda.is_built()}"
    assert run_alone(code) == f"True\nFalse 0 cpu {torch.version.cuda}\n{builds} True\n[]\n"


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="nobody else says what the host has left")
def test_a_gpu_that_is_larger_than_the_host_is_out_of_memory_before_the_host_is(
    run_alone: Callable[[str], str],
) -> None:
    program = """
import torch
from pytest_diffopt.accelerators.simulated import simulated_cuda

lines = dict(line.split(":") for line in open("/proc/meminfo"))
total = int(lines["MemTotal"].split()[0]) * 1024
with simulated_cuda("b200", memory=8 * total):
    try:
        torch.empty(2 * total, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        print(str(error).splitlines()[0])
    torch.cuda.empty_cache()
    print(torch.ones(3, device="cuda").sum().item(), torch.cuda.memory_allocated())
"""
    said, rest = run_alone(program).splitlines()[-2:]
    assert said.startswith("CUDA out of memory. Tried to allocate ")
    assert "is simulated: its memory lies on the host, which has " in said
    assert rest == "3.0 0"


def test_the_tables_of_bitsandbytes_go_with_the_gpu(run_alone: Callable[[str], str]) -> None:
    program = """
import bitsandbytes as bnb, torch
from pytest_diffopt.accelerators.simulated import simulated_cuda

def quantize(device):
    return bnb.functional.quantize_4bit(torch.ones(4096, device=device), quant_type="nf4", compress_statistics=True)[0]

with simulated_cuda("rtx-4090"):
    inside = quantize("cuda").cpu()
print(torch.equal(inside, quantize("cpu")))
"""
    assert run_alone(program).split()[-1] == "True"


def test_torch_says_after_it_what_it_says_in_a_fresh_process(run_alone: Callable[[str], str]) -> None:
    use = """
        with simulated_cuda():
            torch.nn.Linear(4, 4).cuda()(torch.ones(2, 4).cuda()).sum().backward()
            torch.ones(2).pin_memory()
            torch.manual_seed(1)
            torch.cuda.Stream(), torch.cuda.synchronize(), torch.cuda.get_device_properties(0)
        """
    ask = """
        for name, ask in {
            "empty": lambda: torch.empty(2, device="cuda"),
            "to": lambda: torch.ones(2).to("cuda"),
            "cuda": lambda: torch.ones(2).cuda(),
            "pinned": lambda: torch.ones(2).pin_memory(),
            "generator": lambda: torch.Generator("cuda"),
            "stream": lambda: torch.cuda.Stream(),
            "generic stream": lambda: torch.Stream("cuda"),
            "current": lambda: torch.cuda.current_device(),
            "properties": lambda: torch.cuda.get_device_properties(0),
            "memory": lambda: torch.cuda.memory_allocated(),
            "synchronize": lambda: torch.cuda.synchronize(),
            "there": lambda: (torch.cuda.is_available(), torch.cuda.is_initialized(), torch.accelerator.is_available()),
            "built": lambda: (torch.backends.cudnn.version(), torch.backends.cuda.is_built(), torch.version.cuda),
        }.items():
            try:
                print(name, ask())
            except Exception as error:
                print(name, type(error).__name__, error)
        """
    fresh = run_alone(ask)
    assert fresh.count("\n") >= 13
    assert run_alone(use.rstrip() + ask) == fresh


@pytest.fixture
def run_alone(fresh_python: None) -> Callable[[str], str]:
    """Runs code in a process of its own, and returns what it printed."""
    head = (
        "import os, sys, torch\npath = list(sys.meta_path)\n"
        "before = sorted(name for name in sys.modules if name.startswith(('torch._inductor', 'torch._dynamo')))\n"
        "from pytest_diffopt.accelerators.simulated import simulated_cuda\n"
    )

    def run(code: str) -> str:
        lines = code.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        text = head + "\n".join(line[indent:] for line in lines)
        ran = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


# ------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"gpu": "rtx-4091"}, DiffoptError, "rtx-4091"),
        ({"gpu": ""}, DiffoptError, "''|no"),
        ({"devices": 0}, ValueError, "devices: found 0; it takes 1 to 16"),
        ({"devices": 17}, ValueError, "devices: found 17; it takes 1 to 16"),
        ({"devices": -1}, ValueError, "devices: found -1; it takes 1 to 16"),
        ({"devices": True}, ValueError, "devices: found True; it takes 1 to 16"),
        ({"devices": "2"}, ValueError, "devices: found '2'; it takes 1 to 16"),
        ({"devices": 1.0}, ValueError, r"devices: found 1\.0; it takes 1 to 16"),
        ({"memory": 0}, ValueError, "memory: found 0; "),
        ({"memory": "0"}, ValueError, "'0'"),
        ({"memory": -5}, ValueError, "memory: found -5; "),
        ({"memory": "-1GiB"}, ValueError, "'-1GiB'"),
        ({"memory": "12 apples"}, ValueError, "'12 apples'"),
        ({"memory": ""}, ValueError, "''"),
        ({"memory": True}, (ValueError, TypeError), "True"),
    ],
)
def test_an_argument_that_is_none_is_named(arguments: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        simulated_cuda(**arguments)


def test_a_second_gpu_is_refused_while_one_is_in_use() -> None:
    said = r"A simulated GPU is in use already \(NVIDIA GeForce RTX 4090\), in this thread or another"
    with simulated_cuda("rtx-4090"):
        with pytest.raises(UnverifiableError, match=said):
            simulated_cuda("rtx-4090").__enter__()
        found: list[BaseException] = []

        def enter() -> None:
            try:
                simulated_cuda("rtx-4090").__enter__()
            except UnverifiableError as error:
                found.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert "in this thread or another" in str(found[0])
        assert torch.ones(2, device="cuda").sum().item() == 2  # and this one is as it was


def test_one_object_is_entered_again_after_it_was_left_and_not_before() -> None:
    context = simulated_cuda()
    with context, pytest.raises(UnverifiableError, match="in use already"):
        context.__enter__()
    with context:
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()


def test_leaving_what_was_not_entered_does_nothing(untouched: None) -> None:
    simulated_cuda().__exit__(None, None, None)
    with simulated_cuda():
        simulated_cuda().__exit__(None, None, None)
        assert torch.cuda.is_available()
        assert simulated.current() is not None


def test_a_real_gpu_that_was_used_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UnverifiableError, match="A real GPU was used in this process"):
        simulated_cuda().__enter__()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_told_to_be_spawned(run_alone: Callable[[str], str]) -> None:
    code = """
        def child():
            for attempt in (lambda: torch.ones(2, device="cuda"), lambda: simulated_cuda().__enter__()):
                try:
                    attempt()
                except Exception as error:
                    print(type(error).__name__, str(error).splitlines()[0][:60], flush=True)
        with simulated_cuda():
            torch.ones(2, device="cuda")
            if not os.fork():
                child()
                os._exit(0)
            os.wait()
        """
    lines = run_alone(code).splitlines()
    assert lines[0].startswith("RuntimeError Cannot re-initialize CUDA in forked subprocess")
    assert lines[1].startswith("UnverifiableError This process was forked while a simulated GPU was in use")


def test_what_a_gpu_has_not_is_named() -> None:
    with (
        simulated_cuda() as gpu,
        pytest.raises(AttributeError, match="A simulated GPU has no 'transfers'; it has "),
    ):
        gpu.transfers  # noqa: B018


# ------------------------------------------------------------------------------------------- every name of a CUDA build


def test_every_name_of_a_cuda_build_that_torch_asks_for_is_there_or_refused_by_its_name() -> None:
    import re
    from pathlib import Path

    root = Path(torch.__file__).parent
    asked: set[str] = set()
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        asked.update(re.findall(r"torch\._C\.(_cuda_\w+|_Cuda\w+|_CUDA\w+)", text))
        for block in re.findall(r"from torch\._C import \(([^)]*)\)|from torch\._C import ([^(\n]+)", text):
            asked.update(re.findall(r"\b(_cuda_\w+|_Cuda\w+|_CUDA\w+)", " ".join(block)))
    assert len(asked) > 60
    with simulated_cuda():
        assert sorted(name for name in asked if not hasattr(torch._C, name)) == []
        refused = 0
        for name in asked:
            value = getattr(torch._C, name)
            if getattr(value, "__name__", "") != name or isinstance(value, type):
                continue
            with pytest.raises(NotImplementedError, match=f"The simulated GPU has no torch._C.{name}"):
                value()
            refused += 1
    assert refused > 5
