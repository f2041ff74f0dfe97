"""Pictures for reports: self-contained SVG text, without scripts, legible on light and on dark pages."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from pytest_diffopt.byte_sizes import human, unit_of

if TYPE_CHECKING:
    from pytest_diffopt.observation.observation import Owner, PhaseResidency, Residency


@dataclass(frozen=True)
class Layout:
    """Where the parts of a picture stand, in its own units.

    Attributes:
        width, height: of the picture, without a legend that stands below.
        left, right, top, bottom: around the plot.
        legend_below: whether the legend stands below the plot, and not on its right.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    legend_below: bool = False

    @property
    def longest_line(self) -> int:
        """Characters of the title that have room."""
        return self.width // 9


WIDTH, HEIGHT = 960, 400
_WIDE = Layout(WIDTH, HEIGHT, left=72, right=300, top=92, bottom=36)
_NARROW = Layout(340, 300, left=66, right=10, top=108, bottom=36, legend_below=True)
_LEGEND_STEP = 20.0
_HEADROOM = 1.12  # for what is written over the peak
_NEAR = 2.0  # a limit further off than so many times the highest would flatten the picture
_NO_LIMITS: Mapping[str, int] = MappingProxyType({})

# Okabe and Ito's, told apart by colour-blind readers too
_HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#9a8f00", "#7a5cc7")
_GREY = {"other": "#8c959f", "before": "#57606a"}
_WORKING_OPACITY = 0.5

# Below a class: in a page that holds the picture itself, its rules are the page's too
_STYLE = """
.residency text { font: 12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328; }
.residency .title { font-size: 16px; font-weight: 600; }
.residency .quiet { fill: #59636e; }
.residency .page { fill: #ffffff; }
.residency .over { paint-order: stroke; stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; }
.residency .grid { stroke: #d1d9e0; }
.residency .phase { stroke: #818b98; stroke-dasharray: 3 3; }
.residency .limit { stroke: #cf222e; stroke-width: 1.5; stroke-dasharray: 8 4; }
.residency .mark { fill: #ffffff; stroke: #1f2328; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
.residency text { fill: #f0f6fc; }
.residency .quiet { fill: #9198a1; }
.residency .page { fill: #0d1117; }
.residency .over { stroke: #0d1117; }
.residency .grid { stroke: #3d444d; }
.residency .phase { stroke: #656c76; }
.residency .limit { stroke: #f85149; }
.residency .mark { fill: #0d1117; stroke: #f0f6fc; }
}
"""


# Of a picture that is there twice; 11 of 12 pixels of its text are left where a phone has least room
_PAIR_STYLE = """
.residency.narrow { display: none; min-width: 312px; }
@media (max-width: 640px) {
.residency.wide { display: none; }
.residency.narrow { display: block; }
}
"""


def residency_svg(residency: Residency, title: str, limits: Mapping[str, int] = _NO_LIMITS) -> str:
    """Whose bytes were on the accelerator, over time, as an SVG picture of 960 by 400.

    Stacked areas, one an owner, from left to right as blocks of memory came and went; the legend has what each held at the
    highest peak. A component's working memory is a lighter shade of its weights' colour.

    Args:
        limits: name → bytes, each a line across; one that is more than twice as high as anything else has none.
    """
    return _drawn(residency, title, limits, _WIDE)


def residency_pictures(residency: Residency, title: str) -> str:
    """The picture for a page, which is there twice: for a screen, and for a phone, of which one is shown."""
    return _drawn(residency, title, _NO_LIMITS, _WIDE, paired=True) + _drawn(
        residency, title, _NO_LIMITS, _NARROW, paired=True
    )


def _drawn(residency: Residency, title: str, limits: Mapping[str, int], layout: Layout, *, paired: bool = False) -> str:
    peak = max(residency.phases, key=lambda phase: phase.peak_bytes, default=None)
    at_peak = residency.at(peak.peak_at) if peak is not None else {}
    highest = max([*map(sum, residency.bytes), 1])
    unit, name = unit_of(highest)
    near = {named: count for named, count in limits.items() if count <= highest * _NEAR}
    plot = _Plot(residency, max([highest, *near.values()]) * _HEADROOM, layout)
    colours = _colours(residency.owners)
    legend, height = _legend(residency.owners, colours, at_peak, layout)
    kind = f" {'narrow' if layout.legend_below else 'wide'}" if paired else ""
    box = f"0 0 {layout.width} {height:.0f}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="residency{kind}" role="img" viewBox="{box}">',
        f"<title>{_text(title)}</title>",
        f"<desc>{_text(described(residency, limits))}</desc>",
        f"<style>{_STYLE}{_PAIR_STYLE if paired else ''}</style>" if layout is _WIDE else "",
        f'<rect class="page" width="{layout.width}" height="{height:.0f}" rx="6"/>',
        f'<text class="title" x="20" y="30">{_text(_short(title, layout.longest_line))}</text>',
    ]
    if peak is not None:
        said = [f"peak {human(peak.peak_bytes)} in {peak.phase}", _doing(peak)]
        for row, line in enumerate(said if layout.legend_below else ["".join(said)]):
            line = _short(line.removeprefix(", "), layout.longest_line * 3 // 2)
            lines.append(f'<text class="quiet" x="20" y="{51 + 17 * row}">{_text(line)}</text>')
    lines += plot.axis(unit, name)
    lines += _areas(plot, residency, colours, layout, paired=paired)
    lines += plot.phases() + plot.limits(near)
    if peak is not None:
        x, y = plot.x(peak.peak_at), plot.y(peak.peak_bytes)
        anchor = "start" if x < layout.left + 100 else "end" if x > plot.right - 100 else "middle"
        label = _short(
            " ".join(filter(None, (human(peak.peak_bytes), peak.operation))), 26 if layout.legend_below else 36
        )
        lines.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        lines.append(f'<text class="over" x="{x:.1f}" y="{y - 9:.1f}" text-anchor="{anchor}">{_text(label)}</text>')
    lines += legend
    return "\n".join([*filter(None, lines), "</svg>", ""])


def _areas(
    plot: _Plot, residency: Residency, colours: dict[Owner, tuple[str, float]], layout: Layout, *, paired: bool
) -> list[str]:
    """The stacked areas; the narrow one of a pair shows those of the wide one, as they are most of a page's bytes."""
    wide = plot if layout is _WIDE else _Plot(residency, plot.top_bytes, _WIDE)
    drawn = []
    for owner, path in zip(residency.owners, wide.areas(), strict=True):
        fill, opacity = colours[owner]
        drawn.append(f'<path d="{path}" fill="{fill}" fill-opacity="{opacity}"/>')
    if not paired:
        return drawn
    name = f"residency-{hashlib.sha256(''.join(drawn).encode()).hexdigest()[:12]}"
    if layout is _WIDE:
        return [f'<g id="{name}">', *drawn, "</g>"]
    across = (plot.right - layout.left) / (wide.right - _WIDE.left)
    down = (plot.bottom - layout.top) / (wide.bottom - _WIDE.top)
    x, y = layout.left - across * _WIDE.left, layout.top - down * _WIDE.top
    return [f'<use href="#{name}" transform="translate({x:.3f} {y:.3f}) scale({across:.5f} {down:.5f})"/>']


def described(residency: Residency, limits: Mapping[str, int] = _NO_LIMITS) -> str:
    """The picture in words, for those who do not see it."""
    if not residency.phases:
        return "Nothing was recorded."
    peaks = [f"{phase.phase} peaks at {human(phase.peak_bytes)}{_doing(phase)}" for phase in residency.phases]
    held = [f"; {named} has {human(count)}" for named, count in limits.items()]
    return f"Memory on the accelerator over time, by owner: {'; '.join(peaks)}{''.join(held)}."


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to at most ``highest``, four to nine of them."""
    rough = highest / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * count for count in range(int(highest / step + 1e-9) + 1)]


class _Plot:
    """Where things stand."""

    def __init__(self, residency: Residency, top_bytes: float, layout: Layout) -> None:
        self.residency = residency
        self.layout = layout
        self.top_bytes = top_bytes
        self.end = max(residency.positions[-1] if residency.positions else 0, 1)
        self.right, self.bottom = layout.width - layout.right, layout.height - layout.bottom

    def x(self, position: int) -> float:
        return self.layout.left + (self.right - self.layout.left) * position / self.end

    def y(self, count: float) -> float:
        return self.bottom - (self.bottom - self.layout.top) * count / self.top_bytes

    def axis(self, unit: int, name: str) -> list[str]:
        lines = []
        values = ticks(self.top_bytes / unit)
        for value in values[:: 2 if self.layout.legend_below and len(values) > 5 else 1]:
            y = self.y(value * unit)
            label = f"{value:g} {name}" if value else "0"
            lines.append(f'<line class="grid" x1="{self.layout.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(
                f'<text class="quiet" x="{self.layout.left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
            )
        caption, y = "blocks of memory that came and went \N{RIGHTWARDS ARROW}", self.layout.height - 14
        lines.append(f'<text class="quiet" x="{self.right}" y="{y}" text-anchor="end">{caption}</text>')
        return lines

    def areas(self) -> list[str]:
        """A path an owner, each on top of the ones before it; memory changes in steps."""
        xs = [self.x(position) for position in self.residency.positions]
        floor = [0] * len(xs)
        back = _steps(xs, [self.y(0)] * len(xs))
        zero, height = self.y(0), self.y(0) - self.y(1)
        paths = []
        for column in range(len(self.residency.owners)):
            top = [below + row[column] for below, row in zip(floor, self.residency.bytes, strict=True)]
            there = _steps(xs, [zero - height * count for count in top])
            paths.append("M" + "L".join(there + back[::-1]) + "Z")
            floor, back = top, there
        return paths

    def phases(self) -> list[str]:
        """A line at each boundary, and each name over its stretch, shortened to what has room."""
        lines = []
        edges = sorted({at for phase in self.residency.phases for at in (phase.first, phase.last)})
        for at in edges:
            x = self.x(at)
            lines.append(
                f'<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{self.layout.top - 8}" y2="{self.bottom}"/>'
            )
        for phase in self.residency.phases:
            left, right = self.x(phase.first), self.x(phase.last)
            room = int((right - left) / 6.8)
            x, anchor = (left + right) / 2, "middle"
            if phase.first == 0 and phase.last and room < len(phase.phase):  # the first has room on its left
                x, anchor, room = right, "end", int((right - 8) / 6.8)
            if shown := _short(phase.phase, room):
                lines.append(
                    f'<text x="{x:.1f}" y="{self.layout.top - 14}" text-anchor="{anchor}">{_text(shown)}</text>'
                )
        return lines

    def limits(self, limits: Mapping[str, int]) -> list[str]:
        """A line across at each, with its name on the left; names of close ones stand one over the other."""
        lines, above = [], float("inf")
        for named, count in sorted(limits.items(), key=lambda item: item[1]):
            y = self.y(count)
            above = min(y - 5, above - 14)
            label = _short(f"{named}, {human(count)}", 40)
            lines += [
                f'<line class="limit" x1="{self.layout.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>',
                f'<text class="over" x="{self.layout.left + 4}" y="{above:.1f}">{_text(label)}</text>',
            ]
        return lines


def _steps(xs: Sequence[float], ys: Sequence[float]) -> list[str]:
    """The corners of a line that changes in steps, as a path writes them; none where nothing changes that can be seen."""
    corners: list[str] = []
    before = None
    for x, y in zip(xs, ys, strict=True):
        level = round(10 * y)  # a tenth is the least that is written
        if level != before:
            corners += [f"{x:.1f} {one / 10:.1f}" for one in (before, level) if one is not None]
            before = level
    return [*corners, f"{xs[-1]:.1f} {before / 10:.1f}"] if before is not None else []


def _colours(owners: Sequence[Owner]) -> dict[Owner, tuple[str, float]]:
    """Owner → (colour, opacity): one hue a component."""
    components = sorted({owner.component for owner in owners if owner.component})  # so that pictures agree
    hues = {component: _HUES[at % len(_HUES)] for at, component in enumerate(components)}
    return {
        owner: (
            hues.get(owner.component) or _GREY.get(owner.kind, _GREY["other"]),
            _WORKING_OPACITY if owner.kind == "working" else 1.0,
        )
        for owner in owners
    }


def _legend(
    owners: Sequence[Owner], colours: dict[Owner, tuple[str, float]], at_peak: dict[Owner, int], layout: Layout
) -> tuple[list[str], float]:
    """(from the top of the stack down, with what each held at the peak; the height of the picture with it)."""
    right = layout.width - 20
    if layout.legend_below:
        left, top, step = 20, layout.height + 22, _LEGEND_STEP
        height = top + len(owners) * step + 16
    else:
        left, top, height = layout.width - layout.right + 24, layout.top, layout.height
        step = min(_LEGEND_STEP, (layout.height - top - 16) / max(len(owners), 1))
    lines = [f'<text class="quiet" x="{right}" y="{top - 14}" text-anchor="end">at the peak</text>']
    for row, owner in enumerate(reversed(owners)):
        y = top + 8 + row * step
        fill, opacity = colours[owner]
        lines += [
            f'<rect x="{left}" y="{y - 10:.1f}" width="12" height="12" rx="2" fill="{fill}" fill-opacity="{opacity}"/>',
            f'<text x="{left + 20}" y="{y:.1f}">{_text(_short(str(owner), 26))}</text>',
            f'<text x="{right}" y="{y:.1f}" text-anchor="end">{human(at_peak.get(owner, 0))}</text>',
        ]
    return lines, height


def _doing(phase: PhaseResidency) -> str:
    if not phase.operation:
        return ""
    return f", while {phase.component or 'the pipeline'} ran {phase.operation}"


def _short(text: str, length: int) -> str:
    """At most so many characters; nothing where not even five have room."""
    if len(text) <= length:
        return text
    return f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}" if length >= 5 else ""


def _text(text: str) -> str:
    """Escaped, without the characters that XML cannot hold."""
    return escape("".join(character for character in text if character >= " "))
