"""What forecasts say: the table, the details of one, JSON and pictures; pure functions of what was forecast."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.byte_sizes import human
from pytest_diffopt.report.tables import GAP, Column, fitting, folded, lines_of, new_table, room, widths

if TYPE_CHECKING:
    from pytest_diffopt.accelerators.gpus import Card
    from pytest_diffopt.forecasting.record import Estimate, Fit, Forecast

SCHEMA_VERSION = 1
"""Of the JSON document, which holds forecasts of a schema version of their own."""

ANY_CARD = ""
"""In :attr:`Row.forecasts`, where no card was named."""

_GIB = 2**30
_NAME_WIDTH, _LEAST_NAME_WIDTH = 32, 8  # columns of a recipe's name
_WIDE = 0.01  # a range is shown where it is wider than this part of what is expected
_TENSORS_SHOWN = 12
_COLORS = {"fits": "green", "may fit": "yellow", "does not fit": "red"}
_WORDS: dict[Fit, str] = {"fits": "fits", "may fit": "may fit", "does not fit": "does not fit"}
_SHORT_WORDS: dict[Fit, str] = {**_WORDS, "does not fit": "no"}  # where the others have no room
_SHORT_TITLE = 10  # a title of fewer characters is kept in one line


@dataclass(frozen=True)
class Row:
    """A recipe with a model, and what came of it.

    Attributes:
        recipe, model: their names.
        forecasts: name of a card → the forecast with its kernels; :data:`ANY_CARD` → the one for none in particular.
        failure: why there are none, a sentence; then where, a line each.
    """

    recipe: str
    model: str
    forecasts: Mapping[str, Forecast] = field(default_factory=dict)
    failure: str = ""

    @property
    def shown(self) -> Forecast | None:
        """The forecast whose figures stand for all: the one that takes most."""
        return max(self.forecasts.values(), key=lambda one: one.peak.expected, default=None)

    @property
    def distinct(self) -> list[Forecast]:
        """The forecasts, those with the kernels of one generation once."""
        first: dict[str, Forecast] = {}
        for one in self.forecasts.values():
            first.setdefault(one.generation, one)
        return list(first.values())

    @property
    def title(self) -> str:
        """``"recipe · model"``."""
        return f"{self.recipe} · {self.model}"


@dataclass(frozen=True)
class Target:
    """Memory that a recipe may fit, a column of the table.

    Attributes:
        title: of the column.
        cards: one, or all known ones of a size: then "fits" is all of them, and "does not fit" none.
        budget_bytes: that torch's peak is to stay within; None for cards.
        required: the user named it: what is not sure to fit fails.
    """

    title: str
    cards: tuple[Card, ...] = ()
    budget_bytes: int | None = None
    required: bool = False

    def fit(self, row: Row) -> Fit | None:
        """Whether a row fits; None where it has no forecast."""
        if self.budget_bytes is not None:
            found = {one.within(self.budget_bytes) for one in row.forecasts.values()}
        else:
            found = {
                forecast.fit(card)
                for card in self.cards
                if (forecast := row.forecasts.get(card.name) or row.forecasts.get(ANY_CARD)) is not None
            }
        return next(iter(found)) if len(found) == 1 else "may fit" if found else None


def missed(rows: Sequence[Row], targets: Sequence[Target]) -> list[str]:
    """A sentence for each recipe that is not sure to fit something required; none where all are."""
    sentences = []
    for row, target in itertools.product(rows, targets):
        fit = target.fit(row)
        if not target.required or fit is None or fit == "fits":
            continue
        sure = f"{fit} {target.title}" if fit == "does not fit" else f"is not sure to fit {target.title}"
        sentences.append(f"{row.title} {sure}: {_why(row, target)}")
    return sentences


def _why(row: Row, target: Target) -> str:
    ranges = [one.peak for one in row.forecasts.values()]
    low, high = min(one.low for one in ranges), max(one.high for one in ranges)
    peak = f"its peak is {human(low)}" + (f" to {human(high)}" if high > low else "")
    unknown = sum(len(one.unknown) for one in row.distinct)
    beside = f", and {unknown} thing{'s' * (unknown > 1)} that --details names could not be known" if unknown else ""
    if target.budget_bytes is not None:
        more = high - target.budget_bytes
        beyond = f" ({more} bytes more)" if more > 0 and human(high) == human(target.budget_bytes) else ""
        return f"{peak}{beyond}, {human(target.budget_bytes)} allowed{beside}."
    reserved = max(one.reserved.high for one in row.forecasts.values())
    total = min(card.total_bytes for card in target.cards)
    return f"{peak}, up to {human(reserved)} reserved, and CUDA's own beside; the card reports {human(total)}{beside}."


# the table


def _gib(count: int, digits: int = 2) -> str:
    return f"{count / _GIB:.{digits}f}"


def _range(estimate: Estimate) -> str:
    """``"13.90–16.10"`` where that is worth saying, in GiB."""
    if estimate.high - estimate.low <= _WIDE * estimate.expected:
        return ""
    return f"{_gib(estimate.low)}–{_gib(estimate.high)}"


def _figure(say: Callable[[Forecast], str]) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        return "" if row.shown is None else say(row.shown)

    return shown


def _call_component(forecast: Forecast) -> str:
    calls = [one for one in forecast.phases if one.phase == "call"]
    return max(calls, key=lambda one: one.peak.expected).component if calls else ""


def _peak(row: Row) -> str:
    return "failed" if row.shown is None else _gib(row.shown.peak.expected, 4)


_MODEL: Column[Row] = ("model", lambda row: row.model)
_LOAD: Column[Row] = ("load peak", _figure(lambda one: _gib(one.load_peak_bytes)))
_CALL: Column[Row] = ("call peak", _figure(lambda one: _gib(one.call_peak_bytes)))
_WHERE: Column[Row] = ("in", _figure(_call_component))
_CALL_RANGE: Column[Row] = ("range", _figure(lambda one: _range(one.phase_peak("call"))))
_PEAK: Column[Row] = ("peak", _peak)
_RESERVED: Column[Row] = ("reserved", _figure(lambda one: _gib(one.reserved.expected)))
_HOST: Column[Row] = ("host RAM", _figure(lambda one: _gib(one.host_bytes)))
_TRANSFERS: Column[Row] = (
    "transfers in / out",
    _figure(lambda one: f"{_gib(one.h2d_bytes)} / {_gib(one.d2h_bytes)}"),
)
_COLUMNS = (_MODEL, _LOAD, _CALL, _WHERE, _CALL_RANGE, _PEAK, _RESERVED, _HOST, _TRANSFERS)
_RECIPE: Column[Row] = ("recipe", lambda row: row.recipe)
_TEXTS = ("recipe", "model", "in")
_LEAST_TELLING = (_TRANSFERS, _HOST, _LOAD, _RESERVED, _CALL_RANGE, _WHERE, _CALL)


def table_lines(rows: Sequence[Row], targets: Sequence[Target], *, width: int, color: bool) -> list[str]:
    """The table, a row a recipe and model, in ``width`` columns, and below it what failed and why.

    The least telling columns give way first; the peak and what it fits stay. A model that is everybody's has no column
    unless all others have room.
    """
    from rich.text import Text

    names_width = min(max([len("recipe"), *(len(row.recipe) for row in rows)]), _NAME_WIDTH, max(width // 3, 6))
    told = [column for column in _COLUMNS if any(column[1](row) for row in rows)]
    one_model = len({row.model for row in rows}) == 1
    least_telling = (*([_MODEL] if one_model else []), *_LEAST_TELLING)
    fits: list[Column[Row]] = []
    columns: list[Column[Row]] = []
    for words in (_WORDS, _SHORT_WORDS):
        fits = [(target.title, _fit_text(target, words)) for target in targets]
        taken = sum(_need_of_fit(column, rows) + GAP for column in fits)
        columns = fitting(told, rows, width - names_width - taken, least_telling)
        if len(columns) == len(told):
            break
    needs = [*(room(one, rows) - GAP for one in columns), *(_need_of_fit(one, rows) for one in fits)]
    names_width = min(names_width, max(width - sum(needs) - GAP * len(needs), _LEAST_NAME_WIDTH))
    wishes = [max([len(title), *(len(shown(row)) for row in rows)]) for title, shown in (*columns, *fits)]
    given = widths([names_width, *needs], [names_width, *wishes], width)
    table = new_table()
    for (title, _), wide in zip((_RECIPE, *columns, *fits), given, strict=True):
        figures = title not in _TEXTS and title not in [title for title, _ in fits]
        table.add_column(title, justify="right" if figures else "left", width=wide, overflow="fold")
    for row in rows:
        cells = [Text(folded(row.recipe, given[0]))]
        for _, shown in columns:
            style = "" if shown is not _peak else "bold" if row.shown is not None else "bold red"
            cells.append(Text(shown(row), style=style))
        for target, (_, shown) in zip(targets, fits, strict=True):
            cells.append(Text(shown(row), style=_COLORS.get(target.fit(row) or "", "")))
        table.add_row(*cells)
    lines = [*wrapped(_caption(rows), width), "", *lines_of(table, width=width, color=color)]
    for row in rows:
        if row.failure:
            lines += ["", *failure_lines(row.title, row.failure, width)]
    return lines


def _need_of_fit(column: Column[Row], rows: Sequence[Row]) -> int:
    title, shown = column
    words = [title] if len(title) < _SHORT_TITLE else title.split()
    return max(map(len, [*words, *(shown(row) for row in rows)]))


def _fit_text(target: Target, words: Mapping[Fit, str]) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        fit = target.fit(row)
        return words[fit] if fit is not None else ""

    return shown


def _caption(rows: Sequence[Row]) -> str:
    """The unit, and what all rows have in common."""
    made = [row.shown for row in rows if row.shown is not None]
    common = [{row.model for row in rows}, {_sizes(one) for one in made}, {_steps(one) for one in made}]
    shared = [next(iter(found)) for found in common if len(found) == 1]
    return " · ".join(["Peak memory in GiB, forecast without a GPU", *shared])


def _sizes(forecast: Forecast) -> str:
    return ", ".join(dict.fromkeys("×".join(map(str, size)) for size in forecast.sizes))


def _steps(forecast: Forecast) -> str:
    return f"{forecast.steps} step{'s' * (forecast.steps != 1)}"


# the details of one


def detail_lines(forecast: Forecast, *, width: int, color: bool = False) -> list[str]:
    """All that a forecast knows: peaks, what is alive at the highest, what is wide, taken for granted, or unknown."""
    about = [forecast.pipeline, forecast.dtype, _sizes(forecast), _steps(forecast)]
    if forecast.generation:
        about.append(f"kernels of {forecast.generation}")
    at = _at(forecast.peak_phase, forecast.peak_component, forecast.peak_operation)
    peak = f"{_gib(forecast.peak.expected, 4)} GiB"
    if _range(forecast.peak):
        peak += f" ({_gib(forecast.peak.low)} to {_gib(forecast.peak.high)})"
    lines = [
        f"{forecast.recipe} · {forecast.model}",
        *wrapped(", ".join(filter(None, about)), width, "  "),
        *wrapped(f"peak {peak} {at}", width, "  "),
        f"  reserved {forecast.reserved}",
        f"  host {_gib(forecast.host_bytes)} GiB, of it pinned {_gib(forecast.pinned_bytes)} GiB",
        f"  transfers of a call {_gib(forecast.h2d_bytes)} GiB in, {_gib(forecast.d2h_bytes)} GiB out",
    ]
    if forecast.phases:
        lines += _section(("peaks (GiB)", "in", "peak", "range", "while"), _phase_cells(forecast), width, color)
    if forecast.live_at_peak:
        titles = ("alive at the peak (GiB)", "module", "what", "bytes", "tensors")
        lines += _section(titles, _live_cells(forecast), width, color)
    for title, sentences in (
        ("the range is wide because", forecast.wide),
        ("taken for granted", forecast.assumptions),
        ("not known, so nothing is said to fit", forecast.unknown),
    ):
        if sentences:
            lines += ["", f"  {title}"]
            lines += [line for sentence in sentences for line in wrapped(f"- {sentence}", width, "    ", "      ")]
    return lines


def _at(phase: str, component: str, operation: str) -> str:
    where = f"in the {phase}" + (f" of {component}" if component else "")
    return where + (f", at {operation}" if operation else "")


def _phase_cells(forecast: Forecast) -> list[tuple[str, ...]]:
    several = len({one.call for one in forecast.phases if one.phase == "call"}) > 1
    return [
        (
            f"{one.phase} {one.call}" if several and one.phase == "call" else one.phase,
            one.component or "the pipeline",
            _gib(one.peak.expected, 4),
            _range(one.peak),
            one.operation,
        )
        for one in forecast.phases
    ]


def _live_cells(forecast: Forecast) -> list[tuple[str, ...]]:
    ordered = sorted(forecast.live_at_peak, key=lambda one: -one.bytes)
    cells: list[tuple[str, ...]] = [
        (
            one.component or "the pipeline",
            one.module,
            f"{one.kind} of {one.operation}" if one.operation else one.kind,
            _gib(one.bytes, 4),
            str(one.count),
        )
        for one in ordered[:_TENSORS_SHOWN]
    ]
    if rest := ordered[_TENSORS_SHOWN:]:
        total, count = sum(one.bytes for one in rest), sum(one.count for one in rest)
        cells.append((f"{len(rest)} more", "", "", _gib(total, 4), str(count)))
    return cells


def _section(titles: tuple[str, ...], cells: Sequence[tuple[str, ...]], width: int, color: bool) -> list[str]:
    from rich.text import Text

    table = new_table()
    for title in titles:
        figures = title in ("peak", "bytes", "tensors", "range")
        table.add_column(title, justify="right" if figures else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return ["", *(f"  {line}".rstrip() for line in lines_of(table, width=width - 2, color=color))]


def wrapped(text: str, width: int, indent: str = "", further: str | None = None) -> list[str]:
    """A sentence in lines of at most ``width`` columns, those after the first further in; names are not broken."""
    further = f"{indent}  " if further is None else further
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False, break_long_words=False
    )


def failure_lines(name: str, failure: str, width: int) -> list[str]:
    """Why there is no forecast: the sentence in lines that fit, and each place in the code on a line of its own."""
    sentence, *places = failure.splitlines()
    return [*wrapped(f"{name} could not be forecast: {sentence}", width), *places]


# what leaves the terminal


def document(rows: Sequence[Row], targets: Sequence[Target] = ()) -> str:
    """JSON of all: ``forecasts`` as :meth:`Forecast.to_json` has them, ``fits`` a line a row and column, ``failures``."""
    fits = [
        {"recipe": row.recipe, "model": row.model, "target": target.title, "required": target.required, "fit": fit}
        for row, target in itertools.product(rows, targets)
        if (fit := target.fit(row)) is not None
    ]
    whole: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "forecasts": [json.loads(one.to_json()) for row in rows for one in row.distinct],
        "fits": fits,
        "failures": [{"recipe": row.recipe, "model": row.model, "why": row.failure} for row in rows if row.failure],
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def picture(row: Row, targets: Sequence[Target] = ()) -> str | None:
    """SVG of whose bytes are on the accelerator over time, a line at the memory of each required target; None without it."""
    from pytest_diffopt.report.pictures import residency_svg

    if row.shown is None or row.shown.residency is None:
        return None
    limits = {
        "the limit" if target.budget_bytes else target.title: target.budget_bytes
        or min(card.total_bytes for card in target.cards)
        for target in targets
        if target.required
    }
    return residency_svg(row.shown.residency, f"{row.title}, forecast", limits)
