"""Faults that break graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytest_diffopt import Contract

from .conftest import Healthy, Judge, assert_all_pass


class ReadsItem(Healthy):
    """``.item()`` in a branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if y.sum().item() > 1e9:
            y = y + 1
        return self.second(y)


class BreaksTwice(Healthy):
    """Two breaks of different kinds: fullgraph stops at the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        y = self.second(y)
        print("", end="")
        return y.relu()


class Prints(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        print("", end="")
        return self.second(y)


class CallsDisabled(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(outside(self.first(x)))


@torch.compiler.disable
def outside(x: torch.Tensor) -> torch.Tensor:
    return x.relu()


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (ReadsItem, "Tensor.item()"),
        (CallsDisabled, "torch.compiler.disable()"),
        (Prints, "print"),
    ],
)
def test_a_break_is_found_with_its_line_and_its_reason(
    judge: Judge, model: type[nn.Module], cause: str, fullgraph: bool
) -> None:
    verdict = judge(model, fullgraph=fullgraph)["graph_breaks"]
    assert verdict.status == "failed"
    assert verdict.sentence == "1 graph break, 0 allowed"
    assert cause in verdict.text
    assert "test_graph_break_faults.py:" in verdict.text


def test_fullgraph_does_not_hide_the_breaks_after_the_first(judge: Judge) -> None:
    verdict = judge(BreaksTwice, fullgraph=True)["graph_breaks"]
    assert verdict.status == "failed"
    assert verdict.sentence == "2 graph breaks, 0 allowed"
    assert "graph_break()" in verdict.text
    assert "print" in verdict.text


def test_a_break_says_what_to_try(judge: Judge) -> None:
    verdict = judge(ReadsItem)["graph_breaks"]
    assert "capture_scalar_outputs = True" in verdict.evidence[1]


def test_breaks_that_the_contract_allows_pass_and_are_named(judge: Judge) -> None:
    verdict = judge(CallsDisabled, contract=Contract(max_graph_breaks=1))["graph_breaks"]
    assert (verdict.status, verdict.sentence) == ("passed", "1 graph break: 1 within the 1 allowed")
    assert verdict.evidence


def test_one_break_more_than_the_contract_allows_fails(judge: Judge) -> None:
    verdict = judge(BreaksTwice, contract=Contract(max_graph_breaks=1))["graph_breaks"]
    assert (verdict.status, verdict.sentence) == ("failed", "2 graph breaks, 1 allowed")


def test_an_allowed_file_excuses_its_breaks_but_not_under_fullgraph(judge: Judge) -> None:
    contract = Contract(allowed_break_files=("test_graph_break_faults.py",))
    assert judge(CallsDisabled, contract=contract)["graph_breaks"].status == "passed"
    assert judge(CallsDisabled, contract=contract, fullgraph=True)["graph_breaks"].status == "failed"


def test_a_recipe_without_graphs_says_nothing_of_breaks(judge: Judge) -> None:
    class Ignored(Healthy):
        def compile(self, *args: object, **kwargs: object) -> None:
            return None

    assert judge(Ignored)["graph_breaks"].status == "unverified"


def test_a_healthy_model_has_none(judge: Judge) -> None:
    verdicts = judge(Healthy)
    assert_all_pass(verdicts)
    assert verdicts["graph_breaks"].sentence == "no graph break in 1 graph"
