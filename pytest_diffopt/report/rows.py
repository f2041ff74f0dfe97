"""The rows of the table of recipes: plain data that crosses processes in a report's ``user_properties``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.observation.observation import Observation

RECIPE_PROPERTY = "diffopt_recipe"
"""Which recipe an item runs: ``{"source", "recipe", "check"}``. It is there also where the item was skipped."""
VERDICT_PROPERTY = "diffopt_verdict"
"""A verdict, as :meth:`Verdict.to_dict` makes it."""
ROW_PROPERTY = "diffopt_row"
"""What :func:`row_of` makes."""
RECORD_PROPERTY = "diffopt_record"
"""What a baseline keeps of a recipe, of the first check of a recipe in a process: ``{"file", "name", "key", "record"}``.
That of the check ``baseline`` has the measured figures too."""
RESIDENCY_PROPERTY = "diffopt_residency"
"""Whose bytes were on the accelerator over time, where a report asks for it: kind (``observed``, ``forecast``) → a `Residency`
as plain data."""

Row = dict[str, Any]

_CHECK = re.compile(
    r"(?P<source>.*\.recipes\.toml::(?P<recipe>(?:(?!::).)+))::(?P<check>\w+)(?:@.*)?"  # xdist adds a group behind "@"
)


def recipe_of(nodeid: str) -> dict[str, str] | None:
    """What a check's node id says of it, as :data:`RECIPE_PROPERTY` does; None for any other test."""
    found = _CHECK.fullmatch(nodeid)
    return found.groupdict() if found else None


def source_of(item: pytest.Item) -> str:
    """The file of a test, as its node id writes it."""
    return item.nodeid.partition("::")[0]


def row_of(
    observation: Observation | None,
    verdicts: Sequence[Verdict] = (),
    *,
    source: str = "",
    recipe: str = "",
    forecast: Forecast | None = None,
) -> Row:
    """The figures of one recipe, plain data; what is not known is None.

    Args:
        observation: of the recipe; None where there is none.
        verdicts: those known, of the same recipe.
        source: where the recipe stands, so that equal names in two files stay apart.
        recipe: its name, where neither an observation nor a verdict has it.
        forecast: of the recipe with a full-size model; None where there is none.

    Returns:
        ``recipe``, ``source``, ``cold_seconds``, ``warm_seconds``, ``load_peak_bytes``, ``peak_bytes`` (of the calls),
        ``h2d_bytes``, ``d2h_bytes`` (of the last call), ``graphs``, ``breaks``, ``recompiles``, ``required_tolerance``,
        ``forecast_bytes``, ``forecast_low_bytes``, ``forecast_high_bytes`` (the peak as forecast), ``forecast_model``, and
        ``statuses``: check → status.
    """
    recipe = observation.name if observation is not None else next((v.recipe for v in verdicts), recipe)
    required = (v.figures.get("required") for v in verdicts if v.check == "parity")
    row: Row = {
        "recipe": recipe,
        "source": source,
        "cold_seconds": None,
        "warm_seconds": None,
        "load_peak_bytes": None,
        "peak_bytes": None,
        "h2d_bytes": None,
        "d2h_bytes": None,
        "graphs": None,
        "breaks": None,
        "recompiles": None,
        "required_tolerance": next((value for value in required if isinstance(value, int | float)), None),
        "forecast_bytes": None,
        "forecast_low_bytes": None,
        "forecast_high_bytes": None,
        "forecast_model": None,
        "statuses": {verdict.check: verdict.status for verdict in verdicts},
    }
    if observation is not None:
        calls = [call for call in observation.calls if call.kind == "call"]
        row |= {
            "cold_seconds": calls[0].seconds if calls else None,
            "warm_seconds": calls[-1].seconds if len(calls) > 1 else None,
            "peak_bytes": observation.peak_bytes if calls else None,
            "graphs": observation.compiles.graphs,
            "breaks": len(observation.compiles.graph_breaks),
            "recompiles": len(observation.compiles.recompiles),
        }
        if (memory := observation.memory) is not None:
            row["load_peak_bytes"] = memory.load_peak_bytes - memory.before_bytes
            if (transferred := memory.transferred_bytes) is not None:
                row["h2d_bytes"], row["d2h_bytes"] = transferred
    if forecast is not None:
        row |= {
            "forecast_bytes": forecast.peak.expected,
            "forecast_low_bytes": forecast.peak.low,
            "forecast_high_bytes": forecast.peak.high,
            "forecast_model": forecast.model,
        }
    return row


def merged(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row a recipe, in the order in which they came; later figures only fill what was not known."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        kept = found.setdefault((row["source"], row["recipe"]), {**row, "statuses": {}})
        kept["statuses"] = {**kept["statuses"], **row["statuses"]}
        for key, value in row.items():
            if kept.get(key) is None:
                kept[key] = value
    return list(found.values())


_WORDS = ("failed", "unverified", "skipped", "known", "passed")


def verdict_text(statuses: Mapping[str, str]) -> str:
    """All verdicts of a recipe in a few words, the worst first: ``"1 failed: recompiles, 1 known: memory, 5 passed"``."""
    parts = []
    for word in _WORDS:
        checks = [check for check, status in statuses.items() if status == word]
        if checks:
            parts.append(f"{len(checks)} {word}" + ("" if word == "passed" else f": {' '.join(checks)}"))
    return ", ".join(parts) or "no verdict"


def worst(statuses: Mapping[str, str]) -> str:
    """The status that speaks for the recipe: one of failed, unverified, skipped, known, passed; ``""`` where there is none."""
    return next((word for word in _WORDS if word in statuses.values()), "")
