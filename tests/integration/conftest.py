"""What the integration tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_frozen(frozen_libraries: None) -> None: ...
