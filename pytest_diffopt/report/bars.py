"""Bars for reports: figures side by side, now and as recorded, and the distance that parity found against its tolerance.

SVG without scripts, whose colours are those of the page that holds it. It has no scale of its own: bars are parts of the
page's width and text is as large as the page says, so that a phone shows the same picture.
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

_ROOM = 40.0  # per cent of the width that the longest bar takes: a phone has the rest for its figure
_TOP, _NAME = 34, 20  # above all bars, and above those of a name
_BAR, _GAP, _BETWEEN = 14, 4, 14
_NAME_LENGTH = 48
_MOST_TICKS = 5


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
    height = _TOP + sum(_NAME + len(bars) * (_BAR + _GAP) + _BETWEEN for _, bars in known) + 4
    lines = _opened(title, _described(known, shown), height)
    lines += _grid([(at * unit / top, tick(at)) for at in ticks(top / unit)], height)
    y = float(_TOP)
    for group, bars in known:
        lines.append(_text(0, y + _BAR - 3, _short(group.name), "name", whole=group.name))
        y += _NAME
        for bar in bars:
            assert bar.value is not None
            label = shown(bar.value)
            said = f"{group.name}, {bar.name}: {label}"
            if bar.recorded is not None:
                label += f", was {shown(bar.recorded)}"
                said += f", recorded {shown(bar.recorded)}"
            lines += [
                f"<g><title>{_escaped(said)}</title>",
                f'<rect class="bar {bar.kind}" x="0" y="{y:.1f}" width="{_share(bar.value / top)}" height="{_BAR}" rx="2"/>',
            ]
            furthest = bar.value
            if bar.recorded is not None:
                furthest = max(furthest, bar.recorded)
                lines.append(
                    f'<rect class="recorded" x="0" y="{y - 1:.1f}" width="{_share(bar.recorded / top)}" '
                    f'height="{_BAR + 2}" rx="2"/>'
                )
            lines.append(f"{_text(furthest / top, y + _BAR - 3, label, 'value', dx=8)}</g>")
            y += _BAR + _GAP
        y += _BETWEEN
    return "\n".join([*lines, "</svg>"])


def parity_svg(title: str, parity: Sequence[ComponentParity]) -> str:
    """For each component how far its worst output is off, on a logarithmic scale, and a mark where the tolerance ends."""
    values = [value for one in parity for value in (one.required, one.allowed, one.floor) if 0 < value < math.inf]
    low = math.floor(math.log10(min(values, default=1e-3)) - 0.2)
    high = math.ceil(math.log10(max(values, default=1.0)) + 0.2)

    def share(value: float) -> float:
        if value <= 0:
            return 0.0
        place = (math.log10(value) - low) / (high - low) if value < math.inf else 1.0
        return min(max(place, 0.0), 1.0)

    height = _TOP + len(parity) * (_NAME + _BAR + _BETWEEN) + 4
    said = "; ".join(
        f"{one.component} is off by {number(one.required)}, {number(one.allowed)} allowed" for one in parity
    )
    lines = _opened(title, f"Distance of each component's worst output from the reference: {said}.", height)
    lines += _grid([((at - low) / (high - low), f"1e{at}") for at in range(low, high + 1)], height)
    for place, one in enumerate(parity):
        y = _TOP + place * (_NAME + _BAR + _BETWEEN)
        kind = "over" if one.excess > 1 else "within"
        label = f"{number(one.required)} of {number(one.allowed)} allowed"
        end = f"{_ROOM * share(one.allowed):.2f}%"
        lines.append(_text(0, y + _BAR - 3, _short(one.component), "name", whole=one.component))
        y += _NAME
        lines += [
            f"<g><title>{_escaped(f'{one.component}: {label}, floor {number(one.floor)}')}</title>",
            f'<rect class="bar {kind}" x="0" y="{y}" width="{_share(share(one.required))}" height="{_BAR}" rx="2"/>',
            f'<line class="allowed" x1="{end}" x2="{end}" y1="{y - 4}" y2="{y + _BAR + 4}"/>',
            _text(1, y + _BAR - 3, label, "value", dx=8),
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
        f'<svg xmlns="http://www.w3.org/2000/svg" class="bars" role="img" style="height: {height:.0f}px">',
        f"<title>{_escaped(title)}</title>",
        f"<desc>{_escaped(description)}</desc>",
    ]


def _grid(places: Sequence[tuple[float, str]], height: float) -> list[str]:
    """Lines down at shares of the longest bar, each with its label over it, of those between the ends where there is room."""
    lines = []
    kept = places[:: math.ceil(len(places) / _MOST_TICKS)]
    for place, (share, label) in enumerate(kept):
        x = f"{_ROOM * share:.2f}%"
        lines.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP - 10}" y2="{height:.0f}"/>')
        kind = "tick" if place in (0, len(kept) - 1) else "tick between"
        lines.append(_text(share, _TOP - 16, label, kind, "middle" if place else "start"))
    return lines


def _share(of_longest: float) -> str:
    """A width: at least a pixel of a bar is seen, on a phone too."""
    return f"{max(_ROOM * of_longest, 0.32):.2f}%"


def _text(share: float, y: float, text: str, kind: str, anchor: str = "start", *, dx: int = 0, whole: str = "") -> str:
    title = f"<title>{_escaped(whole)}</title>" if whole and whole != text else ""
    place = f'x="{_ROOM * share:.2f}%" y="{y:.1f}"' + (f' dx="{dx}"' if dx else "")
    return f'<text class="{kind}" {place} text-anchor="{anchor}">{_escaped(text)}{title}</text>'


def _short(text: str) -> str:
    """The end of a long name, from where a word begins: what names begin with they have in common."""
    if len(text) <= _NAME_LENGTH:
        return text
    end = text[len(text) - _NAME_LENGTH + 1 :]
    start = next((at + 1 for at, character in enumerate(end[:-1]) if not character.isalnum()), 0)
    return f"\N{HORIZONTAL ELLIPSIS}{end[start:]}"


def _escaped(text: str) -> str:
    return escape("".join(character for character in text if character >= " "))
