"""The check ``baseline`` of recipe files: what a recipe did, held against what was recorded, or handed on to be recorded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.collection.left_out import SOURCES
from pytest_diffopt.collection.session import SETTINGS, session_of

if TYPE_CHECKING:
    from pytest_diffopt.baseline.judging import Baselines
    from pytest_diffopt.checks.session import Session
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe

NAME = "baseline"
BASELINES: pytest.StashKey[Baselines] = pytest.StashKey()
_WORKER_INPUT = "diffopt_baselines"
_LOADS = 3
"""So many more preparations tell how far the peak of loading moves from one to the next."""


def configure(config: pytest.Config) -> None:
    """Read the baselines, where the run has some; a worker of pytest-xdist gets them from the process that started it.

    Raises:
        pytest.UsageError: the options do not fit together, or there is no such folder.
    """
    settings = config.stash[SETTINGS]
    given: dict[str, Any] | None = getattr(config, "workerinput", {}).get(_WORKER_INPUT)
    if given is None and not settings.baseline:
        if settings.update_baseline:
            raise pytest.UsageError(
                "--diffopt-update-baseline: it takes --diffopt-baseline=DIR beside it, the folder to write"
            )
        return
    from pytest_diffopt.baseline.judging import Baselines
    from pytest_diffopt.baseline.store import read_all

    if given is not None:
        config.stash[BASELINES] = Baselines.from_plain(given)
        return
    assert settings.baseline is not None
    directory = directory_of(config)
    if why := why_unusable(directory, update=settings.update_baseline):
        raise pytest.UsageError(f"--diffopt-baseline: found {settings.baseline!r}; {why}")
    config.stash[BASELINES] = Baselines(settings.baseline, read_all(directory), settings.update_baseline)


def directory_of(config: pytest.Config) -> Path:
    """The folder of baselines: from where pytest was started on the command line, from its own folder in an ini file."""
    named = config.stash[SETTINGS].baseline or ""
    from_ini = config.getoption("diffopt_baseline", default=None) is None and config.inipath is not None
    return (config.inipath.parent if from_ini and config.inipath else config.invocation_params.dir) / named


def why_unusable(directory: Path, *, update: bool) -> str:
    """Why baselines can be neither read nor, where they are to be written, written; empty where they can."""
    if directory.exists() and not directory.is_dir():
        return "that is a file; it takes a folder"
    if not update:
        if not directory.exists():
            return "there is no such folder; --diffopt-update-baseline beside it makes and fills it"
        return "" if os.access(directory, os.R_OK | os.X_OK) else "that folder may not be read"
    there = directory
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        return f"{there} is a file; it takes a folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written to"


def hand_to_worker(config: pytest.Config, node: Any) -> None:
    """Give a worker of pytest-xdist the baselines: it need not have the folder."""
    if BASELINES in config.stash:
        node.workerinput[_WORKER_INPUT] = config.stash[BASELINES].to_plain()


OUTSIDE = "outside/"
"""Begins the name of a recipe file that is not below the root of the tests, such as one of an installed package."""


def source_name(path: Path, config: pytest.Config) -> str:
    """How baselines name a recipe file: from the root of the tests, the same on every machine."""
    root = config.rootpath
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else f"{OUTSIDE}{path.name}"


def plain_record_of(config: pytest.Config, recipe: Recipe, path: Path, observation: Observation) -> dict[str, Any]:
    """The record of an observation as plain data, for reports; see :data:`RECORD_PROPERTY`."""
    from pytest_diffopt.baseline.key import key_of
    from pytest_diffopt.baseline.record import record_of
    from pytest_diffopt.baseline.store import plain_record

    session = session_of(config)
    key = key_of(recipe, observation, session.accelerator, session.compile_backend)
    plain = plain_record(key, record_of(observation, folder=str(path.parent)))
    return {"file": source_name(path, config), "name": recipe.name, **plain}


def judged(
    config: pytest.Config, recipe: Recipe, path: Path, node_id: str
) -> tuple[Verdict, Observation, dict[str, Any]]:
    """The verdict, what was observed, and the record of it as plain data; see :data:`RECORD_PROPERTY`.

    Args:
        path: of the recipe's file. node_id: of the recipe.

    Raises:
        DiffoptError: the recipe could not be observed.
    """
    from pytest_diffopt.baseline.key import key_of
    from pytest_diffopt.baseline.latency import latency_of
    from pytest_diffopt.baseline.record import record_of
    from pytest_diffopt.baseline.store import plain_record

    baselines, session = config.stash[BASELINES], session_of(config)
    observation = session.observe(recipe)
    key = key_of(recipe, observation, session.accelerator, session.compile_backend)
    parity = session.judge(recipe, "parity").figures if observation.failure is None else {}
    required, floor = parity.get("required"), 0.0
    if required is not None:
        floor = float(f"{parity['allowed'] / parity['multiple']:.3g}")
    eager = _eager(session, recipe)
    latency = latency_of(observation, eager) if eager is not None else None
    reference = session.evidence(recipe).reference if observation.failure is None else None
    source = source_name(path, config)
    present = config.stash[SOURCES].get(source, [])

    def of(load_peaks: tuple[int, ...]) -> tuple[Verdict, dict[str, Any]]:
        record = record_of(
            observation,
            folder=str(path.parent),
            required_tolerance=required,
            tolerance_floor=floor,
            load_peaks=load_peaks,
            latency=latency,
            reference=reference,
        )
        return baselines.judge(source, recipe.name, key, record, present, node_id), plain_record(key, record)

    loads: tuple[int, ...] = ()
    if baselines.update and observation.failure is None:
        loads = session.load_peaks(recipe, _LOADS)
    verdict, record = of(loads)
    if any(one["what"] == "peak of loading" for one in verdict.figures["differences"]) and not baselines.update:
        verdict, record = of(session.load_peaks(recipe, _LOADS))  # one load alone is no measurement
    return verdict, observation, {"file": source, "name": recipe.name, **record}


def _eager(session: Session, recipe: Recipe) -> Observation | None:
    """The eager reference of a compiled recipe on a real accelerator; None where latency is not judged."""
    if not recipe.compilation or not session.accelerator.is_real:
        return None
    return session.evidence(recipe).reference
