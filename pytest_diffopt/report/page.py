"""A run as one page of HTML: a table, bars, pictures, and every verdict. No script, nothing from outside, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from pytest_diffopt.report.bars import Bar, Group, memory_svg, parity_svg, seconds_svg
from pytest_diffopt.report.figures import Figure, figures_of
from pytest_diffopt.report.markdown import shown
from pytest_diffopt.report.pictures import residency_pictures
from pytest_diffopt.report.rows import verdict_text
from pytest_diffopt.report.tables import pieces

if TYPE_CHECKING:
    from pytest_diffopt.baseline.key import Key
    from pytest_diffopt.report.run import CodePlace, Comparison, RecipeRun, Run, Status, VerdictRecord

_MARKS = {"failed": "✗", "unverified": "?", "skipped": "–", "known": "≈", "passed": "✓"}
_ORDER: tuple[Status, ...] = ("failed", "unverified", "skipped", "known", "passed")
_TITLES = {
    "load_peak_bytes": "peak of loading",
    "peak_bytes": "peak of a call",
    "required_tolerance": "required tolerance",
    "cold_ratio": "first call, against eager (×)",
    "warm_ratio": "warm call, against eager (×)",
    "steady_ratio": "steady calls, against eager (×)",
}

# Below a class, so that a page of pytest-html that holds it keeps its own look
_STYLE = """
.diffopt { --page: #ffffff; --card: #f6f8fa; --text: #1f2328; --quiet: #59636e; --line: #d1d9e0; --link: #0550ae;
  --failed: #cf222e; --failed-back: #ffebe9; --unverified: #7d4e00; --unverified-back: #fff8c5; --passed: #116329;
  --passed-back: #dafbe1; --known: #0550ae; --known-back: #ddf4ff; --skipped: #59636e; --skipped-back: #eaeef2;
  --first: #0072b2; --second: #e69f00; --recorded: #1f2328; color-scheme: light dark;
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; color: var(--text); background: var(--page);
  max-width: 1180px; margin: 0 auto; padding: 24px; border-radius: 8px; text-align: left; }
@media (prefers-color-scheme: dark) {
.diffopt { --page: #0d1117; --card: #151b23; --text: #f0f6fc; --quiet: #9198a1; --line: #3d444d; --link: #79c0ff;
  --failed: #ff7b72; --failed-back: #3d1518; --unverified: #e3b341; --unverified-back: #332700; --passed: #56d364;
  --passed-back: #0f2d18; --known: #79c0ff; --known-back: #0c2d4d; --skipped: #9198a1; --skipped-back: #262c36;
  --first: #56b4e9; --second: #e69f00; --recorded: #f0f6fc; }
}
.diffopt *, .diffopt *::before { box-sizing: border-box; }
.diffopt h1, .diffopt h2, .diffopt h3 { line-height: 1.25; color: var(--text); font-weight: 600; }
.diffopt h1 { font-size: 26px; margin: 0 0 12px; }
.diffopt h2 { font-size: 19px; margin: 36px 0 10px; }
.diffopt h3 { font-size: 15px; margin: 20px 0 6px; }
.diffopt p { margin: 6px 0; font-size: inherit; }
.diffopt a { color: var(--link); }
.diffopt .gate { padding: 14px 18px; border-radius: 8px; font-size: 18px; font-weight: 600; border: 1px solid currentcolor; }
.diffopt .quiet { color: var(--quiet); }
.diffopt .scroll { overflow-x: auto; }
.diffopt table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; width: auto; min-width: 50%; }
.diffopt caption { text-align: left; color: var(--quiet); padding-bottom: 6px; }
.diffopt th, .diffopt td { padding: 6px 10px; border: 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; color: var(--text); }
.diffopt thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; font-weight: 600; }
.diffopt tbody th { font-weight: 600; min-width: 11em; }
.diffopt .figure { text-align: right; white-space: nowrap; }
.diffopt thead .figure { white-space: normal; }
.diffopt .status { display: inline-block; padding: 1px 9px; border-radius: 10px; font-weight: 600; font-size: 13px; }
.diffopt .failed { color: var(--failed); background: var(--failed-back); }
.diffopt .unverified { color: var(--unverified); background: var(--unverified-back); }
.diffopt .passed { color: var(--passed); background: var(--passed-back); }
.diffopt .known { color: var(--known); background: var(--known-back); }
.diffopt .skipped { color: var(--skipped); background: var(--skipped-back); }
.diffopt .counts { display: flex; gap: 8px; flex-wrap: wrap; margin: 12px 0; padding: 0; list-style: none; }
.diffopt details { border: 1px solid var(--line); border-radius: 8px; margin: 10px 0; background: var(--page); }
.diffopt summary { padding: 10px 14px; cursor: pointer; background: var(--card); border-radius: 8px; overflow-wrap: anywhere; }
.diffopt details[open] > summary { border-radius: 8px 8px 0 0; border-bottom: 1px solid var(--line); }
.diffopt summary:focus-visible, .diffopt a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.diffopt .inside { padding: 4px 16px 16px; }
.diffopt ul.verdicts { list-style: none; margin: 10px 0; padding: 0; }
.diffopt ul.verdicts > li { margin: 8px 0; overflow-wrap: anywhere; }
.diffopt pre { margin: 6px 0 0; padding: 10px 12px; background: var(--card); color: var(--text); border-radius: 6px;
  overflow-x: auto; font: 13px/1.45 ui-monospace, 'Cascadia Mono', 'DejaVu Sans Mono', monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.diffopt code { font: 13px ui-monospace, 'Cascadia Mono', 'DejaVu Sans Mono', monospace; overflow-wrap: anywhere; }
.diffopt table code { overflow-wrap: break-word; }
.diffopt svg { display: block; width: 100%; height: auto; max-width: 960px; }
.diffopt svg.bars text { font: 12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: var(--text); }
.diffopt svg.bars .tick { fill: var(--quiet); }
.diffopt svg.bars .name { font-weight: 600; }
.diffopt svg.bars .grid { stroke: var(--line); }
.diffopt svg.bars .first, .diffopt svg.bars .within { fill: var(--first); }
.diffopt svg.bars .second { fill: var(--second); }
.diffopt svg.bars .over { fill: var(--failed); }
.diffopt svg.bars .recorded { fill: none; stroke: var(--recorded); stroke-width: 1.5; stroke-dasharray: 4 2; }
.diffopt svg.bars .allowed { stroke: var(--text); stroke-width: 2.5; }
.diffopt .key { display: flex; gap: 18px; flex-wrap: wrap; font-size: 13px; color: var(--quiet); margin: 4px 0; padding: 0;
  list-style: none; }
.diffopt .key span { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; }
.diffopt .key .first, .diffopt .key .within { background: var(--first); }
.diffopt .key .second { background: var(--second); }
.diffopt .key .over { background: var(--failed); }
.diffopt .key .recorded { border: 1.5px dashed var(--recorded); }
.diffopt .key .allowed { background: var(--text); width: 3px; }
@media (max-width: 640px) {
.diffopt { padding: 12px; border-radius: 0; }
.diffopt h1 { font-size: 22px; }
.diffopt .inside { padding: 4px 10px 12px; }
.diffopt tbody th { min-width: 9em; }
.diffopt svg.bars .between { display: none; }
}
"""
_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; background: #ffffff; }
@media (prefers-color-scheme: dark) { body { background: #0d1117; } }
"""
# pytest-html has no place for a phone: its page is 800 pixels wide at least
_HOST_STYLE = """
body { min-width: 0; }
@media (max-width: 640px) {
#title { overflow-wrap: anywhere; }
#environment, #results-table { display: block; overflow-x: auto; max-width: 100%; }
.controls, .filters { flex-wrap: wrap; }
}
"""
_VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'


def page(run: Run) -> str:
    """The whole page, one file."""
    said = "gate failed" if not run.gate.passed else "gate passed" if run.gate.strict else "no gate, nothing failed"
    title = f"Optimization recipes: {said}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            _VIEWPORT,
            '<link rel="icon" href="data:,">',
            f"<title>{_text(title)}</title>",
            f"<style>{_PAGE_STYLE}</style>",
            "</head>",
            "<body>",
            embedded(run, "main"),
            "</body>",
            "</html>",
            "",
        ]
    )


def in_pytest_html(run: Run) -> str:
    """What the page says, to be put into pytest-html's, with what lets that one be read on a phone."""
    return "\n".join([_VIEWPORT, f"<style>{_HOST_STYLE}</style>", embedded(run)])


def embedded(run: Run, element: str = "section") -> str:
    """What the page says, as one element with its own style, to be put into another page."""
    return "\n".join(
        [
            f'<{element} class="diffopt">',
            f"<style>{_STYLE}</style>",
            *_head(run),
            *_table(run),
            *_memory(run),
            *_latency(run),
            *_recipes(run),
            f"</{element}>",
        ]
    )


def _head(run: Run) -> Iterator[str]:
    yield "<h1>Optimization recipes</h1>"
    status = "failed" if not run.gate.passed else "passed" if run.gate.strict else "unverified"
    yield f'<p class="gate {status}">{_MARKS[status]} {_text(run.gate.sentence)}</p>'
    counts = {status: run.gate.counts.get(status, 0) for status in _ORDER}
    yield '<ul class="counts" aria-label="Verdicts by status">'
    yield from (f"<li>{_chip(status, f'{count} {status}')}</li>" for status, count in counts.items() if count)
    yield "</ul>"
    yield from (f'<p class="failed">{_text(line)}</p>' for line in run.gate.lines)
    for key in run.accelerators:
        versions = ", ".join(f"{name} {version}" for name, version in key.versions.items())
        yield f'<p class="quiet">on {_text(key.place)}, with {_text(versions)}</p>'
    yield (
        f'<p class="quiet">pytest-diffopt {_text(run.pytest_diffopt)}, started '
        f'<time datetime="{_text(run.started)}">{_text(run.started)}</time>, took {run.seconds:.1f} s</p>'
    )


def _table(run: Run) -> Iterator[str]:
    if not run.recipes:
        yield "<p>No recipe was run.</p>"
        return
    rows = [recipe.figures.model_dump() for recipe in run.recipes]
    columns = figures_of(rows)
    yield from (f'<p class="status skipped">{_MARKS["skipped"]} {_text(line)}</p>' for line in run.skipped)
    if not any(recipe.was_run for recipe in run.recipes):
        return
    yield '<h2>Recipes</h2><div class="scroll"><table class="recipes">'
    yield "<caption>Each recipe's verdicts and figures; its name leads to its details.</caption>"
    yield '<thead><tr><th scope="col">recipe</th><th scope="col">verdict</th>'
    yield from (f'<th scope="col" class="figure">{_text(column.heading)}</th>' for column in columns)
    yield "</tr></thead><tbody>"
    for place, (name, recipe, row) in enumerate(zip(run.names, run.recipes, rows, strict=True)):
        if not recipe.was_run:
            continue
        said = verdict_text({verdict.check: verdict.status for verdict in recipe.verdicts})
        yield f'<tr><th scope="row"><a href="#diffopt-{place}">{_words(name)}</a></th>'
        yield f"<td>{_chip(recipe.status, said)}</td>"
        yield from (_cell(column, row[column.name]) for column in columns)
        yield "</tr>"
    yield "</tbody></table></div>"


def _cell(column: Figure, value: float | None) -> str:
    return f'<td class="figure" data-figure="{column.name}">{_text(column.shown(value))}</td>'


def _memory(run: Run) -> Iterator[str]:
    groups = [
        Group(
            name,
            (
                Bar("peak of loading", "first", recipe.figures.load_peak_bytes, _recorded(recipe, "load_peak_bytes")),
                Bar("peak of a call", "second", recipe.figures.peak_bytes, _recorded(recipe, "peak_bytes")),
            ),
        )
        for name, recipe in zip(run.names, run.recipes, strict=True)
    ]
    if any(bar.value for group in groups for bar in group.bars):
        yield "<h2>Memory on the accelerator</h2>"
        yield from _key(groups, "peak of loading", "peak of a call")
        yield memory_svg("Peaks of memory on the accelerator, a group a recipe", groups)


def _latency(run: Run) -> Iterator[str]:
    groups = [
        Group(
            name,
            (
                Bar("first call", "first", recipe.figures.cold_seconds),
                Bar("warm call", "second", recipe.figures.warm_seconds),
            ),
        )
        for name, recipe in zip(run.names, run.recipes, strict=True)
    ]
    if any(bar.value for group in groups for bar in group.bars):
        yield "<h2>Latency</h2>"
        if any(key.accelerator == "sim" for key in run.accelerators):
            yield '<p class="quiet">Of the host: on the simulated device times are shown and never judged.</p>'
        yield from _key(groups, "first call, with compilation", "warm call")
        yield seconds_svg("Latency of calls, a group a recipe", groups)


def _key(groups: Sequence[Group], first: str, second: str) -> Iterator[str]:
    entries = [("first", first), ("second", second)]
    if any(bar.recorded is not None for group in groups for bar in group.bars):
        entries.append(("recorded", "as the baseline has it"))
    yield from _key_of(entries)


def _key_of(entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield '<ul class="key">'
    yield from (f'<li><span class="{kind}"></span>{_text(name)}</li>' for kind, name in entries)
    yield "</ul>"


def _recorded(recipe: RecipeRun, name: str) -> float | None:
    changes = recipe.baseline.changes if recipe.baseline is not None else ()
    return next((change.recorded for change in changes if change.name == name), None)


def _recipes(run: Run) -> Iterator[str]:
    if run.recipes:
        yield "<h2>Details</h2>"
    for place, (name, recipe) in enumerate(zip(run.names, run.recipes, strict=True)):
        opened = " open" if recipe.status in ("failed", "unverified") else ""
        said = verdict_text({verdict.check: verdict.status for verdict in recipe.verdicts})
        yield f'<section id="diffopt-{place}" aria-label="{_text(recipe.recipe)}"><details{opened}>'
        yield f"<summary><strong>{_words(name)}</strong> {_chip(recipe.status, said)}</summary>"
        yield '<div class="inside">'
        where = f"{recipe.file}:{recipe.line}" if recipe.line is not None else recipe.source
        yield f'<p class="quiet">in <code>{_text(where)}</code>{_on(run, recipe.key)}</p>'
        yield '<ul class="verdicts">'
        ordered = sorted(recipe.verdicts, key=lambda verdict: _ORDER.index(verdict.status))
        yield from (_verdict(verdict) for verdict in ordered)
        yield "</ul>"
        if recipe.baseline is not None:
            yield from _baseline(recipe.baseline)
        if recipe.parity:
            yield "<h3>Parity by component</h3>"
            kinds = [
                ("within", "distance from the reference"),
                ("over", "more than is allowed"),
                ("allowed", "tolerance"),
            ]
            yield from _key_of(kinds)
            yield parity_svg(f"Parity of {recipe.recipe} by component", recipe.parity)
        if places := [place for place in recipe.places if place.kind != "crash"]:  # that is said in the verdict
            yield from _places(places)
        for residency, title in (
            (recipe.residency, recipe.recipe),
            (recipe.forecast_residency, f"{recipe.recipe}, forecast of {recipe.figures.forecast_model}"),
        ):
            if residency is not None and residency.phases:
                yield "<h3>Residency</h3>"
                yield residency_pictures(residency, title)
        yield "</div></details></section>"


def _on(run: Run, key: Key | None) -> str:
    return f", on {_text(key.place)}" if key is not None and len(run.accelerators) > 1 else ""


def _verdict(verdict: VerdictRecord) -> str:
    evidence = "\n".join(verdict.evidence)
    more = f"<pre>{_text(evidence)}</pre>" if evidence else ""
    if verdict.traceback:
        whole = _text("\n".join(verdict.traceback))
        more += f"<details><summary>traceback</summary><pre>{whole}</pre></details>"
    chip = _chip(verdict.status, verdict.status)
    return f"<li>{chip} <strong>{_text(verdict.check)}</strong> {_text(verdict.sentence)}{more}</li>"


def _baseline(found: Comparison) -> Iterator[str]:
    yield "<h3>Against the baseline</h3>"
    if found.against is not None:
        exact = "" if found.exact_key else ", the nearest that is recorded"
        versions = ", ".join(f"{name} {version}" for name, version in found.against.versions.items())
        yield f'<p class="quiet">recorded on {_text(found.against.place)}, with {_text(versions)}{exact}</p>'
    if found.differences:
        yield '<div class="scroll"><table><thead><tr>'
        yield from (f'<th scope="col">{title}</th>' for title in ("what", "where", "recorded", "now", "direction"))
        yield "</tr></thead><tbody>"
        for one in found.differences:
            cells = (one.where or "-", _plain(one.recorded, one.unit), _plain(one.now, one.unit))
            yield f'<tr><th scope="row">{_text(one.what)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}'
            kind = {"worse": "failed", "better": "passed"}.get(one.direction, "unverified")
            yield f'<td><span class="status {kind}">{one.direction}</span></td></tr>'
        yield "</tbody></table></div>"
    if found.changes:
        yield '<div class="scroll"><table><thead><tr><th scope="col">figure</th><th scope="col" class="figure">recorded</th>'
        yield '<th scope="col" class="figure">now</th></tr></thead><tbody>'
        for change in found.changes:
            yield f'<tr><th scope="row">{_text(_TITLES.get(change.name, change.name))}</th>'
            yield f'<td class="figure">{_text(shown(change.recorded, change.unit))}</td>'
            yield f'<td class="figure">{_text(shown(change.now, change.unit))}</td></tr>'
        yield "</tbody></table></div>"


def _places(places: Sequence[CodePlace]) -> Iterator[str]:
    yield '<h3>Graph breaks, recompiles and host syncs</h3><div class="scroll"><table><thead><tr>'
    yield from (f'<th scope="col">{title}</th>' for title in ("what", "component", "where", "why"))
    yield '<th scope="col" class="figure">times</th></tr></thead><tbody>'
    for place in places:
        chip = _chip("failed", place.kind) if place.failed else _text(place.kind)
        where = f"<code>{_words(f'{place.file}:{place.line}')}</code><br>{_text(place.function)}"
        yield f'<tr><th scope="row">{chip}</th><td>{_text(place.component or "-")}</td><td>{where}</td>'
        yield f'<td><code>{_text(place.why)}</code></td><td class="figure">{place.count}</td></tr>'
    yield "</tbody></table></div>"


def _plain(value: object, unit: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return shown(value, unit) if unit == "B" or isinstance(value, float) else f"{value} {unit}".rstrip()
    return "-" if value is None else str(value)


def _chip(status: str, text: str) -> str:
    return f'<span class="status {status}">{_MARKS[status]} {_text(text)}</span>'


def _text(text: str) -> str:
    """Escaped, without the characters that HTML cannot hold."""
    return escape(text.translate(_UNHELD))


def _words(name: str) -> str:
    """A name that is broken between its words, where it has to be."""
    return "<wbr>".join(map(_text, pieces(name)))


_UNHELD = {code: None for code in range(32) if chr(code) not in "\n\t"}
