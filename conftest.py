"""What all tests share."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

RunPytest = Callable[..., pytest.RunResult]


@pytest.fixture
def plugin_arguments() -> tuple[str, ...]:
    """What makes pytest load the plugin, where no installed entry point does."""
    installed = any(one.name == "diffopt" for one in importlib.metadata.entry_points(group="pytest11"))
    return () if installed else ("-p", "pytest_diffopt.plugin")


@pytest.fixture
def run_pytest(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, plugin_arguments: tuple[str, ...]
) -> RunPytest:
    """Run pytest with the plugin in ``pytester``'s folder, installed or run from its source tree.

    Without ``subprocess=True`` it runs in this process: right for what does not import torch.
    """
    root = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*args: str, subprocess: bool = False) -> pytest.RunResult:
        start = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        return start(*plugin_arguments, *args)

    return run
