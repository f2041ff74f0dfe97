"""Forecasts with something wrong, each beside a healthy twin: what must not pass for a recipe that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.made_forecasts import GIB, gib, judged, made, phase, recipe


def test_an_expected_peak_below_the_limit_with_a_range_that_reaches_over_it_is_unverified() -> None:
    assert judged(made(gib(14, 15, 16))).status == "passed"
    over = judged(made(replace(gib(14, 15, 16), high=16 * GIB + 1)))
    assert over.status == "unverified"
    assert over.sentence.endswith("while transformer runs: its range reaches 1 B over the 16.00 GiB allowed")


def test_only_a_range_that_lies_over_the_limit_as_a_whole_fails() -> None:
    assert judged(made(gib(16, 17, 18))).status == "unverified"
    assert judged(made(replace(gib(16, 17, 18), low=16 * GIB + 1))).status == "failed"


@pytest.mark.parametrize("told", ["in phases alone", "as the peak"])
def test_a_peak_of_loading_counts_though_every_call_stays_below_the_limit(told: str) -> None:
    def with_loading(size: float) -> Any:
        phases = (phase("load", "transformer", gib(size)), *made().phases[1:])
        if told == "in phases alone":
            return made(phases=phases)
        return made(phases=phases, peak=gib(size), peak_phase="load", peak_operation="aten::to")

    assert judged(with_loading(15.75)).status == "passed"
    verdict = judged(with_loading(17))
    assert verdict.status == "failed"
    assert "while transformer loads: 16.00 GiB allowed, at least 1.00 GiB too little" in verdict.sentence
    assert (verdict.figures["phase"], verdict.figures["load_peak_bytes"]) == ("load", 17 * GIB)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"recipe": "other"}, "the forecast is of the recipe 'other', not of this one"),
        ({"model": "flux.1-schnell"}, "the forecast is of flux.1-schnell; asked for was flux.1-dev"),
    ],
)
def test_a_forecast_of_another_recipe_or_model_is_unverified(fields: dict[str, str], why: str) -> None:
    verdict = judged(made(**fields))
    assert (verdict.status, verdict.sentence) == ("unverified", why)
    assert judged(made(model="Black-Forest-Labs/flux.1-dev")).status == "passed"
    assert judged(made(model="a-directory"), models=()).status == "passed"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"peak": replace(gib(1), high=float("nan"))}, f"{GIB}, {GIB}, nan"),  # type: ignore[arg-type]
        ({"peak": replace(gib(1), low=-1)}, f"-1, {GIB}, {GIB}"),
        ({"peak": replace(gib(1), low=GIB + 1)}, f"{GIB + 1}, {GIB}, {GIB}"),
        ({"reserved": replace(gib(1), expected=float("inf"))}, f"{GIB}, inf, {GIB}"),  # type: ignore[arg-type]
        ({"phases": (phase("call", "", replace(gib(1), high=0)),)}, f"{GIB}, {GIB}, 0"),
    ],
)
def test_numbers_that_are_no_range_of_bytes_are_unverified(fields: dict[str, Any], shown: str) -> None:
    verdict = judged(made(**fields))
    why = f"the forecast of flux.1-dev has no range of bytes where one must be, but {shown}"
    assert (verdict.status, verdict.sentence) == ("unverified", why)


def test_a_forecast_in_which_nothing_came_to_the_accelerator_is_unverified() -> None:
    verdict = judged(made(gib(0), phases=(), live_at_peak=()))
    why = "nothing of flux.1-dev was on the accelerator in its forecast"
    assert (verdict.status, verdict.sentence) == ("unverified", why)


def test_a_forecast_without_a_call_proves_nothing_but_that_loading_takes_too_much() -> None:
    loading = (phase("load", "transformer", gib(15)),)
    verdict = judged(made(gib(15), phases=loading, peak_phase="load"))
    assert verdict.status == "unverified"
    assert verdict.sentence.endswith(
        "within the 16.00 GiB allowed as far as is known; unknown: no call was forecast, so the peak of one is not known"
    )
    assert judged(made(gib(17), phases=loading, peak_phase="load")).status == "failed"
    assert judged(made(gib(15), phases=(*loading, phase("call", "vae", gib(2))), peak_phase="load")).status == "passed"


def test_a_peak_below_the_weights_that_must_be_there_is_unverified() -> None:
    weights = {"transformer": 12 * GIB, "text_encoder": 4 * GIB}
    without_offloading = judged(made(weights_bytes=weights))
    assert without_offloading.status == "unverified"
    assert without_offloading.sentence.endswith(
        "unknown: all weights take 16.00 GiB, so some were never on the accelerator"
    )
    by_model = recipe(offloading={"strategy": "model"})
    assert judged(made(weights_bytes=weights), by_model).status == "passed"
    never = judged(made(weights_bytes={**weights, "transformer": 15.75 * GIB}), by_model)
    assert never.sentence.endswith("the weights of transformer take 15.75 GiB, so it was never there as a whole")
    assert judged(made(weights_bytes={**weights, "vae": 20 * GIB}), by_model).status == "passed"  # it never ran
    by_group = recipe(offloading={"strategy": "group"})
    assert judged(made(weights_bytes={"transformer": 22 * GIB}), by_group).status == "passed"


def test_what_could_not_be_known_never_passes() -> None:
    verdict = judged(made(unknown=("a kernel of flash_attn was not run.",)))
    assert verdict.status == "unverified"
    assert verdict.sentence.endswith(
        "within the 16.00 GiB allowed as far as is known; unknown: a kernel of flash_attn was not run"
    )
    assert judged(made(gib(17), unknown=("a kernel of flash_attn was not run.",))).status == "failed"


def test_a_card_must_hold_what_the_allocator_reserves_and_cudas_context_too() -> None:
    on_card = recipe(None, "rtx-4090")
    assert judged(made(gib(22)), on_card).status == "passed"
    reserving = judged(made(gib(22), reserved=gib(22, 22.5, 23)), on_card)
    assert reserving.status == "unverified"
    assert judged(made(gib(22), reserved=gib(0)), on_card).status == "passed"
    assert judged(made(gib(22, 23, 23.4), reserved=gib(0)), on_card).status == "unverified"
    assert judged(made(gib(23.2)), on_card).status == "failed"


def test_one_promise_that_holds_does_not_hide_one_that_is_broken() -> None:
    assert judged(made(), recipe("16GiB", "rtx-4090")).status == "passed"
    assert judged(made(), recipe("16GiB", "rtx-4060")).status == "failed"
    assert judged(made(), recipe("14GiB", "rtx-4090")).status == "failed"
    assert judged(made(), recipe("15.2GiB", "rtx-4060")).status == "failed"
    assert judged(made(), recipe("15.2GiB", "rtx-4090")).status == "unverified"
