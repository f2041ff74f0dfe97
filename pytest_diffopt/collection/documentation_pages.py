"""Documentation pages become test items: ``PAGE.md::line-N``, one for each Python block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.collection.pages import SUFFIXES
from pytest_diffopt.collection.session import PAGES, PROGRESS, SETTINGS, registry_of
from pytest_diffopt.collection.skipping import skip
from pytest_diffopt.errors import DiffoptError, UnverifiableError
from pytest_diffopt.report.pages import BLOCK_PROPERTY, block_row
from pytest_diffopt.report.rows import VERDICT_PROPERTY

if TYPE_CHECKING:
    from pytest_diffopt.documentation.judging import BlockVerdict
    from pytest_diffopt.documentation.pages import Block, Page
    from pytest_diffopt.documentation.running import PageRuns


class BlockFailure(Exception):
    """Carries what is said of a block to its report."""


class PageFile(pytest.File):
    """A page, ``*.md`` or ``*.mdx``."""

    def collect(self) -> Iterator[BlockItem]:
        from pytest_diffopt.documentation.pages import read_page

        page = read_page(self.path)
        for block in page.blocks:
            yield BlockItem.from_parent(self, name=block.name, page=page, block=block)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:  # type: ignore[override]
        if isinstance(excinfo.value, DiffoptError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)


class BlockItem(pytest.Item):
    """One Python block of a page."""

    def __init__(self, *, page: Page, block: Block, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.page = page
        self.block = block
        self.extra_keyword_matches.update({"diffopt", "documentation", *block.headings})
        self._row = {
            "page": self.nodeid.partition("::")[0] or self.path.name,
            "line": block.line,
            "heading": block.heading,
        }
        self.user_properties.append((BLOCK_PROPERTY, {**self._row, "status": "skipped", "sentence": block.skip}))

    def runtest(self) -> None:
        if self.block.skip:
            skip(self, self.block.skip)
        verdict, expected = self._judge(), self.block.xfail
        failed_as_expected = bool(expected) and verdict.status != "passed" and expected in told(self.page, verdict)
        self._write_down(verdict, expected=failed_as_expected)
        if failed_as_expected:
            pytest.xfail(f"{verdict.status}: {verdict.sentence}")
        if expected:
            found = f"it {verdict.status}" if verdict.status == "passed" else f"{verdict.status}: {verdict.sentence}"
            raise BlockFailure(f"line {self.block.line}: the page expects a failure with {expected!r}; {found}")
        if verdict.status == "skipped":
            skip(self, verdict.sentence)
        if verdict.status == "failed" or (verdict.status == "unverified" and self.config.stash[SETTINGS].strict):
            raise BlockFailure(told(self.page, verdict))
        if verdict.status == "unverified":
            self.user_properties.append((VERDICT_PROPERTY, _summary(verdict, self.name)))
            skip(self, f"unverified: {verdict.sentence}")

    def _judge(self) -> BlockVerdict:
        from pytest_diffopt.documentation.judging import cannot_run, is_wrong

        with self.config.stash[PROGRESS].running():
            try:
                verdict = pages_of(self.config).judge(self.page, self.block)
            except UnverifiableError as error:
                verdict = cannot_run(self.block, str(error))
            except DiffoptError as error:
                verdict = is_wrong(self.block, self.name, str(error))
        self.add_report_section("call", "diffopt", "\n".join(details(verdict)))
        return verdict

    def _write_down(self, verdict: BlockVerdict, *, expected: bool) -> None:
        row = {**self._row, **block_row(verdict)}
        if expected:
            row["status"] = "expected"
        self.user_properties[:] = [one for one in self.user_properties if one[0] != BLOCK_PROPERTY]
        self.user_properties.append((BLOCK_PROPERTY, row))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, BlockFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        heading = f" · {self.block.heading}" if self.block.heading else ""
        return self.path, self.block.line - 1, f"{self.path.name}:{self.block.line}{heading}"


def _summary(verdict: BlockVerdict, name: str) -> dict[str, Any]:
    """The block's verdict in the form of a check's, by which pytest counts it."""
    recipe = verdict.recipe.name if verdict.recipe is not None else name
    return {
        "check": "block",
        "recipe": recipe,
        "status": verdict.status,
        "sentence": verdict.sentence,
        "figures": {},
        "evidence": [],
    }


def told(page: Page, verdict: BlockVerdict) -> str:
    """What is said of a block that did not pass: each verdict with its evidence, and what its recipe is."""
    lines = [f"{page.path.name}:{verdict.block.line} {verdict.status}: {verdict.sentence}"]
    for one in verdict.verdicts:
        if one.status != "passed":
            if one.sentence not in lines[0]:
                lines.append(f"  {one.check}: {one.sentence}")
            lines += [f"    {line}" for line in one.evidence]
    if verdict.run is not None and verdict.run.raised is not None:
        own = [line for line in verdict.run.raised.traceback if line.strip()]
        lines += [f"    {line}" for line in own[-12:]]
    return "\n".join(lines)


def details(verdict: BlockVerdict) -> list[str]:
    """Everything that is known of a block, for the report's section."""
    lines = [f"{one.check}: {one.status}: {one.sentence}" for one in verdict.verdicts] or [verdict.sentence]
    lines += list(verdict.notes)
    if verdict.toml:
        lines += ["", *verdict.toml.rstrip().splitlines()]
    if verdict.run is not None and verdict.run.output.strip():
        lines += ["", "it printed:", *verdict.run.output.strip().splitlines()[-8:]]
    return lines


def pages_of(config: pytest.Config) -> PageRuns:
    """What runs the blocks of this process' pages."""
    if PAGES not in config.stash:
        from pytest_diffopt.documentation.running import PageRuns

        settings = config.stash[SETTINGS]
        config.stash[PAGES] = PageRuns(
            settings.device,
            allow_hub=settings.hub,
            compile_backend=settings.compile_backend,
            seconds=settings.docs_timeout,
            registry=registry_of(config),
            progress=config.stash[PROGRESS].say,
        )
    return config.stash[PAGES]


_LINE = re.compile(r"line-\d+(\[.*)?$")


def by_heading(arguments: list[str], folder: Path) -> list[str]:
    """The command line's arguments, with ``PAGE.md::HEADING`` as the blocks of the sections of that heading.

    An argument that names no section of a page stays, and pytest says that it is not found.
    """
    found: list[str] = []
    for argument in arguments:
        page, _, wanted = argument.partition("::")
        names = (
            []
            if not wanted or _LINE.match(wanted) or not page.endswith(SUFFIXES)
            else _blocks_of(folder / page, wanted)
        )
        found += [f"{page}::{name}" for name in names] or [argument]
    return found


def _blocks_of(path: Path, heading: str) -> list[str]:
    from pytest_diffopt.documentation.pages import read_page

    try:
        page = read_page(path)
    except DiffoptError:  # said when it is collected
        return []
    return [block.name for block in page.blocks if heading in block.headings]
