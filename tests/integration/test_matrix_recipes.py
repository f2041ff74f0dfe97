"""Matrices that run: references are shared, a failure names the parts that it needs, and every combination is an item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Compilation, Contract, Offloading, Quantization, Recipe, Verdict, combinations
from pytest_diffopt.checks.evidence import Evidence
from pytest_diffopt.checks.session import CHECKS, Session, limits_of
from pytest_diffopt.errors import PreparationError, UnverifiableError
from pytest_diffopt.observation import observing

if TYPE_CHECKING:
    from conftest import RunPytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "matrix.recipes.toml"
WIDTH = 64
EIGHT_BIT, EAGER, MODEL = Quantization("bitsandbytes_8bit"), Compilation("model", backend="eager"), Offloading("model")


class Model(nn.Module):
    """Two layers; ``broken`` makes their result useless, and ``breaks`` the graph."""

    def __init__(self, broken: bool = False, breaks: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.broken, self.breaks = broken, breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        result: torch.Tensor = self.second(self.first(x).relu())
        return result * float("nan") if self.broken else result


def parts(recipe: Recipe) -> set[str]:
    return {field for field in ("quantization", "compilation", "offloading") if getattr(recipe, field)}


def broken_with(*needed: str) -> Callable[..., nn.Module]:
    """A factory whose model is broken where the recipe has all of these parts."""
    return lambda recipe: Model(broken=set(needed) <= parts(recipe))


def inputs() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, WIDTH, generator=generator)} for _ in range(3)]


def base(factory: Callable[..., nn.Module]) -> Recipe:
    return Recipe("r", factory, call=Call(inputs=inputs()), isolate=True)


def whole(factory: Callable[..., nn.Module]) -> Recipe:
    return base(factory).replace(quantization=EIGHT_BIT, compilation=EAGER, offloading=MODEL)


Runs = list[tuple[str, bool]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """(content, forced eager) of each recipe that is really observed."""
    seen: Runs = []
    observe = observing.observe

    def counted(recipe: Recipe, **how: Any) -> Any:
        seen.append((recipe.content_hash, how["force_eager"]))
        return observe(recipe, **how)

    monkeypatch.setattr(observing, "observe", counted)
    return seen


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.release()


def failed(session: Session, recipe: Recipe, check: str) -> Verdict:
    verdict = session.isolated(recipe, session.judge(recipe, check))
    assert verdict.status == "failed", verdict.text
    assert verdict == session.isolated(recipe, session.judge(recipe, check))
    return verdict


def test_the_eager_reference_of_eight_combinations_is_observed_once_a_quantization(
    runs: Runs, session: Session
) -> None:
    recipes = combinations(
        base(Model), quantization=[None, EIGHT_BIT], compilation=[None, EAGER], offloading=[None, MODEL]
    )
    for recipe in recipes:
        session.judge(recipe, "parity")
    assert len(recipes) == len(set(runs)) == len(runs) == 8  # the bare recipes are the references of the others
    ran = Counter(content for content, _ in runs)
    references = [recipe for recipe in recipes if not parts(recipe) - {"quantization"}]
    assert [ran[recipe.content_hash] for recipe in references] == [1, 1]


def test_references_are_shared_whatever_runs_first(runs: Runs, session: Session) -> None:
    recipes = combinations(
        base(Model), quantization=[None, EIGHT_BIT], compilation=[None, EAGER], offloading=[None, MODEL]
    )
    for recipe in reversed(recipes):
        session.judge(recipe, "parity")
    assert len(set(runs)) == len(runs) == 10  # forced eager: of a factory that may compile, once a quantization
    assert sum(forced for _, forced in runs) == 2


def compiles_by_itself() -> nn.Module:
    model = Model()
    model.first.compile(backend="eager")
    return model


def test_a_run_of_a_factory_that_compiles_by_itself_is_no_reference(runs: Runs, session: Session) -> None:
    recipes = combinations(base(compiles_by_itself), compilation=[None, Compilation("model", backend="eager")])
    for recipe in recipes:
        assert session.judge(recipe, "parity").status == "passed"
    bare = recipes[0].content_hash
    assert Counter(runs) == {(bare, False): 1, (bare, True): 1, (recipes[1].content_hash, False): 1}


@pytest.mark.parametrize(
    ("needed", "labels", "line"),
    [
        (
            ("quantization", "offloading"),
            ["quantization (bitsandbytes_8bit)", "offloading (model)"],
            "quantization (bitsandbytes_8bit) + offloading (model); each alone passes",
        ),
        (("compilation",), ["compilation (model)"], "compilation (model), alone"),
        (
            ("quantization", "compilation", "offloading"),
            ["quantization (bitsandbytes_8bit)", "offloading (model)", "compilation (model)"],
            (
                "quantization (bitsandbytes_8bit) + offloading (model) + compilation (model); "
                "no smaller subset fails like this"
            ),
        ),
        ((), [], "the bare pipeline fails like this, with none of the recipe's parts"),
    ],
    ids=["a pair", "one", "all three", "none"],
)
def test_the_parts_that_a_failure_needs_are_named(
    runs: Runs, session: Session, needed: tuple[str, ...], labels: list[str], line: str
) -> None:
    verdict = failed(session, whole(broken_with(*needed)), "parity")
    assert "is not finite" in verdict.sentence
    assert verdict.figures["smallest_failing"] == labels
    assert verdict.evidence[-1] == f"smallest failing: {line}"
    assert len(set(runs)) == len(runs) <= 10  # asked twice, run once


def test_a_subset_that_fails_for_another_reason_is_not_named(session: Session) -> None:
    def factory(recipe: Recipe) -> nn.Module:
        model = Model(broken={"quantization", "compilation"} <= parts(recipe))
        if parts(recipe) == {"compilation"}:
            nn.init.zeros_(model.second.weight)  # fails as well: a constant output
            nn.init.zeros_(model.second.bias)
        return model

    verdict = failed(session, whole(factory), "parity")
    assert verdict.figures["smallest_failing"] == ["quantization (bitsandbytes_8bit)", "compilation (model)"]
    assert verdict.evidence[-1].endswith("; no smaller subset fails like this")


def test_a_subset_is_held_to_the_limits_of_the_whole_and_does_not_pass_by_them_alone(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = base(Model).replace(compilation=EAGER, offloading=MODEL)
    assert limits_of(recipe).warmup_calls == 2
    assert limits_of(recipe.without("offloading")).warmup_calls == 1

    def strict(given: Evidence) -> Verdict:
        if parts(given.recipe) == parts(recipe) or given.limits.warmup_calls == 1:
            return given.failed("state", "it recompiles", changed=["a"])
        return given.passed("state", "it holds")

    monkeypatch.setitem(CHECKS, "state", strict)
    verdict = failed(session, recipe, "state")
    assert verdict.evidence == (
        "smallest failing: offloading (model) + compilation (model); no smaller subset fails like this",
    )


def test_a_check_that_does_not_apply_does_not_fail(session: Session) -> None:
    def factory(recipe: Recipe) -> nn.Module:
        return Model(breaks={"quantization", "compilation"} <= parts(recipe))

    verdict = failed(session, whole(factory).replace(contract=Contract(max_graph_breaks=0)), "graph_breaks")
    assert verdict.figures["smallest_failing"] == ["quantization (bitsandbytes_8bit)", "compilation (model)"]
    assert verdict.evidence[-1].endswith("; neither fails alone")


def test_a_subset_that_does_not_run_is_known_by_its_error(session: Session) -> None:
    def factory(recipe: Recipe) -> nn.Module:
        if {"offloading", "compilation"} <= parts(recipe):
            raise ValueError("these two do not go together")
        if parts(recipe) == {"offloading"}:
            raise ValueError("another thing")
        return Model()

    verdict = failed(session, whole(factory), "state")
    assert verdict.figures["smallest_failing"] == ["offloading (model)", "compilation (model)"]


def test_the_status_stays_whatever_happens_in_the_search(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = whole(broken_with())
    verdict = session.judge(recipe, "parity")
    evidence = session.evidence

    def on_the_whole_alone(one: Recipe, error: Exception) -> Any:
        if one == recipe:
            return evidence(one)
        raise error

    for error, line in (
        (ZeroDivisionError("a bug"), "smallest failing: the search ended with ZeroDivisionError: a bug"),
        (PreparationError("no such component"), "no smaller subset fails like this"),
        (UnverifiableError("no device"), "7 smaller subsets could not be judged"),
    ):
        monkeypatch.setattr(session, "evidence", lambda one, error=error: on_the_whole_alone(one, error))
        found = session.isolated(recipe, verdict)
        assert (found.status, found.sentence) == ("failed", verdict.sentence)
        assert found.evidence[-1].endswith(line)


def test_only_a_recipe_that_asks_for_it_is_searched(runs: Runs, session: Session) -> None:
    recipe = whole(broken_with("compilation")).replace(isolate=False)
    verdict = session.judge(recipe, "parity")
    before = len(runs)
    assert session.isolated(recipe, verdict) is verdict
    assert len(runs) == before
    (parity,) = [one for one in session.judge_all(recipe.replace(isolate=True)) if one.check == "parity"]
    assert parity.figures["smallest_failing"] == ["compilation (model)"]


# As items.

FAULTY = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.first, self.second, self.broken = nn.Linear(64, 64), nn.Linear(64, 64), broken

    def forward(self, x):
        result = self.second(self.first(x).relu())
        return result * float("nan") if self.broken else result

def pair(recipe):
    return Model(recipe.offloading is not None and bool(recipe.compilation))

def inputs(k):
    return {"x": torch.randn(4, 64, generator=torch.Generator().manual_seed(k))}
"""

RECIPES = """
[recipe.m]
pipeline = "faulty:pair"
call = { inputs = "faulty:inputs" }
[recipe.m.matrix]
compilation = ["none", { component = "model", backend = "eager" }, { name = "whole", component = "model", fullgraph = true }]
offloading = ["none", { strategy = "model" }]

[recipe.known]
pipeline = "faulty:pair"
call = { inputs = "faulty:inputs" }
known_faults = { parity = "is not finite" }
[recipe.known.matrix]
compilation = [{ component = "model", backend = "eager" }]
offloading = [{ strategy = "model" }]

[recipe.other-cause]
pipeline = "faulty:pair"
call = { inputs = "faulty:inputs" }
known_faults = { parity = "smallest failing" }
matrix.compilation = [{ component = "model", backend = "eager" }]
matrix.offloading = [{ strategy = "model" }]
"""


@pytest.fixture
def files(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(faulty=FAULTY)
    pytester.path.joinpath("a.recipes.toml").write_text(RECIPES, encoding="utf-8")
    pytester.makeini("[pytest]\npythonpath = .")
    return pytester


LEFT_OUT = "a.recipes.toml::m: 1 of 6 combinations left out: they are no valid recipes"
PAIR = "  smallest failing: offloading (model) + compilation (model); each alone passes"


def test_combinations_are_collected_at_their_tables_line_and_what_is_left_out_is_told(
    run_pytest: RunPytest, files: pytest.Pytester
) -> None:
    result = run_pytest("--collect-only", "-q", "-k", "parity")
    assert [line for line in result.outlines if line.endswith("::parity")] == [
        f"a.recipes.toml::{name}::parity"
        for name in (
            *("m-bare", "m-model_offload", "m-compile", "m-compile-model_offload", "m-whole"),
            *("known-compile-model_offload", "other-cause-compile-model_offload"),
        )
    ]
    assert LEFT_OUT in result.outlines
    assert any(
        line.startswith("  m-whole-model_offload: compilation.fullgraph: found true") for line in result.outlines
    )
    selected = run_pytest(
        "--collect-only", "-q", "a.recipes.toml::m-compile-model_offload", "-k", "m-compile and not state"
    )
    assert len([line for line in selected.outlines if "::m-compile-model_offload::" in line]) == 5


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "loadgroup")], ids=["one process", "two workers"])
def test_a_failure_names_its_parts_and_keeps_its_status(
    run_pytest: RunPytest, files: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    if workers:
        pytest.importorskip("xdist")
    result = run_pytest("-k", "parity and not whole", *workers)
    outcomes = {name: count for name, count in result.parseoutcomes().items() if name != "deselected"}
    assert outcomes == {"passed": 3, "failed": 2, "xfailed": 1}
    assert LEFT_OUT in result.outlines
    assert result.outlines.count(PAIR) == 2
    at = result.outlines.index("m-compile-model_offload · parity: the output, call 0 is not finite (NaN or infinity)")
    assert result.outlines[at + 1] == PAIR
    at = next(k for k, line in enumerate(result.outlines) if line.startswith("other-cause-compile-model_offload · par"))
    assert result.outlines[at + 1 : at + 3] == [
        "  known_faults.parity expects 'smallest failing', which this is not",
        PAIR,
    ]


def test_what_an_installation_refuses_is_told_of_entries_once_and_of_combinations_as_left_out(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    text = """
    [recipe.m.matrix]
    pipeline = ["tiny-flux", "tiny-sd"]
    compilation = [{ component = "transformer" }, { name = "unet", component = "unet" }]
    """
    path = pytester.path / "a.recipes.toml"
    path.write_text(text, encoding="utf-8")
    result = run_pytest("--collect-only", "-q")
    assert {line.split("::")[1] for line in result.outlines if line.endswith("parity")} == {
        *("m-tiny-flux-compile", "m-tiny-sd-unet")
    }
    result.stdout.fnmatch_lines(
        [
            "a.recipes.toml::m: 2 of 4 combinations left out: they are no valid recipes",
            "  m-tiny-flux-unet: compilation.component: found 'unet'; the pipeline has: text_encoder, *",
        ]
    )
    path.write_text(text.replace('"unet"', '"transformr"'), encoding="utf-8")
    result = run_pytest()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(
        ["*a.recipes.toml: 1 mistake", "  recipe.m.matrix.compilation[[]1].component: found 'tran*"]
    )


def test_a_recipes_marker_takes_a_matrix(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    files.makepyfile(
        """
        from pytest_diffopt import Recipe, combinations, recipes

        @recipes("a.recipes.toml", *combinations(Recipe("py", "tiny-flux"), dtype=["float32", "float16"]))
        def test_it(recipe):
            assert recipe.isolate
        """
    )
    result = run_pytest("test_a_recipes_marker_takes_a_matrix.py")
    assert result.parseoutcomes() == {"passed": 9}
    assert LEFT_OUT in result.outlines


def test_the_example_holds(run_pytest: RunPytest) -> None:
    result = run_pytest(str(EXAMPLE))
    assert set(result.parseoutcomes()) == {"passed"}, result.stdout.str()
    result.stdout.fnmatch_lines(["flux-nf4 * passed", "flux-model_offload-plain * passed", "flux-reg* passed"])
