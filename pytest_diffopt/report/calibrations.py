"""What calibrations say: a line a phase, what was forecast beside what was measured, and what to do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_diffopt.byte_sizes import human
from pytest_diffopt.report.forecasts import wrapped
from pytest_diffopt.report.tables import lines_of, new_table

if TYPE_CHECKING:
    from pytest_diffopt.forecasting.calibration import Calibration, Compared

_TITLES = ("phase", "in", "low", "expected", "high", "measured", "off", "")
_TEXTS = ("phase", "in", "")


def calibration_lines(calibration: Calibration, *, width: int, color: bool) -> list[str]:
    """The comparison in ``width`` columns."""
    from rich.text import Text

    forecast = calibration.forecast
    table = new_table()
    for title in _TITLES:
        table.add_column(title, justify="left" if title in _TEXTS else "right", overflow="fold")
    for one in calibration.compared:
        cells = _cells(one)
        table.add_row(*map(Text, cells[:-1]), Text(cells[-1], style="green" if one.inside else "bold red"))
    about = [
        calibration.recipe.name,
        forecast.model,
        ", ".join("×".join(map(str, size)) for size in forecast.sizes),
        f"{forecast.steps} steps",
        str(calibration.device["name"]),
        f"kernels of {forecast.generation}",
        f"{calibration.weights} in place of weights" if calibration.weights == "holes" else "real weights",
    ]
    lines = [*wrapped(" · ".join(about), width), "", *lines_of(table, width=width, color=color)]
    if calibration.measured.stopped:
        lines += [
            "",
            *wrapped(f"{calibration.recipe.name} did not run to its end: {calibration.measured.stopped}", width),
        ]
    if calibration.measured.beside_bytes:
        beside = human(calibration.measured.beside_bytes)
        lines += [
            "",
            *wrapped(f"Beside torch, {beside} were in use: the driver's, and those of other processes.", width),
        ]
    return [*lines, "", *wrapped(summary(calibration), width)]


def summary(calibration: Calibration) -> str:
    """How many ranges hold what was measured, and which is furthest off."""
    compared = calibration.compared
    if not compared:
        return f"{calibration.recipe.name}: nothing was measured."
    outside = [one for one in compared if not one.inside]
    if not outside:
        return f"{calibration.recipe.name}: all {len(compared)} forecasts hold what was measured."
    worst = max(outside, key=lambda one: abs(one.off))
    return (
        f"{calibration.recipe.name}: {len(outside)} of {len(compared)} forecasts do not hold what was measured; "
        f"{_where(worst)} is furthest off, {worst.off:+.1%} of what was expected."
    )


def _where(one: Compared) -> str:
    return f"{one.phase} of {one.component}" if one.component else one.phase


def _cells(one: Compared) -> tuple[str, ...]:
    within = "inside" if one.inside else "above" if one.measured > one.high else "below"
    component = one.component or ("the pipeline" if one.phase == "call" else "")
    figures = (one.low, one.expected, one.high, one.measured)
    return one.phase, component, *(f"{figure / 2**30:.4f}" for figure in figures), f"{one.off:+.1%}", within
