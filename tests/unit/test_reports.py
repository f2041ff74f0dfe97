"""Reports of a run: one model, written as JSON, Markdown, HTML and JUnit; annotations; bounds."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from pytest_diffopt.collection.session import SETTINGS
from pytest_diffopt.options import Settings
from pytest_diffopt.report.annotations import Annotation, Repository, annotations_of
from pytest_diffopt.report.gate import Outcome
from pytest_diffopt.report.gathering import Carried
from pytest_diffopt.report.junit import junit_xml
from pytest_diffopt.report.markdown import MOST_BYTES, markdown
from pytest_diffopt.report.page import in_pytest_html, page
from pytest_diffopt.report.reports import Reports, Target
from pytest_diffopt.report.rows import row_of
from pytest_diffopt.report.run import GateRecord, Run, from_json, run_of, schema_text, to_json

ROOT = Path(__file__).parents[2]
MIB = 2**20
KEY = {
    "accelerator": "sim",
    "device": "Simulated accelerator",
    "capability": None,
    "compile_backend": "",
    "versions": {"torch": "2.13.0"},
}
BREAK = {"component": "model", "file": "mine/model.py", "line": 7, "function": "forward", "why": "a break", "count": 2}
RESIDENCY = {
    "owners": [{"component": "model", "kind": "weights"}],
    "phases": [{"phase": "loading", "first": 0, "last": 1, "peak_at": 1, "peak_bytes": 4 * MIB}],
    "positions": [0, 1],
    "bytes": [[0], [4 * MIB]],
}


def record(breaks: int = 0) -> dict[str, Any]:
    told = {
        "component": "model",
        "file": "lib/x.py",
        "line": 3,
        "function": "f",
        "reason": "why",
        "skipped_frame": False,
    }
    return {
        "recipe": {"pipeline": "tiny-flux"},
        "breaks": [{**told, "count": breaks}] if breaks else [],
        "recompiles": [],
        "peaks": {"load_bytes": [9 * MIB], "call_bytes": 12 * MIB, "noise": 0.0},
        "latency": None,
        "required_tolerance": 0.01,
    }


def items(name: str, *, status: str = "passed", sentence: str = "fine", line: int = 4, **figures: Any) -> list[Carried]:
    """What the items of one recipe carry: parity with its components, graph_breaks, and baseline."""
    source = f"a/x.recipes.toml::{name}"
    row = {
        **row_of(None, source=source, recipe=name),
        "peak_bytes": 12 * MIB,
        "load_peak_bytes": 9 * MIB,
        "cold_seconds": 2.5,
        "warm_seconds": 0.25,
        "graphs": 1,
        "breaks": 2,
        "recompiles": 0,
        "required_tolerance": 0.01,
    }
    recorded = {"peaks": {"load_bytes": [8 * MIB], "call_bytes": 10 * MIB, "noise": 0.0}, "required_tolerance": 0.01}
    difference = {"what": "peak", "where": "", "recorded": 10 * MIB, "now": 12 * MIB, "direction": "worse", "unit": "B"}
    parity = {"model": {"required": 0.01, "allowed": 0.03, "floor": 0.009, "excess": 0.33, "detects": 0.004}}

    def one(check: str, status: str, sentence: str, figures: dict[str, Any], **more: Any) -> Carried:
        verdict = {"check": check, "recipe": name, "status": status, "sentence": sentence, "figures": figures}
        verdict["evidence"] = [f"evidence of {check} & <more>"]
        rows = ({**row, "statuses": {check: status}},)
        return Carried(source, name, check, status, sentence, rows, verdict, file="a/x.recipes.toml", line=line, **more)

    return [
        one("parity", "passed", "3 tensors equal", {"components": parity}, residencies={"observed": RESIDENCY}),
        one("graph_breaks", status, sentence, figures),
        one(
            "baseline",
            "failed",
            "1 thing not as recorded: 1 worse",
            {"against": KEY, "exact_key": True, "differences": [difference], "recorded": recorded},
            record={"file": "a/x.recipes.toml", "name": name, "key": KEY, "record": record(2)},
        ),
    ]


def run_with(*recipes: list[Carried]) -> Run:
    gate = GateRecord(passed=False, sentence="GATE FAILED: 1 failed", problems=("a file is gone",), strict=True)
    gate = gate.model_copy(update={"others_failed": ("test_x.py::test_y",), "left_out": ("a.recipes.toml::r::parity",)})
    return run_of(
        [item for recipe in recipes for item in recipe],
        gate,
        version="0.1.0",
        started="2026-01-02T03:04:05+00:00",
        seconds=3.5,
    )


HOSTILE = '<script>alert(1)</script> & "q" | `x` | ]]>'
RUN = run_with(items("flux"), items(HOSTILE, status="failed", sentence=f"broke {HOSTILE}", places=[BREAK]))


def test_json_comes_back_as_it_was_and_a_newer_one_is_refused() -> None:
    assert from_json(to_json(RUN)) == RUN
    with pytest.raises(ValueError, match="found schema version 2; this release reads 1"):
        from_json(to_json(RUN).replace('"schema_version":1', '"schema_version":2'))


def test_the_schema_that_is_documented_is_that_of_the_reports() -> None:
    assert (ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8") == schema_text()


def test_json_has_no_number_that_json_does_not_know() -> None:
    carried = items("flux")
    parity = {"model": {"required": float("inf"), "allowed": 0.03, "floor": float("nan"), "excess": float("inf")}}
    assert carried[0].verdict is not None
    carried[0].verdict["figures"]["components"] = parity  # type: ignore[index]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(to_json(run_with(carried)), parse_constant=refuse)
    assert data["recipes"][0]["parity"][0]["required"] == "Infinity"


def test_a_run_has_all_that_its_items_carried() -> None:
    flux, hostile = RUN.recipes
    assert (flux.recipe, flux.file, flux.line, flux.status) == ("flux", "a/x.recipes.toml", 4, "failed")
    assert [verdict.check for verdict in flux.verdicts] == ["parity", "graph_breaks", "baseline"]
    assert RUN.gate.counts == {"passed": 3, "failed": 3}
    assert flux.residency is not None
    assert flux.residency.phases[0].peak_bytes == 4 * MIB
    assert flux.baseline is not None
    changes = {change.name: (change.recorded, change.now) for change in flux.baseline.changes}
    assert changes["peak_bytes"] == (10 * MIB, 12 * MIB)
    assert [(place.file, place.failed, place.count) for place in hostile.places] == [
        ("mine/model.py", True, 2),
        ("lib/x.py", False, 2),
    ]


class Page(HTMLParser):
    """What a page shows: its tags, and the text of the table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_needs_nothing_from_outside_and_runs_nothing() -> None:
    shown = Page(page(RUN))
    assert [tag for tag, _ in shown.tags if tag in ("script", "iframe", "object", "embed")] == []
    addresses = [value for _, attrs in shown.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert [one for one in addresses if one and not one.startswith(("#", "data:"))] == []
    assert (
        "http" not in "".join(part for part in page(RUN).split('xmlns="http://www.w3.org/2000/svg"')).split("<body>")[0]
    )
    assert [name for _, attrs in shown.tags for name in attrs if name.startswith("on")] == []
    assert HOSTILE in "".join(shown.text)


def test_a_page_has_the_table_the_bars_the_parity_and_the_residency() -> None:
    shown = Page(page(RUN))
    figures = [attrs.get("data-figure") for tag, attrs in shown.tags if tag == "td" and "data-figure" in attrs]
    assert figures.count("peak_bytes") == 2
    kinds = [attrs.get("class") for tag, attrs in shown.tags if tag == "rect"]
    assert kinds.count("bar first") == 4  # of loading, and of first calls
    assert kinds.count("recorded") == 4  # both peaks of both recipes
    assert kinds.count("bar within") == 2
    titles = [tag for tag, _ in shown.tags].count("svg")
    assert titles >= 2 + 2 + 2  # memory, latency; parity and residency of each
    text = "".join(shown.text)
    assert "12.00 MiB, was 10.00 MiB" in text
    assert "GATE FAILED: 1 failed" in text
    assert "a file is gone" in text


@pytest.mark.parametrize("count", [1, 200])
def test_markdown_stays_within_what_github_takes_and_says_what_it_left_out(count: int) -> None:
    sentence = "x" * (20_000 if count > 1 else 10)
    text = markdown(run_with(*(items(f"r{n}", status="failed", sentence=sentence) for n in range(count))))
    assert len(text.encode("utf-8")) <= MOST_BYTES
    assert ("Left out" in text) is (count > 1)
    assert "GATE FAILED" in text


def test_markdown_has_no_html_of_a_recipe() -> None:
    text = markdown(RUN)
    assert "<script>" not in text
    assert text.count("\n| ❌ |") == 2


def test_junit_has_flat_scalars_and_the_failures() -> None:
    root = ElementTree.fromstring(junit_xml(RUN))
    assert (root.get("tests"), root.get("failures")) == ("7", "4")
    suite = next(one for one in root if one.get("name") == "a/x.recipes.toml::flux")
    properties = {one.get("name"): one.get("value") for one in suite.find("properties") or []}
    assert properties["diffopt_peak_bytes"] == str(12 * MIB)
    assert all("{" not in (value or "") and "[" not in (value or "") for value in properties.values())
    failure = next(case.find("failure") for case in suite.iter("testcase") if case.get("name") == "baseline")
    assert failure is not None
    assert failure.get("message") == "1 thing not as recorded: 1 worse"


BESIDE = ("a file is gone", "failed, and no recipe of ours: test_x.py::test_y", "left out: a.recipes.toml::r::parity")


def test_each_report_has_what_closes_the_gate_beside_verdicts() -> None:
    shown = Page(page(RUN))
    for text in (markdown(RUN).replace("\\", ""), "".join(shown.text), junit_xml(RUN)):
        assert all(line in text for line in BESIDE)
    many = RUN.gate.model_copy(update={"left_out": tuple(f"a.recipes.toml::r{k}::parity" for k in range(100))})
    assert "- and 52 more" in markdown(RUN.model_copy(update={"gate": many}))


def test_junit_has_a_failure_where_the_gate_is_closed_by_no_verdict_and_none_where_it_is_open() -> None:
    def failures(passed: bool) -> tuple[str | None, str | None]:
        gate = GateRecord(passed=passed, sentence="GATE ...")
        run = run_of([], gate, version="0.1.0", started="2026-01-02T03:04:05+00:00", seconds=3.5)
        root = ElementTree.fromstring(junit_xml(run))
        return root.get("failures"), root.get("tests")

    assert (failures(False), failures(True)) == (("1", "1"), ("0", "1"))


def test_two_hundred_recipes_take_time_in_proportion() -> None:
    """Twice the recipes, twice the time, and not four times: with room for a noisy machine."""

    def seconds(count: int) -> float:
        run = run_with(*(items(f"r{n}", places=[BREAK]) for n in range(count)))
        begun = time.perf_counter()
        for write in (to_json, markdown, page, junit_xml):
            write(run)
        return time.perf_counter() - begun

    seconds(10)
    assert min(seconds(200) for _ in range(3)) < 12 * min(seconds(50) for _ in range(3))


# annotations


def annotated(run: Run, here: dict[str, str]) -> list[Annotation]:
    return annotations_of(run, here.get, lambda file: file)


def test_a_break_in_the_repository_is_annotated_there_and_one_in_a_library_on_its_recipe() -> None:
    failing = run_with(items("flux", status="failed", sentence="2 breaks", places=[BREAK]))
    (first, *_) = annotated(failing, {"mine/model.py": "src/mine/model.py"})
    assert (first.file, first.line, first.title) == ("src/mine/model.py", 7, "flux: graph break")
    assert first.message == "graph break 2× in model: a break"
    (first, *_) = annotated(failing, {})
    assert (first.file, first.line) == ("a/x.recipes.toml", 4)
    assert "at forward mine/model.py:7" in first.message


def test_an_unverified_verdict_is_a_warning() -> None:
    found = annotated(run_with(items("flux", status="unverified", sentence="no device")), {})
    assert [(one.level, one.title) for one in found if one.level == "warning"] == [
        ("warning", "flux · graph_breaks unverified")
    ]


def test_workflow_commands_are_escaped() -> None:
    command = Annotation("error", "a,b:c.py", 3, "50%: x", "one\ntwo, 100%").command
    assert command == "::error file=a%2Cb%3Ac.py,line=3,title=50%25%3A x::one%0Atwo, 100%25"


def test_ten_of_a_level_are_annotated_and_the_rest_is_counted() -> None:
    run = run_with(*(items(f"r{n}", status="failed", sentence=f"s{n}", line=n + 1) for n in range(12)))
    found = annotated(run, {})
    assert [one.level for one in found].count("error") == 10
    assert found[-1].level == "notice"
    assert "14 more errors" in found[-1].message


def test_files_of_the_repository_are_found_and_installed_ones_are_not(tmp_path: Path) -> None:
    mine, installed = tmp_path / "src" / "mine.py", tmp_path / ".venv" / "site-packages" / "lib.py"
    for file in (mine, installed):
        file.parent.mkdir(parents=True)
        file.write_text("", encoding="utf-8")
    repository = Repository(tmp_path / "tests", tmp_path, (installed.parent,))
    assert repository.found("mine.py") == "src/mine.py"
    assert repository.found("lib.py") is None
    assert repository.found("nowhere.py") is None
    assert repository.shown("r.recipes.toml") == "tests/r.recipes.toml"


def test_charts_have_no_scale_of_their_own_so_that_a_phone_shows_their_text_as_large() -> None:
    charts = re.findall(r'<svg [^>]*class="bars".*?</svg>', page(RUN), flags=re.DOTALL)
    assert len(charts) == 2 + 2
    for chart in charts:
        assert "viewBox" not in chart
        places = [float(one) for one in re.findall(r' x[12]?="([\d.]+)%"', chart)]
        assert places
        assert max(places) <= 40  # the rest is for figures
        assert re.findall(r'<rect class="bar [^"]*" x="0" y="[\d.]+" width="[\d.]+%"', chart)
    long = run_with(items("tests/test_a.py::test_of_a_very_long_name_that_goes_on_and_on[flux-nf4-compile]"))
    (shown,) = set(re.findall(r'class="name" [^>]*>(…[^<]*)<', page(long)))
    assert len(shown) <= 48
    assert shown.endswith("[flux-nf4-compile]")
    assert f"_{shown[1:]}" in long.recipes[0].recipe  # it begins with a word


def test_in_pytest_htmls_page_a_phone_is_no_desk_and_the_title_has_the_verdict() -> None:
    text = in_pytest_html(RUN)
    assert text.startswith('<meta name="viewport" content="width=device-width, initial-scale=1">')
    assert "body { min-width: 0; }" in text
    config: Any = SimpleNamespace(stash=pytest.Stash(), option=SimpleNamespace())
    config.stash[SETTINGS] = Settings(strict=True)
    gate: Any = SimpleNamespace(outcome=Outcome(False, "GATE FAILED: 1 failed; no recipe was run"))
    reports = Reports(config, [Target("r.html", Path("r.html"), by_pytest_html=True)], gate)
    theirs, prefix = SimpleNamespace(title="report.html"), list[str]()
    reports.pytest_html_report_title(theirs)
    reports.pytest_html_results_summary(prefix)
    assert theirs.title == "report.html · GATE FAILED: 1 failed; no recipe was run"
    assert len(prefix) == 1


def skipped(name: str) -> Carried:
    source = f"a/x.recipes.toml::{name}"
    row = {**row_of(None, source=source, recipe=name), "statuses": {"parity": "skipped"}}
    return Carried(
        source, name, "parity", "skipped", "torchao is not installed", (row,), file="a/x.recipes.toml", line=9
    )


def over(recipe: str) -> list[Carried]:
    """What a test over a recipe carries."""
    source = f"tests/test_a.py::test_it[{recipe}]"
    row = {**row_of(None, source=source, recipe=recipe), "peak_bytes": 12 * MIB, "statuses": {"test_it": "passed"}}
    return [Carried(source, recipe, "test_it", "passed", "", (row,), file="tests/test_a.py", line=3)]


def test_recipes_that_were_skipped_are_one_line_and_no_rows_of_dashes() -> None:
    run = run_with(items("flux"), [skipped("one")], [skipped("two")])
    line = "2 skipped (torchao is not installed): one, two"
    assert run.skipped == [line]
    shown = page(run)
    assert line in shown
    assert shown.count('<tr><th scope="row"><a') == 1
    text = markdown(run)
    assert line in text
    assert "torchao" not in text.replace(line, "")
    assert "| ⚠️ |" not in text
    assert "Recipes</h2>" not in page(run_with([skipped("one")]))


def test_a_test_over_a_recipe_is_called_by_its_node_id_in_tables_and_charts() -> None:
    run = run_with(items("flux"), over("flux"))
    assert run.names == ["flux", "tests/test_a.py::test_it[flux]"]
    shown = page(run)
    assert ">tests/<wbr>test_<wbr>a.<wbr>py::<wbr>test_<wbr>it[<wbr>flux]</a></th>" in shown
    assert "tests/test_a.py::test_it[flux], peak of a call: 12.00 MiB" in shown
    assert ">flux</a></th>" in shown
    assert "| tests/test\\_a.py::test\\_it\\[flux\\] |" in markdown(run)


@pytest.mark.parametrize(
    ("passed", "strict", "title", "kind", "mark"),
    [
        (True, True, "gate passed", "passed", "✅"),
        (True, False, "no gate, nothing failed", "unverified", "⚠️"),
        (False, False, "gate failed", "failed", "❌"),
    ],
)
def test_a_report_says_gate_passed_only_of_a_gate(passed: bool, strict: bool, title: str, kind: str, mark: str) -> None:
    gate = GateRecord(passed=passed, strict=strict, sentence="as it is")
    run = RUN.model_copy(update={"gate": gate})
    assert f"<title>Optimization recipes: {title}</title>" in page(run)
    assert f'<p class="gate {kind}">' in page(run)
    assert f"{mark} **as it is**" in markdown(run)
