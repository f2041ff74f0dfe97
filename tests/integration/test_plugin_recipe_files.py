"""Recipe files as test items, with a session that runs nothing: what pytest makes of verdicts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest

RECIPES = """
[recipe.good]
pipeline = "tiny-flux"

[recipe.bad]
pipeline = "tiny-flux"
quantization = { backend = "bitsandbytes_4bit" }

[recipe.unsure]
pipeline = "tiny-sd"
compilation = { component = "unet" }
"""

CONFTEST = """
import os
import pytest
from pytest_diffopt import checks
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.collection.session import SESSION
from pytest_diffopt.errors import PreparationError, UnverifiableError
from pytest_diffopt.observation.observation import CallRecord, Observation

checks.checks_for = lambda recipe: ("engagement", "recompiles", "parity")


class FakeSession:
    def __init__(self):
        self.runs = []

    def observe(self, recipe):
        self.runs.append(recipe.name)
        calls = (CallRecord(0, "call", 12.34), CallRecord(1, "call", 0.5))
        return Observation({"name": recipe.name}, recipe.content_hash, "cpu", "cpu", {}, calls=calls)

    def judge(self, recipe, check):
        print("judging", recipe.name, check, "in", os.environ.get("PYTEST_XDIST_WORKER", "main"))
        if check == "recompiles" and recipe.name == "bad":
            evidence = ("toy.py:3  5x", "try it")
            return Verdict(check, recipe.name, "failed", "5 after warm-up, 0 allowed", {"n": 5}, evidence)
        if check == "parity" and recipe.name == "unsure":
            return Verdict(check, recipe.name, "unverified", "no reference could be made")
        if recipe.name == "raises":
            raise PreparationError("the factory raised") from ValueError("out of memory")
        if recipe.name == "unverifiable":
            raise UnverifiableError("this machine cannot tell")
        if recipe.name == "crashes":
            raise ZeroDivisionError("a bug")
        if recipe.name == "interrupted":
            raise KeyboardInterrupt
        return Verdict(check, recipe.name, "passed", "it holds", {"required": 0.25})

    def release(self):
        print("RELEASED")


def pytest_configure(config):
    config.stash[SESSION] = FakeSession()
"""


@pytest.fixture
def files(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    pytester.path.joinpath("a.recipes.toml").write_text(RECIPES, encoding="utf-8")
    return pytester


def test_a_recipe_is_an_item_a_check(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    result = run_pytest("--collect-only", "-q")
    names = [line for line in result.outlines if "::" in line]
    assert names == [
        f"a.recipes.toml::{recipe}::{check}"
        for recipe in ("good", "bad", "unsure")
        for check in ("engagement", "recompiles", "parity")
    ]


def test_verdicts_become_outcomes_and_unverified_is_none_of_them(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    result = run_pytest("-v")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes() == {"passed": 7, "failed": 1, "unverified": 1}
    result.stdout.fnmatch_lines(["a.recipes.toml::unsure::parity UNVERIFIED*"])


def test_a_failure_is_the_verdict_and_nothing_else(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    result = run_pytest("-rN", "--show-capture=no")
    lines = result.outlines
    start = next(at for at, line in enumerate(lines) if "FAILURES" in line)
    end = next(at for at, line in enumerate(lines) if "optimization recipes" in line)
    assert lines[start + 1 : end] == [
        "_______________________________ bad · recompiles _______________________________",
        "bad · recompiles: 5 after warm-up, 0 allowed",
        "  toy.py:3  5x",
        "  try it",
    ]


def test_the_table_stands_at_the_end_with_what_is_unverified(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    result = run_pytest("-W", "error")
    result.stdout.fnmatch_lines(
        [
            "*= optimization recipes =*",
            "recipe * latency cold / warm (s) * graphs * breaks * recompiles * required tolerance * verdict",
            "good *12.3 / 0.50 * 0 * 0 * 0 * 0.25 * 3 passed",
            "bad * 1 failed: recompiles, 2 passed",
            "unsure * 1 unverified: parity, 2 passed",
            "1 unverified: nothing was judged there, so nothing passed",
            "  unsure · parity: no reference could be made",
        ],
        consecutive=False,
    )


def test_no_recipes_no_table(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_a(): pass")
    run_pytest().stdout.no_fnmatch_line("*optimization recipes*")


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("a.recipes.toml::bad",), 3),
        (("a.recipes.toml::bad::parity",), 1),
        (("-k", "good"), 3),
        (("-k", "recompiles and not bad"), 2),
        (("-k", "bitsandbytes_4bit"), 3),
        (("-k", "inductor and parity"), 1),
        (("-k", "diffopt"), 9),
        (("-k", "tiny-sd"), 3),
    ],
)
def test_recipes_are_selected_like_tests(
    run_pytest: RunPytest, files: pytest.Pytester, arguments: tuple[str, ...], count: int
) -> None:
    result = run_pytest("--collect-only", "-q", *arguments)
    assert len([line for line in result.outlines if line.startswith("a.recipes.toml::")]) == count


def test_exitfirst_and_last_failed_know_recipes(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    assert run_pytest("-x").parseoutcomes() == {"passed": 4, "failed": 1}
    assert run_pytest("--lf").parseoutcomes()["failed"] == 1


def test_it_runs_without_the_cache_provider(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    outcomes = run_pytest("-p", "no:cacheprovider", "-p", "no:xdist").parseoutcomes()
    assert outcomes == {"passed": 7, "failed": 1, "unverified": 1}


def test_strict_fails_on_what_is_unverified(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    result = run_pytest("--diffopt-strict", "-k", "unsure")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes() == {"passed": 2, "failed": 1, "deselected": 6}
    result.stdout.fnmatch_lines(
        ["unsure · parity: no reference could be made", "diffopt: --diffopt-strict fails this run: 1 unverified"]
    )


def test_strict_fails_on_a_recipe_that_was_skipped(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    skip = """
def pytest_collection_modifyitems(items):
    for item in items:
        if item.name == "parity":
            item.add_marker(pytest.mark.skip("not today"))
"""
    files.makeconftest(CONFTEST + skip)
    assert run_pytest("-k", "good").ret == pytest.ExitCode.OK
    result = run_pytest("-k", "good", "--diffopt-strict")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["diffopt: --diffopt-strict fails this run: 1 skipped"])


def test_errors_are_that_recipes_failure_and_the_others_go_on(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    text = "".join(
        f'[recipe.{name}]\npipeline = "tiny-flux"\n' for name in ("raises", "unverifiable", "crashes", "good")
    )
    files.path.joinpath("a.recipes.toml").write_text(text, encoding="utf-8")
    result = run_pytest("-W", "error")
    assert result.parseoutcomes() == {"failed": 6, "unverified": 3, "passed": 3}
    result.stdout.fnmatch_lines(
        [
            "raises · engagement: PreparationError: the factory raised",
            "  caused by ValueError: out of memory",
            "*ZeroDivisionError: a bug",
            "crashes * 3 failed: engagement recompiles parity",
        ]
    )
    result.stdout.fnmatch_lines(["  unverifiable · parity: this machine cannot tell"])


def test_an_interrupt_ends_the_run(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    text = '[recipe.interrupted]\npipeline = "tiny-flux"\n[recipe.good]\npipeline = "tiny-flux"\n'
    files.path.joinpath("a.recipes.toml").write_text(text, encoding="utf-8")
    result = run_pytest()
    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_a_wrong_file_fails_at_collection_with_every_mistake(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    files.path.joinpath("b.recipes.toml").write_text(
        '[recipe.x]\npipeline = "tiny-flux"\ncolour = "red"\nquantization = { backend = "none" }\n', encoding="utf-8"
    )
    result = run_pytest()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    lines = result.outlines
    start = next(at for at, line in enumerate(lines) if "ERROR collecting b.recipes.toml" in line)
    assert lines[start + 1].endswith("b.recipes.toml: 2 mistakes")
    assert lines[start + 2].startswith("  recipe.x")
    assert lines[start + 3].startswith("  recipe.x")
    assert "short test summary" in lines[start + 4]


def test_what_the_installation_lacks_is_told_at_collection(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    files.path.joinpath("a.recipes.toml").write_text(
        '[recipe.x]\npipeline = "no.such.module:factory"\n[recipe.y]\npipeline = "os:no_such_name"\n'
        '[recipe.z]\npipeline = "tiny-fluks"\n[recipe.z1]\nextends = "z"\n[recipe.z2]\nextends = "z1"\n',
        encoding="utf-8",
    )
    result = run_pytest()
    result.stdout.fnmatch_lines(
        [
            "a.recipes.toml: 3 mistakes",
            "  recipe.x.pipeline: *no.such.module*",
            "  recipe.y.pipeline: *no_such_name*",
            "  recipe.z.pipeline (and 2 more: recipe.z1.pipeline, recipe.z2.pipeline): found 'tiny-fluks'; did you mean *",
        ]
    )
    assert result.stdout.str().count("tiny-fluks") == 1


def test_a_junit_report_has_the_verdicts(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    run_pytest("--junitxml=report.xml", "-k", "bad and recompiles")
    tree = ElementTree.parse(files.path / "report.xml")
    properties = {one.get("name"): one.get("value") for one in tree.iter("property")}
    assert properties["diffopt_sentence"] == "5 after warm-up, 0 allowed"


def test_properties_are_plain_json(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    dump = """
import json

def pytest_runtest_logreport(report):
    if report.when == "call":
        print("PROPERTIES", json.dumps(dict(report.user_properties)))
"""
    files.makeconftest(CONFTEST + dump)
    result = run_pytest("-s", "-k", "bad and recompiles")
    line = next(line for line in result.outlines if "PROPERTIES" in line)
    carried = json.loads(line.partition("PROPERTIES ")[2])
    assert carried["diffopt_verdict"]["status"] == "failed"
    assert carried["diffopt_row"]["cold_seconds"] == 12.34


def test_a_skip_and_a_failure_stand_at_the_recipes_line(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    dump = """
def pytest_runtest_logreport(report):
    if report.when == "call" and not report.passed:
        print("AT", report.location[:2], report.longrepr if report.skipped else "")
"""
    files.makeconftest(CONFTEST + dump)
    result = run_pytest("-s")
    result.stdout.fnmatch_lines(["*AT ('a.recipes.toml', 4) *", "*AT ('a.recipes.toml', 8) *a.recipes.toml', 9, *"])


def test_the_session_is_released_at_the_end(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    assert sum("RELEASED" in line for line in run_pytest("-k", "good").outlines) == 1


@pytest.mark.parametrize("distribution", ["load", "loadgroup", "loadscope", "worksteal"])
def test_workers_send_their_verdicts_and_rows(run_pytest: RunPytest, files: pytest.Pytester, distribution: str) -> None:
    pytest.importorskip("xdist")
    result = run_pytest("-n", "2", "--dist", distribution, "-rA")
    assert result.parseoutcomes() == {"passed": 7, "failed": 1, "unverified": 1}
    for row in (
        "good *12.3 / 0.50 * 3 passed",
        "bad * 1 failed: recompiles, 2 passed",
        "unsure * 1 unverified: parity, 2 passed",
    ):
        result.stdout.fnmatch_lines([row])


OVER = """
import os
import pytest
from pytest_diffopt import recipes

@recipes("a.recipes.toml")
@pytest.mark.parametrize("k", range(4))
def test_over(recipe, k):
    print("judging", recipe.name, "test", "in", os.environ["PYTEST_XDIST_WORKER"])
    if recipe.name == "bad":
        pytest.fail("it is bad", pytrace=False)
"""


@pytest.mark.parametrize("distribution", ["load", "loadgroup"])
def test_a_recipe_stays_on_one_worker_with_the_tests_over_it(
    run_pytest: RunPytest, files: pytest.Pytester, distribution: str
) -> None:
    pytest.importorskip("xdist")
    files.makepyfile(test_over=OVER)
    result = run_pytest("-n", "2", "--dist", distribution, "-rA", "--diffopt-strict")
    assert result.parseoutcomes() == {"passed": 15, "failed": 6}
    assert "GATE FAILED: 5 failed, 1 unverified; 15 verdicts of 3 recipes passed" in result.outlines
    workers: dict[str, set[str]] = {}
    for line in result.outlines:
        if line.startswith("judging "):
            _, recipe, _, _, worker = line.split()
            workers.setdefault(recipe, set()).add(worker)
    assert {recipe: len(found) for recipe, found in workers.items()} == {"good": 1, "bad": 1, "unsure": 1}


def test_the_recipes_marker_runs_a_test_a_recipe(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    files.path.joinpath("sub").mkdir()
    files.path.joinpath("sub", "b.recipes.toml").write_text('[recipe.other]\npipeline = "tiny-sd"\n', encoding="utf-8")
    files.path.joinpath("sub", "test_it.py").write_text(
        """
import pytest
from pathlib import Path
from pytest_diffopt import Recipe, recipes

@recipes(Recipe(name="made", pipeline="tiny-flux"), Path("b.recipes.toml"), "a.recipes.toml")
def test_it(recipe, observation):
    assert observation.name == recipe.name

@pytest.mark.diffopt_recipes("b.recipes.toml")
class TestClass:
    def test_observation_alone(self, observation):
        assert observation.name == "other"
""",
        encoding="utf-8",
    )
    result = run_pytest("-v", "sub/test_it.py", "-W", "error")
    assert result.parseoutcomes() == {"passed": 6}
    result.stdout.fnmatch_lines([f"sub/test_it.py::test_it[[]{name}[]] PASSED*" for name in ("made", "other", "good")])
    result.stdout.fnmatch_lines(
        [
            "names begin with sub/test_it.py::",
            "test_it[[]other[]] *12.3 / 0.50 * 1 passed",
            "TestClass::test_observation_alone[[]other[]] *12.3 / 0.50 * 1 passed",
        ]
    )


def test_a_wrong_recipes_marker_fails_its_test_alone(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    files.makepyfile(
        """
        import pytest

        @pytest.mark.diffopt_recipes("nowhere.recipes.toml")
        def test_missing(observation): ...

        @pytest.mark.diffopt_recipes(3)
        def test_wrong(recipe): ...

        @pytest.mark.diffopt_recipes("a.recipes.toml")
        def test_takes_none(): ...

        def test_unmarked(recipe): ...

        def test_other(): ...
        """
    )
    result = run_pytest("test_a_wrong_recipes_marker_fails_its_test_alone.py")
    assert result.parseoutcomes() == {"errors": 4, "passed": 1}
    result.stdout.fnmatch_lines(
        [
            "*::test_missing[[]mistake[]]: the marker recipes: 1 mistake",
            "*::test_wrong[[]mistake[]]: recipes: found 3. It takes: *",
            "*::test_takes_none: recipes: the test takes neither fixture, 'recipe' nor 'observation'",
            "recipe: the test has no marker recipes: *",
        ]
    )


def test_a_conftest_changes_recipes_registers_replicas_and_reads_verdicts(
    run_pytest: RunPytest, files: pytest.Pytester
) -> None:
    hooks = """
def pytest_diffopt_register_replicas(registry):
    print("REGISTRY", type(registry).__name__, "tiny-flux" in registry.families)

def pytest_diffopt_modify_recipe(recipe, config):
    if recipe.name == "good":
        return recipe.replace(dtype="bfloat16")

def pytest_diffopt_verdict(verdict, observation):
    print("READ", verdict.recipe, verdict.status, observation.name)
    if verdict.recipe == "good":
        print("HASH", observation.content_hash)
"""
    files.makeconftest(CONFTEST + hooks)
    result = run_pytest("-s")
    assert sum("REGISTRY Registry True" in line for line in result.outlines) == 1
    for expected in ("READ good passed good", "READ bad failed bad", "READ unsure unverified unsure"):
        assert any(line.endswith(expected) for line in result.outlines), expected
    hashes = {line.partition("HASH ")[2] for line in result.outlines if "HASH " in line}
    from pytest_diffopt import Recipe

    as_written = Recipe(name="good", pipeline="tiny-flux")
    assert hashes == {as_written.replace(dtype="bfloat16").content_hash}


def test_a_hook_that_returns_no_recipe_is_told(run_pytest: RunPytest, files: pytest.Pytester) -> None:
    files.makeconftest(CONFTEST + "\ndef pytest_diffopt_modify_recipe(recipe, config): return 3\n")
    run_pytest().stdout.fnmatch_lines(
        [
            "  recipe.good (and 2 more: recipe.bad, recipe.unsure): found int from the hook pytest_diffopt_modify_recipe; *"
        ]
    )


@pytest.mark.parametrize(("argument", "shown"), [("-v", True), ("-q", False)])
def test_a_long_compile_has_a_progress_line_in_a_terminal_alone(
    run_pytest: RunPytest, plugin_arguments: tuple[str, ...], files: pytest.Pytester, argument: str, shown: bool
) -> None:
    pytest.importorskip("pty")
    slow = """
import time
from pytest_diffopt.collection.session import PROGRESS

def judge_slowly(self, recipe, check):
    self.config.stash[PROGRESS].say("compiling transformer")
    time.sleep(1.3)
    return Verdict(check, recipe.name, "failed", "it took long")

FakeSession.judge = judge_slowly

@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    session.config.stash[SESSION].config = session.config
"""
    files.makeconftest(CONFTEST + slow)
    arguments = (argument, "-k", "good and parity")
    assert "compiling transformer" not in run_pytest(*arguments).stdout.str()
    script = f"""
import os, pty, sys
os.environ["TERM"] = "xterm"
with open("terminal.txt", "wb") as log:
    def read(descriptor):
        data = os.read(descriptor, 1024)
        log.write(data)
        return data
    pty.spawn([sys.executable, "-m", "pytest", *{(*plugin_arguments, *arguments)!r}], read)
"""
    files.run(sys.executable, "-c", script)
    written = files.path.joinpath("terminal.txt").read_text(encoding="utf-8")
    assert "good · parity: it took long" in written
    assert ("compiling transformer … 1 s" in written) is shown


def test_known_faults_are_expected_with_their_cause_and_told_when_mended(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        factories="""
        import torch

        class Raises(torch.nn.Linear):
            def forward(self, input):
                raise RuntimeError("no data")

        def raises():
            return Raises(4, 4)

        def healthy():
            return torch.nn.Linear(4, 4)

        def inputs(k):
            return {"input": torch.ones(2, 4) * k}
        """
    )
    table = '[recipe.{0}]\npipeline = "factories:{1}"\ncall = {{ inputs = "factories:inputs" }}\nknown_faults = {2}\n'
    rows = [
        ("expected", "raises", '{ run = "no data" }'),
        ("other", "raises", '{ run = "out of memory" }'),
        ("mended", "healthy", '{ parity = "differs" }'),
    ]
    pytester.makefile(".recipes.toml", known="".join(table.format(*row) for row in rows))
    result = run_pytest("-rx", "--diffopt-device=cpu")
    assert result.parseoutcomes() == {"xfailed": 2, "failed": 3, "passed": 1}
    result.stdout.fnmatch_lines(
        [
            "*known_faults.run expects 'out of memory', which this is not",
            "mended · parity: the check passes, though known_faults.parity expects 'differs'",
            "expected *2 known: parity state*",
            "XFAIL known.recipes.toml::expected::parity - *known fault: no data",
        ]
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_pytest_html_shows_the_residency_of_each_recipe(
    run_pytest: RunPytest, pytester: pytest.Pytester, workers: str
) -> None:
    pytest.importorskip("pytest_html")
    pytest.importorskip("xdist")
    pytester.makepyfile(
        factories="""
        import torch

        def model():
            return torch.nn.Linear(4, 4)

        def inputs(k):
            return {"input": torch.ones(2, 4) * k}
        """
    )
    table = '[recipe.small]\npipeline = "factories:model"\ncall = { inputs = "factories:inputs" }\n'
    pytester.makefile(".recipes.toml", small=table)
    result = run_pytest("--diffopt-device=sim", "--html=report.html", "--self-contained-html", "-n", workers)
    assert result.ret == pytest.ExitCode.OK
    page = (pytester.path / "report.html").read_text(encoding="utf-8")
    assert page.count("&lt;svg") == 2  # one for a wide page, one for a phone
