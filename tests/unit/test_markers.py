"""The markers' arguments, what they say of an accelerator, and what they say of what a test compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pytest_diffopt.accelerators import Accelerator
from pytest_diffopt.collection.marked_tests import MARKER_LINES
from pytest_diffopt.collection.watching import WatchMarkers, fullgraph_failure, recompiles_failure, verdict_on_test
from pytest_diffopt.errors import MarkerError
from pytest_diffopt.markers import (
    MARKERS,
    CompileFullgraph,
    MaxRecompiles,
    QuantizationMarker,
    Recipes,
    RequiresGpu,
    compile_fullgraph,
    max_memory,
    max_recompiles,
    quantization,
    recipes,
    requires_gpu,
    unsupported,
)
from pytest_diffopt.observation.observation import CompileRecord, FrameAttempt, GraphBreak, Place, RegionRuns

GIB = 2**30
CPU = Accelerator("cpu", "cpu")
A10 = Accelerator("cuda", "NVIDIA A10", 24 * GIB, (8, 6))


class Simulated(Accelerator):
    @property
    def is_simulated(self) -> bool:
        return True


SIM = Simulated("sim", "simulated", 8 * GIB)


# Arguments.


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda: max_recompiles(gb=3),
            "max_recompiles has no argument 'gb'. It takes: limit (an int, at least 0).",
        ),
        (lambda: max_recompiles(), "max_recompiles needs 'limit'. It takes: limit (an int, at least 0)."),
        (lambda: max_recompiles(-1), "max_recompiles: limit: found -1. It takes: limit (an int, at least 0)."),
        (lambda: max_recompiles(True), "max_recompiles: limit: found True. It takes: limit (an int, at least 0)."),
        (lambda: max_recompiles(1, limit=1), "max_recompiles: found 'limit' twice."),
        (lambda: max_recompiles(1, 2), "max_recompiles: found 2 arguments without a name."),
        (
            lambda: compile_fullgraph(3, 4),
            "compile_fullgraph: found 2 arguments without a name. It takes no arguments.",
        ),
        (lambda: requires_gpu(min_memory="lots"), "requires_gpu: min_memory: found 'lots'. It takes: min_memory"),
        (lambda: requires_gpu(capability=8), "requires_gpu: capability: found 8."),
        (lambda: requires_gpu(backends="cpu"), "requires_gpu: backends: found 'cpu'."),
        (lambda: requires_gpu(backends=()), "requires_gpu: backends: found ()."),
        (lambda: requires_gpu(simulated="yes"), "requires_gpu: simulated: found 'yes'."),
        (
            lambda: max_memory("16GiB", forecast=False),
            (
                'max_memory: forecast: found False. It takes: limit ("12GiB", or bytes), '
                "forecast (a full-size model's name, or True for the one that the recipe names)."
            ),
        ),
        (lambda: max_memory("16GiB", forecast=" "), "max_memory: forecast: found ' '."),
        (lambda: max_memory("16GiB", forecast=1), "max_memory: forecast: found 1."),
        (lambda: max_memory(forecast="flux.1-dev"), "max_memory needs 'limit'."),
        (lambda: recipes(), "recipes needs at least one recipe."),
        (lambda: recipes(3), "recipes: found 3. It takes: Recipe objects, and paths of *.recipes.toml files."),
        (lambda: recipes("a.recipes.toml", ids=[1]), "recipes has no argument 'ids'."),
        (lambda: quantization(), "quantization needs 'backend'."),
        (lambda: quantization("bitsandbytes_4bit", components=3), "quantization: components: found 3."),
        (lambda: quantization("bitsandbytes_5bit"), "'bitsandbytes_5bit'"),
        (lambda: quantization("bitsandbytes_4bit", bnb_4bit_quant_type="nf5"), "bnb_4bit_quant_type"),
    ],
)
def test_a_wrong_argument_is_rejected_by_name_where_it_is_written(use: Any, message: str) -> None:
    with pytest.raises(MarkerError) as caught:
        use()
    assert message in str(caught.value)


def test_a_marker_that_needs_arguments_is_not_usable_bare() -> None:
    with pytest.raises(MarkerError, match=r"max_recompiles is used with its arguments: @max_recompiles\(…\)"):

        @max_recompiles
        def decorated() -> None: ...


def test_the_decorators_make_the_marks_of_pytest() -> None:
    @compile_fullgraph
    @max_recompiles(3)
    @requires_gpu(min_memory="12GiB")
    def decorated() -> None: ...

    marks = {mark.name: (mark.args, mark.kwargs) for mark in vars(decorated)["pytestmark"]}
    assert marks == {
        "diffopt_compile_fullgraph": ((), {}),
        "diffopt_max_recompiles": ((3,), {}),
        "diffopt_requires_gpu": ((), {"min_memory": "12GiB"}),
    }


def test_the_most_recompiles_may_be_called_n() -> None:
    mark = max_recompiles(n=3).mark
    assert MaxRecompiles.of(mark.args, mark.kwargs) == MaxRecompiles(3)


def test_a_bare_decorator_is_a_mark_for_pytestmark_and_for_param() -> None:
    assert compile_fullgraph.mark == pytest.mark.diffopt_compile_fullgraph.mark
    assert pytest.param(1, marks=compile_fullgraph).marks == (compile_fullgraph,)


@pytest.mark.parametrize("marker", MARKERS.values(), ids=list(MARKERS))
def test_the_first_line_of_a_markers_docstring_is_its_help(marker: Any) -> None:
    assert MARKER_LINES[marker.mark_name()] == marker.line()
    assert dataclasses.is_dataclass(marker)


def test_every_marker_has_its_help() -> None:
    assert MARKER_LINES.keys() == MARKERS.keys()


def test_recipes_takes_paths_and_recipes() -> None:
    assert Recipes("a.recipes.toml").recipes == ("a.recipes.toml",)


def test_the_quantization_marker_makes_a_recipe() -> None:
    marker = QuantizationMarker("bitsandbytes_4bit", "transformer", bnb_4bit_quant_type="nf4")
    made = marker.recipe("test_x")
    assert made.name == "test_x"
    assert made.pipeline == "tiny-flux"
    assert made.quantization is not None
    assert tuple(made.quantization.components or ()) == ("transformer",)
    assert dict(made.quantization.kwargs) == {"bnb_4bit_quant_type": "nf4"}


# The accelerator.


@pytest.mark.parametrize(
    ("marker", "accelerator", "why"),
    [
        (RequiresGpu(), CPU, "requires_gpu: no GPU; the device in use is cpu"),
        (RequiresGpu(), A10, None),
        (
            RequiresGpu(),
            SIM,
            "requires_gpu: no GPU; the device in use is sim, a simulated one (simulated=True accepts it)",
        ),
        (RequiresGpu(simulated=True), SIM, None),
        (RequiresGpu(simulated=True), CPU, "requires_gpu: no GPU; the device in use is cpu"),
        (RequiresGpu(simulated=True, min_memory="12GiB"), SIM, "requires_gpu: needs 12 GiB; simulated (sim) has 8 GiB"),
        (RequiresGpu(min_memory="24GiB"), A10, None),
        (RequiresGpu(min_memory=24 * GIB + 1), A10, "requires_gpu: needs 24 GiB; NVIDIA A10 (cuda) has 24 GiB"),
        (
            RequiresGpu(min_memory="1GiB"),
            Accelerator("mps", "mps"),
            "requires_gpu: needs 1 GiB; mps (mps) does not say how much it has",
        ),
        (RequiresGpu(capability=(8, 6)), A10, None),
        (RequiresGpu(capability=(8, 9)), A10, "requires_gpu: needs capability 8.9; NVIDIA A10 (cuda) has 8.6"),
        (
            RequiresGpu(capability=(8, 0)),
            Accelerator("xpu", "Arc"),
            "requires_gpu: needs capability 8.0; Arc (xpu) has none",
        ),
        (RequiresGpu(backends=("cuda",)), A10, None),
        (RequiresGpu(backends=("xpu", "mps")), A10, "requires_gpu: needs xpu or mps; the device in use is cuda"),
    ],
)
def test_requires_gpu_says_why_an_accelerator_does_not_fit(
    marker: RequiresGpu, accelerator: Accelerator, why: str | None
) -> None:
    assert unsupported(marker, accelerator) == why


# What was compiled.

FORWARD = Place("toy.py", 10, "Toy.forward")


def frame(**changed: Any) -> FrameAttempt:
    made: dict[str, Any] = {"call": 0, "component": "", "region": "Toy", "place": FORWARD, "resumed": False}
    return FrameAttempt(**{**made, "outcome": "compiled", "graphs": 1, "operations": 3, **changed})


def region(entries: int, engaged: int, *reasons: str) -> RegionRuns:
    return RegionRuns(0, "", "Toy", FORWARD, entries, engaged, engaged, 3 * engaged, reasons)


def recompile(guard: str = "L['self'].step == 1") -> FrameAttempt:
    return frame(recompile=True, guards=(guard,))


HEALTHY = CompileRecord(frames=(frame(),), regions=(region(2, 2),))
BREAK = GraphBreak(0, "", "Toy", Place("toy.py", 12, "forward"), FORWARD, "call to print", hint="move it out")
EXHAUSTED = frame(outcome="limit", graphs=0, operations=0, limit="recompile_limit", reason="recompile_limit exhausted")


def test_one_graph_a_frame_that_runs_at_every_call_holds() -> None:
    assert fullgraph_failure(HEALTHY) is None
    assert recompiles_failure(HEALTHY, 0) is None


def test_a_test_that_compiles_nothing_proves_nothing() -> None:
    assert fullgraph_failure(CompileRecord())[0] == "nothing was compiled in this test"  # type: ignore[index]
    assert recompiles_failure(CompileRecord(), 5)[0] == "nothing was compiled in this test"  # type: ignore[index]


def test_a_frame_that_was_skipped_is_not_a_compile() -> None:
    record = CompileRecord(frames=(frame(outcome="skipped", graphs=0, operations=0, reason="a loop"),))
    assert recompiles_failure(record, 5) == [
        "nothing was compiled in this test",
        "Toy  toy.py:10  1×  a loop",
        "call what torch.compile returned in the test's own body: what was compiled before it is forgotten",
    ]


def test_a_graph_break_is_named_with_its_place_reason_and_hint() -> None:
    record = dataclasses.replace(HEALTHY, graph_breaks=(BREAK, BREAK))
    assert fullgraph_failure(record) == [
        "2 graph breaks; it allows one graph a frame, run at every call",
        "Toy  toy.py:12  2×  call to print",
        "move it out",
    ]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            CompileRecord(frames=(frame(), frame(outcome="skipped", reason="a loop")), regions=(region(1, 1),)),
            "1 skipped frame",
        ),
        (CompileRecord(frames=(frame(), EXHAUSTED), regions=(region(1, 1),)), "1 frame over the recompile limit"),
        (
            CompileRecord(frames=(frame(outcome="failed", reason="crash"),), regions=(region(1, 0),)),
            "1 frame that did not compile, compiled code ran in 0 of 1 calls",
        ),
        (CompileRecord(frames=(frame(),), regions=(region(3, 2),)), "compiled code ran in 2 of 3 calls"),
        (CompileRecord(frames=(frame(outcome="empty"),)), "no compiled code ran"),
        (CompileRecord(regions=(region(1, 0, "a stance"),)), "compiled code ran in 0 of 1 calls"),
    ],
)
def test_whatever_makes_the_code_run_eager_fails_compile_fullgraph(record: CompileRecord, sentence: str) -> None:
    lines = fullgraph_failure(record)
    assert lines is not None
    assert lines[0] == f"{sentence}; it allows one graph a frame, run at every call"


def test_a_region_that_ran_eager_is_named_with_the_reason() -> None:
    record = CompileRecord(regions=(region(2, 1, "a compiler stance makes Dynamo stand aside"),))
    lines = fullgraph_failure(record) or []
    assert "Toy  toy.py:10  called 2×, compiled code ran 1×: a compiler stance makes Dynamo stand aside" in lines


@pytest.mark.parametrize(("limit", "holds"), [(1, False), (2, True), (3, True)])
def test_the_limit_itself_is_allowed(limit: int, holds: bool) -> None:
    record = dataclasses.replace(HEALTHY, frames=(frame(), recompile(), recompile()))
    assert (recompiles_failure(record, limit) is None) is holds


def test_too_many_recompiles_are_told_with_their_guards() -> None:
    record = dataclasses.replace(HEALTHY, frames=(frame(), recompile(), recompile()))
    assert recompiles_failure(record, 1) == [
        "2 recompiles, 1 allowed",
        "Toy  toy.py:10  2×  guard L['self'].step == 1",
        "each guard names what changed between two calls: keep it constant, pass it as a tensor, or mark it dynamic",
    ]


def test_an_exhausted_limit_fails_however_many_recompiles_are_allowed() -> None:
    record = dataclasses.replace(HEALTHY, frames=(frame(), recompile(), EXHAUSTED))
    lines = recompiles_failure(record, 1000)
    assert lines is not None
    assert lines[0] == (
        "1 recompile, 1000 allowed; the recompile_limit was exhausted, so that code ran eager from there on"
    )


def test_both_markers_of_a_test_are_told_each_in_its_block() -> None:
    text = verdict_on_test("test_x", WatchMarkers(CompileFullgraph(), MaxRecompiles(0)), CompileRecord())
    assert text is not None
    first = [line for line in text.splitlines() if not line.startswith("  ")]
    assert first == [
        "test_x · compile_fullgraph: nothing was compiled in this test",
        "test_x · max_recompiles: nothing was compiled in this test",
    ]
    assert verdict_on_test("test_x", WatchMarkers(CompileFullgraph(), MaxRecompiles(0)), HEALTHY) is None
