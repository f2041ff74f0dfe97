"""Recipes whose own code raises: no check passes of them, and one verdict says where."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch

from pytest_diffopt import Call, Compilation, Recipe, assert_recipe, observe
from pytest_diffopt.checks import RecipeFailed
from pytest_diffopt.preparation import compilation
from pytest_diffopt.source_places import MOST_LINES

from .conftest import WIDTH, Healthy, Judge, TwoPart, Verdicts, assert_all_pass, inputs


def assert_crashed(verdicts: Verdicts, sentence: str) -> None:
    """The first verdict has the cause, every other one refers to it, and none passes."""
    first, *rest = verdicts.values()
    assert {verdict.status for verdict in verdicts.values()} == {"failed"}
    assert first.sentence == f"the recipe did not run: {sentence}"
    assert first.traceback
    for verdict in rest:
        see = f"the recipe did not run: see {first.check}"
        assert see in (verdict.sentence, *verdict.evidence[-1:])
        assert sentence not in verdict.text
        assert verdict.traceback == ()


def place(verdicts: Verdicts, function: str) -> str:
    """The line of evidence of the first verdict that names a function of this file."""
    first = next(iter(verdicts.values()))
    return next(line for line in first.evidence if re.search(rf"test_crash_faults\.py:\d+, in {function}: ", line))


class Raises(TwoPart):
    """Everything that is compiled runs; the pipeline itself raises, in the call of that number."""

    def __init__(self, call: int = 0) -> None:
        super().__init__(Healthy(), Healthy())
        self.calls = 0
        self.in_call = call

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        made = super().__call__(prompt, num_inference_steps)
        self.calls += 1
        if self.calls > self.in_call:
            raise ValueError("no such picture")
        return made


@pytest.mark.parametrize("call", [0, 1])
def test_a_pipeline_that_raises_passes_no_check_and_says_where(judge: Judge, call: int) -> None:
    verdicts = judge(lambda: Raises(call), component="denoiser", call=Call())
    assert_crashed(verdicts, f"ValueError: no such picture (while running call {call})")
    assert place(verdicts, "Raises.__call__").endswith(': raise ValueError("no such picture")')
    assert verdicts["engagement"].figures["crash"]["function"] == "Raises.__call__"
    assert any('raise ValueError("no such picture")' in line for line in verdicts["engagement"].traceback)
    assert not any("pytest_diffopt/observation/observing.py" in line for line in verdicts["engagement"].traceback[:2])


def test_its_healthy_twin_passes_in_the_same_words_as_ever(judge: Judge) -> None:
    verdicts = judge(lambda: TwoPart(Healthy(), Healthy()), component="denoiser", call=Call())
    assert_all_pass(verdicts)
    sentence = "compiled code ran in all 9 calls of denoiser (1 graph, 3 operations)"
    assert verdicts["engagement"].sentence == sentence
    assert all(verdict.traceback == () and "crash" not in verdict.figures for verdict in verdicts.values())


class RaisesWithin(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        raise RuntimeError


def test_the_component_that_ran_is_named_and_an_exception_needs_no_words(judge: Judge) -> None:
    verdicts = judge(lambda: TwoPart(Healthy(), RaisesWithin()), component="encoder", call=Call())
    assert_crashed(verdicts, "RuntimeError (while running call 0, in denoiser)")
    assert place(verdicts, "RaisesWithin.forward").endswith(": raise RuntimeError")


class WrongShape(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x.T)


def test_what_dynamo_only_traced_is_placed_in_the_users_code_and_the_librarys(judge: Judge) -> None:
    verdicts = judge(WrongShape)
    assert {verdict.status for verdict in verdicts.values()} == {"failed"}
    assert place(verdicts, "forward").endswith(": return self.first(x.T)")
    assert "torch/nn/modules/linear.py:" in verdicts["engagement"].text
    assert verdicts["engagement"].figures["component"] == "model"


def refusing_backend(graph: Any, example_inputs: Any) -> Any:
    raise NotImplementedError("no such kernel")


def test_a_backend_that_raises_is_placed_in_its_own_code(judge: Judge) -> None:
    verdicts = judge(Healthy, backend=refusing_backend)
    assert {verdict.status for verdict in verdicts.values()} == {"failed"}
    assert "NotImplementedError: no such kernel" in verdicts["engagement"].text
    assert place(verdicts, "refusing_backend").endswith(': raise NotImplementedError("no such kernel")')


class Breaks(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_break_that_fullgraph_raises_is_named_by_graph_breaks_which_refers_to_the_cause(judge: Judge) -> None:
    verdicts = judge(Breaks, fullgraph=True)
    assert {verdict.status for verdict in verdicts.values()} == {"failed"}
    assert "the recipe did not run: Unsupported: " in verdicts["engagement"].sentence
    assert place(verdicts, "forward").endswith(": torch._dynamo.graph_break()")
    breaks = verdicts["graph_breaks"]
    assert breaks.sentence == "1 graph break, 0 allowed"
    assert breaks.evidence[-1] == "the recipe did not run: see engagement"
    assert breaks.figures["places"][0]["file"].endswith("test_crash_faults.py")


class RaisesUnderFullgraph(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such block")


def test_the_exception_that_dynamo_saw_coming_stands_below_its_own(judge: Judge) -> None:
    first = judge(RaisesUnderFullgraph, fullgraph=True)["engagement"]
    assert "without fullgraph it raises ValueError: no such block" in first.evidence
    assert 'in RaisesUnderFullgraph.forward: raise ValueError("no such block")' in first.text


def failing_factory() -> Healthy:
    try:
        raise KeyError("width")
    except KeyError as error:
        torch.backends.cudnn.benchmark = True
        raise ValueError("no such weights") from error


def test_a_factory_that_raises_is_placed_with_its_cause_and_state_says_what_it_left(judge: Judge) -> None:
    verdicts = judge(failing_factory)
    assert_crashed(verdicts, "ValueError: no such weights (while preparing)")
    assert place(verdicts, "failing_factory").endswith(': raise ValueError("no such weights") from error')
    evidence = verdicts["engagement"].evidence
    at = evidence.index("caused by KeyError: 'width'")
    assert evidence[at + 1].endswith('in failing_factory: raise KeyError("width")')
    assert verdicts["state"].sentence == "torch.backends.cudnn.benchmark was left changed, from False to True"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_the_members_of_a_group_are_named(judge: Judge) -> None:
    group = getattr(__builtins__, "ExceptionGroup", None) or __builtins__["ExceptionGroup"]  # type: ignore[index]

    def parts() -> Healthy:
        raise group("the parts", [OSError("no disk"), TimeoutError("no answer")])

    first = judge(parts)["engagement"]
    assert first.sentence == "the recipe did not run: ExceptionGroup: the parts (2 sub-exceptions) (while preparing)"
    assert "in the group OSError: no disk" in first.evidence
    assert "in the group TimeoutError: no answer" in first.evidence


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not this either")


def test_an_exception_that_cannot_be_printed_is_one_all_the_same(judge: Judge) -> None:
    def mute() -> Healthy:
        raise Mute

    assert_crashed(judge(mute), "Mute: (its __str__ raises RuntimeError) (while preparing)")


def test_an_endless_recursion_is_told_in_a_bounded_number_of_lines(judge: Judge) -> None:
    def there() -> Healthy:
        return back()

    def back() -> Healthy:
        return there()

    first = judge(there)["engagement"]
    assert first.sentence.startswith("the recipe did not run: RecursionError: maximum recursion depth exceeded")
    assert len(first.traceback) <= MOST_LINES
    assert "lines are left out" in "\n".join(first.traceback)
    assert len(first.evidence) < 12


class Exits(Healthy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        leave()
        return super().forward(x)


@torch.compiler.disable
def leave() -> None:
    sys.exit(3)


def test_a_model_that_ends_the_process_ends_its_own_run(judge: Judge) -> None:
    verdicts = judge(Exits)
    assert {verdict.status for verdict in verdicts.values()} == {"failed"}
    assert verdicts["engagement"].sentence == "the recipe did not run: SystemExit: 3 (while running call 0, in model)"
    assert place(verdicts, "leave").endswith(": sys.exit(3)")


def test_a_keyboard_interrupt_is_the_users_and_not_the_recipes(judge: Judge) -> None:
    def interrupted() -> Healthy:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(interrupted)


class OnlyItsOwnInputs(Healthy):
    """Refuses what the sensitivity run gives it, which is ours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and x[0, 0] != self.known:
            raise ValueError("not my input")
        return super().forward(x)

    known = inputs()[0]["x"][0, 0].item()


def test_an_exception_in_the_sensitivity_run_is_not_the_recipes() -> None:
    same = {"x": torch.full((4, WIDTH), OnlyItsOwnInputs.known)}
    seen = observe(Recipe("own", OnlyItsOwnInputs, call=Call(inputs=[same])))
    assert seen.failure is None
    assert "no sensitivity run: ValueError: not my input" in seen.notes


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (Healthy, "OSError: it will not let go (while releasing)"),
        (RaisesWithin, "RuntimeError (while running call 0, in model)"),
    ],
)
def test_to_release_may_raise_and_hides_nothing_that_came_first(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, factory: Any, said: str
) -> None:
    def stuck(*given: object) -> None:
        raise OSError("it will not let go")

    monkeypatch.setattr(compilation, "uncompile", stuck)
    first = judge(factory)["engagement"]
    assert first.sentence == f"the recipe did not run: {said}"


def test_assert_recipe_prints_the_place_once() -> None:
    recipe = Recipe("net", RaisesWithin, compilation=Compilation("model", backend="eager"), call=Call(inputs=inputs()))
    with pytest.raises(RecipeFailed) as caught:
        assert_recipe(recipe)
    text = str(caught.value)
    assert text.count("RaisesWithin.forward: raise RuntimeError") == 1
    assert "net · parity: the recipe did not run: see engagement" in text
    assert str(WIDTH) not in text.partition("\n")[0]
