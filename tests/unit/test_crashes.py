"""A run that did not end, as plain data: what every check makes of it, how the others refer to the cause, and its reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from pytest_diffopt import Observation, Quantization, Recipe, Verdict, observe
from pytest_diffopt.checks import crashes
from pytest_diffopt.checks.evidence import Evidence
from pytest_diffopt.checks.session import CHECKS, limits_of
from pytest_diffopt.observation.failures import failure_of
from pytest_diffopt.observation.observation import (
    CompileRecord,
    ComponentRecord,
    Failure,
    FrameAttempt,
    GraphBreak,
    Layer,
    Place,
    RegionRuns,
    StateChange,
)
from pytest_diffopt.report.annotations import Repository, annotations_of
from pytest_diffopt.report.gathering import Carried
from pytest_diffopt.report.junit import junit_xml
from pytest_diffopt.report.markdown import markdown
from pytest_diffopt.report.page import page
from pytest_diffopt.report.rows import row_of
from pytest_diffopt.report.run import GateRecord, Run, from_json, run_of, to_json
from pytest_diffopt.source_places import CodeFrame, last_frames, short_path, traceback_lines, whose

FRAME = CodeFrame("mine/model.py", 7, "Net.forward", "raise ValueError(x)")
FAILURE = Failure(
    "call 0",
    "ValueError",
    "no such block\nsay another",
    FRAME.place,
    ("Traceback (most recent call last):", "ValueError: no such block"),
    "transformer",
    FRAME,
    (FRAME,),
    ("caused by KeyError: 3",),
)
PLACE = Place("mine/model.py", 5, "Net.forward")
HELD = Observation(
    {"name": "r"},
    "hash",
    "sim",
    "sim",
    {},
    components=(ComponentRecord("transformer", "Net", 4, compiled=("",)),),
    compiles=CompileRecord(
        frames=(FrameAttempt(0, "transformer", "", PLACE, False, "compiled", 1, 3),),
        regions=(RegionRuns(0, "transformer", "", PLACE, 1, 1, 1, 3),),
    ),
    layers=(Layer("transformer", "first", "torch.nn.Linear", "nf4", "uint8", "", 8, 8, 32, 4, library="bitsandbytes"),),
    failure=FAILURE,
)
RECIPE = Recipe(
    "r",
    "tiny-flux",
    quantization=Quantization("bitsandbytes_4bit", components=("transformer",)),
    compilation={"component": "transformer"},  # type: ignore[arg-type]
    caching={"component": "transformer", "kind": "first_block_cache"},  # type: ignore[arg-type]
    attention="native",
)


def judged(check: str, observation: Observation = HELD) -> Verdict:
    return CHECKS[check](Evidence(RECIPE, observation, limits_of(RECIPE), observation))


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "forecast"])
def test_no_check_passes_of_a_run_that_did_not_end(check: str) -> None:
    verdict = judged(check)
    assert verdict.status == "failed"
    said = "the recipe did not run: ValueError: no such block (while running call 0, in transformer)"
    assert said in (verdict.sentence, *verdict.evidence)
    assert verdict.traceback == FAILURE.traceback
    assert verdict.figures["crash"]["line"] == 7


def test_of_the_same_run_that_ended_some_of_them_pass() -> None:
    passed = {
        check
        for check in CHECKS
        if check != "forecast" and judged(check, replace(HELD, failure=None)).status == "passed"
    }
    assert {"engagement", "graph_breaks", "state"} <= passed


@pytest.mark.parametrize(
    ("check", "seen", "sentence"),
    [
        (
            "graph_breaks",
            {"compiles": CompileRecord(graph_breaks=(GraphBreak(0, "transformer", "", PLACE, PLACE, "print"),))},
            "1 graph break, 0 allowed",
        ),
        (
            "recompiles",
            {"compiles": CompileRecord(frames=(FrameAttempt(0, "transformer", "", PLACE, False, "limit", limit="n"),))},
            "the n is exhausted: transformer/Net.forward runs eager from call 0 on, after 0 recompiles",
        ),
        ("state", {"state_changes": (StateChange("x", "1", "2", "call 0"),)}, "x was left changed, from 1 to 2"),
        (
            "quantization",
            {"layers": (replace(HELD.layers[0], format="", library=""),)},
            "transformer is not quantized at all (1 Linear layer left plain)",
        ),
    ],
)
def test_what_a_check_found_by_itself_stays_and_the_cause_is_below_it(
    check: str, seen: dict[str, Any], sentence: str
) -> None:
    recipe = RECIPE.replace(compilation={"component": "transformer", "fullgraph": True})
    observation = replace(HELD, **seen)
    verdict = CHECKS[check](Evidence(recipe, observation, limits_of(recipe)))
    assert verdict.sentence == sentence
    assert verdict.evidence[-4:] == tuple(crashes.described(FAILURE))
    referring = crashes.referring(verdict, FAILURE, "f.recipes.toml::r::engagement")
    assert referring.sentence == sentence
    assert referring.evidence == (
        *verdict.evidence[:-4],
        "the recipe did not run: see f.recipes.toml::r::engagement",
    )


def test_the_cause_is_given_once_and_what_was_added_stays() -> None:
    verdicts = [judged("engagement"), replace(judged("parity"), evidence=(*judged("parity").evidence, "added"))]
    first, second = crashes.with_cause_once(verdicts, FAILURE)
    assert first == verdicts[0]
    assert (second.sentence, second.evidence, second.traceback) == (
        "the recipe did not run: see engagement",
        ("added",),
        (),
    )
    assert crashes.with_cause_once(verdicts, None) == verdicts


def test_it_goes_to_json_and_back_and_what_an_earlier_release_wrote_is_read() -> None:
    assert Observation.from_json(HELD.to_json()) == HELD
    old = json.loads(HELD.to_json())
    for name in ("component", "raised_at", "frames", "behind"):
        del old["failure"][name]
    read = Observation.from_json(json.dumps(old)).failure
    assert read is not None
    assert (read.place, read.lines) == (
        "mine/model.py:7, in Net.forward",
        ["mine/model.py:7, in Net.forward", "say another"],
    )
    verdict = judged("engagement")
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
    before = {name: value for name, value in verdict.to_dict().items() if name != "traceback"}
    assert Verdict.from_dict(before) == replace(verdict, traceback=())


def run_with(*verdicts: Verdict) -> Run:
    source = "a/x.recipes.toml::r"
    items = [
        Carried(
            source,
            "r",
            one.check,
            one.status,
            one.sentence,
            ({**row_of(None, source=source, recipe="r"), "statuses": {one.check: one.status}},),
            one.to_dict(),
            file="a/x.recipes.toml",
            line=4,
        )
        for one in verdicts
    ]
    gate = GateRecord(passed=False, sentence="GATE FAILED: 2 failed")
    return run_of(items, gate, version="0.1.0", started="2026-01-02T03:04:05+00:00", seconds=3.5)


def test_every_report_has_the_whole_traceback_once() -> None:
    run = run_with(*crashes.with_cause_once([judged("engagement"), judged("parity"), judged("state")], FAILURE))
    assert from_json(to_json(run)) == run
    assert run.recipes[0].verdicts[0].traceback == FAILURE.traceback
    assert [place.kind for place in run.recipes[0].places] == ["crash"]
    written = {"json": to_json(run), "md": markdown(run), "html": page(run), "xml": junit_xml(run)}
    for name, text in written.items():
        assert text.count("Traceback (most recent call last):") == 1, name
        assert "mine/model.py:7, in Net.forward" in text
    failures = ElementTree.fromstring(written["xml"]).findall(".//testcase/failure")
    assert failures[1].get("message") == "the recipe did not run: see engagement"


def test_it_is_annotated_on_the_users_own_line_and_only_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.py").touch()
    repository = Repository(tmp_path, tmp_path)
    run = run_with(*crashes.with_cause_once([judged("engagement"), judged("parity"), judged("state")], FAILURE))
    (only,) = annotations_of(run, repository.found, repository.shown)
    assert (only.file, only.line, only.title) == ("mine/model.py", 7, "r: crash")
    assert only.message == "crash in transformer: ValueError: no such block"


def raising(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:
        return raised


def test_paths_are_those_of_every_machine() -> None:
    found = failure_of(raising(ValueError('File "' + __file__ + '", line 3')), "preparing", {})
    assert found.place == f"{short_path(__file__)}:{found.raised_at.line}, in raising"  # type: ignore[union-attr]
    assert str(Path(__file__).parents[2]) not in "\n".join([found.message, *found.lines, *found.traceback])


def test_a_frame_is_the_users_a_librarys_or_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    whose.cache_clear()
    generated = str(tmp_path / "ab" / "cab.py")
    found = {
        file: whose(file)
        for file in (__file__, json.__file__, torch.__file__, crashes.__file__, "<eval_with_key>.3", generated)
    }
    whose.cache_clear()
    assert list(found.values()) == ["user", "library", "library", "own", "", "library"]


def test_the_last_frames_are_the_innermost_of_the_user_and_of_the_libraries_in_order() -> None:
    module = str(Path(torch.__file__).parent / "nn" / "modules" / "module.py")
    raw = [(__file__, line, f"f{line}") for line in (1, 2, 3, 4, 4)]
    raw[2:2] = [(json.__file__, 1, "loads"), (module, 2, "_call_impl")]
    assert [frame.function for frame in last_frames(raw)] == ["f2", "loads", "f3", "f4"]
    assert [frame.function for frame in last_frames([(module, 2, "_call_impl")])] == ["_call_impl"]


def test_an_error_of_ours_has_its_words_and_none_of_our_frames() -> None:
    refused = Recipe("r", lambda: 3)
    failure = observe(refused, accelerator="cpu").failure
    assert failure is not None
    assert failure.error == "PreparationError"
    (line,) = failure.traceback
    assert line.startswith("pytest_diffopt.errors.PreparationError: pipeline: the factory returned int")
    assert (failure.place, failure.lines) == ("", [])


def test_a_chain_that_is_a_circle_comes_to_an_end() -> None:
    first, second = raising(ValueError("a")), raising(KeyError("b"))
    first.__cause__, second.__cause__ = second, first
    assert failure_of(first, "preparing", {}).behind[0] == "caused by KeyError: 'b'"
    assert traceback_lines(first)
