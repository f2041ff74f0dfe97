"""Documentation pages as their maintainer runs them: what is said of each block, and that nothing of it stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_diffopt.documentation.order import Code, Order
from pytest_diffopt.documentation.processes import Server
from pytest_diffopt.documentation.record import BlockRun
from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.recipe_loading import load_recipes
from tests.warm_python import INTERPRETER

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "tests" / "pages"


@dataclass
class Ran:
    """A run of pytest on pages."""

    status: int
    output: str
    report: str
    folder: Path

    def said(self, heading: str, number: int = 0) -> tuple[str, str]:
        """(verdict, reason) of a block of a section, by the Markdown report."""
        page = next(iter(self.folder.glob("*.md*")))
        lines = page.read_text(encoding="utf-8").splitlines()
        start = lines.index(next(line for line in lines if line.lstrip("#") == f" {heading}"))
        fences = [at + 1 for at, line in enumerate(lines) if at > start and re.match(r"[> ]*```[Pp]y", line)]
        row = re.search(rf"^\| {re.escape(page.name)}:{fences[number]} \|(.*)\|$", self.report, re.M)
        assert row is not None, (heading, fences[number])
        _, verdict, reason = (cell.strip() for cell in re.split(r"(?<!\\)\|", row[1]))
        return verdict, reason


def run(folder: Path, *arguments: str, environment: dict[str, str] | None = None, plugin: tuple[str, ...] = ()) -> Ran:
    command = [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    ran = subprocess.run(
        [*command, "--diffopt-docs", "--diffopt-docs-report=report.txt"],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
    )
    report = folder / "report.txt"
    return Ran(ran.returncode, ran.stdout + ran.stderr, report.read_text() if report.exists() else "", folder)


@pytest.fixture(scope="module")
def plugin() -> tuple[str, ...]:
    import importlib.metadata

    installed = any(one.name == "diffopt" for one in importlib.metadata.entry_points(group="pytest11"))
    return () if installed else ("-p", "pytest_diffopt.plugin")


def page_in(folder: Path, name: str) -> Path:
    return Path(shutil.copy(PAGES / name, folder / name))


# Blocks that are no pipelines.


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory, plugin: tuple[str, ...]) -> Ran:
    folder = tmp_path_factory.mktemp("shapes")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    page_in(folder, "shapes.md")
    environment = {"ELSEWHERE": str(elsewhere), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    return run(folder, "shapes.md", "--diffopt-docs-timeout=5", environment=environment, plugin=plugin)


NOTHING = "use: it configures nothing that could be judged, and no pipeline is called"
UNDEFINED = "NameError: name 'undefined_pipeline' is not defined"


@pytest.mark.parametrize(
    ("heading", "number", "verdict", "reason"),
    [
        ("Leaves things behind", 0, "unverified", NOTHING),
        ("Finds nothing left", 0, "unverified", NOTHING),
        ("Is no Python", 0, "failed", "it is no Python, '(' was never closed: pipeline = make("),
        ("Output pasted below code", 0, "failed", "it is no Python, invalid syntax: Max memory reserved: 12.3 GB"),
        ("Names nothing defines", 0, "failed", UNDEFINED),
        ("Hides its own mistake", 0, "failed", f"fails, and the block hides it: {UNDEFINED}"),
        ("Hides it in another way", 0, "failed", f"fails, and the block hides it: {UNDEFINED}"),
        ("Does without what may be missing", 0, "unverified", NOTHING),
        ("Never ends", 0, "failed", "it did not end within 5 s, it was at line "),
        ("Kills its process", 0, "failed", "its process was killed by SIGKILL"),
        ("Leaves early", 0, "failed", "its process ended with exit status 3 before the block was over"),
        ("Exits", 0, "failed", "it ends itself with sys.exit('enough')"),
        ("Starts a program that stays", 0, "unverified", NOTHING),
        ("Prints much and reads the keyboard", 0, "unverified", NOTHING),
        ("Writes where placeholders lead", 0, "unverified", NOTHING),
        ("Reads a placeholder", 0, "skipped", "/path/to/weights.bin is a placeholder: nothing is there"),
        ("Needs what is not there", 0, "skipped", "needs no-such-package-anywhere, which is not installed"),
        ("Imports what is not there", 0, "skipped", "needs no_such_package_anywhere, which is not installed"),
        ("Comments", 0, "skipped", "for eight cards only"),
        ("Comments", 1, "expected", "ZeroDivisionError: division by zero"),
        ("Comments", 2, "failed", "NameError: name 'undefined' is not defined"),
        ("Comments", 3, "failed", NOTHING),
        ("Comments", 4, "failed", "the comment above the block says 'diffopt: ignore'; it takes"),
        ("Quoted", 0, "failed", "ValueError: in a quote"),
        ("A repository of nobody", 0, "skipped", "no replica stands for 'your-name/your-model': it is a placeholder"),
    ],
)
def test_each_block_gets_its_verdict(shapes: Ran, heading: str, number: int, verdict: str, reason: str) -> None:
    said = shapes.said(heading, number)
    assert said[0] == verdict, said
    assert reason in said[1]


def test_a_traceback_shows_the_pages_own_lines(shapes: Ran) -> None:
    line = next(at for at, text in enumerate((PAGES / "shapes.md").read_text().splitlines(), 1) if "in a quote" in text)
    assert f'shapes.md", line {line}, in <module>' in shapes.output
    assert 'raise ValueError("in a quote")' in shapes.output
    assert "documentation/observing.py" not in shapes.output


@pytest.mark.skipif(sys.platform != "linux", reason="files are confined by Linux alone")
def test_what_is_written_elsewhere_is_refused_and_told(shapes: Ran) -> None:
    from pytest_diffopt.documentation import confinement

    probe = f"import sys; from {confinement.__name__} import confine_writes as c; sys.exit(not c(('/dev',)))"
    if subprocess.run([sys.executable, "-c", probe], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
        pytest.skip("this kernel has no Landlock")
    verdict, reason = shapes.said("Writes elsewhere")
    assert verdict == "unverified"
    assert "it writes outside of its own folder, which is refused here" in reason
    assert shapes.said("Lets another program write elsewhere")[0] == "failed"
    assert list((shapes.folder / "elsewhere").iterdir()) == []


def test_nothing_of_a_page_stays(shapes: Ran) -> None:
    assert sorted(path.name for path in shapes.folder.iterdir()) == ["elsewhere", "report.txt", "shapes.md", "tmp"]
    assert [path.name for path in (shapes.folder / "tmp").iterdir() if path.name.startswith("diffopt-page")] == []
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 987" not in left
    assert not (ROOT / "left.txt").exists()


def test_the_run_fails_and_the_table_counts(shapes: Ran) -> None:
    assert shapes.status == pytest.ExitCode.TESTS_FAILED
    assert re.search(r"^27 blocks: \d+ failed, \d+ unverified, 5 skipped, 1 expected$", shapes.output, re.M)


# Blocks that run pipelines.


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, plugin: tuple[str, ...]) -> Ran:
    folder = tmp_path_factory.mktemp("pipelines")
    page_in(folder, "pipelines.mdx")
    return run(folder, "pipelines.mdx", "--diffopt-docs-extract=page.recipes.toml", plugin=plugin)


@pytest.mark.parametrize(
    ("heading", "number", "verdict", "reason"),
    [
        ("Plain", 0, "passed", "the plain pipeline: use, parity"),
        (
            "On the host",
            0,
            "unverified",
            "use: nothing was ever put on the accelerator (sim): everything ran on the host",
        ),
        ("Compiled", 0, "passed", "compilation: use, engagement, graph_breaks, recompiles, parity"),
        (
            "Compiled, in a mode of its own",
            0,
            "passed",
            "compilation: use, engagement, graph_breaks, recompiles, parity",
        ),
        ("Compiled and never called", 0, "unverified", "has compilation configured, and nothing ever calls it"),
        ("Called after that", 0, "passed", "compilation: use, engagement, graph_breaks, recompiles, parity"),
        ("Compiled with a break", 0, "failed", "graph_breaks: 1 graph break, 0 allowed"),
        ("A compiled copy that nobody uses", 0, "failed", "engagement: nothing in unet is compiled"),
        ("Offloaded", 0, "passed", "offloading: use, memory, parity"),
        ("Offloaded", 1, "failed", "memory: the peak of a call is"),
        (
            "Quantized",
            0,
            "unverified",
            "unet (UNet2DConditionModel) has quantization configured, and nothing",
        ),
        ("Two ways", 0, "unverified", "use: the pipeline is called again, configured in another way"),
        ("Picture to picture", 0, "passed", "the plain pipeline: use, parity"),
        ("A method compiled, and wrong", 0, "failed", "parity: vae, step 0 of call 0 is the first to differ: by 0.5"),
        ("Its forward compiled", 0, "passed", "compilation: use, engagement, graph_breaks, recompiles, parity"),
        ("Blocks compiled in a loop", 0, "passed", "compilation: use, engagement, graph_breaks, recompiles, parity"),
        ("A method of the pipeline compiled", 0, "failed", "graph_breaks: "),
        (
            "A component that is not there",
            0,
            "failed",
            "use: quantization names text_encoder_2, which the StableDiffusionPipeline does not have; did you mean",
        ),
        ("A public LoRA", 0, "skipped", "someone/a-public-lora"),
        ("A LoRA on a quantized model", 0, "passed", "quantization: use, quantization, memory, parity"),
    ],
)
def test_each_pipeline_gets_its_verdict(pipelines: Ran, heading: str, number: int, verdict: str, reason: str) -> None:
    said = pipelines.said(heading, number)
    assert said[0] == verdict, said
    assert reason in said[1]


def test_what_was_made_small_is_told(pipelines: Ran) -> None:
    text = (pipelines.folder / "page.recipes.toml").read_text()
    assert "height=512 as 96, width=512 as 96, num_inference_steps=50 as 4, prompts=8 as 2" in text


def test_a_page_becomes_a_recipe_file_whose_recipes_hold(pipelines: Ran, plugin: tuple[str, ...]) -> None:
    recipes = load_recipes(pipelines.folder / "page.recipes.toml")
    parts = [
        (bool(one.compilation), one.offloading is not None, one.quantization is not None) for one in recipes.values()
    ]
    assert parts.count((True, False, False)) == 8
    assert parts.count((False, True, False)) == 2
    assert (False, False, True) in parts
    offloaded = next(name for name, one in recipes.items() if one.offloading is not None)
    ran = run(pipelines.folder, f"page.recipes.toml::{offloaded}", plugin=plugin)
    assert ran.status == 0, ran.output
    assert " passed" in ran.output


def test_the_report_says_what_the_page_says_and_with_which_versions(pipelines: Ran) -> None:
    import diffusers

    assert f"diffusers {diffusers.__version__}" in pipelines.report
    finding = pipelines.report[pipelines.report.index("· Compiled with a break") :]
    assert "torch._dynamo.graph_break()" in finding
    assert "- **graph_breaks** failed: 1 graph break, 0 allowed" in finding


# A page of our own.


def test_the_guides_own_page_holds(tmp_path: Path, plugin: tuple[str, ...]) -> None:
    shutil.copy(ROOT / "docs" / "optimize-a-pipeline.md", tmp_path)
    ran = run(tmp_path, "optimize-a-pipeline.md", "--diffopt-docs-extract=page.recipes.toml", plugin=plugin)
    assert ran.status == 0, ran.output
    verdicts = re.findall(r"^\| optimize-a-pipeline\.md:\d+ \| (.*?) \| (\w+) \|", ran.report, re.M)
    assert verdicts == [
        ("bitsandbytes_4bit + compile transformer", "passed"),
        ("compile transformer by block + model offloading", "passed"),
        ("group offloading (leaf_level)", "passed"),
        ("bitsandbytes_4bit", "passed"),
        ("-", "expected"),
    ]
    assert len(load_recipes(tmp_path / "page.recipes.toml")) == 4


# How pages are named and run.


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pages that no library is needed for."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "one.md").write_text(
        "# First\n\n```py\na = 1\n```\n\n## Second\n\n```py\nb = a\n```\n\n```py\nb / 0\n```\n"
    )
    (folder / "more").mkdir()
    (folder / "more" / "two.mdx").write_text("```python\nprint(1)\n```\n")
    (folder / "more" / "none.md").write_text("Nothing to run.\n")
    (folder / "more" / "empty.md").write_text("")
    return folder


HOST = "--diffopt-device=cpu"


@pytest.mark.parametrize(
    ("arguments", "items"),
    [
        (("one.md",), ["one.md::line-3", "one.md::line-9", "one.md::line-13"]),
        (("one.md::line-9",), ["one.md::line-9"]),
        (("one.md::Second",), ["one.md::line-9", "one.md::line-13"]),
        (("one.md::First",), ["one.md::line-3", "one.md::line-9", "one.md::line-13"]),
        (("one.md", "-k", "Second"), ["one.md::line-9", "one.md::line-13"]),
        ((".",), ["more/two.mdx::line-1", "one.md::line-3", "one.md::line-9", "one.md::line-13"]),
        (("more/empty.md", "more/none.md"), []),
    ],
)
def test_blocks_are_named_by_line_and_by_heading(
    quick: Path, plugin: tuple[str, ...], arguments: tuple[str, ...], items: list[str]
) -> None:
    ran = run(quick, *arguments, "--collect-only", "-q", plugin=plugin)
    assert [line for line in ran.output.splitlines() if "::" in line] == items, ran.output


def test_pages_are_not_collected_unless_asked(quick: Path, plugin: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "--rootdir", str(quick), "-q", "."]
    ran = subprocess.run(
        command, cwd=quick, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ran.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize("how", [("-n", "2", "--dist", "loadgroup"), ("-p", "no:xdist")])
def test_the_verdicts_are_the_same_however_they_are_distributed(
    quick: Path, plugin: tuple[str, ...], how: tuple[str, ...]
) -> None:
    ran = run(quick, "one.md", HOST, *how, plugin=plugin)
    verdicts = {row[0]: row[1] for row in re.findall(r"^\| (one\.md:\d+) \| - \| (\w+) \|", ran.report, re.M)}
    assert verdicts == {"one.md:3": "unverified", "one.md:9": "unverified", "one.md:13": "failed"}, ran.output


def test_a_strict_run_fails_for_what_is_unverified(quick: Path, plugin: tuple[str, ...]) -> None:
    ran = run(quick, "one.md::line-3", HOST, "--diffopt-strict", plugin=plugin)
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    assert f"one.md:3 unverified: {NOTHING}" in ran.output


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.md", None, "file or directory not found: gone.md"),
        ("latin.md", b"# Caf\xe9\n", "latin.md:1: byte 0xe9 is not UTF-8; save the page as UTF-8"),
        ("open.md", b"# Open\n\n```py\na = 1\n", "the fence opened in line 3 is never closed"),
        (
            "nested.md",
            b"```py\npip install x\n```py\na = 1\n```\n",
            "another fence opens in line 3, inside the block",
        ),
    ],
)
def test_a_page_that_is_wrong_is_told(
    tmp_path: Path, plugin: tuple[str, ...], name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ran = run(tmp_path, name, HOST, plugin=plugin)
    assert ran.status not in (0, pytest.ExitCode.INTERNAL_ERROR)
    assert said in ran.output


@pytest.mark.parametrize("option", ["--diffopt-docs-extract=no/where.toml", "--diffopt-docs-timeout=soon"])
def test_a_wrong_option_is_told_before_the_run(quick: Path, plugin: tuple[str, ...], option: str) -> None:
    ran = run(quick, "one.md", option, plugin=plugin)
    assert ran.status == pytest.ExitCode.USAGE_ERROR
    assert option.partition("=")[0] in ran.output


def test_a_page_of_ten_megabytes_is_collected(tmp_path: Path, plugin: tuple[str, ...]) -> None:
    part = "Text of a page.\n" * 2000 + "\n```py\nvalue = 1\n```\n"
    (tmp_path / "large.md").write_text(part * (10 * 2**20 // len(part)))
    ran = run(tmp_path, "large.md", "--collect-only", "-q", plugin=plugin)
    assert ran.output.count("large.md::line-") == (tmp_path / "large.md").read_text().count("```py")


# The processes.


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as monkeypatch, Server("cpu") as server:
        monkeypatch.setattr(sys, "executable", INTERPRETER)  # its memory and open files are looked at
        yield server


def run_in(server: Server, source: str, page: Path, *, seconds: float = 20.0) -> BlockRun:
    return server.run(
        lambda folder: Order("block", str(page), Code(source, 1), (), "as written", folder), seconds=seconds
    )


def test_a_hundred_blocks_leave_the_server_as_it_was(server: Server, tmp_path: Path) -> None:
    page = tmp_path / "page.md"

    def state() -> tuple[int, int, int]:
        assert server._process is not None
        folder = Path("/proc", str(server._process.pid))
        memory = int(re.search(r"VmRSS:\s+(\d+)", (folder / "status").read_text())[1])  # type: ignore[index]
        children = (folder / "task" / str(server._process.pid) / "children").read_text().split()
        return memory, len(list((folder / "fd").iterdir())), len(children)

    for _ in range(10):
        run_in(server, "x = bytearray(2**24)", page)
    memory, files, children = state()
    for _ in range(90):
        assert run_in(server, "x = bytearray(2**24)", page).ended == "ran"
    after = state()
    assert (after[1], after[2]) == (files, children) == (files, 0)
    assert after[0] - memory < 8 * 1024  # KiB


def test_a_block_that_dies_is_told_and_the_next_one_runs(server: Server, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    died = run_in(server, "import os\nos.abort()", page)
    assert (died.ended, died.how) == ("died", "its process was killed by SIGABRT")
    assert run_in(server, "print('next')", page).output == "next\n"


def test_the_server_itself_dying_loses_one_block(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with Server("cpu") as server:
        run_in(server, "pass", page)
        first = server._process
        assert first is not None
        lost = run_in(
            server, "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nimport time\ntime.sleep(1)", page
        )
        assert lost.ended == "died"
        assert run_in(server, "print('next')", page).output == "next\n"
        assert server._process is not first


def test_blocks_run_in_new_processes_where_forking_is_not_safe(tmp_path: Path) -> None:
    with Server("cpu", fork=False) as server:
        ran = run_in(server, "print(1)", tmp_path / "page.md")
        assert (ran.ended, ran.output) == ("ran", "1\n")
        stopped = run_in(server, "while True: pass", tmp_path / "page.md", seconds=2.0)
        assert (stopped.ended, stopped.how) == ("timed out", "it did not end within 2 s, it was at line 1")


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    with Server("xpu") as server, pytest.raises(DiffoptError, match="found 'xpu', which this machine does not have"):
        run_in(server, "pass", tmp_path / "page.md")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_process(tmp_path: Path, plugin: tuple[str, ...], how: signal.Signals) -> None:
    (tmp_path / "page.md").write_text(
        f"```py\nimport os\nopen({'/path/to/pid'!r}, 'w').write('x')\nwhile True: pass\n```\n"
    )
    command = [INTERPRETER, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "--diffopt-docs", "page.md", HOST]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("diffopt-page-*/*/path/to/pid")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(tmp_path.glob("diffopt-page-*/*/path/to/pid"))
    mine = _children(process.pid)
    assert len(mine) >= 2
    process.send_signal(how)
    process.wait(120)  # it says goodbye to a server first, on a machine that may be busy
    deadline = time.monotonic() + 20
    while any(Path("/proc", str(pid)).exists() for pid in mine) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in mine if Path("/proc", str(pid)).exists()] == []


def _children(pid: int) -> list[int]:
    """A process' children, and theirs."""
    try:
        direct = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*direct, *(below for one in direct for below in _children(one))]
