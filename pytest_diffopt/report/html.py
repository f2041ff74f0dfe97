"""What pytest-html's page shows of a recipe beside its verdicts: the picture of its residency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_diffopt.observation.observation import Observation

_PICTURE = pytest.StashKey[str]()


def keep_picture(item: pytest.Item, observation: Observation, title: str) -> None:
    """Draw the residency of a recipe for the item's report, where pytest-html writes one and the device told it."""
    memory = observation.memory
    if not getattr(item.config.option, "htmlpath", None) or memory is None or memory.residency is None:
        return
    from pytest_diffopt.report.pictures import residency_svg

    item.stash[_PICTURE] = residency_svg(memory.residency, title)


def attach_picture(item: pytest.Item, report: Any) -> None:
    """Put the picture into the report of the item's call, as pytest-html reads it: plain data, which crosses processes."""
    if report.when == "call" and (picture := item.stash.get(_PICTURE, None)) is not None:
        extra = {"name": "residency", "format_type": "html", "content": picture, "mime_type": None, "extension": None}
        report.extras = [*getattr(report, "extras", []), extra]
