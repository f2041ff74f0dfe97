"""What the integration tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_frozen(frozen_libraries: Callable[[], None]) -> None:
    frozen_libraries()


@pytest.fixture
def entry_point_of_torch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find the entry point by which torch loads us, also where the source tree is not installed."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["torch.backends"].items()
    folder = tmp_path_factory.mktemp("entry-point")
    distribution = folder / "diffopt_source_tree-0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: diffopt-source-tree\nVersion: 0\n")
    (distribution / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {value}\n")
    path = [str(folder), str(root), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
