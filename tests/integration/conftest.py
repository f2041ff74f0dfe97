"""What the integration tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_frozen(frozen_libraries: Callable[[], None]) -> None:
    frozen_libraries()
