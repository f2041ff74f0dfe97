"""What pytest is told of documentation pages, without importing what reads and runs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_diffopt.collection.session import SETTINGS
from pytest_diffopt.report.pages import PageReport

if TYPE_CHECKING:
    from pytest_diffopt.collection.documentation_pages import PageFile

SUFFIXES = (".md", ".mdx")
"""documentation.pages.SUFFIXES, written again (a test compares them): importing it would slow every start of pytest."""


def configure(config: pytest.Config) -> None:
    """Gather what is said of pages, and let sections be named by their headings."""
    from pytest_diffopt.collection.documentation_pages import by_heading

    config.pluginmanager.register(PageReport(config.stash[SETTINGS], config), "diffopt-pages")
    config.args[:] = by_heading(config.args, config.invocation_params.dir)


def page_file(path: Path, parent: pytest.Collector) -> PageFile:
    """The collector of a page."""
    from pytest_diffopt.collection.documentation_pages import PageFile

    return PageFile.from_parent(parent, path=path)
