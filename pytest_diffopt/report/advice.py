"""What advice says: a table, a row a rung, and below it what failed, what was left out, and which rung to take."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_diffopt.byte_sizes import human
from pytest_diffopt.report.forecasts import failure_lines, wrapped
from pytest_diffopt.report.tables import GAP, Column, fitting, lines_of, new_table, room, widths

if TYPE_CHECKING:
    from pytest_diffopt.forecasting.advice import Advice, Rung
    from pytest_diffopt.forecasting.record import Forecast

_GIB = 2**30
_COLORS = {"fits": "green", "may fit": "yellow", "does not fit": "red"}
_WIDE = 0.01  # a range is shown where it is wider than this part of what is expected


def _figure(say: Callable[[Forecast], str]) -> Callable[[Rung], str]:
    def shown(rung: Rung) -> str:
        return "" if rung.forecast is None else say(rung.forecast)

    return shown


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f}"


def _range(forecast: Forecast) -> str:
    peak = forecast.peak
    return f"{_gib(peak.low)}–{_gib(peak.high)}" if peak.high - peak.low > _WIDE * peak.expected else ""


def _peak(rung: Rung) -> str:
    return "failed" if rung.forecast is None else _gib(rung.forecast.peak.expected)


_WORDS: Column[Rung] = ("what it does", lambda rung: rung.words)
_PEAK: Column[Rung] = ("peak", _peak)
_RANGE: Column[Rung] = ("range", _figure(_range))
_WHERE: Column[Rung] = ("in", _figure(lambda one: one.peak_component))
_RESERVED: Column[Rung] = ("reserved", _figure(lambda one: _gib(one.reserved.expected)))
_HOST: Column[Rung] = ("host RAM", _figure(lambda one: _gib(one.host_bytes)))
_MOVED: Column[Rung] = ("moved a step", lambda rung: _gib(rung.cost.step_bytes) if rung.cost is not None else "")
_FITS: Column[Rung] = ("fits", lambda rung: rung.fit or "")
_COLUMNS = (_WORDS, _PEAK, _RANGE, _WHERE, _RESERVED, _HOST, _MOVED, _FITS)
_TEXTS = ("rung", "what it does", "in", "fits")
_LEAST_TELLING = (_HOST, _WHERE, _RANGE, _RESERVED, _WORDS)


def asked(advice: Advice) -> str:
    """What was asked for: ``"16.00 GiB"``, ``"rtx-4090"``, or both."""
    budget = human(advice.budget_bytes) if advice.budget_bytes is not None else None
    return " and ".join(filter(None, [budget, advice.gpu]))


def advice_lines(advice: Advice, *, width: int, color: bool) -> list[str]:
    """The ladder in ``width`` columns, the rung that costs least first; ``>`` is the first that surely fits."""
    from rich.text import Text

    names = [("> " if rung is advice.best else "  ") + rung.name for rung in advice.rungs]
    names_width = max(map(len, ["  rung", *names]))
    columns = fitting(_COLUMNS, advice.rungs, width - names_width - GAP, _LEAST_TELLING)
    needs = [names_width, *(room(column, advice.rungs) - GAP for column in columns)]
    wishes = [max([len(title), *(len(shown(rung)) for rung in advice.rungs)]) for title, shown in columns]
    table = new_table()
    for (title, _), wide in zip(
        [("  rung", _peak), *columns], widths(needs, [names_width, *wishes], width), strict=True
    ):
        table.add_column(title, justify="left" if title.strip() in _TEXTS else "right", width=wide, overflow="fold")
    for name, rung in zip(names, advice.rungs, strict=True):
        bold = "bold" if rung is advice.best else ""
        cells = [Text(name, style=bold)]
        for title, shown in columns:
            style = _COLORS.get(rung.fit or "", "") if title == "fits" else "bold red" if not rung.forecast else ""
            cells.append(Text(shown(rung), style=style or bold))
        table.add_row(*cells)
    lines = [*wrapped(_caption(advice), width), "", *lines_of(table, width=width, color=color)]
    for rung in advice.rungs:
        if rung.failure:
            lines += ["", *failure_lines(rung.name, rung.failure, width)]
    lines += ["", *wrapped(verdict(advice), width)]
    if advice.left_out:
        lines += ["", "left out"]
        for why, these in itertools.groupby(sorted(advice.left_out, key=lambda one: one.why), lambda one: one.why):
            lines += wrapped(f"{', '.join(one.name for one in these)}: {why}", width, "  ", "    ")
    return lines


def verdict(advice: Advice) -> str:
    """Which rung to take, and why it is not for nothing."""
    best = advice.best
    if best is not None and best.cost is not None:
        return f"{best.name} is the first that surely fits {asked(advice)}. What it costs: {best.cost.why}."
    may = [rung.name for rung in advice.rungs if rung.fit == "may fit"]
    if may:
        return f"No rung is sure to fit {asked(advice)}; {', '.join(may)} may."
    least = min(
        (rung for rung in advice.rungs if rung.forecast is not None),
        key=lambda rung: rung.forecast.peak.low if rung.forecast is not None else 0,
        default=None,
    )
    if least is None or least.forecast is None:
        return "No rung could be forecast."
    return f"No rung fits {asked(advice)}; {least.name} takes least, {least.forecast.peak}."


def _caption(advice: Advice) -> str:
    first = next((rung.forecast for rung in advice.rungs if rung.forecast is not None), None)
    sizes = ", ".join(dict.fromkeys("×".join(map(str, size)) for size in first.sizes)) if first is not None else ""
    wanted = f"to fit {asked(advice)}" if asked(advice) else ""
    about = [advice.model, sizes, f"{advice.steps} step{'s' * (advice.steps != 1)}", wanted]
    return " · ".join(filter(None, ["Memory in GiB, forecast without a GPU, the fastest recipe first", *about]))
