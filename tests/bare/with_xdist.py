"""The wheel with the extra xdist alone, which `tox -e bare` installs into the same environment afterwards."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from installed import MODELS, NET, outcomes, run_pytest

from pytest_diffopt.extras import EXTRAS


def test_two_workers_run_a_recipe_file(tmp_path: Path) -> None:
    installed = {one.metadata["Name"].lower().replace("_", "-") for one in metadata.distributions()}
    assert installed & set(EXTRAS) == {"pytest-xdist"}
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    (tmp_path / "net.recipes.toml").write_text(NET + NET.replace("recipe.net", "recipe.second"))
    ran = run_pytest(tmp_path, "-n", "2", "-v", "net.recipes.toml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert set(outcomes(ran)) == {"passed"}
    workers = re.findall(r"\[(gw\d)\].* PASSED net\.recipes\.toml::(\w+)::", ran.stdout)
    assert {recipe for _, recipe in workers} == {"net", "second"}
    assert len(set(workers)) == 2  # all checks of a recipe on one worker
