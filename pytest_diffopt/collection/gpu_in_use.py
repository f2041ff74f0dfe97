"""The simulated GPU, for the time of each test that uses it: other tests go on seeing no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from pytest_diffopt.collection.session import accelerator_of, kind_of
from pytest_diffopt.errors import DiffoptError

_FIXTURE = "_diffopt_accelerator"


@contextlib.contextmanager
def gpu_in_use(item: pytest.Item) -> Iterator[None]:
    """The simulated GPU is there while a test that uses it is set up, runs and is torn down.

    A test uses it that takes a fixture of ours on a device, or whose markers measure on one or accept a simulated one.
    """
    with contextlib.ExitStack() as stack:
        if _uses_it(item):
            # what is wrong is said by the fixture or the marker
            with contextlib.suppress(DiffoptError):
                if kind_of(item.config) == "sim":
                    stack.enter_context(accelerator_of(item.config).in_use())
        yield


def _uses_it(item: pytest.Item) -> bool:
    if _FIXTURE in getattr(item, "fixturenames", ()):
        return True
    memory = item.get_closest_marker("diffopt_max_memory")
    if memory is not None and "forecast" not in memory.kwargs:
        return True
    return any(mark.kwargs.get("simulated") is True for mark in item.iter_markers("diffopt_requires_gpu"))
