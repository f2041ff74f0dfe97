"""What pytest-html's page shows of a recipe beside its verdicts: pictures of its residency, as observed and as forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.observation.observation import Observation, Residency

_PICTURES = pytest.StashKey[dict[str, str]]()
"""Name → picture."""


def keep_picture(item: pytest.Item, observation: Observation, title: str) -> None:
    """Draw the residency of a recipe for the item's report, where pytest-html writes one and the device told it."""
    if observation.memory is not None:
        _keep(item, "residency", observation.memory.residency, title)


def keep_forecast_picture(item: pytest.Item, forecast: Forecast) -> None:
    """Draw the residency that was forecast, where pytest-html writes a report."""
    _keep(item, "forecast", forecast.residency, f"{forecast.recipe}, forecast of {forecast.model}")


def _keep(item: pytest.Item, name: str, residency: Residency | None, title: str) -> None:
    if not getattr(item.config.option, "htmlpath", None) or residency is None:
        return
    from pytest_diffopt.report.pictures import residency_svg

    item.stash.setdefault(_PICTURES, {})[name] = residency_svg(residency, title)


def attach_pictures(item: pytest.Item, report: Any) -> None:
    """Put the pictures into the report of the item's call, as pytest-html reads it: plain data, which crosses processes."""
    if report.when != "call":
        return
    for name, picture in item.stash.get(_PICTURES, {}).items():
        extra = {"name": name, "format_type": "html", "content": picture, "mime_type": None, "extension": None}
        report.extras = [*getattr(report, "extras", []), extra]
