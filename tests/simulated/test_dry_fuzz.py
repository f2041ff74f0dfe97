"""Random programs count the same, computed and dry.

``DIFFOPT_FUZZ_EXAMPLES=5000`` draws that many new ones; without it the same ones are drawn on every run.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_diffopt.accelerators import simulated
from tests.simulated.dry_programs import DRY_NAMES, compare
from tests.simulated.random_programs import OPERATIONS, Operation, Step
from tests.simulated.test_simulated_fuzz import some

steps: st.SearchStrategy[Step] = st.tuples(st.sampled_from(DRY_NAMES), st.tuples(*[st.integers(0, 255)] * 5))
programs = st.lists(steps, min_size=20, max_size=60)


@some(60)
@given(programs, st.sampled_from([0, 8, 16, 40, 100]))
def test_a_random_program_counts_the_same_computed_and_dry(program: list[Step], real_bytes: int) -> None:
    compare(program, real_bytes)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda x: x.clone() if simulated.is_dry() else x.clone() * 1, "allocations"),
        (lambda x: x.double() if simulated.is_dry() else x.clone(), "step 1, broken: .*float32.*float64"),
        (lambda x: x + simulated.is_dry(), "has other values"),
        (lambda x: x.detach() if simulated.is_dry() else x.clone(), "step 1, broken"),
        (lambda x: x.view(7) if simulated.is_dry() else x.clone(), "computed well, dry RuntimeError"),
    ],
)
def test_a_difference_between_the_runs_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: Operation, said: str) -> None:
    monkeypatch.setitem(OPERATIONS, "broken", Operation(lambda d, x: fault(x), 1))  # type: ignore[operator]
    with pytest.raises(AssertionError, match=said):
        compare([("ones", (1, 0, 0, 0, 0)), ("broken", (0, 0, 0, 0, 0))], real_bytes=100)


def test_most_of_what_is_compared_is_hollow() -> None:
    made = [("randn", (3, 0, 0, 1, 0)), ("exp", (0, 0, 0, 0, 0)), ("matmul", (0, 0, 0, 0, 0))]
    assert compare([step for step in made if step[0] in OPERATIONS], real_bytes=0) >= 3
    assert simulated.is_dry() is False  # type: ignore[attr-defined]
