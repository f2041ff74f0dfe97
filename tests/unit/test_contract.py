"""Limits are derived from a recipe's parts, and what the author gave wins."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pytest_diffopt.contract import OFFLOADING_HOOK_FILES, Contract, Limits, derive, parse_bytes
from pytest_diffopt.errors import RecipeError
from pytest_diffopt.recipe import Compilation, Offloading

WHOLE = (Compilation("transformer"),)
BLOCKS = (Compilation("transformer", scope="repeated_blocks"),)
OFFLOADED = Offloading("model")


def lines(error: RecipeError) -> list[str]:
    return [str(problem) for problem in error.problems]


def test_without_hooks_nothing_breaks_and_each_code_recompiles_at_most_once_during_warm_up() -> None:
    assert derive(Contract(), compilations=WHOLE, offloading=None) == Limits(
        max_graph_breaks=0,
        allowed_break_files=(),
        warmup_calls=1,
        max_recompiles=None,
        max_recompiles_after_warmup=0,
        recompiles_per_code=1,
        parity_multiple=3.0,
        max_memory_ratio=None,
        max_memory_bytes=None,
    )


def test_with_hooks_breaks_are_allowed_in_their_own_files_and_only_the_recompile_limit_bounds_the_warm_up() -> None:
    limits = derive(Contract(), compilations=WHOLE, offloading=OFFLOADED)
    assert limits.max_graph_breaks == 0
    assert limits.allowed_break_files == OFFLOADING_HOOK_FILES
    assert limits.allowed_break_files == (
        "accelerate/hooks.py",
        "diffusers/hooks/hooks.py",
        "diffusers/hooks/group_offloading.py",
    )
    assert (limits.warmup_calls, limits.recompiles_per_code, limits.max_recompiles_after_warmup) == (2, None, 0)


@pytest.mark.parametrize(
    ("compilations", "offloading", "expected"),
    [(WHOLE, None, 1), (BLOCKS, None, 1), ((), None, 0), (WHOLE, OFFLOADED, None), (BLOCKS, OFFLOADED, None)],
)
def test_recompiles_for_each_code_follow_from_the_parts(
    compilations: tuple[Compilation, ...], offloading: Offloading | None, expected: int | None
) -> None:
    assert derive(Contract(), compilations=compilations, offloading=offloading).recompiles_per_code == expected


def test_a_given_total_of_recompiles_replaces_the_budget_for_each_code_and_holds_after_warm_up_too() -> None:
    limits = derive(Contract(max_recompiles=5), compilations=WHOLE, offloading=None)
    assert (limits.max_recompiles, limits.max_recompiles_after_warmup, limits.recompiles_per_code) == (5, 5, None)


def test_a_given_budget_after_warm_up_is_kept_beside_a_total() -> None:
    limits = derive(Contract(max_recompiles=5, max_recompiles_after_warmup=1), compilations=WHOLE, offloading=None)
    assert (limits.max_recompiles, limits.max_recompiles_after_warmup) == (5, 1)


def test_a_total_of_no_recompiles_is_not_taken_for_an_open_one() -> None:
    limits = derive(Contract(max_recompiles=0), compilations=WHOLE, offloading=OFFLOADED)
    assert (limits.max_recompiles, limits.max_recompiles_after_warmup, limits.recompiles_per_code) == (0, 0, None)


def test_what_the_author_gives_wins_over_what_the_parts_imply() -> None:
    given = Contract(
        max_graph_breaks=4,
        allowed_break_files=(),
        warmup_calls=3,
        parity_multiple=2,
        max_memory_ratio=0.5,
        max_memory="1.5GiB",
    )
    limits = derive(given, compilations=WHOLE, offloading=OFFLOADED)
    assert (limits.max_graph_breaks, limits.allowed_break_files, limits.warmup_calls) == (4, (), 3)
    assert (limits.parity_multiple, limits.max_memory_ratio, limits.max_memory_bytes) == (2.0, 0.5, 3 * 2**29)
    assert type(limits.parity_multiple) is float


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (1, 1),
        (12_884_901_888, 12_884_901_888),
        ("1B", 1),
        ("2KB", 2_000),
        ("3 MB", 3_000_000),
        ("4GB", 4_000_000_000),
        ("1TB", 10**12),
        ("2KiB", 2_048),
        ("3MiB", 3 * 2**20),
        (" 12GiB ", 12 * 2**30),
        ("1TiB", 2**40),
        ("1.1GB", 1_100_000_000),
    ],
)
def test_bytes_are_read_in_thousands_and_in_1024s(written: str | int, expected: int) -> None:
    assert parse_bytes(written) == expected


@pytest.mark.parametrize(
    "wrong", ["12 gigs", "", "GiB", "12", "12gib", "-1GiB", "1e3MB", "0.1B", 0, -5, True, 1.5, None]
)
def test_what_is_no_size_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^max_memory: found .+; write bytes as an int, or a number with one of: "):
        parse_bytes(wrong)


def test_a_wrong_size_is_refused_with_the_units() -> None:
    with pytest.raises(ValueError) as caught:
        parse_bytes("12 gigs")
    assert str(caught.value) == (
        "max_memory: found '12 gigs'; write bytes as an int, or a number with one of: "
        "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
    )


def test_a_wrong_size_is_named_as_its_caller_names_it() -> None:
    with pytest.raises(ValueError, match=r"^limit: found '1 gig'; "):
        parse_bytes("1 gig", "limit")


def test_every_wrong_limit_is_named_at_once() -> None:
    wrong: dict[str, Any] = {
        "max_graph_breaks": -1,
        "allowed_break_files": {"a", "b"},
        "max_recompiles": True,
        "max_recompiles_after_warmup": 1.5,
        "warmup_calls": -1,
        "parity_multiple": 0,
        "max_memory_ratio": float("nan"),
        "max_memory": "12 gigs",
    }
    with pytest.raises(RecipeError) as caught:
        Contract(**wrong, max_graph_brakes=3)  # type: ignore[call-arg]
    error = caught.value
    assert error.source == "Contract(...)"
    assert [problem.path for problem in error.problems] == [*wrong, "max_graph_brakes"]
    assert lines(error)[0] == "max_graph_breaks: found -1; an int >= 0"
    assert lines(error)[2:7] == [
        "max_recompiles: found True; an int >= 0",
        "max_recompiles_after_warmup: found 1.5; an int >= 0",
        "warmup_calls: found -1; an int >= 0",
        "parity_multiple: found 0; a number > 0",
        "max_memory_ratio: found nan; a finite number",
    ]
    assert lines(error)[7] == (
        "max_memory: found '12 gigs'; write bytes as an int, or a number with one of: "
        "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
    )
    assert error.problems[8].allowed.startswith("did you mean 'max_graph_breaks'? allowed keys: max_graph_breaks, ")


def test_contracts_are_equal_by_content_and_print_only_what_was_given() -> None:
    one, other = Contract(3, "hooks.py"), Contract(max_graph_breaks=3, allowed_break_files=("hooks.py",))  # type: ignore[arg-type]
    assert one == other
    assert hash(one) == hash(other)
    assert one != Contract(3)
    assert repr(one) == "Contract(max_graph_breaks=3, allowed_break_files=('hooks.py',))"
    assert repr(Contract()) == "Contract()"


def test_importing_recipes_and_contracts_imports_neither_torch_nor_numpy_nor_diffusers() -> None:
    code = (
        "import sys, pytest_diffopt.recipe, pytest_diffopt.contract; "
        "print([name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_parity_is_judged_in_a_wider_dtype_or_the_mistake_is_named() -> None:
    from pytest_diffopt.recipe import Recipe

    with pytest.raises(RecipeError) as caught:
        Contract(parity_dtype="bfloat16")  # type: ignore[arg-type]
    assert lines(caught.value) == [
        "parity_dtype: found 'bfloat16'; did you mean 'float64'? allowed: 'float32' or 'float64'"
    ]
    plain = Recipe("r", "tiny-flux", dtype="bfloat16")
    sharp = plain.replace(contract={"parity_dtype": "float32"})
    assert sharp.content_hash == plain.content_hash  # both are observed once, and have one baseline
    assert Recipe.from_dict(sharp.to_dict()) == sharp != plain
