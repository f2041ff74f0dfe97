"""What is documented is executed: every block of the README and of docs/ that says what it is."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from sybil import Document
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from pytest_diffopt.recipe_loading import loads_recipes
from tests.warm_python import INTERPRETER

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = ("tox -qqm recipes", "tox -qq run-parallel -op 2 -m tests")


def blocks(language: str) -> list[tuple[str, str]]:
    """("page:line", text) of every fence of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        document = Document(text, str(page))
        for lexed in FencedCodeBlockLexer(language)(document):
            line = text.count("\n", 0, lexed.start) + 1
            found.append((f"{page.relative_to(ROOT)}:{line}", lexed.lexemes["source"]))
    return found


@pytest.mark.parametrize(("where", "text"), blocks("toml"), ids=lambda value: value if ":" in value[:40] else "")
def test_recipes_in_the_documentation_are_valid(where: str, text: str) -> None:
    assert loads_recipes(text, where)


PYTHON = blocks("python")


def is_a_program(text: str) -> bool:
    """Whether a block must run without pytest: torch keeps the device for good."""
    return "pytest_diffopt.accelerators.simulated" in text


def as_test(text: str) -> str:
    """A block as the text of a test file: as it is where it names one, else in a test."""
    if re.match(r"# (test_\w+\.py)\n", text):
        return text
    return "def test_block():\n" + "".join(f"    {line}\n" for line in text.splitlines())


@pytest.mark.parametrize(("where", "text"), PYTHON, ids=[where for where, _ in PYTHON])
def test_python_in_the_documentation_runs(where: str, text: str, run_pytest: object, pytester: pytest.Pytester) -> None:
    if is_a_program(text):
        text += "\nimport sys\nassert 'pytest' not in sys.modules\n"
        ran = pytester.run(sys.executable, "-W", "ignore", pytester.makepyfile(program=text))
        assert ran.ret == 0, ran.stderr.str()
        return
    pytester.makepyfile(test_block=as_test(text))
    result = run_pytest("-p", "no:cacheprovider")  # type: ignore[operator]
    outcomes = result.parseoutcomes()
    assert result.ret == 0, result.stdout.str()
    assert outcomes.get("passed", 0) >= 1


def test_every_variable_of_the_simulated_device_is_documented() -> None:
    sources = ROOT / "pytest_diffopt" / "accelerators" / "simulated"
    text = "".join(path.read_text(encoding="utf-8") for path in sources.rglob("*.py"))
    page = (ROOT / "docs" / "simulated.md").read_text(encoding="utf-8")
    variables = set(re.findall(r"DIFFOPT_[A-Z_]+", text)) | set(re.findall(r'environ\.get\("(\w+)"', text))
    assert {"DIFFOPT_SIM_CXXFLAGS", "CXX"} <= variables
    assert [name for name in variables if f"| `{name}` |" not in page] == []


def test_the_readmes_commands_are_those_of_tox_and_of_ci() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    labels = (ROOT / "tox.ini").read_text(encoding="utf-8")
    commands = [text.strip() for where, text in blocks("bash") if where.startswith("README")]
    assert [command.rpartition(".venv/bin/")[2] for command in commands] == list(COMMANDS)
    assert commands[1] in ci
    assert all(command.rpartition(" ")[2] + " = installed" in labels for command in COMMANDS)
    assert "examples/quantize-compile-offload.recipes.toml" in readme


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_option_marker_and_check_is_documented() -> None:
    from pytest_diffopt.checks.session import CHECKS
    from pytest_diffopt.options import OPTIONS

    plugin = (ROOT / "docs" / "plugin.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for option in OPTIONS:
        assert f"`--diffopt-{option.name.replace('_', '-')}`" in plugin
    for check in CHECKS:
        assert f"| `{check}` |" in readme


def test_every_check_has_a_page_and_every_sentence_on_it_is_one_of_the_checks() -> None:
    from pytest_diffopt.checks.session import CHECKS

    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "checks").glob("*.md")}
    assert set(pages) == {*CHECKS, "baseline"}
    for check in CHECKS:
        source = (ROOT / "pytest_diffopt" / "checks" / f"{check}.py").read_text(encoding="utf-8")
        source = re.sub(r'"\s*\n\s*f?"', "", source)  # pieces of one text
        source = re.sub(r"\{[^{}]*\}", "…", re.sub(r"\{[^{}]*\}", "…", source))
        table = pages[check].split("| the sentence | what to do |")[1].split("\n\n")[0]
        sentences = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
        assert sentences
        missing = [
            piece for text in sentences for piece in text.split("…") if piece.strip() and piece.strip() not in source
        ]
        assert missing == [], f"{check}: {missing}"


KINDS = {"python", "toml", "sh", "bash", "ini", "yaml", "text", "md", "py", ""}
"""``text`` and no language are output; ``py`` and ``md`` are parts of something that is not here, which are parsed alone."""


def fences() -> list[tuple[str, str]]:
    """("page", language) of every fence."""
    found = []
    for page in PAGES:
        opened = False
        for mark in re.findall(r"^ *```(\w*)", page.read_text(encoding="utf-8"), re.MULTILINE):
            opened = not opened
            found += [(page.name, mark)] if opened else []
    return found


def test_every_block_is_of_a_kind_that_is_run_or_is_output() -> None:
    assert {kind for _, kind in fences()} <= KINDS


@pytest.mark.parametrize(("where", "text"), blocks("py"), ids=lambda value: value if ":" in value[:40] else "")
def test_python_that_cannot_run_here_is_python(where: str, text: str) -> None:
    compile(text, where, "exec", flags=0x2000)  # PyCF_ALLOW_TOP_LEVEL_AWAIT: parts of notebooks


@pytest.mark.parametrize(("where", "text"), blocks("yaml"), ids=lambda value: value if ":" in value[:40] else "")
def test_steps_of_workflows_are_sound(where: str, text: str) -> None:
    import yaml

    steps = yaml.safe_load(text)
    assert all(("run" in step) != ("uses" in step) for step in steps), where


SMALL = """
[recipe.small]
pipeline = "models:Net"
compilation = { component = "model", backend = "eager" }
call = { inputs = "models:inputs" }
"""
"""In the place of recipes whose pipelines take longer: the commands are what is run here."""

GUIDES = ("docs/first-recipe.md", "docs/gate.md", "docs/reports.md", "docs/machines.md", "docs/forecast.md")
"""In the order in which they are read."""

_OF_ANOTHER_MACHINE = ("python -m venv", ".venv/bin/pip", "pytest --dist", "while true")
_DEAR = ("diffopt forecast",)
"""Commands that other tests run, with what they say."""


def read_in_order(page: str) -> list[tuple[str, str]]:
    """("sh" or "ini", text) of a page's blocks, from its first line to its last."""
    found = [(where, language, text) for language in ("sh", "ini") for where, text in blocks(language)]
    own = [(int(where.rpartition(":")[2]), language, text) for where, language, text in found if where.startswith(page)]
    return [(language, text) for _, language, text in sorted(own)]


def put_pytest_on_the_path(folder: Path, plugin_arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """``pytest`` and ``.venv/bin/pytest`` are pytest's own script, which has no folder of ours on its import path;
    ``diffopt`` is our command."""
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    pytests_script = str(Path(INTERPRETER).with_name("pytest"))
    programs = {
        "pytest": (pytests_script, "-p", "no:cacheprovider", *plugin_arguments),
        "diffopt": ("-m", "pytest_diffopt"),
        "python": (),
    }
    for name, arguments in programs.items():
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(arguments)} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_folder), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_commands_of_the_guides_run_as_they_are_printed_in_the_order_in_which_they_are_read(
    pytester: pytest.Pytester, plugin_arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model and its recipe are the guide's own."""
    put_pytest_on_the_path(pytester.path, plugin_arguments, monkeypatch)
    ((_, models),) = [one for one in PYTHON if one[0].startswith("docs/first-recipe.md")]
    (net,) = [text for where, text in blocks("toml") if where.startswith("docs/first-recipe.md") and "models:" in text]
    (pytester.path / "models.py").write_text(models, encoding="utf-8")
    pytester.makefile(".recipes.toml", flux=SMALL, net=net)
    ran = []
    for page in GUIDES:
        if page == "docs/machines.md":  # which is about a run, and no gate
            (pytester.path / "tox.ini").unlink()
            pytester.makefile(".recipes.toml", gate=SMALL)
        for language, text in read_in_order(page):
            if language == "ini":
                pytester.makeini(text)
                continue
            for command in text.splitlines():
                if command.startswith((*_OF_ANOTHER_MACHINE, *_DEAR)):
                    continue
                result = pytester.run("sh", "-c", command)
                assert result.ret == 0, f"{command}\n{result.stdout.str()}\n{result.stderr.str()}"
                ran.append(command)
    assert len(ran) == 9, ran
    for written in ("report.json", "report.md", "report.html", "report.xml", "baselines/net/net.json"):
        assert (pytester.path / written).is_file()
