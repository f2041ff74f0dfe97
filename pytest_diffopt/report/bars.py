"""Bars for reports: figures side by side, now and as recorded, and the distance that parity found against its tolerance.

SVG without scripts, as wide as the page, whose colours are those of the page that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from pytest_diffopt.byte_sizes import human, unit_of
from pytest_diffopt.report.figures import number
from pytest_diffopt.report.pictures import ticks

if TYPE_CHECKING:
    from pytest_diffopt.report.run import ComponentParity

WIDTH = 960
_LEFT, _RIGHT, _TOP = 230, 210, 34  # around the bars: names on their left, figures on their right
_BAR, _GAP, _BETWEEN = 14, 4, 14
_NAME_LENGTH = 32


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: what it measures. kind: its CSS class. value: its length; None where it is not known.
        recorded: the same as the baseline has it; None for none.
    """

    name: str
    kind: str
    value: float | None
    recorded: float | None = None


@dataclass(frozen=True)
class Group:
    """The bars of one recipe."""

    name: str
    bars: tuple[Bar, ...]


def memory_svg(title: str, groups: Sequence[Group]) -> str:
    """Bars of bytes; see :func:`bars_svg`."""
    highest = _highest(groups)
    unit, name = unit_of(int(highest))
    return bars_svg(title, groups, lambda value: human(int(value)), lambda at: f"{at:g} {name}" if at else "0", unit)


def seconds_svg(title: str, groups: Sequence[Group]) -> str:
    """Bars of seconds; see :func:`bars_svg`."""
    return bars_svg(title, groups, lambda value: f"{value:.3g} s", lambda at: f"{at:g} s" if at else "0", 1)


def bars_svg(
    title: str, groups: Sequence[Group], shown: Callable[[float], str], tick: Callable[[float], str], unit: int
) -> str:
    """Horizontal bars from nought, a group a recipe, each with its value on its right; what was recorded is an outline.

    Args:
        shown: how a value is written. tick: how a place on the axis is, in units. unit: values in one of them.
    """
    known = [(group, [bar for bar in group.bars if bar.value is not None]) for group in groups]
    known = [(group, bars) for group, bars in known if bars]
    top = max(_highest(groups), 1e-9) * 1.02
    height = _TOP + sum(len(bars) * (_BAR + _GAP) + _BETWEEN for _, bars in known) + 4
    lines = _opened(title, _described(known, shown), height)
    room = WIDTH - _LEFT - _RIGHT
    lines += _grid([(at * unit / top, tick(at)) for at in ticks(top / unit)], height)
    y = float(_TOP)
    for group, bars in known:
        middle = y + (len(bars) * (_BAR + _GAP) - _GAP) / 2
        lines.append(_text(_LEFT - 12, middle + 4, _short(group.name), "name", "end", group.name))
        for bar in bars:
            assert bar.value is not None
            label = shown(bar.value)
            if bar.recorded is not None:
                label += f", recorded {shown(bar.recorded)}"
            said = f"{group.name}, {bar.name}: {label}"
            width = max(room * bar.value / top, 1)
            lines += [
                f"<g><title>{_escaped(said)}</title>",
                f'<rect class="bar {bar.kind}" x="{_LEFT}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" rx="2"/>',
            ]
            furthest = bar.value
            if bar.recorded is not None:
                furthest = max(furthest, bar.recorded)
                lines.append(
                    f'<rect class="recorded" x="{_LEFT}" y="{y - 1:.1f}" width="{max(room * bar.recorded / top, 1):.1f}" '
                    f'height="{_BAR + 2}" rx="2"/>'
                )
            lines.append(f"{_text(_LEFT + room * furthest / top + 8, y + _BAR - 3, label, 'value')}</g>")
            y += _BAR + _GAP
        y += _BETWEEN
    return "\n".join([*lines, "</svg>"])


def parity_svg(title: str, parity: Sequence[ComponentParity]) -> str:
    """For each component how far its worst output is off, on a logarithmic scale, and a mark where the tolerance ends."""
    values = [value for one in parity for value in (one.required, one.allowed, one.floor) if 0 < value < math.inf]
    low = math.floor(math.log10(min(values, default=1e-3)) - 0.2)
    high = math.ceil(math.log10(max(values, default=1.0)) + 0.2)
    room = WIDTH - _LEFT - _RIGHT

    def x(value: float) -> float:
        if value <= 0:
            return _LEFT
        place = (math.log10(value) - low) / (high - low) if value < math.inf else 1.0
        return _LEFT + room * min(max(place, 0.0), 1.0)

    height = _TOP + len(parity) * (_BAR + _BETWEEN) + 4
    said = "; ".join(
        f"{one.component} is off by {number(one.required)}, {number(one.allowed)} allowed" for one in parity
    )
    lines = _opened(title, f"Distance of each component's worst output from the reference: {said}.", height)
    step = max(1, (high - low) // 6)
    lines += _grid([((at - low) / (high - low), f"1e{at}") for at in range(low, high + 1, step)], height)
    for place, one in enumerate(parity):
        y = _TOP + place * (_BAR + _BETWEEN)
        kind = "over" if one.excess > 1 else "within"
        label = f"{number(one.required)} of {number(one.allowed)} allowed"
        width = max(x(one.required) - _LEFT, 1)
        lines += [
            _text(_LEFT - 12, y + _BAR - 3, _short(one.component), "name", "end", one.component),
            f"<g><title>{_escaped(f'{one.component}: {label}, floor {number(one.floor)}')}</title>",
            f'<rect class="bar {kind}" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"/>',
            f'<line class="allowed" x1="{x(one.allowed):.1f}" x2="{x(one.allowed):.1f}" y1="{y - 4}" y2="{y + _BAR + 4}"/>',
            _text(WIDTH - _RIGHT + 8, y + _BAR - 3, label, "value"),
            "</g>",
        ]
    return "\n".join([*lines, "</svg>"])


def _highest(groups: Sequence[Group]) -> float:
    return max(
        (value for group in groups for bar in group.bars for value in (bar.value, bar.recorded) if value is not None),
        default=0.0,
    )


def _described(known: Sequence[tuple[Group, list[Bar]]], shown: Callable[[float], str]) -> str:
    said = [
        f"{group.name}: " + ", ".join(f"{bar.name} {shown(bar.value)}" for bar in bars if bar.value is not None)
        for group, bars in known
    ]
    return f"{'; '.join(said)}."


def _opened(title: str, description: str, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="bars" role="img" viewBox="0 0 {WIDTH} {height:.0f}">',
        f"<title>{_escaped(title)}</title>",
        f"<desc>{_escaped(description)}</desc>",
    ]


def _grid(places: Sequence[tuple[float, str]], height: float) -> list[str]:
    """Lines down at shares of the width, each with its label over it."""
    lines = []
    for share, label in places:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * share
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 10}" y2="{height:.0f}"/>')
        lines.append(_text(x, _TOP - 16, label, "tick", "middle"))
    return lines


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start", whole: str = "") -> str:
    title = f"<title>{_escaped(whole)}</title>" if whole and whole != text else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(text)}{title}</text>'


def _short(text: str) -> str:
    return text if len(text) <= _NAME_LENGTH else f"{text[: _NAME_LENGTH - 1]}\N{HORIZONTAL ELLIPSIS}"


def _escaped(text: str) -> str:
    return escape("".join(character for character in text if character >= " "))
