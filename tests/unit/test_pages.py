"""Documentation pages are read: their blocks, what each needs, and what comes before it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pytest_diffopt.collection import pages as told_to_pytest
from pytest_diffopt.documentation import pages
from pytest_diffopt.documentation.pages import Block, Page, Tab, read_page
from pytest_diffopt.documentation.requirements import missing, pip_requirements
from pytest_diffopt.errors import PageError


def page_of(tmp_path: Path, text: str | bytes, name: str = "page.md") -> Page:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_page(path)


def fenced(code: str, info: str = "py", fence: str = "```") -> str:
    return f"{fence}{info}\n{code}\n{fence}\n"


@pytest.mark.parametrize(
    ("text", "line", "source"),
    [
        ("```py\na = 1\n```\n", 1, "a = 1\n"),
        ("text\n\n```python\na = 1\n```", 3, "a = 1\n"),
        ("```Python\na = 1\n```\n", 1, "a = 1\n"),
        ('```py title="x.py" {1}\na = 1\n```\n', 1, "a = 1\n"),
        ("``` {.python .numbered}\na = 1\n```\n", 1, "a = 1\n"),
        ("~~~python\na = 1\n~~~\n", 1, "a = 1\n"),
        ("> quoted\n> ```py\n> a = 1\n>\n> b = 2\n> ```\n", 2, "a = 1\n\nb = 2\n"),
        ("- item\n\n    ```py\n    if a:\n        b = 2\n    ```\n", 3, "if a:\n    b = 2\n"),
        ('<hfoptions id="x">\n<hfoption id="y">\n```py\na = 1\n```\n</hfoption>\n</hfoptions>\n', 3, "a = 1\n"),
        ("\r\n```py\r\na = 1\r\n```\r\n", 2, "a = 1\n"),
        ("\ufeff```py\na = 1\n```\n", 1, "a = 1\n"),
    ],
    ids=["py", "python", "case", "options", "braces", "tildes", "quote", "indented", "tab", "crlf", "bom"],
)
def test_every_python_fence_is_a_block(tmp_path: Path, text: str, line: int, source: str) -> None:
    (block,) = page_of(tmp_path, text).blocks
    assert (block.line, block.code_line, block.source, block.problem) == (line, line + 1, source, "")
    assert block.name == f"line-{line}"


@pytest.mark.parametrize("info", ["", "bash", "pycon", "diff", "pyspark", "text", "toml"])
def test_a_fence_of_another_language_is_none(tmp_path: Path, info: str) -> None:
    assert page_of(tmp_path, fenced("a = 1", info)).blocks == ()


def test_what_is_fenced_inside_a_fence_is_text(tmp_path: Path) -> None:
    inner = "Write it so:\n\n```py\nnot_a_block()\n```"
    page = page_of(tmp_path, fenced(inner, "markdown", "````") + fenced("a = 1"))
    assert [block.source for block in page.blocks] == ["a = 1\n"]


def test_a_fence_that_is_never_closed_is_a_block_that_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path, fenced("a = 1") + "\n```py\nb = 2\n")
    assert [block.problem for block in page.blocks] == ["", "the fence opened in line 5 is never closed"]


def test_a_fence_that_opens_inside_another_is_told_with_both_lines(tmp_path: Path) -> None:
    (block,) = page_of(tmp_path, "```py\npip install x\n\n```py\na = 1\n```\n").blocks
    assert block.problem == "another fence opens in line 4, inside the block of line 1: its closing fence is missing"


def test_a_string_that_holds_a_fence_is_python(tmp_path: Path) -> None:
    (block,) = page_of(tmp_path, '````py\ntext = """\n```py\n"""\n````\n').blocks
    assert block.problem == ""


@pytest.mark.parametrize("name", ["page.md", "page.mdx"])
def test_a_comment_just_above_a_fence_skips_it_or_expects_a_failure(tmp_path: Path, name: str) -> None:
    text = "<!-- diffopt: skip: needs eight cards -->\n" + fenced("a = 1")
    text += "\n{/* diffopt: xfail: name 'b': x */}\n\n" + fenced("b")
    first, second = page_of(tmp_path, text, name).blocks
    assert (first.skip, first.xfail) == ("needs eight cards", "")
    assert (second.skip, second.xfail) == ("", "name 'b': x")


def test_a_comment_further_up_is_of_no_block(tmp_path: Path) -> None:
    text = (
        "<!-- diffopt: skip: x -->\n\ntext\n\n" + fenced("a = 1") + "<!-- diffopt: skip: y -->\n" + fenced("b", "bash")
    )
    assert [block.skip for block in page_of(tmp_path, text + fenced("c = 1")).blocks] == ["", ""]


@pytest.mark.parametrize(
    ("said", "found"),
    [("skip", "skip without a reason"), ("skip:", "skip without a reason"), ("ignore: x", "ignore: x"), ("no", "no")],
)
def test_a_wrong_comment_says_what_it_takes(tmp_path: Path, said: str, found: str) -> None:
    (block,) = page_of(tmp_path, f"<!-- diffopt: {said} -->\n" + fenced("a = 1")).blocks
    assert block.problem == (
        f"the comment above the block says 'diffopt: {found}'; it takes 'diffopt: skip: REASON' or "
        f"'diffopt: xfail: PART OF WHAT THE VERDICT SAYS'"
    )


def test_headings_nest_and_lose_their_anchors(tmp_path: Path) -> None:
    text = (
        "# Top [[top]]\n"
        + fenced("a = 1")
        + "## In {#in}\n### Deep\n"
        + fenced("b = 1")
        + "## Next ##\n"
        + fenced("c = 1")
    )
    text += "```bash\n# no heading\n```\n" + fenced("d = 1")
    headings = [block.headings for block in page_of(tmp_path, text).blocks]
    assert headings == [("Top",), ("Top", "In", "Deep"), ("Top", "Next"), ("Top", "Next")]


def test_a_tab_is_known_by_its_group_and_option(tmp_path: Path) -> None:
    text = '<hfoptions id="g">\n<hfoption id="a">\n' + fenced("a = 1") + '</hfoption>\n<hfoption id="b">\n'
    text += fenced("b = 1") + "</hfoption>\n</hfoptions>\n" + fenced("c = 1")
    assert [block.tab for block in page_of(tmp_path, text).blocks] == [Tab(1, "a"), Tab(1, "b"), None]


def test_pip_commands_hold_for_their_section_and_those_in_it(tmp_path: Path) -> None:
    text = "# Top\n```bash\npip install one\n```\n## A\n```sh\n$ pip install -U two\n```\n" + fenced("a = 1")
    text += "### A.A\n" + fenced("b = 1") + "## B\n" + fenced("c = 1")
    required = [block.requirements for block in page_of(tmp_path, text).blocks]
    assert required == [("one", "two"), ("one", "two"), ("one",)]


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("pip install -U bitsandbytes", ("bitsandbytes",)),
        ("pip install diffusers[torch] 'torch>=2.5' accelerate -U", ("diffusers[torch]", "torch>=2.5", "accelerate")),
        ("python -m pip install x && uv pip install y", ("x", "y")),
        ("!pip install x\n%pip install y", ("x", "y")),
        ("pip install \\\n  x \\\n  y", ("x", "y")),
        ("pip install git+https://github.com/huggingface/diffusers.git@main", ("diffusers",)),
        ("pip install git+https://example.org/a/b#egg=c", ("c",)),
        ("pip install torch --index-url https://example.org/whl -r more.txt", ("torch",)),
        ("pip install . ./local /abs <your-package>", ()),
        ("pip install x  # and why", ("x",)),
        ("conda install x\nnpm install y\necho pip install z", ()),
        ("pip install 'unclosed", ()),
    ],
)
def test_a_pip_command_is_read_as_requirements(script: str, found: tuple[str, ...]) -> None:
    assert pip_requirements(script) == found


def test_what_is_not_installed_or_of_another_version_is_missing() -> None:
    assert missing(("pytest", "pytest>=1", "pytest; python_version < '3'", "{placeholder}")) == ""
    assert missing(("no-such-package",)) == "needs no-such-package, which is not installed"
    assert missing(("pytest>=1000",)).startswith("needs pytest>=1000; ")


# What comes before a block.


def before(tmp_path: Path, text: str) -> list[str]:
    """The code of the blocks that run before the last one."""
    page = page_of(tmp_path, text)
    return [block.source.strip() for block in page.before(page.blocks[-1])]


def test_a_block_that_defines_what_it_uses_needs_none(tmp_path: Path) -> None:
    text = fenced("x = 1") + fenced("import os\ny = os.sep\nprint(len(y))\ndef f(a):\n    return a + y")
    assert before(tmp_path, text) == []


def test_a_fragment_runs_after_all_earlier_blocks_of_its_section(tmp_path: Path) -> None:
    text = "# A\n" + fenced("x = 1") + "# B\n" + fenced("y = 1") + fenced("z = 1") + fenced("print(y)")
    assert before(tmp_path, text) == ["y = 1", "z = 1"]


def test_sections_around_it_count_and_others_do_not(tmp_path: Path) -> None:
    text = "# A\n" + fenced("x = 1") + "## B\n" + fenced("y = 1") + "## C\n" + fenced("print(x)")
    assert before(tmp_path, text) == ["x = 1"]


def test_a_name_from_elsewhere_is_looked_for_upwards(tmp_path: Path) -> None:
    text = "# A\n" + fenced("x = 0") + "# B\n" + fenced("import os\nx = os.sep") + "# C\n" + fenced("print(x)")
    assert before(tmp_path, text) == ["import os\nx = os.sep"]


def test_what_a_function_uses_counts_and_what_is_no_python_does_not(tmp_path: Path) -> None:
    text = fenced("x = 1") + fenced("pip install y") + fenced("def f():\n    return x")
    assert before(tmp_path, text) == ["x = 1"]


def test_of_tabs_the_own_one_or_the_first_is_taken(tmp_path: Path) -> None:
    def tabs(group: str, *options: str) -> str:
        inner = "".join(f'<hfoption id="{o}">\n{fenced(f"x = {o!r}")}</hfoption>\n' for o in options)
        return f'<hfoptions id="{group}">\n{inner}</hfoptions>\n'

    def then(option: str) -> str:
        return f'<hfoptions id="h">\n<hfoption id="{option}">\n{fenced("print(x)")}</hfoption>\n</hfoptions>\n'

    assert before(tmp_path, tabs("g", "a", "b") + fenced("print(x)")) == ["x = 'a'"]
    assert before(tmp_path, tabs("g", "a", "b") + then("b")) == ["x = 'b'"]
    assert before(tmp_path, tabs("g", "a", "b") + then("c")) == ["x = 'a'"]


def test_what_a_block_really_needs_stops_where_a_name_is_defined_anew(tmp_path: Path) -> None:
    text = fenced("import broken") + fenced("x = [1]") + fenced("x.append(2)") + fenced("y = 1") + fenced("print(x)")
    page = page_of(tmp_path, text)
    assert [block.source.strip() for block in page.needed(page.blocks[-1])] == ["x = [1]", "x.append(2)"]


def test_who_uses_a_module_is_not_needed_for_it(tmp_path: Path) -> None:
    text = fenced("import os") + fenced("os.sep.broken()") + fenced("print(os.sep)")
    page = page_of(tmp_path, text)
    assert [block.source.strip() for block in page.needed(page.blocks[-1])] == ["import os"]


def test_names_that_are_called_are_found() -> None:
    source = "vae.decode(z)\nmodel(x)\npipe.to('cuda')\nprint(other.config)"
    assert pages.called_names(source) == {"vae", "model", "print"}
    assert pages.called_names("not python (") == set()


# Bad input.


def test_a_page_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"^none\.md: the page cannot be read: No such file or directory$"):
        read_page(tmp_path / "none.md")


def test_a_page_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=r"^page\.md:3: byte 0xe9 is not UTF-8; save the page as UTF-8$"):
        page_of(tmp_path, b"one\ntwo\ncaf\xe9\n")


def test_an_empty_page_has_no_blocks(tmp_path: Path) -> None:
    assert page_of(tmp_path, "").blocks == ()


def test_ten_megabytes_take_about_ten_times_as_long_as_one(tmp_path: Path) -> None:
    part = "Some text of a page, and more of it.\n" * 20 + fenced("value = 1")
    times = []
    for megabytes in (1, 10):
        text = part * (megabytes * 2**20 // len(part))
        started = time.process_time()
        page = page_of(tmp_path, text)
        times.append(time.process_time() - started)
        assert len(page.blocks) == text.count("```py")
    assert times[1] < 40 * times[0]


def test_what_pytest_is_told_of_suffixes_is_what_pages_have() -> None:
    assert told_to_pytest.SUFFIXES == pages.SUFFIXES


def test_a_block_is_compared_by_content() -> None:
    assert Block(1, 2, "a") == Block(1, 2, "a") != Block(1, 2, "b")
