"""A documentation page: its Python blocks, where each stands, what it needs, and which blocks come before it.

Nothing is run here, and neither torch nor pytest is imported.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sybil import Document, Region
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from pytest_diffopt.documentation.requirements import pip_requirements
from pytest_diffopt.errors import PageError

SUFFIXES = (".md", ".mdx")

_PYTHON = ("py", "python", "py3", "python3")
_SHELL = ("bash", "sh", "shell", "zsh", "console", "shell-session", "")
_LANGUAGE = re.compile(r"\s*\{?\s*\.?([\w+-]*)")
_HEADING = re.compile(r"^ {0,3}(?P<marks>#{1,6})[ \t]+(?P<text>.*?)[ \t]*#*[ \t]*$")
_ANCHOR = re.compile(r"\s*(\[\[.*?\]\]|\{#.*?\})\s*$")
_TAB = re.compile(r"^[ \t>]*<(?P<end>/?)(?P<tag>hfoptions|hfoption)\b(?P<attributes>[^>]*)>")
_ID = re.compile(r"""id\s*=\s*["'](.*?)["']""")
_COMMENT = re.compile(r"^[ \t>]*(?:<!--+|\{/\*)\s*diffopt\s*:\s*(?P<said>.*?)\s*(?:--+>|\*/\})\s*$")
_DIRECTIVES = ("skip", "xfail")
_RUNNING_METHODS = ("forward", "encode", "decode", "generate")


@dataclass(frozen=True)
class Tab:
    """One option of a group of which a reader follows one: ``<hfoption id="…">``."""

    group: int
    option: str


@dataclass(frozen=True)
class Block:
    """One Python block of a page.

    Attributes:
        line: of its opening fence, from 1.
        code_line: of its first line of code.
        headings: of the sections that it stands in, the outermost first.
        skip: the reason of a comment above it that skips it; empty where there is none.
        xfail: a part of what its failed verdict is expected to say; empty where none is expected.
        problem: what is wrong with the page at the block; empty where nothing is.
        requirements: what pip commands above it, in its own section or an enclosing one, install.
    """

    line: int
    code_line: int
    source: str
    headings: tuple[str, ...] = ()
    tab: Tab | None = None
    skip: str = ""
    xfail: str = ""
    problem: str = ""
    requirements: tuple[str, ...] = ()
    section: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """How it is called among a page's items."""
        return f"line-{self.line}"

    @property
    def heading(self) -> str:
        """Of the innermost section; empty where the page has none above it."""
        return self.headings[-1] if self.headings else ""


@dataclass(frozen=True)
class Page:
    """A page and its Python blocks, in order."""

    path: Path
    blocks: tuple[Block, ...] = field(default_factory=tuple)

    def before(self, block: Block) -> tuple[Block, ...]:
        """The blocks that have to run before one that uses names it does not define itself; none for any other.

        All earlier blocks of its section, and of those that enclose it, run; of alternatives in tabs, the block's own.
        A name that none of them defines is looked for upwards in the rest of the page.
        """
        wanted = free_names(block.source)
        if not wanted:
            return ()
        earlier = self._earlier(block)
        taken = [one for one in earlier if _encloses(one.section, block.section) and _goes_with(one, block, earlier)]
        for name in sorted(wanted - set().union(*(bound_names(one.source) for one in taken))):
            binding = [one for one in earlier if name in bound_names(one.source) and one not in taken]
            if binding:
                taken += [binding[-1], *(one for one in self.before(binding[-1]) if one not in taken)]
        return tuple(sorted(dict.fromkeys(taken), key=lambda one: one.line))

    def needed(self, block: Block) -> tuple[Block, ...]:
        """Of the blocks before one, those alone that define the names it uses, or do something to what they name.

        What was defined anew is not looked for further up.
        """
        wanted = free_names(block.source)
        before = self.before(block)
        imported = set().union(*(imported_names(one.source) for one in before))  # a module is not changed by its users
        taken: list[Block] = []
        for one in reversed(before):
            bound, used = bound_names(one.source), free_names(one.source)
            if wanted & bound or (wanted - imported) & used:
                taken.append(one)
                wanted = (wanted - bound) | used
        return tuple(reversed(taken))

    def _earlier(self, block: Block) -> list[Block]:
        return [one for one in self.blocks if one.line < block.line and not one.problem and parses(one.source)]


def read_page(path: Path) -> Page:
    """The page in a file.

    Raises:
        PageError: it cannot be read, or is no text in UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PageError(f"{path.name}: the page cannot be read: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PageError(
            f"{path.name}:{line}: byte {data[error.start]:#04x} is not UTF-8; save the page as UTF-8"
        ) from None
    return Page(path, tuple(_blocks(text.replace("\r\n", "\n"), path)))


class _Fences(RawFencedCodeBlockLexer):
    """Every fenced block, of any language, and whether its fence is closed."""

    def __init__(self) -> None:
        super().__init__(re.compile(r"(?P<info>[^\n]*)(?:\n|\Z)"))

    def make_region(self, opening: Any, document: Document, closing: Any) -> Region | None:
        region = super().make_region(opening, document, closing)
        if region is not None:
            region.lexemes |= {"closed": closing is not None, "prefix": opening["prefix"]}
        return region


def _regions(text: str, path: Path) -> list[Region]:
    """Every fence that stands in no other one: what is fenced inside a fence is text."""
    found: list[Region] = []
    for region in sorted(_Fences()(Document(text, str(path))), key=lambda one: one.start):
        if not found or region.start >= found[-1].end:
            found.append(region)
    return found


def _blocks(text: str, path: Path) -> Iterator[Block]:
    place = _Place()
    at, line = 0, 1
    for region in _regions(text, path):
        between = text[at : region.start]
        place.read(between)
        line += between.count("\n")
        fence = text[region.start : region.end]
        language = _language(region.lexemes["info"])
        source = str(region.lexemes["source"])
        if language in _PYTHON:
            yield _block(place, region, line, source)
        elif language in _SHELL:
            place.requires(pip_requirements(source))
        at, line = region.end, line + fence.count("\n")


def _block(place: _Place, region: Region, line: int, source: str) -> Block:
    block = Block(line, line + 1, source, place.headings, place.tab, section=place.section)
    block = replace(block, requirements=place.requirements)
    if not region.lexemes["closed"]:
        return replace(block, problem=f"the fence opened in line {line} is never closed")
    for offset, one in enumerate(source.splitlines()):
        if re.match(r"\s*(`{3,}|~{3,})", one) and not parses(source):
            inner = line + 1 + offset
            return replace(
                block,
                problem=f"another fence opens in line {inner}, inside the block of line {line}: its closing fence is missing",
            )
    said, _, reason = place.comment.partition(":")
    said, reason = said.strip(), reason.strip()
    if not place.comment:
        return block
    if said not in _DIRECTIVES or not reason:
        found = f"{said} without a reason" if said in _DIRECTIVES else place.comment
        return replace(
            block,
            problem=f"the comment above the block says 'diffopt: {found}'; it takes 'diffopt: skip: REASON' or "
            f"'diffopt: xfail: PART OF WHAT THE VERDICT SAYS'",
        )
    return replace(block, skip=reason) if said == "skip" else replace(block, xfail=reason)


def _language(info: str) -> str:
    match = _LANGUAGE.match(info)
    return match[1].lower() if match else ""


class _Place:
    """Where in the page the reader is: sections, tabs, the comment just above, and what pip commands install."""

    def __init__(self) -> None:
        self._headings: list[tuple[int, str, int]] = []
        self._count = self._groups = 0
        self._group: int | None = None
        self.tab: Tab | None = None
        self.comment = ""
        self._required: list[tuple[tuple[int, ...], tuple[str, ...]]] = []

    @property
    def headings(self) -> tuple[str, ...]:
        return tuple(text for _, text, _ in self._headings)

    @property
    def section(self) -> tuple[int, ...]:
        """The headings above by their numbers: two sections of one name are two."""
        return tuple(number for _, _, number in self._headings)

    @property
    def requirements(self) -> tuple[str, ...]:
        own = self.section
        found = [one for section, names in self._required if _encloses(section, own) for one in names]
        return tuple(dict.fromkeys(found))

    def requires(self, requirements: tuple[str, ...]) -> None:
        self._required.append((self.section, requirements))

    def read(self, text: str) -> None:
        """Read on, through text that is in no fence."""
        self.comment = ""
        for line in text.splitlines():
            if match := _HEADING.match(line):
                level = len(match["marks"])
                self._count += 1
                self._headings = [one for one in self._headings if one[0] < level]
                self._headings.append((level, _ANCHOR.sub("", match["text"]), self._count))
            elif match := _TAB.match(line):
                self._tab(match)
            if line.strip(" \t>"):
                found = _COMMENT.match(line)
                self.comment = found["said"] if found else ""

    def _tab(self, match: re.Match[str]) -> None:
        if match["tag"] == "hfoptions":
            self._groups += not match["end"]
            self._group = None if match["end"] else self._groups
            self.tab = None
        elif match["end"]:
            self.tab = None
        else:
            name = _ID.search(match["attributes"])
            self.tab = Tab(self._group or self._groups, name[1] if name else "")


def _encloses(outer: tuple[int, ...], inner: tuple[int, ...]) -> bool:
    return inner[: len(outer)] == outer


def _goes_with(earlier: Block, block: Block, among: list[Block]) -> bool:
    """Whether a reader of the block has followed the earlier one: not if it stands in a tab that they did not choose."""
    if earlier.tab is None:
        return True
    if block.tab is not None and block.tab.group == earlier.tab.group:
        return block.tab.option == earlier.tab.option
    options = list(dict.fromkeys(one.tab.option for one in among if one.tab and one.tab.group == earlier.tab.group))
    chosen = block.tab.option if block.tab is not None and block.tab.option in options else options[0]
    return earlier.tab.option == chosen


# Names.


def parses(source: str) -> bool:
    """Whether it is Python."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def free_names(source: str) -> set[str]:
    """Names that a block uses and nothing in it defines; none where it is no Python, or takes all names of a module."""
    names = _names(source)
    if names is None:
        return set()
    bound, used = names
    return used - bound - set(dir(builtins)) - {"__name__", "__file__", "__doc__"}


def bound_names(source: str) -> set[str]:
    """Names that a block defines at its top level."""
    names = _names(source)
    return names[0] if names is not None else set()


def imported_names(source: str) -> set[str]:
    """Names that a block imports."""
    if not parses(source):
        return set()
    imports = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}


def _names(source: str) -> tuple[set[str], set[str]] | None:
    """(bound at the top level, used as a global anywhere)."""
    if not parses(source):
        return None
    table = symtable.symtable(source, "<block>", "exec")
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(ast.parse(source))):
        return None
    bound = {
        one.get_name() for one in table.get_symbols() if one.is_assigned() or one.is_imported() or one.is_namespace()
    }
    used = {one.get_name() for one in table.get_symbols() if one.is_referenced()}
    inner = list(table.get_children())
    while inner:
        scope = inner.pop()
        inner += scope.get_children()
        used |= {one.get_name() for one in scope.get_symbols() if one.is_global() and one.is_referenced()}
        bound |= {one.get_name() for one in scope.get_symbols() if one.is_declared_global() and one.is_assigned()}
    return bound, used


def called_names(source: str) -> set[str]:
    """Names of objects that a block calls, by themselves or by one of the methods that run a model."""
    if not parses(source):
        return set()
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr in _RUNNING_METHODS:
                function = function.value
            if isinstance(function, ast.Name):
                found.add(function.id)
    return found
