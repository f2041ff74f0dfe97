"""What all tests share."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

# Set before torch is imported. One Inductor cache for all tests and runs: a cold one costs minutes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "inductor"))
os.environ.setdefault("DIFFOPT_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "replicas"))

RunPytest = Callable[..., pytest.RunResult]

# By these pytest and the plugin write more for a CI's log and page: whole messages in the summary, annotations.
_OF_A_CI = ("CI", "BUILD_NUMBER", "GITHUB_ACTIONS", "GITHUB_WORKSPACE", "GITHUB_STEP_SUMMARY")


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
