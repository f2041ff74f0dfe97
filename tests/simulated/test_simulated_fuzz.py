"""Random programs run alike on the host and on the device.

``DIFFOPT_FUZZ_EXAMPLES=5000`` draws that many new ones; without it the same ones are drawn on every run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_diffopt.accelerators import simulated
from tests.simulated.random_programs import NAMES, OPERATIONS, Operation, Step, Twins, run

EXAMPLES = os.environ.get("DIFFOPT_FUZZ_EXAMPLES")

steps: st.SearchStrategy[Step] = st.tuples(st.sampled_from(NAMES), st.tuples(*[st.integers(0, 255)] * 5))
programs = st.lists(steps, min_size=20, max_size=60)


def some(examples: int) -> settings:
    return settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def caching() -> Iterator[None]:
    simulated.set_caching_allocator(True)
    yield
    simulated.set_caching_allocator(False)


@some(60)
@given(programs)
def test_a_random_program_runs_alike_on_both_sides(program: list[Step]) -> None:
    run(program)


@some(25)
@given(programs, st.integers(0, 3000))
def test_what_does_not_fit_leaves_everything_as_it_was(program: list[Step], limit_bytes: int) -> None:
    run(program, limit_bytes=limit_bytes)


@some(20)
@given(programs)
@pytest.mark.usefixtures("caching")
def test_the_caching_allocator_loses_no_byte_either(program: list[Step]) -> None:
    run(program)
    torch.cuda.empty_cache()
    for index in range(2):
        stats = torch.cuda.memory_stats(index)
        # what outlives a test of this process was taken before caching was on
        assert (
            torch.cuda.memory_reserved(index)
            == torch.cuda.memory_allocated(index)
            == stats["requested_bytes.all.current"]
        )


def test_every_operation_of_the_programs_can_succeed() -> None:
    """One that never does compares nothing."""
    made = [
        ("zeros", (6, 0, 0, 0, 0)),
        ("channels_last", (0, 0, 0, 0, 0)),
        ("randn", (4, 0, 0, 3, 0)),
        ("randn", (2, 0, 0, 3, 0)),
        ("ones", (5, 0, 0, 0, 0)),
        ("ones", (3, 8, 0, 0, 0)),
        ("ones", (0, 7, 0, 0, 0)),
        ("randint", (3, 0, 0, 1, 0)),
        ("randn", (11, 0, 0, 1, 0)),
        ("randn", (1, 0, 0, 1, 0)),
        ("randn", (12, 0, 0, 1, 0)),
    ]
    failed = []
    for name in OPERATIONS:
        both = sorted(itertools.product(range(len(made)), repeat=2), key=lambda pair: pair[0] != pair[1])
        tries = ((name, (0, 0, 0, first, second)) for first, second in both)
        if not any(run([*made, one], after_step=lambda twins: None) > len(made) for one in tries):
            failed.append(name)
    assert failed == []


def _break(monkeypatch: pytest.MonkeyPatch, on_device: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """One more operation, which does something else on the device than on the host."""
    monkeypatch.setitem(
        OPERATIONS, "broken", Operation(lambda d, x: x.clone() if d.device == "cpu" else on_device(x), 1)
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda x: x + 1e-7, "tensor 1: tensor"),
        (lambda x: x.mul(-1).mul(-1.0000001), "tensor 1: tensor"),
        (lambda x: x.t().contiguous().t(), "layout"),
        (lambda x: x.double(), "layout"),
        (lambda x: x.view(7), "only the device raised"),
        (lambda x: x.detach(), "memory is shared on the device only"),
        (lambda x: torch.cat([x, x])[: len(x)], "48 and 96 bytes|a view on one side only"),
        (lambda x: (x.clone(), LEAKED.append(torch.zeros(3, device="cuda")))[0], r"tells \d+ bytes, its tensors hold"),
    ],
)
def test_a_difference_between_the_sides_is_noticed(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    LEAKED.clear()
    _break(monkeypatch, fault)
    with pytest.raises(AssertionError, match=said):
        run([("ones", (1, 0, 0, 0, 0)), ("broken", (0, 0, 0, 0, 0))])
    LEAKED.clear()


def test_bytes_that_outlive_the_program_are_noticed() -> None:
    held: list[torch.Tensor] = []

    def hold(twins: Twins) -> None:
        held.extend(twins.device)

    with pytest.raises(AssertionError, match="bytes were on the devices"):
        run([("ones", (1, 0, 0, 0, 0))], after_step=hold)


LEAKED: list[torch.Tensor] = []
