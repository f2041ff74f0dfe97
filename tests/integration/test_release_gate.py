"""The release gate on real runs: recorded, compared, closed where something is worse, better, missing or left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

RunPytest = Callable[..., pytest.RunResult]

MODELS = """
import os, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        if "fat" in os.environ.get("FAULT", ""):
            self.spare = torch.nn.Parameter(torch.zeros(50_000))

    def forward(self, x):
        x = self.first(x).relu()
        if "breaks" in os.environ.get("FAULT", ""):
            torch._dynamo.graph_break()
        if "waste" in os.environ.get("FAULT", ""):
            x = x + x.new_ones(100, 2, 64).sum(0) * 0
        return self.second(x)

def inputs(call):
    return {"x": torch.ones(2, 64) * (call + 1)}
"""
RECIPES = """
[recipe.compiled]
pipeline = "models:Net"
compilation = { component = "model", backend = "eager" }
call = { inputs = "models:inputs" }
contract = { allowed_break_files = ["models.py"] }

[recipe.nf4]
pipeline = "models:Net"
quantization = { backend = "bitsandbytes_4bit", components = ["model"] }
call = { inputs = "models:inputs" }
"""


@pytest.fixture
def gate(
    pytester: pytest.Pytester, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """Run two recipes against the baselines in ``base``; ``fault`` is one of the model."""
    pytester.makepyfile(models=MODELS)
    pytester.makefile(".recipes.toml", r=RECIPES)
    pytester.makeini("[pytest]\npythonpath = .")

    def run(*arguments: str, fault: str = "") -> pytest.RunResult:
        monkeypatch.setenv("FAULT", fault)
        return run_pytest("-p", "no:cacheprovider", "--diffopt-baseline=base", *arguments)

    return run


UPDATE = "--diffopt-update-baseline"
STRICT = "--diffopt-strict"


def last_lines(result: pytest.RunResult) -> list[str]:
    return result.outlines[-3:]


def test_a_gate_opens_on_what_was_recorded_and_closes_on_what_is_worse_or_better(
    gate: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    recorded = gate(UPDATE, fault="fat")
    assert recorded.ret == 0
    assert "baseline: 2 recipes recorded in base: 2 new" in recorded.outlines
    files = sorted(path.relative_to(pytester.path).as_posix() for path in pytester.path.glob("base/**/*"))
    assert files == ["base/r", "base/r/compiled.json", "base/r/nf4.json"]

    same = gate(STRICT, fault="fat")
    assert same.ret == 0
    assert same.outlines[-2].startswith("GATE PASSED: ")
    assert "11 verdicts of 2 recipes passed" in same.outlines[-2]

    better = gate(fault="")
    assert better.ret == 1
    better.stdout.fnmatch_lines(["*better: bytes of model: 227.81 KiB recorded, 32.50 KiB now*"])
    better.stdout.fnmatch_lines(
        ["*if this is meant, record it: pytest r.recipes.toml::compiled --diffopt-baseline=base*"]
    )
    assert better.outlines[-2].startswith("GATE FAILED: 2 failed; ")

    worse = gate("-n", "2", fault="fat breaks waste")
    assert worse.ret == 1
    worse.stdout.fnmatch_lines(
        ["*worse: graph breaks in model at * models.py (Call to `torch._dynamo.graph_break()`): 0 recorded, 1*"]
    )
    worse.stdout.fnmatch_lines(["*worse: peak of a call: * recorded, * now"])


def test_what_was_left_out_damaged_or_renamed_closes_the_gate(
    gate: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    missing = pytester.mkdir("base")
    unverified = gate()
    assert unverified.ret == 0
    assert "2 unverified" in unverified.outlines[-2]
    assert unverified.outlines[-2].startswith("NOT A GATE (no --diffopt-strict): ")
    assert gate(STRICT).ret == 1

    assert gate(UPDATE, "-n", "2").ret == 0
    left_out = gate(STRICT, "-k", "parity or baseline")
    assert left_out.ret == 1
    assert left_out.outlines[-2] == "GATE FAILED: 7 checks left out; 4 verdicts of 2 recipes passed"
    by_node_id = gate(STRICT, "-n", "1", "r.recipes.toml::nf4")
    assert by_node_id.ret == 1
    assert by_node_id.outlines[-2].startswith("GATE FAILED: 6 checks left out; ")

    damaged = missing / "r" / "nf4.json"
    damaged.write_text(damaged.read_text(encoding="utf-8").replace('"weight_bytes"', '"weight"'), encoding="utf-8")
    recipes = pytester.path / "r.recipes.toml"
    recipes.write_text(RECIPES.replace("recipe.compiled", "recipe.renamed"), encoding="utf-8")
    closed = gate()
    assert closed.ret == 1
    closed.stdout.fnmatch_lines(
        [
            "*there is no baseline base/r/renamed.json*",
            "*baseline: base/r/compiled.json: r.recipes.toml has no recipe compiled any more; delete the file*",
            "GATE FAILED: 1 failed, 1 problem with baselines; *",
        ]
    )
    closed.stdout.fnmatch_lines(
        ["*base/r/nf4.json: it is damaged: *", "*restore it from version control, or delete it*"]
    )

    before = damaged.read_bytes()
    moved = gate(UPDATE)
    assert moved.ret == 1  # what is damaged stays, and says so
    assert "baseline: 1 recipe recorded in base: 1 moved" in moved.outlines
    assert damaged.read_bytes() == before
    assert sorted(path.name for path in damaged.parent.iterdir()) == ["nf4.json", "renamed.json"]


def test_a_recipe_file_that_is_not_run_closes_a_strict_gate_and_a_mark_makes_nothing_known_that_passes(
    gate: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    pytester.mkdir("more")
    other = RECIPES.partition("[recipe.nf4]")[0].replace("recipe.compiled", "recipe.other")
    pytester.path.joinpath("more", "m.recipes.toml").write_text(other, encoding="utf-8")
    assert gate(UPDATE).ret == 0
    part = gate("--ignore=more")
    assert (part.ret, part.outlines[-2]) == (0, "NOT A GATE (no --diffopt-strict): 11 verdicts of 2 recipes passed")
    strict = gate(STRICT, "--ignore=more", "-n", "2")
    assert strict.ret == 1
    assert last_lines(strict)[:2] == [
        "baseline: base/more/m/other.json: its recipe file more/m.recipes.toml was no part of the run",
        "GATE FAILED: 1 problem with baselines; 11 verdicts of 2 recipes passed",
    ]
    pytester.path.joinpath("base", "r", "nf4.json").unlink()
    pytester.makeconftest(
        "import pytest\n"
        "def pytest_collection_modifyitems(items):\n"
        "    for item in items:\n"
        "        item.add_marker(pytest.mark.xfail(reason='whatever'))\n"
    )
    marked = gate(STRICT, "--ignore=more", fault="breaks")
    assert marked.ret == 1
    assert marked.outlines[-2].startswith(
        "GATE FAILED: 1 unverified, 1 problem with baselines; 9 verdicts of 2 recipes"
    )


def test_a_recipe_that_fails_is_not_recorded_and_a_full_disk_leaves_what_was_there(
    gate: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    assert gate(UPDATE, "-k", "nf4").ret == 0
    before = (pytester.path / "base/r/nf4.json").read_bytes()
    recipes = pytester.path / "r.recipes.toml"
    recipes.write_text(RECIPES.replace('contract = { allowed_break_files = ["models.py"] }', ""), encoding="utf-8")
    pytester.makeconftest(
        "import errno, os\nfull = OSError(errno.ENOSPC, 'No space left on device')\n"
        "def fsync(_):\n    raise full\nos.fsync = fsync\n"
    )
    result = gate(UPDATE, fault="breaks fat")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "baseline: compiled is not recorded: its graph_breaks failed",
            "baseline: nf4 is not recorded: No space left on device; what was there stands",
        ]
    )
    assert [path.name for path in (pytester.path / "base" / "r").iterdir()] == ["nf4.json"]
    assert (pytester.path / "base/r/nf4.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--diffopt-baseline=models.py"], "--diffopt-baseline: found 'models.py'; that is a file; it takes a folder"),
        (
            ["--diffopt-baseline=models.py/in", UPDATE],
            "--diffopt-baseline: found 'models.py/in'; *models.py is a file; it takes a folder",
        ),
        (
            ["--diffopt-baseline=nowhere"],
            "--diffopt-baseline: found 'nowhere'; there is no such folder; --diffopt-update-baseline beside it makes",
        ),
        ([UPDATE], "--diffopt-update-baseline: it takes --diffopt-baseline=DIR beside it, the folder to write"),
        (["-o", "diffopt_update_baseline=perhaps"], "diffopt_update_baseline: *perhaps*; it takes true or false"),
    ],
)
def test_wrong_options_are_said_before_the_run(
    pytester: pytest.Pytester, run_pytest: RunPytest, arguments: list[str], told: str
) -> None:
    pytester.makepyfile(models=MODELS)
    pytester.makefile(".recipes.toml", r=RECIPES)
    result = run_pytest("-p", "no:cacheprovider", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{told}*"])
    assert not (pytester.path / "nowhere").exists()


def test_a_baseline_in_an_ini_file_is_beside_it_wherever_pytest_is_started(
    pytester: pytest.Pytester, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\ndiffopt_baseline = base\npythonpath = .")
    pytester.makepyfile(models=MODELS)
    pytester.makefile(".recipes.toml", r=RECIPES)
    elsewhere = pytester.mkdir("elsewhere")
    monkeypatch.chdir(elsewhere)
    result = run_pytest("-p", "no:cacheprovider", "-k", "nf4", UPDATE, "..")
    assert result.ret == 0, result.stdout.str()
    assert (pytester.path / "base" / "r" / "nf4.json").is_file()
    assert list(elsewhere.iterdir()) == []


def test_a_run_that_is_no_gate_says_nothing_of_one(pytester: pytest.Pytester, run_pytest: RunPytest) -> None:
    pytester.makepyfile(test_a="def test_a(): pass")
    assert "GATE" not in run_pytest("-p", "no:cacheprovider").stdout.str()
    passed = run_pytest("-p", "no:cacheprovider", STRICT)
    assert passed.outlines[-2].startswith("GATE PASSED")
    assert passed.ret == 0
    nothing = run_pytest("-p", "no:cacheprovider", STRICT, "-k", "nothing")
    assert nothing.outlines[-2].startswith("GATE FAILED: nothing ran")
    assert "GATE" not in run_pytest("-p", "no:cacheprovider", STRICT, "--collect-only").stdout.str()
    pytester.makepyfile(test_b="def test_b(): assert False", test_c="import nothing_of_that_name")
    failed = run_pytest("-p", "no:cacheprovider", STRICT, "--continue-on-collection-errors")
    assert failed.outlines[-2].startswith("GATE FAILED: 2 other tests failed")


def test_killed_while_it_records_what_was_recorded_stands(
    gate: Callable[..., pytest.RunResult], pytester: pytest.Pytester, plugin_arguments: tuple[str, ...]
) -> None:
    assert gate(UPDATE, "-k", "nf4").ret == 0
    path = pytester.path / "base" / "r" / "nf4.json"
    before = path.read_bytes()
    # the change is on its way to the disk when the process dies
    pytester.makeconftest(
        "import os, signal\n_fsync = os.fsync\ndef fsync(descriptor):\n    _fsync(descriptor)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\nos.fsync = fsync\n"
    )
    environment = {**os.environ, "FAULT": "fat"}
    killed = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *plugin_arguments,
            "-p",
            "no:cacheprovider",
            "-k",
            "nf4",
            UPDATE,
            "--diffopt-baseline=base",
        ],
        cwd=pytester.path,
        env=environment,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    (pytester.path / "conftest.py").unlink()
    assert gate("-k", "nf4").ret == 0  # what the killed run left beside is no baseline


def test_two_runs_that_record_at_once_lose_nothing(
    gate: Callable[..., pytest.RunResult], pytester: pytest.Pytester, plugin_arguments: tuple[str, ...]
) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        *plugin_arguments,
        "-p",
        "no:cacheprovider",
        UPDATE,
        "--diffopt-baseline=base",
    ]
    backends = ("eager", "aot_eager")
    runs = [
        subprocess.Popen([*command, "-k", "compiled", f"--diffopt-compile-backend={backend}"], cwd=pytester.path)
        for backend in backends
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    entries = json.loads((pytester.path / "base/r/compiled.json").read_text(encoding="utf-8"))["entries"]
    assert sorted(entry["key"]["compile_backend"] for entry in entries) == sorted(backends)


def test_latency_is_recorded_of_what_is_taken_for_a_real_device_and_of_no_simulated_one(
    gate: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(
        "from pytest_diffopt.accelerators import Accelerator\nAccelerator.is_real = property(lambda self: True)\n"
    )
    assert gate(UPDATE, "-k", "compiled").ret == 0
    path = pytester.path / "base/r/compiled.json"
    latency = json.loads(path.read_text(encoding="utf-8"))["entries"][0]["record"]["latency"]
    assert latency["cold"]["value"] > 1
    assert latency["steady"]["low"] <= latency["steady"]["value"] <= latency["steady"]["high"]
    (pytester.path / "conftest.py").unlink()
    path.unlink()
    assert gate(UPDATE, "-k", "compiled").ret == 0
    assert json.loads(path.read_text(encoding="utf-8"))["entries"][0]["record"]["latency"] is None
