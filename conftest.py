"""What all tests share."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.warm_python import INTERPRETER, warm_python

pytest_plugins = ["pytester"]

# Set before torch is imported. One Inductor cache for all tests and runs: a cold one costs minutes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes that import torch costs more
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else each process asks another one, which imports torch
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for a core spin on it otherwise
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "inductor"))
os.environ.setdefault("DIFFOPT_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "replicas"))

RunPytest = Callable[..., pytest.RunResult]

# By these pytest and the plugin write otherwise: whole messages for a CI's log and page, tables as wide as a terminal.
_OF_A_CI = ("COLUMNS", "CI", "BUILD_NUMBER", "GITHUB_ACTIONS", "GITHUB_WORKSPACE", "GITHUB_STEP_SUMMARY")


_LONGEST_FIRST = (
    *("test_replica_recipes", "test_documentation_pages", "test_forecast", "test_main_job", "test_documentation"),
    *("test_quantization_backends_run", "test_replica_families", "test_forecast_claims", "test_advice_ladder"),
    *("test_replica_cache", "test_matrix_recipes", "test_release_gate", "test_many_machines", "test_bundled_suite"),
)
"""Files of a quarter of a minute and more, by what they take: so no worker waits for one of them at the end."""

_SLOW_TOO = (
    *("test_simulated_compilation", "test_dry_pipelines", "test_simulated_pipelines", "test_simulated_build"),
    "test_simulated_operator_database",
    *("test_backend_faults", "test_attention_faults", "test_baseline_faults"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real pipelines, processes and cold compiles are slow; the longest files come first.

    Those of the device come before them: what a compiled module keeps on it lives until the next is compiled.
    """
    rank = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: -1 if item.path.parent.name == "simulated" else rank.get(item.path.stem, len(rank)))
    for item in items:
        if item.path.parent.name == "integration" or item.path.stem in (*_LONGEST_FIRST, *_SLOW_TOO):
            item.add_marker("slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "slow: runs real pipelines, processes or cold compiles; -m 'not slow' leaves it out"
    )
    processes = warm_python()
    processes.__enter__()  # before the workers of pytest-xdist are started, which share it
    config.add_cleanup(lambda: processes.__exit__(None, None, None))


@pytest.fixture(scope="session")
def frozen_libraries() -> Callable[[], None]:
    """Half a million objects of the libraries, which every collection of garbage would look at: 0.4 s each. Calling what
    this returns freezes what was imported since, and lets go of what is garbage by now."""
    from pytest_diffopt.libraries import import_libraries, quietly

    def freeze() -> None:
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    with quietly():
        import_libraries()
    freeze()
    return freeze


@pytest.fixture(scope="session", autouse=True)
def _processes_are_forked() -> Iterator[None]:
    """Python that tests start is forked from a process that has the libraries, where it would import them."""
    with pytest.MonkeyPatch.context() as monkeypatch, warm_python() as folder:
        if folder:
            monkeypatch.setattr(sys, "executable", f"{folder}/python")
        yield


@pytest.fixture
def fresh_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of this test are the interpreter's own: for tests of what is imported, and of the process itself."""
    monkeypatch.setattr(sys, "executable", INTERPRETER)


@pytest.fixture(scope="session", autouse=True)
def _runs_within_write_as_at_a_desk() -> Iterator[None]:
    """What the runs that tests start print does not depend on where the tests run; a test may set these itself."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in _OF_A_CI:
            monkeypatch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def plugin_arguments() -> tuple[str, ...]:
    """What makes pytest load the plugin, where no installed entry point does."""
    installed = any(one.name == "diffopt" for one in importlib.metadata.entry_points(group="pytest11"))
    return () if installed else ("-p", "pytest_diffopt.plugin")


@pytest.fixture
def run_pytest(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, plugin_arguments: tuple[str, ...]
) -> RunPytest:
    """Run pytest with the plugin in ``pytester``'s folder, installed or run from its source tree.

    Always in a process of its own: within this one, a second import of the plugin would meet the first one's modules.
    """
    root = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*args: str) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*plugin_arguments, *args)

    return run
