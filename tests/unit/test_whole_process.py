"""The GPU that the environment names: read, written, and set for a while."""

from __future__ import annotations

import os

import pytest

from pytest_diffopt.accelerators.whole_process import DEVICES, GPU, MEMORY, ChosenGpu, whole_process
from pytest_diffopt.options import OPTIONS


@pytest.mark.parametrize("chosen", [ChosenGpu("t4"), ChosenGpu("rtx-4090", 2), ChosenGpu("l40", 16, 12 * 2**30)])
def test_what_is_written_is_read_again(chosen: ChosenGpu) -> None:
    assert ChosenGpu.of(chosen.variables()) == chosen


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({}, None),
        ({GPU: " ", DEVICES: "2"}, None),
        ({GPU: "t4", DEVICES: "", MEMORY: ""}, ChosenGpu("t4")),
        ({GPU: "t4", DEVICES: " 2 ", MEMORY: "1.5GiB"}, ChosenGpu("t4", 2, 3 * 2**29)),
    ],
)
def test_what_a_person_writes_is_read(environment: dict[str, str], chosen: ChosenGpu | None) -> None:
    assert ChosenGpu.of(environment) == chosen


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({GPU: "t4", DEVICES: "-1"}, "DIFFOPT_GPU_DEVICES: found '-1'; it takes a whole number from 1 on"),
        ({GPU: "t4", MEMORY: "0"}, "DIFFOPT_GPU_MEMORY: found 0; write bytes as an int"),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChosenGpu.of(environment)


def test_the_options_read_the_same_variables() -> None:
    assert [option.variable for option in OPTIONS if option.variable] == [GPU, DEVICES, MEMORY]


def test_with_none_child_processes_are_on_none_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPU, "t4")
    monkeypatch.delenv(DEVICES, raising=False)
    with whole_process(None) as gpu:
        assert gpu is None
        assert GPU not in os.environ
        os.environ[DEVICES] = "3"
    assert os.environ[GPU] == "t4"
    assert DEVICES not in os.environ
