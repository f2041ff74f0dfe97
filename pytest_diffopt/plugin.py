"""pytest's hooks, a few lines each. Loading this imports neither torch nor pydantic nor rich."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt import hookspec
from pytest_diffopt.collection import baselines, gpu_session, left_out, marked_tests, pages, workers
from pytest_diffopt.collection.gpu_in_use import gpu_in_use
from pytest_diffopt.collection.session import PROGRESS, SETTINGS, release
from pytest_diffopt.fixtures import register_fixtures
from pytest_diffopt.notices import shown_by
from pytest_diffopt.options import add_options, read_settings
from pytest_diffopt.report import reports
from pytest_diffopt.report.combinations import CombinationsReport
from pytest_diffopt.report.gate import Gate
from pytest_diffopt.report.progress import ProgressLine
from pytest_diffopt.report.terminal import RecipeReport, status_of

if TYPE_CHECKING:
    from pytest_diffopt.collection.documentation_pages import PageFile
    from pytest_diffopt.collection.recipe_files import RecipeFile


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspec)


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before conftest files are imported, and before output is captured
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, None, None]:
    gpu_session.begin(early_config)
    return (yield)


@pytest.hookimpl(tryfirst=True)  # before pytest-html, which is told which page to write
def pytest_configure(config: pytest.Config) -> None:
    gpu_session.begin(config)  # in a worker that loads the plugin by -p, the hook above was over by then
    workers.configure(config)
    marked_tests.register_markers(config)
    config.stash[SETTINGS] = read_settings(config)
    config.stash[PROGRESS] = ProgressLine()
    report = RecipeReport(config.stash[SETTINGS])
    config.pluginmanager.register(report, "diffopt-report")
    baselines.configure(config)
    gate = None
    if not hasattr(config, "workerinput"):
        gate = Gate(config, config.stash[SETTINGS], report)
        config.pluginmanager.register(gate, "diffopt-gate")
    reports.configure(config, gate)
    config.pluginmanager.register(CombinationsReport(), "diffopt-combinations")
    if config.stash[SETTINGS].docs:
        pages.configure(config)


@pytest.hookimpl(trylast=True)  # when every plugin's fixtures are known
def pytest_sessionstart(session: pytest.Session) -> None:
    register_fixtures(session)
    line = session.config.stash[PROGRESS] = ProgressLine.of(session.config)  # by now the terminal reporter is there
    announcements = contextlib.ExitStack()
    announcements.enter_context(shown_by(line.announcing))
    session.config.add_cleanup(announcements.close)


def pytest_unconfigure(config: pytest.Config) -> None:
    release(config)


def pytest_report_header(config: pytest.Config) -> str:
    return config.stash[SETTINGS].header


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> RecipeFile | PageFile | None:
    if file_path.suffix in pages.SUFFIXES and parent.config.stash[SETTINGS].docs:
        return pages.page_file(file_path, parent)
    if not file_path.name.endswith(".recipes.toml"):
        return None
    from pytest_diffopt.collection.recipe_files import RecipeFile

    return RecipeFile.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked_tests.parametrize_recipes(metafunc)


def pytest_itemcollected(item: pytest.Item) -> None:
    marked_tests.note_recipe(item)


@pytest.hookimpl(tryfirst=True)  # before xdist sends what was collected
def pytest_collection_finish(session: pytest.Session) -> None:
    left_out.note_selected(session.config, [item.nodeid for item in session.items])
    workers.tell_of_recipes(session.config, session.items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    with gpu_in_use(item):
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    marked_tests.set_up(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with marked_tests.watching(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return marked_tests.tidied(item, (yield))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    workers.listen_to_worker(node.config, node)
    baselines.hand_to_worker(node.config, node)
    reports.hand_to_worker(node.config, node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[Any]) -> None:
    workers.give_places(config, specs)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from pytest_diffopt.collection.scheduling import scheduler  # only xdist calls this, so it is there

    return scheduler(config, log)


def pytest_report_teststatus(report: pytest.TestReport) -> Any:
    return status_of(report)
