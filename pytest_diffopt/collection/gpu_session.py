"""A session on a simulated GPU: entered before conftest files are imported, and said where nobody can overlook it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.options import read_gpu_settings

if TYPE_CHECKING:
    from pytest_diffopt.accelerators.simulated import SimulatedGpu

NAME = "diffopt-gpu-session"
PROPERTY = "diffopt_simulated_gpu"
"""Of the test suite in JUnit's file."""


def begin(config: pytest.Config) -> None:
    """Put the session on the GPU of the options, if they name one; it is given back when pytest is unconfigured.

    Raises:
        pytest.UsageError: an option is wrong, or the GPU cannot be simulated here.
    """
    settings = read_gpu_settings(config)
    unwanted = getattr(config.known_args_namespace, "diffopt_gpu", None) is not None
    if config.pluginmanager.has_plugin(NAME) or (settings.gpu is None and not unwanted):
        return
    from pytest_diffopt.accelerators.whole_process import ChosenGpu, described, whole_process
    from pytest_diffopt.notices import shown_by
    from pytest_diffopt.report.progress import ProgressLine

    chosen = ChosenGpu(settings.gpu, settings.gpu_devices, settings.gpu_memory) if settings.gpu is not None else None
    borrowed = contextlib.ExitStack()
    config.add_cleanup(borrowed.close)
    with contextlib.closing(ProgressLine.plainly()) as line, shown_by(line.announcing):
        try:
            gpu = borrowed.enter_context(whole_process(chosen))
        except DiffoptError as error:
            raise pytest.UsageError(f"--diffopt-gpu={settings.gpu}: {error}") from None
    if gpu is not None:
        config.pluginmanager.register(GpuSession(gpu, described(gpu)), NAME)


class GpuSession:
    """Says that what runs is no GPU: at the head, at the end, and in JUnit's file."""

    def __init__(self, gpu: SimulatedGpu, description: str) -> None:
        self.gpu = gpu
        self.description = description

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_header(self) -> str:
        return f"SIMULATED GPU: {self.description}. No GPU is used: the CPU computes, and times are the CPU's."

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        for plugin in session.config.pluginmanager.get_plugins():
            add: Any = getattr(plugin, "add_global_property", None)  # of pytest's own JUnit file
            if add is not None:
                add(PROPERTY, self.description)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"ran on a SIMULATED GPU: {self.description}", yellow=True)
