"""A pipeline's bytes on the device are exact: the same on every run, with any number of threads, and those of its tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.simulated.measured_pipelines import PLACEMENTS

ENTERS = False  # see conftest.py

Measured = dict[str, Any]


def measured(threads: int) -> Measured:
    """What a process of its own measures."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.simulated.measured_pipelines", str(threads)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: Measured = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def once() -> Measured:
    pytest.importorskip("diffusers")
    return measured(threads=1)


def without_images(found: Measured) -> Measured:
    return {name: {k: v for k, v in row.items() if k != "images"} for name, row in found.items() if name != "host"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_eager_placement_gives_the_hosts_image_to_the_bit(once: Measured, placement: str) -> None:
    assert set(once[placement]["images"]) == {once["host"]}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_is_resident_is_what_the_tensors_hold(once: Measured, placement: str) -> None:
    row = once[placement]
    assert row["resident_bytes"] == row["counted_bytes"]
    assert row["after_bytes"] == row["counted_after_bytes"]


def test_a_whole_pipeline_is_resident_with_each_of_its_weights(once: Measured) -> None:
    assert once["whole"]["resident_bytes"] == once["whole"]["weight_bytes"]
    assert once["model"]["resident_bytes"] == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nothing_grows_with_a_second_call_and_nothing_is_left_after_the_pipeline(
    once: Measured, placement: str
) -> None:
    row = once[placement]
    assert row["second_peak_bytes"] == row["peak_bytes"]
    # the scheduler's table of noise levels stays as long as the scheduler: five numbers at most
    assert 0 < row["after_bytes"] - row["resident_bytes"] <= 20
    assert row["left_bytes"] == 0


def test_peaks_fall_in_the_order_of_what_stays_on_the_device(once: Measured) -> None:
    peaks = {name: once[name]["peak_bytes"] for name in PLACEMENTS}
    assert peaks["sequential"] < peaks["model"] < peaks["whole"]
    assert peaks["leaf"] < peaks["leaf, stream"] < peaks["block"] < peaks["block, stream"] < peaks["whole"]


def test_another_process_with_more_threads_measures_the_same_bytes(once: Measured) -> None:
    assert without_images(measured(threads=2)) == without_images(once)
