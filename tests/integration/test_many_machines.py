"""One run on many workers and hosts: the same verdicts as in one process, and what happens when a worker is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("xdist")

ROOT = Path(__file__).parent.parent.parent

MODELS = '''
import os
import signal
import time
from pathlib import Path

import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))

    def forward(self, input):
        return self.layers(input)


class Breaking(Model):
    def forward(self, input):
        torch._dynamo.graph_break()
        return self.layers(input * 2)


class Leaking(Model):
    kept = []

    def forward(self, input):
        self.kept.append(self.layers(input))
        return self.kept[-1]


class Killing(Model):
    def forward(self, input):
        kill_once("calling")
        return self.layers(input)


def kill_once(phase):
    mark = Path(os.environ["KILLED"]) / phase
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def model():
    return Model()


def breaking():
    return Breaking()


def leaking():
    return Leaking()


def killing():
    return Killing()


def killed_while_loading():
    kill_once("loading")
    return Model()


def fatal():
    os.kill(os.getpid(), signal.SIGKILL)


def timed(recipe):
    begin = time.monotonic()
    time.sleep(0.2)
    with open(os.environ["TIMES"], "a") as file:
        file.write(f"{recipe.name} {os.getpid()} {begin} {time.monotonic()}\\n")
    return Model()


def at_once():
    """Compiled at the same time as in another worker, which is waited for."""
    folder = Path(os.environ["MEET"])
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    return Model()


def inputs(k):
    return {"input": torch.ones(2, 64) * (k + 1)}


def growing(k):
    return {"input": torch.ones(2 + k, 64) * (k + 1)}
'''

KEEP_VERDICTS = """
import json
import os
from pathlib import Path

KEPT, WORKERS = {}, {}


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:
        if name == "diffopt_verdict":
            KEPT[report.nodeid.partition("@")[0]] = value
            if hasattr(report, "node"):
                WORKERS.setdefault(report.node.gateway.id, []).append(report.nodeid.split("::")[1])


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        Path("verdicts.json").write_text(json.dumps(KEPT, indent=1, sort_keys=True))
        Path("workers.json").write_text(json.dumps(WORKERS))
"""

COMPILED = 'compilation = { component = "model", backend = "eager" }'


def recipe(name: str, factory: str, *lines: str, inputs: str = "inputs") -> str:
    call = f'call = {{ inputs = "machine_models:{inputs}" }}'
    return "\n".join([f"[recipe.{name}]", f'pipeline = "machine_models:{factory}"', call, *lines, ""])


LEDGER = "\n".join(
    [
        recipe("plain", "model"),
        recipe("compiled", "model", COMPILED),
        recipe("shapes", "model", COMPILED, inputs="growing"),
        recipe("breaking", "breaking", COMPILED),
        recipe("leaking", "leaking", COMPILED, 'contract = { max_memory = "1GiB" }'),
        recipe("offloaded", "model", 'offloading = { strategy = "group", offload_type = "leaf_level" }'),
        recipe("nf4", "model", 'quantization = { backend = "bitsandbytes_4bit" }', COMPILED),
        recipe("nf4-again", "model", 'quantization = { backend = "bitsandbytes_4bit" }'),
        recipe("too-large", "model", 'contract = { max_memory = "1KiB" }'),
    ]
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(plugin_arguments: tuple[str, ...]) -> Run:
    """Run pytest in a folder, under ``filterwarnings = error``, in a process of its own."""

    def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", *plugin_arguments, "-p", "no:cacheprovider", *arguments]
        environment = environment_of(folder, **variables)
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    return run


def environment_of(folder: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in {**kept, **own, **variables}.items() if value}


def outcomes(ran: subprocess.CompletedProcess[str]) -> dict[str, int]:
    last = next(line for line in reversed(ran.stdout.splitlines()) if re.search(r"\d+ \w+.* in [\d.]+s", line))
    return {word: int(number) for number, word in re.findall(r"(\d+) (failed|passed|error|unverified)", last)}


def verdicts(folder: Path) -> str:
    """Byte for byte: no verdict of these recipes says a time."""
    return (folder / "verdicts.json").read_text(encoding="utf-8")


# The ledger


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ledger")
    (made / "machine_models.py").write_text(MODELS, encoding="utf-8")
    (made / "conftest.py").write_text(KEEP_VERDICTS, encoding="utf-8")
    (made / "all.recipes.toml").write_text(LEDGER, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def ledger(run: Run, folder: Path) -> str:
    """The verdicts of one process, which a later run must not differ from."""
    ran = run(folder, "-n", "0", "--diffopt-device=sim")
    assert outcomes(ran) == {"failed": 5, "passed": 35}, ran.stdout
    return verdicts(folder)


def test_two_workers_say_what_one_process_says_and_a_recipe_stays_on_one(run: Run, folder: Path, ledger: str) -> None:
    ran = run(folder, "-n", "2", "--diffopt-device=sim")
    assert outcomes(ran) == {"failed": 5, "passed": 35}, ran.stdout
    assert verdicts(folder) == ledger
    workers = json.loads((folder / "workers.json").read_text(encoding="utf-8"))
    names = {name for worker in workers.values() for name in worker}
    ran_by = {name: {worker for worker, ran in workers.items() if name in ran} for name in names}
    assert len(ran_by) == 9
    assert {name: len(found) for name, found in ran_by.items()} == dict.fromkeys(ran_by, 1)
    assert set(workers) == {"gw0", "gw1"}


def test_without_xdist_the_verdicts_are_the_same(run: Run, folder: Path, ledger: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(['xdist', 'execnet']))\n", encoding="utf-8"
    )  # importing them raises, as where they are not installed
    ran = run(
        folder,
        *("-p", "pytest_diffopt.plugin", "--diffopt-device=sim"),
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT), str(folder)]),
    )
    assert outcomes(ran) == {"failed": 5, "passed": 35}, ran.stdout
    assert verdicts(folder) == ledger


def host_environment(folder: Path, models: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(models)]),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DIFFOPT_CACHE_DIR": os.environ.get("DIFFOPT_CACHE_DIR", str(Path("~/.cache/pytest-diffopt").expanduser())),
    }


@contextlib.contextmanager
def host(folder: Path, address: str, models: Path) -> Iterator[str]:
    """Another machine, as far as one can be had here: its own home, files, environment and port, and no file of ours."""
    for name in ("home", "tmp", "work"):
        (folder / name).mkdir(parents=True)
    environment = host_environment(folder, models)
    command = [sys.executable, "-m", "execnet.script.socketserver", "127.0.0.1:0"]
    with open(folder / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=folder / "work", env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while not (found := re.search(r"\('127\.0\.0\.1', (\d+)\)", (folder / "log").read_text(encoding="utf-8"))):
            assert time.monotonic() < until
            assert server.poll() is None
            time.sleep(0.05)
        yield f"socket={address}:{found[1]}"
    finally:
        server.kill()
        server.wait()


def models_alone(folder: Path) -> Path:
    """What recipes import, as a package that both hosts have installed: a folder without the recipe file."""
    models = folder / "installed"
    models.mkdir()
    (models / "machine_models.py").write_text(MODELS, encoding="utf-8")
    return models


def documented(folder: Path, a: str, b: str) -> list[str]:
    """The arguments of the command that the documentation gives for two hosts, for these two."""
    text = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    ssh, socket = (next(line for line in text.splitlines() if f"--tx {how}=gpu-a" in line) for how in ("ssh", "socket"))
    program, *arguments = shlex.split(socket)
    assert program == "pytest"
    assert shlex.split(ssh)[-5:] == arguments[-5:]  # what they send and run is the same
    places = {
        "socket=gpu-a:8888": a,
        "socket=gpu-b:8888": b,
        "$PWD/gate.recipes.toml": str(folder / "all.recipes.toml"),
    }
    assert places.keys() <= set(arguments)
    return [*(places.get(argument, argument) for argument in arguments), "--diffopt-device=sim"]


def standing_in_for_ssh(folder: Path, models: Path) -> str:
    """A program named ssh, which runs the command here, as on another machine; its folder."""
    for name in ("home", "tmp", "work", "bin"):
        (folder / name).mkdir(parents=True)
    variables = " ".join(shlex.quote(f"{name}={value}") for name, value in host_environment(folder, models).items())
    program = folder / "bin" / "ssh"
    script = f'#!/bin/sh\nfor last; do :; done\ncd {folder}/work && exec env -i {variables} sh -c "$last"\n'
    program.write_text(script, encoding="utf-8")
    program.chmod(0o755)
    return str(program.parent)


def test_two_hosts_get_the_recipe_file_alone_and_say_the_same(
    run: Run, folder: Path, ledger: str, tmp_path: Path
) -> None:
    models = models_alone(tmp_path)
    (folder / "reports").mkdir()  # which the other machines do not have
    path = os.pathsep.join([standing_in_for_ssh(tmp_path / "b", models), os.environ["PATH"]])
    with host(tmp_path / "a", "127.0.0.1", models) as a:
        arguments = documented(folder, a, f"ssh=gpu-b//python={sys.executable}")
        ran = run(folder, *arguments, "--diffopt-docs-report=reports/pages.md", PATH=path)
    assert outcomes(ran) == {"failed": 5, "passed": 35}, ran.stdout
    assert verdicts(folder) == ledger
    assert set(json.loads((folder / "workers.json").read_text(encoding="utf-8"))) == {"gw0", "gw1"}
    for name in "ab":
        files = [path.relative_to(tmp_path / name) for path in (tmp_path / name / "work").rglob("*") if path.is_file()]
        assert files == [Path("work/pyexecnetcache/all.recipes.toml")]


def test_a_host_that_is_gone_takes_no_more_than_its_recipe(run: Run, folder: Path, tmp_path: Path) -> None:
    models = models_alone(tmp_path)
    text = "\n".join([recipe("fatal", "fatal"), *(recipe(f"healthy-{k}", "model") for k in range(4))])
    own = tmp_path / "own"
    own.mkdir()
    (own / "all.recipes.toml").write_text(text, encoding="utf-8")
    with host(tmp_path / "a", "127.0.0.1", models) as a, host(tmp_path / "b", "localhost", models) as b:
        ran = run(own, *documented(own, a, b))
    assert outcomes(ran) == {"failed": 2, "passed": 8}, ran.stdout
    assert "cannot be reached again: the run goes on without it" in ran.stdout
    assert re.search(
        r"fatal · parity: worker gw[01] was lost \(Not properly terminated\) while it ran fatal", ran.stdout
    )


# Workers that are lost

KILLERS = """
import json
import os
from pathlib import Path

import pytest
from machine_models import kill_once

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
CONFIG = []


def pytest_configure(config):
    CONFIG.append(config)
    from torch._dynamo import register_backend

    def killing_backend(graph, inputs):
        kill_once("compiling")
        return graph

    register_backend(killing_backend, name="killing_backend")


def pytest_collection_modifyitems(session):
    if WORKER == "gw1":
        kill_once("collecting")


def pytest_runtest_logfinish(nodeid):
    if WORKER and "::between::engagement" in nodeid:
        kill_once("between")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    if WORKER and "::teardown::engagement" in item.nodeid:
        kill_once("teardown")


def pytest_runtest_logreport(report):
    import torch
    from pytest_diffopt.collection.session import ACCELERATOR

    accelerator = CONFIG[0].stash.get(ACCELERATOR, None)
    if WORKER and accelerator is not None:
        at = accelerator.simulation.index, torch.get_num_threads(), os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
        (Path(os.environ["KILLED"]) / f"{WORKER}.json").write_text(json.dumps(at))
"""


@pytest.fixture(scope="module")
def killed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run in which a worker is killed in every phase."""
    made = tmp_path_factory.mktemp("killed")
    (made / "machine_models.py").write_text(MODELS, encoding="utf-8")
    (made / "conftest.py").write_text(KILLERS, encoding="utf-8")
    (made / "marks").mkdir()
    rows = [
        recipe("loading", "killed_while_loading", COMPILED),
        recipe("compiling", "model", COMPILED.replace("eager", "killing_backend")),
        recipe("calling", "killing", COMPILED),
        recipe("between", "model", COMPILED),
        recipe("teardown", "model", COMPILED),
        recipe("fatal", "fatal", COMPILED),
        recipe("healthy", "model", COMPILED),
    ]
    (made / "killed.recipes.toml").write_text("\n".join(rows), encoding="utf-8")
    arguments = ("-n", "2", "--max-worker-restart=20", "--diffopt-device=sim")
    ran = run(made, *arguments, KILLED=str(made / "marks"), OMP_NUM_THREADS="", TORCHINDUCTOR_COMPILE_THREADS="")
    return ran, made


def test_a_worker_killed_in_any_phase_loses_its_own_recipe_with_that_cause(
    killed: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    ran, made = killed
    assert {path.name for path in (made / "marks").iterdir()} >= {
        "collecting",
        "loading",
        "compiling",
        "calling",
        "between",
        "teardown",
    }
    for phase in ("loading", "compiling", "calling"):
        item = f"{phase} · engagement"
        assert re.search(rf"^{item}: worker gw\d+ was killed \(signal 9\) while it ran {item}$", ran.stdout, re.M)
    for phase in ("between", "teardown"):
        item = f"{phase} · engagement"
        assert re.search(
            rf"^{item}: worker gw\d+ was killed \(signal 9\) after the verdict of {item}, ", ran.stdout, re.M
        )
    assert "diffopt: worker gw1 was killed (signal 9) while it collected, and took no check with it" in ran.stdout


def test_what_was_not_run_gets_its_verdict_from_the_worker_that_comes_instead(
    killed: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    ran, _ = killed
    table = ran.stdout.partition("optimization recipes")[2]
    for phase in ("loading", "compiling", "between", "teardown"):
        assert re.search(rf"^{phase} .* 1 failed: engagement, 4 passed$", table, re.M), table
    assert re.search(r"^calling .* 2 failed: engagement graph_breaks, 3 passed$", table, re.M), table
    assert re.search(r"^healthy .* 5 passed$", table, re.M), table


def test_a_recipe_that_ends_two_workers_is_tried_no_more(
    killed: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    ran, _ = killed
    assert len(re.findall(r"^diffopt: worker gw\d+ was killed .* fatal · \w+$", ran.stdout, re.M)) == 2
    cause = r"worker gw\d+ was killed \(signal 9\) while it ran fatal · graph_breaks"
    for check in ("recompiles", "parity", "state"):
        assert re.search(rf"^fatal · {check}: not run, since the recipe ended 2 workers: {cause}$", ran.stdout, re.M)
    assert "fatal" in ran.stdout.partition("optimization recipes")[2]


def test_workers_take_devices_in_turn_and_divide_the_threads(
    killed: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, made = killed
    told = [json.loads(path.read_text(encoding="utf-8")) for path in (made / "marks").glob("gw*.json")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // 2)
    assert {device for device, _, _ in told} == {0, 1}  # those that replace a worker have its device
    assert {threads for _, threads, _ in told} == {share}
    assert {compilers for _, _, compilers in told} == {str(min(share, 32))}


def test_without_a_restart_the_run_fails_and_names_what_was_not_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "machine_models.py").write_text(MODELS, encoding="utf-8")
    rows = [recipe("fatal", "fatal"), recipe("other", "fatal"), recipe("left", "model")]
    (tmp_path / "a.recipes.toml").write_text("\n".join(rows), encoding="utf-8")
    ran = run(tmp_path, "-n", "1", "--max-worker-restart=0", "--diffopt-device=cpu")
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert outcomes(ran) == {"failed": 6}
    lost = "worker gw0 was killed (signal 9) while it ran fatal · parity"
    for item in ("fatal · state", "other · parity", "left · parity", "left · state"):
        assert f"\n{item}: not run: {lost}, and no worker took its place\n" in ran.stdout


def test_workers_that_all_die_while_they_collect_fail_the_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import os\n\ndef pytest_collection(session):\n    if 'PYTEST_XDIST_WORKER' in os.environ:\n        os._exit(3)\n",
        encoding="utf-8",
    )
    (tmp_path / "a.recipes.toml").write_text('[recipe.flux]\npipeline = "tiny-flux"\n', encoding="utf-8")
    ran = run(
        tmp_path, "--dist", "load", "--tx", "popen", "a.recipes.toml"
    )  # with --tx alone xdist would go on for ever
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert "diffopt: worker gw4 ended by itself (exit status 3) while it collected" in ran.stdout
    assert "diffopt: no worker lived to collect anything, so nothing was run of: a.recipes.toml" in ran.stdout


# What workers share


def test_an_exclusive_recipe_has_its_device_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "machine_models.py").write_text(MODELS, encoding="utf-8")
    rows = []
    for k in range(2):  # of different content: what is equal is observed once
        rows.append(recipe(f"shared-{k}", "timed").replace("call = {", f"call = {{ seed = {k},"))
        alone = recipe(f"alone-{k}", "timed", "exclusive = true")
        rows.append(alone.replace("call = {", f"call = {{ seed = {10 + k},"))
    (tmp_path / "a.recipes.toml").write_text("\n".join(rows), encoding="utf-8")
    times = tmp_path / "times"
    ran = run(tmp_path, "-n", "2", "--diffopt-device=sim", TIMES=str(times), DIFFOPT_SIM_DEVICES="1")
    assert outcomes(ran) == {"passed": 8}, ran.stdout
    spans = [line.split() for line in times.read_text(encoding="utf-8").splitlines()]
    assert len({pid for _, pid, _, _ in spans}) == 2
    alone_spans = [(name, float(begin), float(end)) for name, _, begin, end in spans if name.startswith("alone")]
    assert {name for name, _, _ in alone_spans} == {"alone-0", "alone-1"}
    for name, begin, end in alone_spans:
        others = [(float(b), float(e)) for other, _, b, e in spans if other != name]
        assert [other for other in others if other[0] < end and begin < other[1]] == []


def test_two_workers_compile_one_graph_at_once_into_one_cache(run: Run, tmp_path: Path) -> None:
    (tmp_path / "machine_models.py").write_text(MODELS, encoding="utf-8")
    (tmp_path / "meet").mkdir()
    inductor = COMPILED.replace("eager", "inductor")
    rows = [recipe("one", "at_once", inductor), recipe("two", "at_once", inductor, 'dtype = "float32"')]
    (tmp_path / "a.recipes.toml").write_text("\n".join(rows), encoding="utf-8")
    cache = tmp_path / "inductor"
    variables = {"MEET": str(tmp_path / "meet"), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    ran = run(tmp_path, "-n", "2", "--diffopt-device=cpu", **variables)
    assert outcomes(ran) == {"passed": 10}, ran.stdout
    assert len(list((tmp_path / "meet").iterdir())) == 2
    assert list(cache.rglob("*.so"))
