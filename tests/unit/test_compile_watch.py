"""The compile watch is right where torch's own counters are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from pytest_diffopt.errors import UnsupportedTorchError
from pytest_diffopt.observation import private_torch
from pytest_diffopt.observation.compilation import CompileWatch, explain_break
from pytest_diffopt.observation.observation import CompileRecord
from pytest_diffopt.preparation.borrowed_state import borrowed_state


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with borrowed_state():
        yield


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


class SkippedWhole(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.device("cpu"):
            return super().forward(x)


class Counts(Layer):
    step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return super().forward(x) * self.step


def watched(model: Any, *, calls: int = 3, **compilation: Any) -> CompileRecord:
    with CompileWatch() as watch:
        model.compile(**{"backend": "eager", **compilation})
        for call in range(calls):
            watch.call = call
            model(torch.ones(2, 8))
    return watch.record


def test_a_healthy_model_is_one_engaged_graph_and_three_runs() -> None:
    record = watched(Layer())
    assert record.graphs == 1
    assert [(r.call, r.entries, r.engaged, r.graph_runs) for r in record.regions] == [
        (0, 1, 1, 1),
        (1, 1, 1, 1),
        (2, 1, 1, 1),
    ]
    assert (record.graph_breaks, record.recompiles, record.limits) == ((), (), ())


def test_a_frame_skipped_whole_is_a_break_though_torch_counts_none() -> None:
    torch._dynamo.utils.counters.clear()
    record = watched(SkippedWhole())
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    assert [(b.skipped_frame, b.reason) for b in record.graph_breaks] == [(True, "Unsupported context manager")]
    assert [r.engaged for r in record.regions] == [0, 0, 0]


def test_an_exhausted_limit_is_seen_and_the_silence_after_it_too() -> None:
    record = watched(Counts(), calls=12)
    assert len(record.limits) == 1
    assert record.limits[0].limit == "recompile_limit"
    assert [r.engaged for r in record.regions] == [1] * 8 + [0] * 4


def test_error_on_recompile_that_is_suppressed_is_seen() -> None:
    torch._dynamo.config.error_on_recompile = True
    torch._dynamo.config.suppress_errors = True
    record = watched(Counts(), calls=1)
    record = watched(Counts(), calls=2)
    failed = [f for f in record.frames if f.outcome == "failed"]
    assert failed
    assert "___dict_contains" in failed[0].guards[0]
    assert record.regions[1].engaged == 0


def test_more_compiles_are_seen_than_torchs_metrics_keep() -> None:
    with CompileWatch() as watch:
        for number in range(70):
            scope: dict[str, Any] = {}
            exec(f"def f{number}(x): return x + {number}", scope)
            torch.compile(scope[f"f{number}"], backend="eager")(torch.ones(2))
    assert watch.record.graphs == 70


def test_the_first_compile_is_no_recompile_and_the_guard_that_failed_is_named() -> None:
    record = watched(Counts(), calls=2)
    assert [f.recompile for f in record.frames] == [False, True]
    assert record.frames[1].guards == ("not ___dict_contains('step', self.__dict__)",)


def test_compiles_from_before_the_watch_are_not_counted_and_its_end_is_final() -> None:
    model = Layer()
    model.compile(backend="eager")
    model(torch.ones(2, 8))
    with CompileWatch() as watch:
        model(torch.ones(2, 8))
    assert watch.record.graphs == 0
    model(torch.ones(3, 8))
    assert watch.record.frames == ()


def test_a_function_and_an_optimized_module_are_regions_too() -> None:
    with CompileWatch() as watch:
        torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.ones(2))
        torch.compile(Layer(), backend="eager")(torch.ones(2, 8))
    assert [(r.entries, r.engaged) for r in watch.record.regions] == [(1, 1), (1, 1)]


def test_a_region_inside_a_region_is_counted_by_itself() -> None:
    inner = torch.compile(Layer(), backend="eager")

    class Outer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            return outside(x) * 2

    @torch.compiler.disable(recursive=False)
    def outside(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = inner(x)
        return result

    with torch.no_grad():
        record = watched(Outer(), calls=1)
    assert [r.region for r in record.regions] == ["Layer", "Outer"]
    assert all(r.entries == r.engaged for r in record.regions)


def test_two_watches_at_once_see_the_same() -> None:
    with CompileWatch() as first, CompileWatch() as second:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert first.record == second.record
    assert first.record.graphs == 1


def test_torchs_functions_are_given_back_also_after_a_raise() -> None:
    def names() -> list[Any]:
        found = []
        for entry in private_torch.PRIVATE_NAMES:
            holder, name = private_torch._resolve(entry)
            found.append(getattr(holder, name))
        return found

    before = names()
    with pytest.raises(ValueError, match="inside"), CompileWatch():
        assert names() != before
        raise ValueError("inside")
    assert names() == before


def test_a_needed_private_name_that_is_missing_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._dynamo.convert_frame._compile")
    with pytest.raises(UnsupportedTorchError, match=r"lacks what the compile watch needs: torch\._dynamo\.convert_fra"):
        CompileWatch().__enter__()


def test_every_private_name_is_there_in_this_torch() -> None:
    assert private_torch.missing_names() == []


def test_a_break_is_explained_in_three_short_lines() -> None:
    text = """Unsupported Tensor.item() call
  Explanation: Dynamo does not
    support it.
  Hint: Set this.
  Hint: Or that.

  Developer debug context: call_method"""
    assert explain_break(text) == ("Unsupported Tensor.item() call", "Dynamo does not support it.", "Set this.")
