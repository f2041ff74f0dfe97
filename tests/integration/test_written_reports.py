"""``--diffopt-report`` on real runs: the same figures in every report, and wrong paths said before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

RunPytest = Callable[..., pytest.RunResult]

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)

    def forward(self, x):
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)

def inputs(call):
    return {"x": torch.ones(2, 512) * (call + 1)}
"""
RECIPES = """
[recipe.breaks]
pipeline = "models:Net"
compilation = { component = "model", backend = "eager" }
call = { inputs = "models:inputs" }

[recipe.nf4]
pipeline = "models:Net"
quantization = { backend = "bitsandbytes_4bit", components = ["model"] }
call = { inputs = "models:inputs" }
"""
REPORTS = ("r.json", "r.md", "r.html", "r.xml")


@pytest.mark.parametrize(
    "how", [("-p", "no:html", "-p", "no:xdist"), ("-n", "2", "--junitxml=pytest.xml")], ids=["alone", "xdist"]
)
def test_one_run_writes_the_same_figures_into_every_report(
    pytester: pytest.Pytester, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    pytester.makeini("[pytest]\npythonpath = .")
    pytester.makepyfile(models=MODEL)
    pytester.makefile(".recipes.toml", r=RECIPES)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(pytester.path))
    result = run_pytest(
        "-p", "no:cacheprovider", "--diffopt-strict", *how, *(f"--diffopt-report={one}" for one in REPORTS)
    )
    assert result.ret == 1, result.stdout.str()
    result.stdout.fnmatch_lines(["::error file=models.py,line=11,title=breaks%3A graph break::graph break in model: *"])
    assert result.outlines[-2].startswith("GATE FAILED: 1 failed; 8 verdicts of 2 recipes passed")

    run = json.loads((pytester.path / "r.json").read_text(encoding="utf-8"))
    assert run["gate"]["sentence"] == result.outlines[-2]
    peaks = {one["recipe"]: one["figures"]["peak_bytes"] for one in run["recipes"]}
    assert set(peaks) == {"breaks", "nf4"}
    assert peaks["breaks"] > 2**21 > peaks["nf4"] > 0

    suites = ElementTree.parse(pytester.path / "r.xml").getroot()
    *of_recipes, gate = suites
    assert (gate.get("name"), gate.get("failures")) == ("gate", "1")
    properties = [{one.get("name"): one.get("value") for one in suite.find("properties") or []} for suite in of_recipes]
    assert sorted(int(one["diffopt_peak_bytes"] or 0) for one in properties) == sorted(peaks.values())

    written = {name: f"{peak / 2**20:.1f}" for name, peak in peaks.items()}
    text = (pytester.path / "r.md").read_text(encoding="utf-8")
    for name, shown in written.items():
        (line,) = re.findall(rf"^\| .* \| {name} \|.*$", text, re.MULTILINE)
        assert f"| {shown} |" in line
    html = (pytester.path / "r.html").read_text(encoding="utf-8")
    assert sorted(re.findall(r'data-figure="peak_bytes">([0-9.]+)<', html)) == sorted(written.values())
    assert html.count("<svg") >= 5
    assert ("pytest-html" in html) is ("-n" in how)
    if "-n" in how:
        theirs = (pytester.path / "pytest.xml").read_text(encoding="utf-8")
        assert f'name="diffopt_peak_bytes" value="{peaks["nf4"]}"' in theirs
        assert "{&apos;" not in theirs
        assert "{'" not in re.sub(r"<failure.*?</failure>", "", theirs, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--diffopt-report=r.txt"],
            "--diffopt-report: found 'r.txt'; it takes a file that ends in one of: .json, .md, .html, .xml",
        ),
        (["--diffopt-report=no/r.json"], "--diffopt-report: 'no/r.json' cannot be written: its folder is missing"),
        (["--diffopt-report=d.json"], "--diffopt-report: 'd.json' cannot be written: it is a directory"),
        (
            ["--diffopt-report=r.json", "--diffopt-report=./r.json"],
            "--diffopt-report: './r.json' and 'r.json' are one file; each report takes its own",
        ),
        (
            ["--diffopt-report=link.json", "--diffopt-report=there.json"],
            "--diffopt-report: 'there.json' and 'link.json' are one file; each report takes its own",
        ),
        (
            ["--junitxml=r.xml", "--diffopt-report=r.xml"],
            "--diffopt-report: 'r.xml' and '--junitxml=*r.xml' are one file*",
        ),
        (["-o", "diffopt_report=r.txt"], "diffopt_report: found 'r.txt'; it takes a file that ends in one of: *"),
    ],
)
def test_reports_that_cannot_be_are_said_before_the_run(
    pytester: pytest.Pytester, run_pytest: RunPytest, arguments: list[str], told: str
) -> None:
    pytester.mkdir("d.json")
    (pytester.path / "there.json").write_text("before", encoding="utf-8")
    (pytester.path / "link.json").symlink_to("there.json")
    pytester.makepyfile(test_a="def test_a(): raise SystemExit('it ran')")
    result = run_pytest("-p", "no:cacheprovider", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{told}"])
    assert not (pytester.path / "r.json").exists()
    assert (pytester.path / "there.json").read_text(encoding="utf-8") == "before"


def test_a_report_that_can_no_longer_be_written_fails_the_run_and_what_was_there_stands(
    pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    (pytester.path / "r.json").write_text("before", encoding="utf-8")
    pytester.makepyfile(test_a="def test_a(): pass")
    pytester.makeconftest(
        "import errno, os\ndef fsync(_):\n    raise OSError(errno.ENOSPC, 'No space left on device')\nos.fsync = fsync\n"
    )
    result = run_pytest("-p", "no:cacheprovider", "--diffopt-report=r.json", "--diffopt-strict")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["--diffopt-report: 'r.json' cannot be written: No space left on device", "GATE FAILED: *"]
    )
    assert (pytester.path / "r.json").read_text(encoding="utf-8") == "before"
