"""The search for the smallest failing subset: against brute force, and what it says of verdicts that are made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_diffopt import Caching, Compilation, Offloading, Quantization, Recipe, Verdict
from pytest_diffopt.checks.isolation import MOST_RUNS, Judged, causes_of, isolated, parts_of, with_only
from pytest_diffopt.checks.subsets import Smallest, smallest

Answer = bool | None


def every_subset(parts: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [subset for size in range(len(parts) + 1) for subset in itertools.combinations(parts, size)]


@st.composite
def properties(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[tuple[int, ...], Answer]]:
    """Any property of subsets, one that is neither monotone nor always answered; the whole has it."""
    parts = tuple(range(draw(st.integers(0, 5))))
    answers: dict[tuple[int, ...], Answer] = {
        subset: draw(st.sampled_from([True, False, False, None])) for subset in every_subset(parts)
    }
    return parts, answers | {parts: True}


@given(properties())
def test_it_finds_what_brute_force_finds(made: tuple[tuple[int, ...], dict[tuple[int, ...], Answer]]) -> None:
    parts, answers = made
    found = smallest(parts, answers.__getitem__)
    holding = [subset for subset in every_subset(parts) if answers[subset]]
    assert found.subset == holding[0]
    assert len(holding[0]) == min(map(len, holding))
    before = every_subset(parts)[: every_subset(parts).index(holding[0])]
    assert found.tried == sum(answers[one] is not None for one in before) + (holding[0] != parts)


@given(properties(), st.integers(0, 40))
def test_the_bound_holds_and_what_is_said_within_it_is_true(
    made: tuple[tuple[int, ...], dict[tuple[int, ...], Answer]], most: int
) -> None:
    parts, answers = made
    asked: list[tuple[int, ...]] = []

    def holds(subset: tuple[int, ...]) -> Answer:
        asked.append(subset)
        return answers[subset]

    found = smallest(parts, holds, most=most)
    assert found.tried == sum(answers[one] is not None for one in asked) <= most
    assert parts not in asked
    if found.subset is None:
        assert found.tried == most
        assert not any(answers[one] for one in every_subset(parts) if len(one) <= found.complete)
    else:
        assert found == smallest(parts, answers.__getitem__)


def test_the_whole_is_never_asked_about_and_no_parts_are_the_smallest_of_none() -> None:
    def never(subset: tuple[int, ...]) -> bool:
        raise AssertionError(subset)

    assert smallest((), never) == Smallest((), 0, -1)


RECIPE = Recipe(
    "r",
    "p",
    quantization=[
        Quantization("torchao", "a", {"quant_type": "Int8WeightOnlyConfig"}),
        Quantization("torchao", "b", {"quant_type": "Int8WeightOnlyConfig"}),
    ],
    compilation=[Compilation("a"), Compilation("b")],
    offloading=Offloading("model"),
    dynamo={"verbose": True},
    attention={"a": "native"},
    caching=Caching("a", "first_block_cache"),
    order=["offloading", "quantization", "compilation"],
    vae_tiling=True,
    isolate=True,
)


def test_each_part_can_be_taken_away_and_the_rest_stays() -> None:
    parts = parts_of(RECIPE)
    assert [part.label for part in parts] == [
        "quantization (torchao of a)",
        "quantization (torchao of b)",
        "offloading (model)",
        "compilation (a)",
        "compilation (b)",
        "attention (a)",
        "caching (first_block_cache of a)",
        "dynamo (verbose)",
    ]
    assert with_only(RECIPE, parts).content_hash == RECIPE.content_hash
    assert with_only(RECIPE, ()) == Recipe("r", "p", vae_tiling=True)
    assert with_only(RECIPE, [parts[1], parts[3]]) == Recipe(
        "r",
        "p",
        quantization=Quantization("torchao", "b", {"quant_type": "Int8WeightOnlyConfig"}),
        compilation=Compilation("a"),
        vae_tiling=True,
    )
    for part in parts:
        one = with_only(RECIPE, [part])
        assert [left.field for left in parts_of(one)] == [part.field]


def verdict(sentence: str, check: str = "parity", **figures: Any) -> Verdict:
    return Verdict(check, "r", "failed", sentence, figures, ("evidence",))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            verdict("transformer, step 0 of call 0 is the first to differ: by 0.1 of its size"),
            verdict("transformer, step 2 of call 1 is the first to differ: scaled by 1.2 on average"),
        ),
        (
            verdict("transformer or vae is the first to differ: seen in vae, step 0 of call 0, by 0.1 of its size"),
            verdict("vae, step 0 of call 0 is the first to differ: by 0.1 of its size"),
        ),
        (
            verdict("the peak of a call is 3.5 MiB, 4 MiB without offloading; memory grows by 1 KiB a call", "memory"),
            verdict("the peak of a call is 12 B, 5 MiB without offloading", "memory"),
        ),
        (
            verdict("vae has not left the accelerator after the call", "memory"),
            verdict("vae has not left the accelerator after call 12; it grows", "memory"),
        ),
        (
            verdict("the recipe did not run: RuntimeError: at 0x7f12 of 3 (while preparing)", error="RuntimeError"),
            verdict("the recipe did not run: RuntimeError: at 0x8a of 4 (while running call 2)", "state", error="x"),
        ),
        (verdict("a was left changed", "state", changed=["a", "b"]), verdict("b and", "state", changed=["b"])),
    ],
)
def test_a_failure_is_known_again_with_other_numbers(one: Verdict, other: Verdict) -> None:
    assert causes_of(one) & causes_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            verdict("transformer, step 0 of call 0 is the first to differ: by 0.1 of its size"),
            verdict("text_encoder, step 0 of call 0 is the first to differ: by 0.1 of its size"),
        ),
        (
            verdict("transformer, step 0 of call 0 is the first to differ: by 0.1"),
            verdict("transformer, step 0 of call 0 is not finite (NaN or infinity)"),
        ),
        (verdict("text_encoder has not left", "memory"), verdict("text_encoder_2 has not left", "memory")),
        (
            verdict("the recipe did not run: RuntimeError: a (while preparing)", error="RuntimeError"),
            verdict("the recipe did not run: RuntimeError: b (while preparing)", error="RuntimeError"),
        ),
        (verdict("a", "state", changed=["a"]), verdict("a", "state", changed=["b"])),
    ],
)
def test_another_failure_is_another(one: Verdict, other: Verdict) -> None:
    assert not causes_of(one) & causes_of(other)


def test_breaks_and_recompiles_are_the_same_by_their_line_and_reason() -> None:
    failed = verdict("1 graph break, 0 allowed", "graph_breaks")
    at = [("transformer a.py:12", "called 3 times")]
    assert causes_of(failed, at) == causes_of(failed, [("transformer a.py:12", "called 4 times")])
    assert not causes_of(failed, at) & causes_of(failed, [("transformer a.py:13", "called 3 times")])
    assert not causes_of(failed, at) & causes_of(failed, [("transformer a.py:12", "print was called")])


THREE = Recipe(
    "r",
    "p",
    quantization=Quantization("layerwise_casting"),
    compilation=Compilation("a"),
    offloading=Offloading("model"),
    isolate=True,
)
CAUSE = frozenset({"this"})
FAILS, PASSES, OTHER = Judged("failed", CAUSE | {"more"}), Judged("passed"), Judged("failed", frozenset({"that"}))


def judged_by(answer: Callable[[set[str]], Judged]) -> Callable[[Recipe], Judged]:
    return lambda recipe: answer({part.field for part in parts_of(recipe)})


@pytest.mark.parametrize(
    ("answer", "line", "labels", "runs"),
    [
        (
            lambda parts: FAILS if {"quantization", "offloading"} <= parts else PASSES,
            "quantization (layerwise_casting) + offloading (model); each alone passes",
            ["quantization (layerwise_casting)", "offloading (model)"],
            5,
        ),
        (
            lambda parts: FAILS if "offloading" in parts else PASSES,
            "offloading (model), alone",
            ["offloading (model)"],
            3,
        ),
        (
            lambda parts: Judged(None) if "compilation" not in parts else FAILS if len(parts) > 1 else PASSES,
            "quantization (layerwise_casting) + compilation (a); neither fails alone",
            ["quantization (layerwise_casting)", "compilation (a)"],
            2,
        ),
        (
            lambda parts: FAILS if len(parts) == 2 else OTHER,
            "quantization (layerwise_casting) + offloading (model); no smaller subset fails like this",
            ["quantization (layerwise_casting)", "offloading (model)"],
            5,
        ),
        (
            lambda parts: PASSES,
            (
                "quantization (layerwise_casting) + offloading (model) + compilation (a); "
                "no smaller subset fails like this"
            ),
            ["quantization (layerwise_casting)", "offloading (model)", "compilation (a)"],
            7,
        ),
        (
            lambda parts: FAILS if len(parts) == 2 else Judged("unverified"),
            "quantization (layerwise_casting) + offloading (model); 3 smaller subsets could not be judged",
            ["quantization (layerwise_casting)", "offloading (model)"],
            5,
        ),
        (lambda parts: FAILS, "the bare pipeline fails like this, with none of the recipe's parts", [], 1),
    ],
)
def test_the_smallest_subset_is_named(
    answer: Callable[[set[str]], Judged], line: str, labels: list[str], runs: int
) -> None:
    failed = verdict("it broke", required=1)
    found = isolated(THREE, failed, judged_by(answer), CAUSE)
    assert (found.status, found.sentence) == ("failed", "it broke")
    assert found.evidence == ("evidence", f"smallest failing: {line}")
    assert found.figures == {"required": 1, "smallest_failing": labels, "subsets_judged": runs}


def test_the_search_stops_and_says_what_it_knows() -> None:
    asked: list[Recipe] = []

    def judge(recipe: Recipe) -> Judged:
        asked.append(recipe)
        return PASSES

    found = isolated(RECIPE, verdict("it broke"), judge, CAUSE)
    assert len(asked) == MOST_RUNS == 16
    assert found.figures["smallest_failing"] is None
    assert found.evidence[-1] == (
        "smallest failing: not found, none with up to 1 of the 8 parts fails like this; the search stopped after 16 subsets"
    )


def test_a_recipe_without_parts_and_a_forecast_are_left_as_they_are() -> None:
    def never(recipe: Recipe) -> Judged:
        raise AssertionError(recipe)

    for recipe, failed in ((Recipe("r", "p"), verdict("a")), (THREE, verdict("20 GiB", "forecast"))):
        assert isolated(recipe, failed, never, CAUSE) is failed
