"""``diffopt run``: a program runs as python runs it, and what it took of the simulated GPU is said at its end."""

from __future__ import annotations

import json
import textwrap

import pytest

from pytest_diffopt.accelerators.whole_process import DEVICES, GPU, MEMORY
from tests.warm_python import INTERPRETER

MIB = 2**20


@pytest.fixture(autouse=True)
def _on_none(monkeypatch: pytest.MonkeyPatch, entry_point_of_torch: None) -> None:
    for name in (GPU, DEVICES, MEMORY):
        monkeypatch.delenv(name, raising=False)


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    return pytester.run(INTERPRETER, "-m", "pytest_diffopt", "run", "--gpu", "rtx-4090", *words)


def written(pytester: pytest.Pytester, name: str, text: str) -> str:
    path = pytester.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return name


WHO_AM_I = """
import sys
class Here: pass
main = sys.modules["__main__"]
print(__name__, __file__, main.__dict__ is globals(), Here.__module__, __package__, __spec__ and __spec__.name)
print(sys.argv, sys.path[0], type(__loader__).__name__, __doc__, __builtins__.__name__)
"""

ENDS = {
    "a status": "import sys\nsys.exit(7)",
    "words": "import sys\nsys.exit('no weights')",
    "an exception": "def inner():\n    raise ValueError('1') from KeyError('2')\n\ninner()",
    "a mistake in it": "print('not reached')\nif\n",
    "its own hook": "import sys\nsys.excepthook = lambda *given: print('hook', given[0])\n1 / 0",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
}


def test_a_script_is_main_as_python_has_it_and_so_is_a_module(pytester: pytest.Pytester) -> None:
    written(pytester, "tool/__init__.py", "")
    for words in (["scripts/who.py", "--json", "x"], ["-m", "tool", "--gpu"]):
        written(pytester, words[0] if words[0] != "-m" else "tool/__main__.py", WHO_AM_I)
        expected = pytester.run(INTERPRETER, *words)
        found = run(pytester, *words)
        assert (found.ret, found.outlines) == (expected.ret, expected.outlines) == (0, expected.outlines)
        assert len(expected.outlines) == 2
        assert found.errlines[0].startswith("diffopt run: ")


@pytest.mark.parametrize("how", ENDS)
def test_it_ends_as_python_ends(pytester: pytest.Pytester, how: str) -> None:
    script = written(pytester, "ends.py", ENDS[how])
    expected = pytester.run(INTERPRETER, script)
    found = run(pytester, script)
    assert (found.ret, found.outlines) == (expected.ret, expected.outlines)
    assert found.errlines[: len(expected.errlines)] == expected.errlines
    assert found.errlines[len(expected.errlines)].startswith("diffopt run: ")


def test_what_it_took_is_said_and_written(pytester: pytest.Pytester) -> None:
    script = written(
        pytester,
        "program.py",
        """
        import os
        import subprocess
        import sys
        import threading

        import torch

        MIB = 2**20
        high = torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
        del high
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        data = torch.zeros(2 * MIB, dtype=torch.uint8).to("cuda")
        torch.cuda.reset_accumulated_memory_stats()
        back = data.cpu()
        try:
            torch.empty(30 * 2**30, dtype=torch.uint8, device="cuda:1")
        except torch.cuda.OutOfMemoryError:
            print("caught")
        threading.Thread(target=lambda: torch.empty(20 * MIB, dtype=torch.uint8, device="cuda:1")).start()
        child = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory)"
        subprocess.run([sys.executable, "-c", child], check=True)
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        os.chdir("/")
        """,
    )
    found = run(pytester, "--devices", "2", "--memory", "1GiB", "--json", "took.json", script, "an argument")
    assert (found.ret, found.outlines) == (0, ["caught", f"2 {2**30}"]), found.stderr.str()
    assert found.errlines[:6] == [
        "diffopt run: NVIDIA GeForce RTX 4090, 1.00 GiB, SIMULATED: no GPU was used",
        "  GPU 0: peak memory: 300.00 MiB allocated, 300.00 MiB reserved",
        "  GPU 0: transfers: 2.00 MiB to the GPU in 1 copy, 2.00 MiB to the host in 1 copy, 0 B on the GPU in 0 copies",
        found.errlines[3],
        "  GPU 1: peak memory: 20.00 MiB allocated, 20.00 MiB reserved",
        "  GPU 1: transfers: 0 B to the GPU in 0 copies, 0 B to the host in 0 copies, 0 B on the GPU in 0 copies",
    ]
    assert "  GPU 1: out of memory: 1 time" in found.errlines
    data = json.loads((pytester.path / "took.json").read_text(encoding="utf-8"))
    assert (data["schema_version"], data["simulated"], data["program"]) == (1, True, [script, "an argument"])
    assert (data["gpu"], data["memory_bytes"], data["exit_status"]) == ("NVIDIA GeForce RTX 4090", 2**30, 0)
    assert [device["peak_allocated_bytes"] for device in data["devices"]] == [300 * MIB, 20 * MIB]
    assert [device["out_of_memory"] for device in data["devices"]] == [0, 1]
    assert data["out_of_memory"] is None
    syncs = [(sync["operation"], sync["count"], sync["place"]) for sync in data["syncs"]]
    assert ("aten::copy_ to the host", 1, f"{script}:16, in <module>") in syncs
    assert f"  host syncs: {sum(count for _, count, _ in syncs)}" in found.errlines


def test_out_of_memory_names_whose_memory_it_was(pytester: pytest.Pytester) -> None:
    script = written(
        pytester,
        "program.py",
        """
        import torch
        from pytest_diffopt.accelerators import simulated

        class Denoiser(torch.nn.Sequential):
            pass

        def denoise():
            model = Denoiser(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 1024)).to("cuda")
            x = torch.ones(1024, 1024, device="cuda")
            for _ in range(50_000):  # what comes and goes is forgotten
                torch.empty(1, device="cuda")
            assert len(simulated.recorded_memory_events()) < 80_000
            kept = []
            while True:
                kept.append(model(x))

        denoise()
        """,
    )
    found = run(pytester, "--memory", "64MiB", "--json", "took.json", script)
    assert found.ret == 1
    found.stderr.fnmatch_lines(
        ["torch.OutOfMemoryError: CUDA out of memory. *", "  it ended out of memory; GPU 0 held:"]
    )
    out_of_memory = json.loads((pytester.path / "took.json").read_text(encoding="utf-8"))["out_of_memory"]
    held = {(owner["kind"], owner["name"]): owner["bytes"] for owner in out_of_memory["owners"]}
    assert held["weights", "Denoiser"] == 2 * (1024 + 1) * 1024 * 4
    assert held["operation", "aten::addmm"] >= 40 * MIB
    assert out_of_memory["message"].startswith("CUDA out of memory. Tried to allocate")
    assert out_of_memory["device"] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing.py"], "*run: error: argument PROGRAM: 'nothing.py' cannot be read: No such file or directory"),
        (["-m", "nothing.at.all"], "*run: error: argument -m: 'nothing.at.all' cannot be found: *"),
        (["--devices", "17", "a.py"], "*run: error: devices: found 17; it takes 1 to 16"),
    ],
)
def test_what_cannot_be_run_is_a_wrong_argument(pytester: pytest.Pytester, words: list[str], sentence: str) -> None:
    found = run(pytester, *words)
    assert (found.ret, found.outlines) == (2, [])
    found.stderr.fnmatch_lines([sentence])
    found.stderr.no_fnmatch_line("*SIMULATED*")
