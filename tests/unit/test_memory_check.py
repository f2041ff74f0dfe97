"""The memory check on figures made by hand: what it must catch, and the healthy twin of each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_diffopt import Contract, Offloading, Recipe, Verdict
from pytest_diffopt.checks import memory
from pytest_diffopt.checks.evidence import Evidence
from pytest_diffopt.contract import derive
from pytest_diffopt.observation.observation import (
    CallMemory,
    ComponentRecord,
    Failure,
    MemoryRecord,
    Observation,
)

SIZES = {"transformer": 800_000, "text_encoder": 150_000, "vae": 50_000}
BEFORE = 4_096  # what others hold


def record(*peaks: int, left: int = 0, grows: int = 0, stays: dict[str, int] | None = None) -> MemoryRecord:
    residency = dict.fromkeys(SIZES, 0) | (stays or {})
    calls = tuple(
        CallMemory(k, BEFORE + peak, BEFORE + left + grows * k + sum(residency.values()), residency)
        for k, peak in enumerate(peaks)
    )
    return MemoryRecord(BEFORE, BEFORE + 1_000_000, BEFORE + sum(SIZES.values()), calls)


RESIDENT = record(1_060_000, 1_050_000, 1_050_000, stays=SIZES)


def observation(found: MemoryRecord | None, *, kind: str = "cuda") -> Observation:
    components = tuple(ComponentRecord(name, "Module", size) for name, size in SIZES.items())
    return Observation({"name": "r"}, "hash", kind, kind, {}, components=components, memory=found)


def judge(
    found: MemoryRecord | None,
    *,
    offloading: Offloading | None = None,
    contract: Contract | None = None,
    resident: Observation | None = None,
    kind: str = "cuda",
) -> Verdict:
    offloading = offloading or Offloading("model")
    recipe = Recipe("r", "tiny-flux", offloading=offloading, contract=contract or Contract())
    limits = derive(recipe.contract, compilations=(), offloading=offloading)
    without = resident or observation(RESIDENT)
    return memory.judge(Evidence(recipe, observation(found, kind=kind), limits, None, without))


def failed_with(verdict: Verdict, *words: str) -> None:
    assert verdict.status == "failed", verdict
    for word in words:
        assert word in verdict.text


def test_a_peak_that_falls_and_components_that_leave_pass() -> None:
    verdict = judge(record(870_000, 860_000, 860_000))
    assert verdict.status == "passed"
    assert verdict.sentence == ("the peak of a call falls from 1.00 MiB to 839.84 KiB (0.82×), and 0 B stay after it")


def test_a_peak_that_does_not_fall_fails_with_what_was_promised() -> None:
    # 200,000 bytes could be saved beside the transformer; half of it is promised
    failed_with(judge(record(1_050_000, 1_050_000, 1_050_000)), "0 B saved, at least 97.66 KiB promised")
    failed_with(judge(record(950_001, 950_001, 950_001)), "saved, at least 97.66 KiB promised")
    assert judge(record(950_000, 950_000, 950_000)).status == "passed"


def test_the_peak_of_loading_and_of_the_cold_call_is_not_that_of_a_call() -> None:
    cold_is_high = record(5_000_000, 860_000, 860_000)
    assert judge(cold_is_high).status == "passed"


def test_leaf_by_leaf_promises_more_than_whole_models() -> None:
    found = record(870_000, 860_000, 860_000)
    failed_with(judge(found, offloading=Offloading("sequential")), "at least 292.97 KiB promised")
    assert judge(record(300_000, 300_000), offloading=Offloading("sequential")).status == "passed"


def test_a_component_that_never_leaves_is_named() -> None:
    stays = record(860_000, 860_000, 860_000, stays={"vae": 50_000})
    failed_with(judge(stays), "vae has not left the accelerator after the call", "vae: 48.83 KiB of its 48.83 KiB stay")


def test_only_the_components_that_are_offloaded_must_leave() -> None:
    stays = record(860_000, 860_000, 860_000, stays={"vae": 50_000})
    offloading = Offloading("model", components=["transformer", "text_encoder"])
    assert judge(stays, offloading=offloading).status == "passed"


def test_a_state_object_that_keeps_a_weight_alive_is_found_though_every_parameter_has_left() -> None:
    verdict = judge(record(860_000, 860_000, 860_000, left=400_000))
    failed_with(verdict, "390.62 KiB stay on the accelerator after the call, though every parameter has left")
    assert judge(record(860_000, 860_000, 860_000, left=252)).status == "passed"


def test_growth_over_calls_is_found() -> None:
    failed_with(judge(record(860_000, 860_000, 860_000, 860_000, grows=6_000)), "memory grows by 5.86 KiB a call")
    assert judge(record(860_000, 860_000, 860_000, 860_000, grows=40)).status == "passed"


@pytest.mark.parametrize(
    ("contract", "cause"),
    [
        (Contract(max_memory_ratio=0.8), "the peak is 0.819 of that without offloading, 0.8 allowed"),
        (Contract(max_memory="800KB"), "the peak of a call is 839.84 KiB, 781.25 KiB allowed"),
    ],
)
def test_the_contract_may_promise_more(contract: Contract, cause: str) -> None:
    failed_with(judge(record(860_000, 860_000, 860_000), contract=contract), cause)


def test_a_device_without_memory_of_its_own_is_unverified() -> None:
    verdict = judge(None, kind="cpu")
    assert verdict.status == "unverified"
    assert "the device in use, cpu, has no memory of its own" in verdict.sentence


def test_without_a_run_to_compare_with_it_is_unverified() -> None:
    broken = replace(observation(None), failure=Failure("preparing", "OutOfMemoryError", "sim out of memory"))
    verdict = judge(record(860_000, 860_000), resident=broken)
    assert verdict.status == "unverified"
    assert "OutOfMemoryError: sim out of memory" in verdict.sentence


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (1536, "1.50 KiB"), (3 << 30, "3.00 GiB")])
def test_bytes_for_a_person(count: int, shown: str) -> None:
    assert memory.human(count) == shown
