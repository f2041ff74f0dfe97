"""What one pytest process keeps: the settings, the accelerator, and the session of checks, made when first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_diffopt.collection.import_paths import give_back
from pytest_diffopt.collection.workers import take_share, worker_index
from pytest_diffopt.errors import UnverifiableError
from pytest_diffopt.options import Settings
from pytest_diffopt.report.progress import ProgressLine

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.checks.session import Session
    from pytest_diffopt.documentation.running import PageRuns
    from pytest_diffopt.replicas import Registry

SETTINGS = pytest.StashKey[Settings]()
PROGRESS = pytest.StashKey[ProgressLine]()
SESSION: pytest.StashKey[Session] = pytest.StashKey()
ACCELERATOR: pytest.StashKey[Accelerator] = pytest.StashKey()
NO_ACCELERATOR = pytest.StashKey[str]()
"""Why there is none."""
PAGES: pytest.StashKey[PageRuns] = pytest.StashKey()
REGISTRY: pytest.StashKey[Registry] = pytest.StashKey()


def accelerator_of(config: pytest.Config) -> Accelerator:
    """The accelerator in use. Imports torch.

    Raises:
        DiffoptError: this machine lacks what was asked for.
        UnverifiableError: the simulated one cannot be built; tried once, and said at every use.
    """
    if NO_ACCELERATOR in config.stash:
        raise UnverifiableError(config.stash[NO_ACCELERATOR])
    if ACCELERATOR not in config.stash:
        take_share(config, config.stash[SETTINGS].device)
        from pytest_diffopt.accelerators import select

        try:
            config.stash[ACCELERATOR] = select(config.stash[SETTINGS].device, worker_index(config))
        except UnverifiableError as error:
            config.stash[NO_ACCELERATOR] = str(error)
            raise
    return config.stash[ACCELERATOR]


def kind_of(config: pytest.Config) -> str:
    """The kind of the accelerator in use, known before it is made. Imports torch."""
    from pytest_diffopt.accelerators import resolve_kind

    return resolve_kind(config.stash[SETTINGS].device)


def session_of(config: pytest.Config) -> Session:
    """The session of checks of this process. Imports torch."""
    if SESSION not in config.stash:
        from pytest_diffopt.checks.session import Session

        registry_of(config)  # recipes may name what conftest files register
        settings = config.stash[SETTINGS]
        accelerator, timed_calls = accelerator_of(config), 0
        if (
            settings.baseline and accelerator.is_real
        ):  # latency is held against a baseline, and a simulated one has none
            from pytest_diffopt.baseline.latency import TIMED_CALLS as timed_calls
        config.stash[SESSION] = Session(
            accelerator,
            allow_hub=settings.hub,
            compile_backend=settings.compile_backend,
            progress=config.stash[PROGRESS].say,
            timed_calls=timed_calls,
        )
    return config.stash[SESSION]


def registry_of(config: pytest.Config) -> Registry:
    """The registry of replica families, with those that plugins and conftest files added."""
    if REGISTRY not in config.stash:
        from pytest_diffopt.replicas import registry

        config.hook.pytest_diffopt_register_replicas(registry=registry)
        config.stash[REGISTRY] = registry
    return config.stash[REGISTRY]


def release(config: pytest.Config) -> None:
    """Let go of all that the session of checks holds, of the terminal, and of entries of ``sys.path``."""
    give_back(config)
    if SESSION in config.stash:
        session = config.stash[SESSION]
        del config.stash[SESSION]
        session.release()
    if PAGES in config.stash:
        pages = config.stash[PAGES]
        del config.stash[PAGES]
        pages.close()
    if PROGRESS in config.stash:
        config.stash[PROGRESS].close()
