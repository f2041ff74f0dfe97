"""``--diffopt-gpu``: a whole session on a simulated GPU, and the processes that it starts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from pytest_diffopt.accelerators.whole_process import DEVICES, GPU, MEMORY
from tests.warm_python import INTERPRETER

if TYPE_CHECKING:
    from conftest import RunPytest

GPU_LINE = (
    "SIMULATED GPU: NVIDIA GeForce RTX 4090, 23.43 GiB. No GPU is used: the CPU computes, and times are the CPU's."
)

SUITE = """
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing
from seen import AT_IMPORT

CHILD = "import torch; print(torch.cuda.is_available() and torch.cuda.get_device_name())"

def test_of_the_cpu():
    assert torch.ones(3).sum() == 3

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOfCuda:
    def test_conftest_saw_it(self):
        assert AT_IMPORT

    def test_memory(self):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer = torch.nn.Linear(256, 256).to("cuda")
        assert torch.cuda.max_memory_allocated() - before >= 257 * 256 * 4
        assert layer(torch.ones(2, 256, device="cuda")).is_cuda

    def test_memory_has_an_end(self):
        with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(24 * 2**30, dtype=torch.uint8, device="cuda")

    def test_child_processes(self):
        ran = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == torch.cuda.get_device_name()

    def test_a_second_one(self):
        from pytest_diffopt.accelerators.simulated import simulated_cuda

        with pytest.raises(Exception, match="A simulated GPU is in use already"), simulated_cuda("rtx-4090"):
            pass
"""


@pytest.fixture(autouse=True)
def _on_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (GPU, DEVICES, MEMORY):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _a_process_of_its_own(fresh_python: None) -> None:
    """A process that is forked from one that has torch imported it on no GPU."""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(
        seen="AT_IMPORT = []", conftest="import seen, torch\nif torch.cuda.is_available(): seen.AT_IMPORT.append(1)"
    )
    pytester.makepyfile(test_cuda=SUITE)
    return pytester


@pytest.mark.usefixtures("entry_point_of_torch")
def test_a_suite_for_cuda_skips_without_the_option_and_runs_with_it(
    suite: pytest.Pytester, run_pytest: RunPytest
) -> None:
    without = run_pytest()
    assert without.parseoutcomes() == {"passed": 1, "skipped": 5}
    without.stdout.no_fnmatch_line("*SIMULATED*")

    result = run_pytest("--diffopt-gpu=rtx-4090", "--junitxml=junit.xml")
    assert result.parseoutcomes() == {"passed": 6}
    result.stdout.fnmatch_lines([GPU_LINE, "ran on a SIMULATED GPU: NVIDIA GeForce RTX 4090, 23.43 GiB"])
    properties = ElementTree.parse(suite.path / "junit.xml").iterfind("testsuite/properties/property")
    assert {one.get("name"): one.get("value") for one in properties} == {
        "diffopt_simulated_gpu": "NVIDIA GeForce RTX 4090, 23.43 GiB"
    }


def test_recipes_and_fixtures_use_the_gpu_of_the_session_and_reports_call_it_simulated(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    pytester.makepyfile(
        models="""
        import torch

        def net(): return torch.nn.Sequential(torch.nn.Linear(64, 64))
        def inputs(): return {"input": torch.ones(2, 64)}
        """,
        test_own="""
        import torch
        from pytest_diffopt import max_memory, requires_gpu

        @requires_gpu(simulated=True, min_memory="2GiB")
        @max_memory("20KiB")
        def test_ours(accelerator):
            assert (accelerator.kind, torch.cuda.device_count()) == ("sim", 1)
            torch.nn.Linear(64, 64, device=accelerator.device)

        @requires_gpu
        def test_of_a_real_gpu(): pass
        """,
    )
    pytester.makefile(
        ".recipes.toml",
        net='[recipe.net]\npipeline = "models:net"\ncall = { inputs = "models:inputs" }\ncontract = { max_memory = "1MiB" }\n',
    )
    result = run_pytest("--diffopt-gpu=t4", "--diffopt-gpu-memory=2GiB", "--diffopt-report=report.json", "-rs")
    outcomes = result.parseoutcomes()
    assert (outcomes["skipped"], outcomes.get("failed")) == (1, None), result.stdout.str()
    run = json.loads((pytester.path / "report.json").read_text(encoding="utf-8"))
    assert [(one["accelerator"], one["device"]) for one in run["accelerators"]] == [("sim", "simulated Tesla T4")]
    refused = run_pytest("--diffopt-gpu=t4", "--diffopt-device=cuda", "net.recipes.toml")
    refused.stdout.fnmatch_lines(
        ["*device: found 'cuda', which this machine does not have; here it takes: auto, sim, cpu*"]
    )


@pytest.mark.usefixtures("entry_point_of_torch")
def test_workers_of_xdist_are_on_the_gpu_of_the_ini_file(suite: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytest.importorskip("xdist")
    suite.makeini("[pytest]\ndiffopt_gpu = RTX 4090\n")
    result = run_pytest("-n", "1")
    assert result.parseoutcomes() == {"passed": 6}
    result.stdout.fnmatch_lines([GPU_LINE])


def test_the_command_line_wins_over_the_environment_and_that_over_the_ini_file(
    pytester: pytest.Pytester, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\ndiffopt_gpu = t4\ndiffopt_gpu_memory = 1GiB\ndiffopt_gpu_devices = 4\n")
    pytester.makepyfile(
        """
        import os, torch

        def test_it():
            assert torch.cuda.device_count() == 2
            assert torch.cuda.get_device_properties(1).total_memory == 3 * 2**30
            assert os.environ["DIFFOPT_GPU"] == "rtx-4090"
            assert os.environ["DIFFOPT_GPU_DEVICES"] == "2"
            assert os.environ["DIFFOPT_GPU_MEMORY"] == str(3 * 2**30)
        """
    )
    monkeypatch.setenv(GPU, "rtx-4090")
    monkeypatch.setenv(DEVICES, "3")
    monkeypatch.setenv(MEMORY, "3GiB")
    result = run_pytest("--diffopt-gpu-devices=2")
    assert result.parseoutcomes() == {"passed": 1}
    result.stdout.fnmatch_lines(["SIMULATED GPU: 2 × NVIDIA GeForce RTX 4090, 3.00 GiB each. *"])


@pytest.mark.usefixtures("entry_point_of_torch")
def test_an_empty_name_is_none_for_child_processes_too(
    pytester: pytest.Pytester, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("import torch\n\ndef test_it(): assert not torch.cuda.is_available()")
    monkeypatch.setenv(GPU, "rtx-4090")
    assert run_pytest("--diffopt-gpu=").parseoutcomes() == {"passed": 1}


@pytest.mark.usefixtures("entry_point_of_torch")
def test_it_is_given_back_after_the_session_and_after_a_usage_error(
    pytester: pytest.Pytester, plugin_arguments: tuple[str, ...], run_pytest: RunPytest
) -> None:
    pytester.makepyfile(test_it="import torch\n\ndef test_it(): assert torch.cuda.is_available()")
    program = pytester.makepyfile(
        program=f"""
        import os

        import pytest
        import torch

        plugin = {list(plugin_arguments)!r}
        assert pytest.main([*plugin, "-W", "error", "--diffopt-gpu=rtx-4090", "test_it.py"]) == 0
        assert pytest.main([*plugin, "--diffopt-gpu=rtx-4090", "--no-such-option"]) == 4
        assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
        assert not [name for name in os.environ if name.startswith("DIFFOPT_GPU")]
        with pytest.raises((RuntimeError, AssertionError)):
            torch.ones(1, device="cuda")
        """
    )
    ran = pytester.run(INTERPRETER, program)
    assert ran.ret == 0, ran.stderr.str()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diffopt-gpu=rtx-4091"], "ERROR: --diffopt-gpu: No card is called 'rtx-4091'. Did you mean 'rtx-4090'? *"),
        (
            ["--diffopt-gpu=rtx-4090", "--diffopt-gpu-devices=17"],
            "ERROR: --diffopt-gpu-devices: found '17'; it takes a whole number from 1 to 16",
        ),
        (
            ["--diffopt-gpu=rtx-4090", "--diffopt-gpu-memory=0"],
            "ERROR: --diffopt-gpu-memory: found '0'; it takes a size, e.g. 12GiB, or bytes",
        ),
        (
            ["--diffopt-gpu-memory=1GiB"],
            "ERROR: --diffopt-gpu-memory needs a GPU; name one, e.g. --diffopt-gpu=rtx-4090",
        ),
    ],
)
def test_a_wrong_option_is_a_usage_error_before_anything_is_imported(
    pytester: pytest.Pytester, run_pytest: RunPytest, arguments: list[str], message: str
) -> None:
    pytester.makeconftest("raise Exception('conftest was imported')")
    result = run_pytest(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    result.stderr.no_fnmatch_line("*conftest was imported*")


def run_with(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, code: str, **variables: str
) -> pytest.RunResult:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return pytester.run(INTERPRETER, "-c", code)


@pytest.mark.usefixtures("entry_point_of_torch")
def test_a_process_with_the_variables_is_on_the_gpu_from_the_import_of_torch_on(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import torch; print(torch.ones(2, device='cuda:1').device, torch.cuda.mem_get_info()[1])"
    ran = run_with(pytester, monkeypatch, code, **{GPU: "rtx-4090", DEVICES: "2", MEMORY: "2GiB"})
    assert ran.outlines == [f"cuda:1 {2 * 2**30}"]
    assert (ran.ret, ran.errlines) == (0, [])


@pytest.mark.usefixtures("entry_point_of_torch")
def test_a_process_without_them_imports_nothing_for_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, torch; print(sorted(m for m in sys.modules if m.startswith('pytest')), torch.cuda.is_available())"
    )
    assert run_with(pytester, monkeypatch, code).outlines == ["['pytest_diffopt', 'pytest_diffopt.autoload'] False"]


@pytest.mark.usefixtures("entry_point_of_torch")
@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({GPU: "rtx-4091"}, "DIFFOPT_GPU: No card is called 'rtx-4091'. Did you mean 'rtx-4090'? *"),
        ({GPU: "t4", DEVICES: "two"}, "DIFFOPT_GPU_DEVICES: found 'two'; it takes a whole number from 1 on"),
        ({GPU: "t4", MEMORY: "12 gigs"}, "DIFFOPT_GPU_MEMORY: found '12 gigs'; *"),
    ],
)
def test_a_mistake_in_them_ends_the_process_with_a_sentence(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    code = "try:\n    import torch\nexcept Exception: print('hidden')"
    ran = run_with(pytester, monkeypatch, code, **variables)
    assert (ran.ret, ran.outlines, len(ran.errlines)) == (2, [], 1)
    ran.stderr.fnmatch_lines([sentence])


@pytest.mark.usefixtures("entry_point_of_torch")
def test_processes_that_torch_spawns_have_it_as_torchs_own_start_of_several_processes_has(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = pytester.makepyfile(
        """
        import torch
        import torch.multiprocessing

        def child(index):
            torch.cuda.set_device(index)
            print("child", torch.ones(1, device="cuda").device, flush=True)

        if __name__ == "__main__":
            torch.multiprocessing.spawn(child, nprocs=2)
        """
    )
    monkeypatch.setenv(GPU, "rtx-4090")
    monkeypatch.setenv(DEVICES, "2")
    ran = pytester.run(INTERPRETER, script)
    assert sorted(ran.outlines) == ["child cuda:0", "child cuda:1"], ran.stderr.str()
