"""Verdicts of blocks, out of records made by hand: nothing is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_diffopt.documentation.judging import BlockVerdict, cannot_run, is_wrong, judge_block, references_for
from pytest_diffopt.documentation.pages import Block
from pytest_diffopt.documentation.record import BlockRun, Raised
from pytest_diffopt.options import Settings
from pytest_diffopt.recipe import Recipe
from pytest_diffopt.recipe_loading import loads_recipes
from pytest_diffopt.report import pages as report

BLOCK = Block(line=10, code_line=11, source="pipe('a cat')\n", headings=("Top", "Section"))
KNOWN = ("org/known",)


def raised(error: str, message: str, *kinds: str, line: int = 12, missing: str = "") -> BlockRun:
    return BlockRun("raised", raised=Raised(error, message, line, (error, *kinds), missing, ("Traceback", "last")))


def judged(run: BlockRun, *, ids: tuple[str, ...] = (), source: str = "", **references: BlockRun) -> BlockVerdict:
    given: Any = {name.replace("_", " "): one for name, one in references.items()}
    return judge_block(
        BLOCK,
        "page-line-10",
        run,
        given,
        resolves=lambda hub_id: hub_id in KNOWN,
        installed=lambda module: module in ("torch", "json"),
        ids=ids,
        source=source,
    )


PLAIN = Recipe("page-line-10", "tiny-sd").to_dict()
COMPILED = Recipe("page-line-10", "tiny-sd", compilation={"component": "unet"}).to_dict()
OFFLOADED = Recipe("page-line-10", "tiny-sd", offloading={"strategy": "model"}).to_dict()
BOTH = Recipe("page-line-10", "tiny-sd", compilation={"component": "unet"}, offloading={"strategy": "model"}).to_dict()
CALLED = BlockRun("ran", recipe=PLAIN, called=("StableDiffusionPipeline",), device_bytes=1000, accelerator="sim")


# A block that does not run.


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (raised("NameError", "name 'x' is not defined"), "line 12: NameError: name 'x' is not defined"),
        (raised("ImportError", "cannot import name 'x' from 'torch'", missing="torch"), "line 12: ImportError: cannot"),
        (raised("ModuleNotFoundError", "No module named 'torch.x'", "ImportError", missing="torch.x"), "line 12: Mod"),
        (
            raised("OSError", "org/known does not appear to have a file named config.json."),
            "line 12: OSError: org/known",
        ),
        (BlockRun("exited", how="it ends itself with sys.exit('x')"), "it ends itself with sys.exit('x')"),
        (BlockRun("died", how="its process was killed by SIGKILL"), "its process was killed by SIGKILL"),
        (BlockRun("timed out", how="it did not end within 5 s"), "it did not end within 5 s"),
    ],
)
def test_a_mistake_of_the_page_fails(run: BlockRun, sentence: str) -> None:
    verdict = judged(run, ids=KNOWN)
    assert verdict.status == "failed"
    assert verdict.sentence.startswith(sentence)
    assert [(one.check, one.status) for one in verdict.verdicts] == [("run", "failed")]


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (
            raised("ModuleNotFoundError", "No module named 'nope'", "ImportError", missing="nope.inner"),
            "needs nope, which is not installed",
        ),
        (
            raised("RuntimeError", "the `kernels` package isn't available. Please `pip install kernels`."),
            "needs kernels, which is not installed",
        ),
        (
            raised("ImportError", "X requires the sentencepiece library but it was not found"),
            "needs sentencepiece, which is not installed",
        ),
        (raised("ImportError", "Requires mslk >= 1.0.0"), "needs mslk, which is not installed"),
        (raised("ConnectionError", "no route", "OSError"), "needs the network (ConnectionError)"),
        (
            raised("RepositoryNotFoundError", "404 for org/other", "OSError"),
            "no replica stands for 'org/other'",
        ),
        (
            raised("OSError", "We couldn't find username/model in the cache"),
            "no replica stands for 'username/model': it is a placeholder",
        ),
        (
            raised("FileNotFoundError", "No such file: '/folder/path/to/model.bin'", "OSError"),
            "/path/to/model.bin is a placeholder: nothing is there",
        ),
        (
            raised("OSError", "org/known does not appear to have a file named big.safetensors."),
            "needs big.safetensors, which no replica has",
        ),
    ],
)
def test_what_is_missing_here_is_a_reason_to_skip(run: BlockRun, sentence: str) -> None:
    verdict = judged(run, ids=(*KNOWN, "org/other", "username/model"), source='"org/known/blob/main/big.safetensors"')
    assert (verdict.status, verdict.sentence, verdict.verdicts) == ("skipped", sentence, ())


@pytest.mark.parametrize(
    ("owner", "is_placeholder"),
    [
        *((one, True) for one in ("username", "user", "your-username", "your_org", "YourName", "hf-user", "org-name")),
        *((one, True) for one in ("path", "namespace", "your", "your-namespace", "<your-name>")),
        *((one, False) for one in ("diffusers", "diffusers-internal-dev", "pathfinder", "yourbench", "superuser2")),
    ],
)
def test_an_owner_is_a_placeholder_by_whole_words(owner: str, is_placeholder: bool) -> None:
    name = f"{owner}/model"
    verdict = judged(raised("OSError", f"We couldn't find {name} in the cache"), ids=(name,))
    assert verdict.sentence == f"no replica stands for {name!r}" + ": it is a placeholder" * is_placeholder


@pytest.mark.parametrize(
    ("run", "word"),
    [
        (raised("PermissionError", "[Errno 13] Permission denied: '/etc/x'", "OSError"), "outside of its own folder"),
        (raised("SafetensorError", "I/O error: Permission denied (os error 13)"), "outside of its own folder"),
        (raised("RuntimeError", "needs CUDA compute capability 8.9"), "hardware that is not here"),
        (
            raised("NotImplementedError", "The simulated GPU has no torch.cuda.CUDAGraph: …"),
            "simulated GPU cannot do it",
        ),
        (
            raised("AttributeError", "module 'torch.cuda' has no attribute 'jiterator'"),
            "nothing like torch.cuda's jiterator",
        ),
        (
            raised("NameError", "name 'x' is not defined", line=5),
            "an earlier block that it needs fails in line 5: NameError",
        ),
        (BlockRun("timed out", how="the block ended, and the calls …", own_code_ended=True), "the block ended"),
    ],
)
def test_what_is_not_the_pages_doing_is_unverified(run: BlockRun, word: str) -> None:
    verdict = judged(run)
    assert verdict.status == "unverified"
    assert word in verdict.sentence


# A block that runs.


def test_a_block_that_is_called_on_the_accelerator_is_used() -> None:
    verdict = judged(CALLED)
    assert [(one.check, one.status) for one in verdict.verdicts] == [("run", "passed"), ("use", "passed")]
    assert verdict.verdicts[1].sentence == "StableDiffusionPipeline was called on sim"
    assert (verdict.status, verdict.sentence) == ("passed", "the plain pipeline: use")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"called": ()}, "use: it configures nothing that could be judged, and no pipeline is called"),
        ({"called": (), "recipe": COMPILED}, "use: compilation is configured, and no pipeline is called"),
        ({"device_bytes": 0}, "use: nothing was ever put on the accelerator (sim): everything ran on the host"),
        ({"idle": ("x has quantization configured, and nothing ever calls it",)}, "use: x has quantization configured"),
        ({"not_judged": ("another pipeline, P, is called as well",)}, "use: another pipeline, P, is called as well"),
        (
            {"recipe": None, "recipe_error": "Recipe:\n  offloading: refused"},
            "use: what is set on the pipeline is no recipe",
        ),
        ({"swallowed": (Raised("OutOfMemoryError", "full", 14),)}, "use: line 14 fails, and the block handles it"),
    ],
)
def test_what_is_not_put_to_use_is_no_pass(changed: dict[str, Any], sentence: str) -> None:
    verdict = judged(replace(CALLED, **changed))
    assert verdict.status == "unverified"
    assert verdict.sentence.startswith(sentence)


def test_a_mistake_that_the_block_hides_fails() -> None:
    swallowed = (Raised("NameError", "name 'x' is not defined", 14),)
    verdict = judged(replace(CALLED, swallowed=swallowed, idle=("y is never called",)))
    assert (verdict.status, verdict.sentence) == (
        "failed",
        "use: line 14 fails, and the block hides it: NameError: name 'x' is not defined",
    )


@pytest.mark.parametrize("error", ["ImportError", "ModuleNotFoundError"])
def test_an_import_that_may_fail_is_no_mistake(error: str) -> None:
    assert judged(replace(CALLED, swallowed=(Raised(error, "no x", 14),))).status == "passed"


def test_a_host_that_does_not_count_its_memory_is_no_reproach() -> None:
    assert judged(replace(CALLED, device_bytes=None, accelerator="cpu")).status == "passed"


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (CALLED, ()),
        (replace(CALLED, recipe=COMPILED), ("eager",)),
        (replace(CALLED, recipe=OFFLOADED), ("eager",)),
        (replace(CALLED, recipe=BOTH), ("eager", "resident")),
        (replace(CALLED, recipe=BOTH, called=()), ()),
        (replace(CALLED, recipe=BOTH, ended="raised"), ()),
        (replace(CALLED, recipe=None), ()),
    ],
)
def test_a_block_is_run_again_for_what_its_checks_compare_with(run: BlockRun, wanted: tuple[str, ...]) -> None:
    assert references_for(run) == wanted


def test_a_record_goes_to_plain_data_and_back() -> None:
    import json

    run = replace(CALLED, swallowed=(Raised("E", "m", 3, ("E",), "", ("a", "b")),), shrunk=("height=1 as 2",))
    assert BlockRun.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert BlockRun.from_dict(json.loads(json.dumps(raised("E", "m").to_dict()))) == raised("E", "m")
    assert str(Raised("E", "\n\n first\nsecond")) == "E: first"
    assert str(Raised("E", "")) == "E"


# The report.


def row(verdict: BlockVerdict, **more: Any) -> dict[str, Any]:
    return {"page": "docs/page.md", "line": 10, "heading": "Section", **report.block_row(verdict), **more}


PASSED = judged(replace(CALLED, toml='# page.md, line 10\n[recipe.page-line-10]\npipeline = "tiny-sd"\n'))
FAILED = judged(raised("NameError", "name `x` | is not defined\nmore"))


def test_the_table_has_a_row_for_each_block() -> None:
    lines = report.table_lines(
        [row(PASSED), row(FAILED, line=20), row(cannot_run(BLOCK, "needs x"))], width=120, color=False
    )
    assert lines[0].split() == ["block", "recipe", "verdict", "reason"]
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["docs/page.md:10", "plain", "passed"],
        ["docs/page.md:20", "-", "failed"],
        ["docs/page.md:10", "-", "skipped"],
    ]
    assert max(map(len, lines)) <= 120


def test_the_summary_counts_the_worst_first() -> None:
    rows = [row(PASSED), row(PASSED), row(FAILED), row(cannot_run(BLOCK, "x"))]
    assert report.summary(rows) == "4 blocks: 1 failed, 1 skipped, 2 passed"
    assert report.summary([row(PASSED)]) == "1 block: 1 passed"


def test_the_recipes_of_a_page_are_a_recipe_file() -> None:
    text = report.recipes_text([row(PASSED), row(FAILED)])
    assert list(loads_recipes(text)) == ["page-line-10"]


def test_the_markdown_says_what_the_page_says_and_what_happens() -> None:
    text = report.markdown([row(PASSED), row(FAILED, line=20)])
    assert "2 blocks: 1 failed, 1 passed, in `docs/page.md`." in text
    assert "| docs/page.md:20 | - | failed | line 12: NameError: name `x` \\| is not defined |" in text
    finding = text[text.index("## `docs/page.md:20` · Section") :]
    assert "What it says:\n\n```python\npipe('a cat')\n```" in finding
    assert "- **run** failed: line 12: NameError" in finding
    assert "## `docs/page.md:10`" not in text


def test_code_that_holds_a_fence_is_fenced_by_more() -> None:
    wrong = is_wrong(replace(BLOCK, source='x = """\n```py\n"""\n'), "name", "wrong")
    assert "````python\n" in report.markdown([row(wrong)])


class _Report:
    """As much of pytest's report as is read."""

    def __init__(self, row: object, when: str = "call", outcome: str = "passed") -> None:
        self.user_properties = [(report.BLOCK_PROPERTY, row)]
        self.when, self.outcome = when, outcome
        self.passed, self.failed = outcome == "passed", outcome == "failed"


class _Config:
    """Of a process that is no worker."""


def test_a_block_is_counted_once_and_a_failure_elsewhere_counts() -> None:
    gathered = report.PageReport(Settings(), _Config())  # type: ignore[arg-type]
    gathered.add(_Report(row(PASSED), when="setup"))  # type: ignore[arg-type]
    gathered.add(_Report(row(PASSED)))  # type: ignore[arg-type]
    gathered.add(_Report(row(PASSED), when="teardown"))  # type: ignore[arg-type]
    gathered.add(_Report(row(PASSED), outcome="failed"))  # type: ignore[arg-type]
    assert [one["status"] for one in gathered.rows] == ["passed", "failed"]


def test_the_files_are_written_and_one_that_cannot_be_is_told(tmp_path: Path) -> None:
    settings = Settings(docs_extract=str(tmp_path / "x.toml"), docs_report=str(tmp_path / "gone" / "x.md"))
    gathered = report.PageReport(settings, _Config())  # type: ignore[arg-type]
    gathered.rows = [row(PASSED)]
    gathered.write()
    assert "page-line-10" in (tmp_path / "x.toml").read_text()
    (problem,) = gathered.problems
    assert problem.startswith("--diffopt-docs-report: ")
    assert problem.endswith("cannot be written: No such file or directory")


def test_skipped_blocks_fail_a_strict_run() -> None:
    gathered = report.PageReport(Settings(strict=True), _Config())  # type: ignore[arg-type]
    assert gathered.strict_line() == ""
    gathered.rows = [row(cannot_run(BLOCK, "x"))]
    assert gathered.strict_line() == "diffopt: --diffopt-strict fails this run: 1 block skipped"
