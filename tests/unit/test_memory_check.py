"""The memory check on figures made by hand: what it must catch, and the healthy twin of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_diffopt import Contract, Offloading, Quantization, Recipe, Verdict
from pytest_diffopt.byte_sizes import human
from pytest_diffopt.checks import checks_for, memory
from pytest_diffopt.checks.evidence import Evidence
from pytest_diffopt.contract import derive
from pytest_diffopt.observation.observation import (
    CallMemory,
    ComponentRecord,
    Failure,
    Layer,
    MemoryRecord,
    Observation,
    Output,
    Owner,
    PhaseResidency,
    Residency,
)

SIZES = {"transformer": 800_000, "text_encoder": 150_000, "vae": 50_000}
BEFORE = 4_096  # what others hold


def record(
    *peaks: int,
    left: int = 0,
    grown: tuple[int, ...] = (),
    stays: dict[str, int] | None = None,
    elsewhere: int = 0,
    loading: int = 400_000,
) -> MemoryRecord:
    """A record of calls with these peaks; ``grown`` are bytes beyond the first after each repeated call."""
    residency = dict.fromkeys(SIZES, 0) | (stays or {})
    weights = sum(residency.values())
    calls = tuple(
        CallMemory(
            k, BEFORE + peak, BEFORE + left + weights, residency, weights_bytes=weights, elsewhere_bytes=elsewhere
        )
        for k, peak in enumerate(peaks)
    )
    calls += tuple(
        CallMemory(len(peaks) + k, BEFORE + peaks[-1], BEFORE + left + size + weights, residency, repeated=True)
        for k, size in enumerate(grown)
    )
    return MemoryRecord(BEFORE, BEFORE + loading, BEFORE + weights, calls, residency)


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
    failed_with(judge(stays), "vae has not left the accelerator after the call", "vae: 48.83 KiB stay, with")
    with_state = judge(record(860_000, 860_000, 860_000, stays={"vae": 60_000}))
    told = "vae: 58.59 KiB stay, with buffers and quantization state; its parameters alone take 48.83 KiB"
    failed_with(with_state, "vae has not left the accelerator after the call", told)


def test_only_the_components_that_are_offloaded_must_leave() -> None:
    stays = record(860_000, 860_000, 860_000, stays={"vae": 50_000})
    offloading = Offloading("model", components=["transformer", "text_encoder"])
    assert judge(stays, offloading=offloading).status == "passed"


def test_a_state_object_that_keeps_a_weight_alive_is_found_though_every_parameter_has_left() -> None:
    verdict = judge(record(860_000, 860_000, 860_000, left=400_000))
    failed_with(verdict, "390.62 KiB stay on the accelerator after the call, though every parameter has left")
    assert judge(record(860_000, 860_000, 860_000, left=252)).status == "passed"


@pytest.mark.parametrize(("without", "left", "status"), [(12_000, 12_000, "passed"), (0, 12_000, "failed")])
def test_what_stays_without_offloading_too_is_no_fault_of_offloading(without: int, left: int, status: str) -> None:
    resident = observation(record(1_060_000, 1_050_000, 1_050_000, stays=SIZES, left=without))
    assert judge(record(860_000, 860_000, 860_000, left=left), resident=resident).status == status


def test_a_pipeline_that_keeps_much_without_offloading_too_may_not_keep_it_all() -> None:
    resident = observation(record(1_060_000, 1_050_000, 1_050_000, stays=SIZES, left=400_000))
    verdict = judge(record(860_000, 860_000, 860_000, left=400_000), resident=resident)
    failed_with(verdict, "390.62 KiB stay on the accelerator after the call, though every parameter has left")


def test_growth_over_calls_is_found() -> None:
    verdict = judge(record(860_000, 860_000, 860_000, grown=(600, 1_200, 1_800, 2_400)))
    failed_with(verdict, "memory grows by 600 B a call, over 4 repeated calls")
    every_other = judge(record(860_000, 860_000, grown=(0, 600, 600, 1_200, 1_200, 1_800)))
    failed_with(every_other, "memory grows by 326 B ± 42 B a call, over 6 repeated calls")


def test_growth_that_no_repeated_call_explains_is_unverified() -> None:
    found = record(860_000, 860_000, 860_000)
    last = replace(found.calls[-1], live_bytes=found.calls[-1].live_bytes + 64)
    verdict = judge(replace(found, calls=(*found.calls[:-1], last)))
    assert verdict.status == "unverified"
    assert "a call left 64 B more than the one before it, and could not be repeated" in verdict.sentence


@pytest.mark.parametrize(
    "grown",
    [
        (),
        (600, 600, 600, 600),
        (600, 1_200, 600, 1_200),
        (0, 600, 600, 600),
        (100, 200, 300, 400, 500, 600, 700, 800, 800, 800, 800),  # a ring of buffers that is full by then
    ],
)
def test_what_is_kept_once_or_comes_and_goes_is_no_growth(grown: tuple[int, ...]) -> None:
    assert judge(record(860_000, 860_000, 860_000, grown=grown)).status == "passed"


@pytest.mark.parametrize("start", range(3))
def test_growth_at_every_third_call_is_found_wherever_the_calls_begin(start: int) -> None:
    grown = tuple(600 * ((call + start) // 3) for call in range(12))
    failed_with(judge(record(860_000, 860_000, grown=grown)), "memory grows by", "a call, over 6 repeated calls")


def test_a_peak_that_grows_is_found_where_equal_calls_are_compared() -> None:
    found = record(860_000, 860_000, grown=(0,) * 8)

    def with_peaks(*peaks: int) -> Verdict:
        kinds = ("small", "large") * 4
        repeats = [
            replace(call, peak_bytes=BEFORE + peak, inputs=kind)
            for call, peak, kind in zip(found.calls[2:], peaks, kinds, strict=True)
        ]
        return judge(replace(found, calls=(*found.calls[:2], *repeats)))

    assert with_peaks(1_000, 9_000, 1_000, 9_000, 1_000, 9_000, 1_000, 9_000).status == "passed"
    grows = with_peaks(1_000, 9_000, 1_000, 9_100, 1_000, 9_200, 1_000, 9_300)
    failed_with(grows, "the peak of a call grows by 100 B a call, though no more stays after it")


def test_what_stays_after_an_earlier_call_only_is_named_with_the_call() -> None:
    calls = list(record(860_000, 860_000, 860_000).calls)
    calls[1] = replace(calls[1], residency={"vae": 50_000}, weights_bytes=50_000, live_bytes=BEFORE + 50_000)
    found = replace(record(860_000), calls=tuple(calls))
    failed_with(judge(found), "vae has not left the accelerator after call 1", "48.83 KiB stay")
    calls[1] = replace(calls[1], residency={}, weights_bytes=0)
    failed_with(judge(replace(found, calls=tuple(calls))), "48.83 KiB stay on the accelerator after call 1, though")


def test_results_that_the_pipeline_keeps_are_left_too() -> None:
    found = replace(record(860_000, 860_000), kept_results_bytes=400_000)
    failed_with(judge(found), "390.62 KiB stay on the accelerator after the call, though every parameter has left")


@pytest.mark.parametrize(
    ("contract", "cause"),
    [
        (Contract(max_memory_ratio=0.8), "the peak is 0.819 of that without offloading, 0.8 allowed"),
        (Contract(max_memory="800KB"), "the peak of a call is 839.84 KiB, 781.25 KiB allowed"),
    ],
)
def test_the_contract_may_promise_more(contract: Contract, cause: str) -> None:
    failed_with(judge(record(860_000, 860_000, 860_000), contract=contract), cause)


def test_a_peak_too_low_for_what_ran_is_found() -> None:
    output = Output(0, "transformer", 0, "", "float32", (1,), True, "")
    seen = replace(observation(record(300_000, 300_000)), outputs=(output,))
    recipe = Recipe("r", "tiny-flux", offloading=Offloading("model"))
    limits = derive(recipe.contract, compilations=(), offloading=recipe.offloading)
    verdict = memory.judge(Evidence(recipe, seen, limits, None, observation(RESIDENT)))
    failed_with(verdict, "292.97 KiB, less than transformer with 781.25 KiB: it did not run on the accelerator")


def test_memory_on_another_device_of_the_kind_is_found() -> None:
    verdict = judge(record(860_000, 860_000, elsewhere=2_048))
    failed_with(verdict, "2.00 KiB on another device of the same kind, which the recipe does not use")


def test_a_reference_that_is_offloaded_itself_is_none() -> None:
    verdict = judge(record(860_000, 860_000), resident=observation(record(860_000, 860_000)))
    assert verdict.status == "unverified"
    assert "781.25 KiB of transformer's 781.25 KiB are not on the accelerator" in verdict.sentence


def test_a_component_that_the_pipelines_class_keeps_need_not_leave() -> None:
    components = tuple(
        ComponentRecord(name, "Module", size, kept_resident=name == "vae") for name, size in SIZES.items()
    )
    seen = replace(observation(record(860_000, 860_000, stays={"vae": 50_000})), components=components)
    recipe = Recipe("r", "tiny-flux", offloading=Offloading("model"))
    limits = derive(recipe.contract, compilations=(), offloading=recipe.offloading)
    assert memory.judge(Evidence(recipe, seen, limits, None, observation(RESIDENT))).status == "passed"


def layer(form: str, **more: Any) -> Layer:
    fields: dict[str, Any] = {"weight_bytes": 8_192, "state_bytes": 1_088, "in_features": 128, "out_features": 128}
    return Layer("model", "first", "Linear4bit", form, "uint8", "bfloat16", **(fields | more))


@pytest.mark.parametrize(
    ("healthy", "fault"),
    [
        (layer("nf4"), layer("nf4", state_bytes=2 * 1_088)),
        (
            layer("nf4", state_bytes=1_400, double_quantized=True),
            layer("nf4", state_bytes=2_176, double_quantized=True),
        ),
        (layer("int8", weight_bytes=16_384, state_bytes=512), layer("int8", weight_bytes=16_384, state_bytes=1_024)),
    ],
)
def test_quantized_layers_take_what_their_format_says(healthy: Layer, fault: Layer) -> None:
    recipe = Recipe("r", "tiny-flux", quantization=Quantization("bitsandbytes_4bit"))
    limits = derive(recipe.contract, compilations=(), offloading=None)

    def verdict(found: Layer) -> Verdict:
        return memory.judge(Evidence(recipe, replace(observation(RESIDENT), layers=(found,)), limits))

    assert verdict(healthy).status == "passed"
    failed_with(verdict(fault), "1 quantized layer larger than the format says", "model.first: ")


def test_tensors_beside_resident_weights_are_found_where_they_are_as_large_as_a_dense_layer() -> None:
    recipe = Recipe("r", "tiny-flux", quantization=Quantization("bitsandbytes_4bit"))
    limits = derive(recipe.contract, compilations=(), offloading=None)

    def verdict(left: int) -> Verdict:
        seen = replace(observation(record(1_060_000, 1_060_000, stays=SIZES, left=left)), layers=(layer("nf4"),))
        return memory.judge(Evidence(recipe, seen, limits))

    assert verdict(20_000).status == "passed"
    failed_with(verdict(32_768), "32.00 KiB stay on the accelerator after the call beside the weights")


@pytest.mark.parametrize(("strategy", "status"), [("group", "passed"), ("model", "failed")])
def test_group_offloading_may_leave_the_scales_and_nothing_more(strategy: Any, status: str) -> None:
    offloading = Offloading(strategy)
    recipe = Recipe("r", "tiny-flux", quantization=Quantization("bitsandbytes_4bit"), offloading=offloading)
    limits = derive(recipe.contract, compilations=(), offloading=offloading)
    scales = replace(layer("nf4"), component="transformer", weight_bytes=8_192, state_bytes=100_000)

    def verdict(stays: int) -> Verdict:
        seen = replace(observation(record(300_000, 300_000, stays={"transformer": stays})), layers=(scales,))
        return memory.judge(Evidence(recipe, replace(seen, layers=(scales,)), limits, None, observation(RESIDENT)))

    words = "transformer has not left the accelerator after the call"
    assert (words in verdict(100_000).text) == (status == "failed")
    failed_with(verdict(110_000), words)


WEIGHTS = tuple(Owner(name, "weights") for name in ("text_encoder", "transformer"))


def with_residency(found: MemoryRecord) -> MemoryRecord:
    """A position a moment: the calls peak at 1, 3, … and end at 2, 4, …; the text encoder grows from end to end."""
    owners = (*WEIGHTS, Owner("transformer", "working"), Owner("", "before"))
    phases = [PhaseResidency("loading", 0, 0, 0, 0)]
    for at, call in enumerate(found.calls):
        ran = f"aten::op{at}"
        phases.append(PhaseResidency(f"call {at}", 2 * at, 2 * at + 2, 2 * at + 1, call.peak_bytes, "transformer", ran))
    rows = [(2048 * at, 0 if at % 2 == 0 else 4096, at, 512) for at in range(2 * len(found.calls) + 1)]
    return replace(found, residency=Residency(owners, tuple(phases), tuple(range(len(rows))), tuple(rows)))


def test_a_peak_that_is_too_high_is_taken_apart() -> None:
    too_high = with_residency(record(5_000_000, 1_050_000, 1_060_000))
    line = (
        "at the peak (call 2, while transformer ran aten::op2): text_encoder weights 10.00 KiB, "
        "transformer weights 4.00 KiB, transformer working 5 B"
    )
    assert line in judge(too_high).evidence
    limited = judge(with_residency(record(500_000, 500_000, 600_000)), contract=Contract(max_memory="500KB"))
    assert line in limited.evidence
    both = judge(too_high, contract=Contract(max_memory="500KB", max_memory_ratio=0.5))
    assert both.evidence.count(line) == 1
    assert not any("at the peak" in one for one in judge(replace(too_high, residency=None)).evidence)


def test_a_peak_that_was_there_when_the_call_began_is_no_operations_doing() -> None:
    found = with_residency(record(1_050_000))
    assert found.residency is not None
    phases = (found.residency.phases[0], PhaseResidency("call 0", 0, 2, 1, 1_050_000))
    verdict = judge(replace(found, residency=replace(found.residency, phases=phases)))
    assert any(line.startswith("at the peak (call 0): transformer weights 4.00 KiB") for line in verdict.evidence)


def test_what_stays_is_told_by_whose_it_is() -> None:
    verdict = judge(with_residency(record(860_000, 860_000, left=400_000)))
    assert "after call 1: text_encoder weights 8.00 KiB, transformer working 4 B" in (verdict.evidence)


def test_what_grows_is_told_by_whose_it_is() -> None:
    verdict = judge(with_residency(record(860_000, 860_000, grown=(0, 64, 128, 192))))
    assert "from call 2 to call 5 grew: text_encoder weights 12.00 KiB, transformer working 6 B" in verdict.evidence


def test_a_line_names_the_largest_and_sums_the_rest() -> None:
    held = {Owner(f"c{at}", "weights"): 1024 * (10 - at) for at in range(8)}
    assert memory._shares(held).endswith("c5 weights 5.00 KiB, 2 more 7.00 KiB")
    assert memory._shares({}) == "nothing"


@pytest.mark.parametrize(("strategy", "status"), [("sequential", "passed"), ("group", "failed"), ("model", "failed")])
def test_sequential_offloading_may_leave_buffers_and_nothing_more(strategy: Any, status: str) -> None:
    def verdict(stays: int) -> Verdict:
        found = record(300_000, 300_000, stays={"transformer": stays})
        calls = tuple(replace(call, buffers={"transformer": 20_000}) for call in found.calls)
        return judge(replace(found, calls=calls), offloading=Offloading(strategy))

    words = "transformer has not left the accelerator after the call"
    assert (words in verdict(20_000).text) == (status == "failed")
    failed_with(verdict(30_000), words)


def test_a_ratio_without_offloading_has_nothing_to_compare_with() -> None:
    recipe = Recipe("r", "tiny-flux", contract=Contract(max_memory_ratio=0.9))
    assert "memory" in checks_for(recipe)
    limits = derive(recipe.contract, compilations=(), offloading=None)
    verdict = memory.judge(Evidence(recipe, observation(RESIDENT), limits))
    assert verdict.status == "unverified"


def test_a_budget_holds_for_the_cold_call_too() -> None:
    contract = Contract(max_memory="900KB")
    assert judge(record(870_000, 860_000, 860_000), contract=contract).status == "passed"
    failed_with(judge(record(910_000, 860_000, 860_000), contract=contract), "the peak of the first call is 888.67 KiB")


def test_a_budget_holds_while_the_pipeline_loads() -> None:
    contract = Contract(max_memory="900KB")
    found = record(870_000, 860_000, 860_000, loading=910_000)
    failed_with(judge(found, contract=contract), "the peak of loading is 888.67 KiB, 878.91 KiB allowed")
    assert judge(found).status == "passed"


def test_a_device_without_memory_of_its_own_is_unverified() -> None:
    verdict = judge(None, kind="cpu")
    assert verdict.status == "unverified"
    assert "the device in use, cpu, has no memory of its own" in verdict.sentence


def test_without_a_run_to_compare_with_it_is_unverified() -> None:
    broken = replace(observation(None), failure=Failure("preparing", "OutOfMemoryError", "sim out of memory"))
    verdict = judge(record(860_000, 860_000), resident=broken)
    assert verdict.status == "unverified"
    assert "OutOfMemoryError: sim out of memory" in verdict.sentence


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (300 << 20, "300.00 MiB"), (3 << 30, "3.00 GiB")],
)
def test_bytes_for_a_person(count: int, shown: str) -> None:
    assert human(count) == shown
