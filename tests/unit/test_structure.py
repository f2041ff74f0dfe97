"""The package keeps its shape: imports point downward, few modules know pytest, and loading the plugin is cheap."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pytest_diffopt

PACKAGE = "pytest_diffopt"
ROOT = Path(pytest_diffopt.__file__).parent

# From the top down: a module may import from its own layer and from those below. A name is what stands right below the
# package. "" is the package itself, whose lazy names reach everything: so no module in it imports them.
LAYERS = (
    ("",),
    ("__main__",),
    ("plugin", "command_line", "suite", "autoload"),
    ("collection", "report", "baseline", "fixtures"),
    ("options", "markers", "hookspec"),
    ("documentation",),
    ("checks",),
    ("installation",),
    ("forecasting",),
    ("observation",),
    ("preparation",),
    ("replicas", "accelerators"),
    ("strategies", "recipe_loading", "matrix"),
    ("recipe", "libraries"),
    ("quantization_backends",),
    ("contract", "denoising"),
    ("references",),
    ("part",),
    ("byte_sizes",),
    ("errors", "extras", "source_places", "user_cache", "whole_files", "notices"),
)
KNOW_PYTEST = {"plugin", "options", "markers", "fixtures", "hookspec", "collection", "report"}
HEAVY = ("torch", "numpy", "pydantic", "rich", "diffusers", "transformers", "hypothesis")

_DEPTHS = {name: depth for depth, names in enumerate(LAYERS) for name in names}


@dataclass(frozen=True)
class Import:
    """One imported module; ``for_types`` if it stands under ``if TYPE_CHECKING:``."""

    module: str
    line: int
    for_types: bool


def module_name(path: Path) -> str:
    """``pytest_diffopt/checks/state.py`` as ``pytest_diffopt.checks.state``; a package by its own name."""
    steps = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(steps[:-1] if steps[-1] == "__init__" else steps)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(source: str, module: str, modules: frozenset[str], *, is_package: bool = False) -> list[Import]:
    """Every import in a source, those inside functions too.

    Args:
        module: its own name, which relative imports start from.
        modules: all modules of the package: ``from package import name`` imports the module of that name if there is
            one, and else a name of the package.
    """
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: list[Import] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            steps = module.split(".")
            steps = steps[: len(steps) - node.level + is_package] if node.level else []
            origin = ".".join([*steps, *([node.module] if node.module else [])])
            names = [full if (full := f"{origin}.{alias.name}") in modules else origin for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [one.value for one in node.args[:1] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        found += [Import(name, getattr(node, "lineno", 0), id(node) in for_types) for name in dict.fromkeys(names)]
    return found


def top(module: str) -> str:
    """What stands right below the package: ``checks`` of ``pytest_diffopt.checks.state``; "" for the package."""
    return module.removeprefix(PACKAGE).lstrip(".").split(".")[0]


def upward(source: str, module: str, modules: frozenset[str], *, is_package: bool = False) -> list[str]:
    """The imports that do not point downward, as ``checks.state imports plugin (line 3)``."""
    return [
        f"{module} imports {one.module} (line {one.line})"
        for one in imports_of(source, module, modules, is_package=is_package)
        if one.module.split(".")[0] == PACKAGE and not one.for_types
        if _DEPTHS[top(one.module)] < _DEPTHS[top(module)]
    ]


def all_imports() -> Iterator[tuple[str, Import]]:
    for module, path in SOURCES.items():
        source = path.read_text(encoding="utf-8")
        for one in imports_of(source, module, frozenset(SOURCES), is_package=path.name == "__init__.py"):
            yield module, one


def test_every_module_has_a_layer_and_the_table_names_no_other() -> None:
    assert {top(module) for module in SOURCES} == set(_DEPTHS)


def test_imports_point_downward() -> None:
    found = []
    for module, path in SOURCES.items():
        source = path.read_text(encoding="utf-8")
        found += upward(source, module, frozenset(SOURCES), is_package=path.name == "__init__.py")
    assert found == []


@pytest.mark.parametrize(
    "statement",
    [
        "import pytest_diffopt.checks.state",
        "from pytest_diffopt.checks import state",
        "from pytest_diffopt.checks.state import judge",
        "from pytest_diffopt import checks",
        "from pytest_diffopt import Recipe",
        "from ..checks import state",
        "from .. import checks",
        "def later():\n    from pytest_diffopt.checks.state import judge",
        "if True:\n    from pytest_diffopt.checks.state import judge",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from pytest_diffopt.checks.state import judge",
        "importlib.import_module('pytest_diffopt.checks.state')",
    ],
)
def test_an_upward_import_is_caught_in_every_form(statement: str) -> None:
    modules = frozenset(SOURCES)
    assert len(upward(statement, f"{PACKAGE}.preparation.made_up", modules)) == 1
    relative = statement.replace("from ..", "from .") if statement.startswith("from .") else statement
    assert upward(relative, PACKAGE, modules, is_package=True) == []


@pytest.mark.parametrize(
    "statement",
    [
        "if TYPE_CHECKING:\n    from pytest_diffopt.checks.state import judge",
        "from pytest_diffopt.preparation import pipeline",
        "from . import pipeline",
        "from .pipeline import prepare",
        "from pytest_diffopt import errors",
        "from pytest_diffopt.replicas import registry",
        "import pytest",
    ],
)
def test_an_import_downward_sideways_or_for_types_alone_is_accepted(statement: str) -> None:
    assert upward(statement, f"{PACKAGE}.preparation.made_up", frozenset(SOURCES)) == []


def test_only_the_modules_that_speak_to_pytest_import_it_and_none_its_private_parts() -> None:
    imported = [(module, one.module.split(".")[0]) for module, one in all_imports()]
    assert {"plugin"} <= {top(module) for module, name in imported if name == "pytest"} <= KNOW_PYTEST
    assert [module for module, name in imported if name == "_pytest"] == []


@pytest.mark.parametrize("package", [module for module, path in SOURCES.items() if path.name == "__init__.py"])
def test_nothing_that_a_package_exports_has_the_name_of_one_of_its_modules(package: str) -> None:
    exporting = importlib.import_module(package)
    modules = {found.name for found in pkgutil.iter_modules(exporting.__path__)}
    exported = {*getattr(exporting, "__all__", ()), *(name for name, held in vars(exporting).items() if callable(held))}
    assert modules & exported == set()


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.plugin", f"{PACKAGE}.__main__"])
def test_loading_it_imports_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    docstring = ast.get_docstring(ast.parse(SOURCES[module].read_text(encoding="utf-8"))) or ""
    assert len(docstring.split()) > 2, SOURCES[module]


def test_no_module_is_named_after_nothing() -> None:
    assert [m for m in SOURCES if m.split(".")[-1] in ("utils", "util", "helpers", "common", "misc")] == []


def test_every_public_name_is_there() -> None:
    missing = [name for name in pytest_diffopt.__all__ if not hasattr(pytest_diffopt, name)]
    assert missing == []
    assert set(pytest_diffopt.__all__) == {*pytest_diffopt._HOMES, "__version__"}


def test_every_public_name_has_a_type_for_type_checkers_of_the_same_object() -> None:
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert set(typed) == set(pytest_diffopt._HOMES)
    for name, module in typed.items():
        assert getattr(importlib.import_module(module), name) is getattr(pytest_diffopt, name)


def test_the_map_of_the_package_names_only_files_that_are_there() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:pytest_diffopt/)?((?:[a-z_]+/)*[a-z_]+\.py)`", text)) - {"conftest.py"}
    assert [name for name in sorted(named) if not (ROOT / name).is_file() and not (ROOT.parent / name).is_file()] == []
