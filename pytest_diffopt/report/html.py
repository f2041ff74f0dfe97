"""What a page shows of a recipe beside its verdicts: its residency, as observed and as forecast.

Where a report of ours asks for it, it goes there as plain data; else pytest-html's own page shows it as pictures.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.report.rows import RESIDENCY_PROPERTY

if TYPE_CHECKING:
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.observation.observation import Observation, Residency

PICTURED = pytest.StashKey[bool]()
"""Whether a report of ours wants the residency."""
EMBEDDED = pytest.StashKey[bool]()
"""Whether pytest-html's page is that report."""
_PICTURES = pytest.StashKey[dict[str, str]]()
"""Name → picture."""


def keep_picture(item: pytest.Item, observation: Observation, title: str) -> None:
    """Keep the residency of a recipe for the item's report, where a page is written and the device told it."""
    if observation.memory is not None:
        _keep(item, "observed", "residency", observation.memory.residency, title)


def keep_forecast_picture(item: pytest.Item, forecast: Forecast) -> None:
    """Keep the residency that was forecast, where a page is written."""
    _keep(item, "forecast", "forecast", forecast.residency, f"{forecast.recipe}, forecast of {forecast.model}")


def _keep(item: pytest.Item, kind: str, name: str, residency: Residency | None, title: str) -> None:
    if residency is None:
        return
    if item.config.stash[PICTURED]:
        held = next((held for key, held in item.user_properties if key == RESIDENCY_PROPERTY), None)
        if not isinstance(held, dict):
            held = {}
            item.user_properties.append((RESIDENCY_PROPERTY, held))
        held[kind] = _plain(residency)
    if getattr(item.config.option, "htmlpath", None) and not item.config.stash[EMBEDDED]:
        from pytest_diffopt.report.pictures import residency_pictures

        item.stash.setdefault(_PICTURES, {})[name] = residency_pictures(residency, title)


def _plain(residency: Residency) -> dict[str, Any]:
    """Plain data that crosses processes: lists in the place of tuples."""
    return {
        "owners": [dataclasses.asdict(owner) for owner in residency.owners],
        "phases": [dataclasses.asdict(phase) for phase in residency.phases],
        "positions": list(residency.positions),
        "bytes": [list(row) for row in residency.bytes],
    }


def attach_pictures(item: pytest.Item, report: Any) -> None:
    """Put the pictures into the report of the item's call, as pytest-html reads it: plain data, which crosses processes."""
    if report.when != "call":
        return
    for name, picture in item.stash.get(_PICTURES, {}).items():
        extra = {"name": name, "format_type": "html", "content": picture, "mime_type": None, "extension": None}
        report.extras = [*getattr(report, "extras", []), extra]
