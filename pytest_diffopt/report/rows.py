"""The rows of the table of recipes: plain data that crosses processes in a report's ``user_properties``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.observation.observation import Observation

RECIPE_PROPERTY = "diffopt_recipe"
"""Which recipe an item runs: ``{"source", "recipe", "check", "content"}``. It is there also where the item was skipped."""
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

_FILE = ".recipes.toml::"
_CHECK = re.compile(
    r"(?P<source>.*\.recipes\.toml::(?P<recipe>(?:(?!::).)+))::(?P<check>\w+)(?:@.*)?"  # xdist adds a group behind "@"
)


def recipe_of(nodeid: str) -> dict[str, str] | None:
    """What a check's node id says of it, as :data:`RECIPE_PROPERTY` does; None for any other test."""
    found = _CHECK.fullmatch(nodeid)
    return found.groupdict() if found else None


class KnownRecipes(dict[str, dict[str, str]]):
    """Node id → what :data:`RECIPE_PROPERTY` says of it, in a process that collects nothing itself: of a check its node id
    says enough, a test over a recipe is here once a worker of pytest-xdist has told of it."""

    def of(self, nodeid: str) -> dict[str, str] | None:
        """What is known of an item's recipe; None for a test without one."""
        return self.get(nodeid) or recipe_of(nodeid)


def about_of(item: pytest.Item) -> dict[str, str] | None:
    """What an item carries as :data:`RECIPE_PROPERTY`; None for a test without a recipe."""
    return next(
        (held for name, held in item.user_properties if name == RECIPE_PROPERTY and isinstance(held, dict)), None
    )


def source_of(item: pytest.Item) -> str:
    """Where the recipe of an item stands, as its rows say: a test over recipes stands for itself."""
    about = about_of(item)
    return about["source"] if about is not None else item.nodeid


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
        ``h2d_bytes``, ``d2h_bytes`` (of the last call), ``host_syncs`` (in a denoising step of it, the most), ``graphs``,
        ``breaks``, ``recompiles``, ``required_tolerance``,
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
        "host_syncs": None,
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
        if (syncs := observation.host_syncs) is not None and syncs.steps:
            row["host_syncs"] = max(syncs.per_step(len(syncs.steps) - 1), default=None)
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


def distinct_recipes(rows: Iterable[Mapping[str, Any]]) -> int:
    """How many recipes rows are of: a test over a recipe is not another one than the checks of it."""
    return len({(row["recipe"], row.get("content") or row["source"]) for row in rows})


def names_of(rows: Iterable[tuple[str, str]]) -> list[str]:
    """What tables and charts call rows, each a (source, recipe): a recipe by its name, where another has that too by where
    it stands, and a test over a recipe by its node id."""
    known = list(rows)
    counts = Counter(recipe for source, recipe in known if not _is_test(source))
    return [source if _is_test(source) or (source and counts[recipe] > 1) else recipe for source, recipe in known]


def _is_test(source: str) -> bool:
    return "::" in source and _FILE not in source


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


def is_skipped(statuses: Mapping[str, str]) -> bool:
    """Whether nothing of a recipe was run, so that it has no figures."""
    return bool(statuses) and set(statuses.values()) == {"skipped"}


def skipped_lines(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> list[str]:
    """The recipes that were skipped, a line for each reason.

    Args:
        reasons: source → why it was skipped.
    """
    found: dict[str, list[str]] = {}
    for name, row in zip(names_of((row["source"], row["recipe"]) for row in rows), rows, strict=True):
        if is_skipped(row["statuses"]):
            found.setdefault(reasons.get(row["source"], ""), []).append(name)
    return [f"{len(names)} skipped{f' ({why})' if why else ''}: {', '.join(names)}" for why, names in found.items()]
