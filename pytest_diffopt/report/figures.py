"""The figures of a recipe as people read them: a title, a unit, and how a value is written, the same in every report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def seconds(value: float | None) -> str:
    """Seconds with three figures or fewer; ``-`` where they are not known."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def mebibytes(value: int | None) -> str:
    """Bytes in MiB."""
    return "-" if value is None else f"{value / 2**20:.1f}"


def gibibytes(value: int | None) -> str:
    """Bytes in GiB."""
    return "-" if value is None else f"{value / 2**30:.2f}"


def number(value: float | None) -> str:
    """A count, or a number with two figures."""
    return "-" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Figure:
    """One figure of a recipe.

    Attributes:
        name: in a row, see :func:`row_of`. title, unit: over its column; ``""`` of what has no unit.
        shown: how a value is written, without its unit.
        always: whether it has a column also where it is known of no recipe.
    """

    name: str
    title: str
    unit: str
    shown: Callable[[Any], str]
    always: bool = False

    @property
    def heading(self) -> str:
        """``"peak of a call (MiB)"``."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


FIGURES: tuple[Figure, ...] = (
    Figure("cold_seconds", "first call", "s", seconds, always=True),
    Figure("warm_seconds", "warm call", "s", seconds, always=True),
    Figure("load_peak_bytes", "peak of loading", "MiB", mebibytes),
    Figure("peak_bytes", "peak of a call", "MiB", mebibytes),
    Figure("h2d_bytes", "to the device", "MiB", mebibytes),
    Figure("d2h_bytes", "from the device", "MiB", mebibytes),
    Figure("host_syncs", "host syncs in a step", "", number),
    Figure("graphs", "graphs", "", number, always=True),
    Figure("breaks", "graph breaks", "", number, always=True),
    Figure("recompiles", "recompiles", "", number, always=True),
    Figure("required_tolerance", "required tolerance", "", number, always=True),
    Figure("forecast_bytes", "forecast peak", "GiB", gibibytes),
)


def figures_of(rows: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """The figures that get a column: all that are always told, and those that are known of any recipe."""
    known = list(rows)
    return [one for one in FIGURES if one.always or any(row.get(one.name) is not None for row in known)]
