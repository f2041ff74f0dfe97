"""The table of recipes, and what the end of a run says."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_diffopt.checks.verdict import Status, Verdict
from pytest_diffopt.observation.observation import (
    CallMemory,
    CallRecord,
    CompileRecord,
    FrameAttempt,
    GraphBreak,
    HostSyncs,
    HostWait,
    MemoryRecord,
    Observation,
    Place,
)
from pytest_diffopt.options import Settings
from pytest_diffopt.report.gathering import carried_by
from pytest_diffopt.report.progress import ProgressLine
from pytest_diffopt.report.rows import (
    RECIPE_PROPERTY,
    ROW_PROPERTY,
    VERDICT_PROPERTY,
    Row,
    merged,
    names_of,
    row_of,
    verdict_text,
)
from pytest_diffopt.report.tables import shortened, width_of
from pytest_diffopt.report.terminal import RecipeReport, status_of, table_lines
from tests.made_forecasts import GIB, made

PLACE = Place("toy.py", 10, "Toy.forward")


def observation(name: str = "flux", peak_bytes: int | None = None) -> Observation:
    frames = (
        FrameAttempt(0, "transformer", "", PLACE, False, "compiled", 1, 40),
        FrameAttempt(1, "transformer", "", PLACE, False, "compiled", 1, 40, recompile=True),
    )
    return Observation(
        recipe={"name": name},
        content_hash="0",
        accelerator="cpu",
        device="cpu",
        versions={},
        calls=(
            CallRecord(0, "call", 12.34),
            CallRecord(1, "call", 0.6),
            CallRecord(2, "call", 0.5),
            CallRecord(3, "sensitivity", 9.0),
        ),
        compiles=CompileRecord(
            frames=frames, graph_breaks=(GraphBreak(0, "transformer", "", PLACE, PLACE, "a break"),)
        ),
        memory=MemoryRecord(0, 0, 0, (CallMemory(0, peak_bytes, 0),)) if peak_bytes is not None else None,
    )


def verdict(check: str, status: Status = "passed", **figures: Any) -> Verdict:
    return Verdict(check, "flux", status, f"what {check} says", figures)


def test_a_row_has_the_figures_of_its_observation() -> None:
    row = row_of(observation(peak_bytes=2**20), [verdict("parity", required=0.003), verdict("recompiles", "failed")])
    assert row == {
        "recipe": "flux",
        "source": "",
        "cold_seconds": 12.34,
        "warm_seconds": 0.5,
        "load_peak_bytes": 0,
        "peak_bytes": 2**20,
        "h2d_bytes": None,
        "d2h_bytes": None,
        "host_syncs": None,
        "graphs": 2,
        "breaks": 1,
        "recompiles": 1,
        "required_tolerance": 0.003,
        "forecast_bytes": None,
        "forecast_low_bytes": None,
        "forecast_high_bytes": None,
        "forecast_model": None,
        "statuses": {"parity": "passed", "recompiles": "failed"},
    }
    assert json.loads(json.dumps(row)) == row


def test_host_syncs_have_a_column_where_any_recipe_waits() -> None:
    waits = tuple(
        HostWait(call, step, "unet", "aten::nonzero", offloading=offloading, count=2)
        for call, step, offloading in ((0, 0, False), (1, -1, False), (1, 0, True), (1, 1, False))
    )
    syncs = HostSyncs((2, 2), waits)
    assert [syncs.per_step(call) for call in (0, 1)] == [[2, 0], [0, 2]]
    waiting = row_of(replace(observation(), host_syncs=syncs))
    assert waiting["host_syncs"] == 2
    idle = row_of(replace(observation("b"), host_syncs=HostSyncs((2, 2))))
    assert idle["host_syncs"] == 0
    shown = "\n".join(table_lines([waiting, idle], width=200, color=False))
    assert "host syncs in a step" in shown
    assert "host syncs" not in "\n".join(table_lines([idle], width=200, color=False))


def test_rows_of_one_recipe_become_one_and_those_of_two_files_stay_apart() -> None:
    rows = [
        row_of(None, [verdict("engagement", "failed")], source="a"),
        row_of(observation(), [verdict("parity", required=0.25)], source="a"),
        row_of(observation(), [verdict("parity")], source="b"),
    ]
    first, second = merged(rows)
    assert first["statuses"] == {"engagement": "failed", "parity": "passed"}
    assert first["graphs"] == 2
    assert first["required_tolerance"] == 0.25
    assert second["statuses"] == {"parity": "passed"}


@pytest.mark.parametrize(
    ("statuses", "text"),
    [
        ({}, "no verdict"),
        ({"a": "passed", "b": "passed"}, "2 passed"),
        ({"a": "passed", "recompiles": "failed"}, "1 failed: recompiles, 1 passed"),
        ({"a": "unverified", "b": "failed", "c": "failed"}, "2 failed: b c, 1 unverified: a"),
    ],
)
def test_the_verdict_column_tells_the_worst_first(statuses: dict[str, str], text: str) -> None:
    assert verdict_text(statuses) == text


def test_the_table_has_a_row_a_recipe() -> None:
    rows = [row_of(observation(), [verdict("parity", required=0.0031)])]
    header, _, line = table_lines(rows, width=160, color=False)
    assert header.split("  ")[0] == "recipe"
    assert line.split() == ["flux", "12.3", "/", "0.50", "2", "1", "1", "0.0031", "1", "passed"]
    assert "peak memory" not in header


def test_the_peak_has_a_column_where_it_is_known_of_any() -> None:
    rows = [row_of(observation("a"), []), row_of(observation("b", 3 * 2**30), [])]
    header, _, first, second = table_lines(rows, width=160, color=False)
    assert "peak memory" in header
    assert first.split()[4] == "-"
    assert "0.0 / 3072.0" in second


def test_a_forecast_has_a_column_with_its_model_where_there_is_one() -> None:
    row = row_of(None, [], recipe="flux", forecast=made())
    assert json.loads(json.dumps(row)) == row
    figures = (row["forecast_low_bytes"], row["forecast_bytes"], row["forecast_high_bytes"], row["forecast_model"])
    assert figures == (int(14.5 * GIB), 15 * GIB, int(15.5 * GIB), "flux.1-dev")
    rows = merged([row_of(observation(peak_bytes=2**20), []), row, row_of(observation("other"), [])])
    header, _, flux, other = table_lines(rows, width=160, color=False)
    assert "forecast (GiB)" in header
    assert "0.0 / 1.0" in flux
    assert "15.00 flux.1-dev" in flux
    assert other.split()[:8] == ["other", "12.3", "/", "0.50", "-", "/", "-", "-"]
    del row["forecast_bytes"]  # a row that an older worker sent
    assert "forecast" not in table_lines([row], width=160, color=False)[0]


def test_an_item_that_was_observed_and_forecast_is_one_row_with_both() -> None:
    gathered = RecipeReport(Settings())
    one = report("test_a", None)
    one.user_properties += [
        (ROW_PROPERTY, row_of(observation(), source="f")),
        (ROW_PROPERTY, row_of(None, source="f", recipe="flux", forecast=made())),
    ]
    gathered.add(one)
    (row,) = merged(gathered.rows)
    assert (row["graphs"], row["forecast_model"], row["statuses"]) == (2, "flux.1-dev", {"test_a": "passed"})


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_keeps_to_its_width_and_has_color_only_where_asked(width: int) -> None:
    rows = [row_of(observation("flux-nf4-compile-offload-with-a-long-name"), [verdict("parity", "failed")])]
    assert all(len(line) <= width for line in table_lines(rows, width=width, color=False))
    assert "\x1b[" not in "".join(table_lines(rows, width=width, color=False))
    assert "\x1b[31m" in "".join(table_lines(rows, width=width, color=True))


WORDS = st.text("abcdefgh0123456789", min_size=1, max_size=9)
NAMES = st.lists(WORDS, min_size=1, max_size=6).map("-".join)
TESTS = st.builds("tests/test_{0}.py::test_{1}[{2}]".format, WORDS, WORDS, NAMES)
STATUSES = st.dictionaries(
    st.sampled_from(["engagement", "graph_breaks", "recompiles", "quantization", "memory", "parity"]),
    st.sampled_from(["passed", "failed", "unverified", "known"]),
)
HEADINGS = set(
    re.findall(
        r"\S+",
        "recipe latency cold / warm (s) peak memory load call (MiB) forecast (GiB) transfers in out graphs breaks recompiles "
        "required tolerance verdict",
    )
)


@st.composite
def rows_of_recipes(draw: st.DrawFn) -> list[Row]:
    rows = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        row = row_of(
            observation(name, draw(st.sampled_from([None, 2**20, 2**34]))), [], source=f"a.recipes.toml::{name}"
        )
        rows.append({**row, "statuses": draw(STATUSES), "source": draw(st.sampled_from([row["source"], draw(TESTS)]))})
    return rows


@settings(max_examples=150, deadline=None)
@given(rows_of_recipes(), st.integers(40, 250))
def test_in_any_width_headings_are_whole_words_and_names_are_broken_only_between_words(
    rows: list[Row], width: int
) -> None:
    lines = table_lines(rows, width=width, color=False)
    about = [line for line in lines if line.startswith("names begin with ")]
    assert max(map(len, lines[len(about) :])) <= width
    rule = next(at for at, line in enumerate(lines) if line.startswith("───"))
    assert set(" ".join(lines[len(about) : rule]).split()) <= HEADINGS
    assert {"recipe", "verdict"} <= set(lines[rule - 1].split())
    names_width = lines[rule - 1].index("verdict") if len(lines[rule - 1].split()) == 2 else None
    column = "\n".join(line[:names_width] for line in lines[rule + 1 :])
    for name in names_of((row["source"], row["recipe"]) for row in rows):
        kept = name.removeprefix(about[0].removeprefix("names begin with ") if about else "")
        for word in re.findall(r"[a-z0-9]+", kept):
            assert re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", column), (word, column)


def test_names_lose_what_all_begin_with_where_they_are_long_and_only_there() -> None:
    sources = [f"tests/test_stripes.py::test_every_recipe_gives_an_image[{name}]" for name in ("nf4", "nf4-compile")]
    rows = [{**row_of(observation("nf4"), [verdict("parity")]), "source": source} for source in sources]
    first, *lines = table_lines(rows, width=100, color=False)
    assert first == "names begin with tests/test_stripes.py::"
    begun = [line.split()[0] for line in lines if "image[" in line]
    assert begun == ["image[nf4]", "image[nf4-compile]"]
    assert shortened(["flux-nf4", "flux-nf4-compile"]) == ("flux-", ["nf4", "nf4-compile"])
    assert shortened(["a-", "a-b"]) == ("", ["a-", "a-b"])
    named = ["test_a.py::test_fits[small]", "test_a.py::test_fits[large-1]", "test_a.py::test_fails"]
    assert shortened(named) == ("test_a.py::", ["test_fits[small]", "test_fits[large-1]", "test_fails"])
    assert shortened(named[:2]) == ("test_a.py::", ["test_fits[small]", "test_fits[large-1]"])
    assert shortened(["t.py::a[x-1]", "t.py::a[x-2]"]) == ("t.py::", ["a[x-1]", "a[x-2]"])
    assert shortened(["same", "same"]) == ("", ["same", "same"])
    assert "flux-nf4-compile" in table_lines([row_of(observation("flux-nf4-compile"), [])], width=100, color=False)[-1]


def test_recipes_that_were_skipped_are_a_line_for_each_reason_and_no_rows() -> None:
    gathered = RecipeReport(Settings())
    for name, why in (("a", "torchao is not installed"), ("b", "torchao is not installed"), ("c", "no GPU")):
        for check in ("engagement", "parity"):
            about = {"source": f"f.recipes.toml::{name}", "recipe": name, "check": check}
            skipped: Any = ("f", 1, f"Skipped: {why}")
            gathered.add(
                pytest.TestReport(
                    "f", ("f", 0, "f"), {}, "skipped", skipped, "call", user_properties=[(RECIPE_PROPERTY, about)]
                )
            )
    assert gathered.summary_lines() == ["2 skipped (torchao is not installed): a, b", "1 skipped (no GPU): c"]
    rows = merged(gathered.rows)
    assert table_lines(rows, width=100, color=False) == []
    (_, _, line) = table_lines([*rows, row_of(observation("d"), [verdict("parity")])], width=100, color=False)
    assert line.startswith("d ")


@pytest.mark.parametrize(
    ("asked", "terminal", "width"),
    [("70", False, 70), ("200", True, 200), ("", False, 160), ("x", False, 160), ("0", False, 160)],
)
def test_a_table_that_goes_to_no_terminal_has_the_columns_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, terminal: bool, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", asked)
    assert width_of(terminal=terminal) == width


class Worker:
    """What pytest-xdist puts into a report as ``node``."""

    class gateway:
        id = "gw0"

    workerinfo: ClassVar = {"sysplatform": "linux", "version_info": (3, 12, 1), "executable": "python", "id": "gw0"}


def test_a_sentence_of_another_process_begins_with_what_happened() -> None:
    failed = report("test_a", None, outcome="failed")
    failed.node = Worker  # type: ignore[attr-defined]
    failed.longrepr = "flux · observation: PipelineError: no such file\n  more"
    assert failed.longreprtext.startswith("[gw0] linux -- Python")
    carried = carried_by(failed)
    assert carried is not None
    assert carried.sentence == "flux · observation: PipelineError: no such file"
    failed.longrepr = SimpleNamespace(reprcrash=SimpleNamespace(message="Failed: it is bad\nmore"))
    assert (carried_by(failed) or carried).sentence == "it is bad"
    failed.longrepr = None
    assert (carried_by(failed) or carried).sentence == ""


def report(check: str, status: Status | None, *, outcome: str = "passed", when: str = "call") -> pytest.TestReport:
    carried: list[tuple[str, object]] = [(RECIPE_PROPERTY, {"source": "f", "recipe": "flux", "check": check})]
    if status is not None:
        carried += [(VERDICT_PROPERTY, verdict(check, status).to_dict())]
        carried += [(ROW_PROPERTY, row_of(observation(), [verdict(check, status)], source="f"))]
    return pytest.TestReport("f", ("f", 0, "f"), {}, outcome, None, when, user_properties=carried)  # type: ignore[arg-type]


def test_each_item_counts_once_and_other_tests_do_not() -> None:
    gathered = RecipeReport(Settings())
    for when in ("setup", "call", "teardown"):
        gathered.add(report("parity", "passed", when=when))
    gathered.add(pytest.TestReport("t", ("t", 0, "t"), {}, "passed", None, "call"))
    assert [row["statuses"] for row in gathered.rows] == [{"parity": "passed"}]


def test_what_is_unverified_is_counted_and_told() -> None:
    gathered = RecipeReport(Settings())
    gathered.add(report("parity", "unverified", outcome="skipped"))
    assert gathered.summary_lines() == [
        "1 unverified: nothing was judged there, so nothing passed",
        "  flux · parity: what parity says",
    ]
    assert gathered.strict_line() == ""


def test_strict_says_that_unverified_and_skipped_checks_fail_the_run() -> None:
    gathered = RecipeReport(Settings(strict=True))
    assert gathered.strict_line() == ""
    gathered.add(report("parity", "unverified", outcome="failed"))
    gathered.add(report("state", None, outcome="skipped", when="setup"))
    assert gathered.strict_line() == "diffopt: --diffopt-strict fails this run: 1 unverified and 1 skipped"


def test_an_unverified_verdict_has_a_category_of_its_own() -> None:
    unverified = status_of(report("parity", "unverified", outcome="skipped"))
    assert unverified == ("unverified", "u", ("UNVERIFIED", {"yellow": True}))
    assert status_of(report("parity", "passed")) is None
    assert status_of(report("parity", None, outcome="skipped", when="setup")) is None


def test_the_progress_line_is_shown_while_something_takes_long_and_cleared_after() -> None:
    read, write = os.pipe()
    line = ProgressLine(write, delay_seconds=0.01)
    with line.running():
        line.say("compiling transformer")
        time.sleep(0.2)
    line.close()
    with os.fdopen(read, encoding="utf-8") as terminal:
        written = terminal.read()
    assert "compiling transformer … 0 s" in written
    assert "\n" not in written
    assert written.endswith("\x1b8\x1b[K")


def test_what_is_quick_has_no_progress_line() -> None:
    read, write = os.pipe()
    line = ProgressLine(write, delay_seconds=5)
    with line.running():
        line.say("compiling transformer")
    line.close()
    with os.fdopen(read, encoding="utf-8") as terminal:
        assert terminal.read() == ""
