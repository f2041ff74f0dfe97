"""What is installed: versions, extras, and libraries that are quiet while we import them."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import warnings
from pathlib import Path

import pytest

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.extras import EXTRAS, needs
from pytest_diffopt.libraries import (
    dtype_argument,
    import_libraries,
    quiet_imports,
    silent_about_being_offline,
    versions,
)
from pytest_diffopt.preparation.quantization import import_backends
from pytest_diffopt.quantization_backends import BACKENDS, DISTRIBUTIONS
from pytest_diffopt.recipe import Quantization

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao can neither be found nor imported, as where it is not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "torchao":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for module in BACKENDS["torchao"].imports:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.usefixtures("_no_torchao")
def test_versions_leave_out_what_is_not_installed() -> None:
    from pytest_diffopt.forecasting.running import _library_versions

    found = versions()
    assert "torchao" not in found
    assert {"python", "torch", "diffusers", "bitsandbytes"} <= set(found)
    assert set(_library_versions()) == set(found) - {"python", "pytest-diffopt"}


@pytest.mark.usefixtures("_no_torchao")
def test_a_backend_that_cannot_be_imported_names_the_extra_that_installs_it() -> None:
    quantization = Quantization("torchao", "transformer", kwargs={"quant_type": "Int8WeightOnlyConfig"})
    with pytest.raises(PreparationError) as caught:
        import_backends([quantization])
    assert str(caught.value) == (
        "quantization: torchao needs torchao, which is not installed: pip install pytest-diffopt[torchao]"
    )


def test_each_extra_is_one_of_the_packages_and_installs_what_needs_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    written = {
        requirement.partition(">=")[0]: extra
        for extra, requirements in project["optional-dependencies"].items()
        if extra not in ("test", "all")
        for requirement in requirements
    }
    assert written == EXTRAS
    page = (ROOT / "docs" / "plugin.md").read_text(encoding="utf-8").split("## Options")[0]
    assert [extra for extra in EXTRAS.values() if f"[{extra}]" not in page] == []
    required = {requirement.partition(">=")[0] for requirement in project["dependencies"]}
    assert set(DISTRIBUTIONS) <= required | set(EXTRAS)
    assert needs("a-package-of-others") == "needs a-package-of-others, which is not installed"


def test_strategies_without_hypothesis_name_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pytest_diffopt.strategies", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module("pytest_diffopt.strategies")
    assert str(caught.value) == (
        "pytest_diffopt.strategies needs hypothesis, which is not installed: pip install pytest-diffopt[hypothesis]"
    )


def test_imports_are_quiet_but_for_errors_and_logging_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("a_library")
    with quiet_imports():
        library.setLevel(logging.WARNING)  # as libraries do when they are imported
        library.warning("no kernels for this machine")
        warnings.warn("an optional package is missing", UserWarning, stacklevel=1)
        library.error("a broken installation")
    library.warning("of a call")
    assert [record.getMessage() for record in caplog.records] == ["a broken installation", "of a call"]
    with pytest.raises(ZeroDivisionError), quiet_imports():
        1 / 0  # noqa: B018
    assert logging.root.manager.disable == logging.NOTSET


def test_quiet_imports_keep_what_the_user_disabled() -> None:
    logging.disable(logging.CRITICAL)
    try:
        with quiet_imports():
            assert logging.root.manager.disable == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)


def test_lines_that_the_hub_cannot_be_reached_are_held_back_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    hub = logging.getLogger("huggingface_hub.hf_api")
    pipelines = logging.getLogger("diffusers.pipelines.pipeline_utils")
    before = (list(hub.filters), list(pipelines.filters))
    try:
        silent_about_being_offline()
        for logger in (hub, pipelines):
            logger.addHandler(caplog.handler)
        hub.warning("Could not reach the Hub (%s). Using cached commit hash for 'a/b'.", "offline")
        hub.warning("a repository was renamed")
        pipelines.warning("Couldn't connect to the Hub: offline.\nWill try to load from local cache.")
        pipelines.warning("an argument is ignored")
    finally:
        hub.filters, pipelines.filters = before
        for logger in (hub, pipelines):
            logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"a repository was renamed", "an argument is ignored"}


@pytest.mark.parametrize(
    ("installed", "expected"),
    [("0.37.0", "torch_dtype"), ("0.41.2", "torch_dtype"), ("0.42.0", "dtype"), ("1.0.0.dev0", "dtype")],
)
def test_diffusers_gets_the_dtype_by_the_name_that_it_has_for_it(
    installed: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    assert dtype_argument() == expected


def test_a_pipeline_is_loaded_with_no_deprecated_dtype() -> None:
    from pytest_diffopt.accelerators import select
    from pytest_diffopt.preparation.pipeline import prepare
    from pytest_diffopt.recipe import Recipe

    import_libraries()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = prepare(Recipe("r", "tiny-sd", dtype="bfloat16"), select("cpu"))
    assert str(next(prepared.components["unet"].parameters()).dtype) == "torch.bfloat16"
    assert [str(one.message) for one in caught if "torch_dtype" in str(one.message)] == []
