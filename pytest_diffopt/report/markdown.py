"""A run as Markdown, for GitHub's summary of a step: at most 1 MiB, and what did not fit is counted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from pytest_diffopt.byte_sizes import human
from pytest_diffopt.report.figures import figures_of, number
from pytest_diffopt.report.rows import verdict_text

if TYPE_CHECKING:
    from pytest_diffopt.report.run import RecipeRun, Run, VerdictRecord

MOST_BYTES = 1 << 20
"""GitHub shows no summary of a step that is larger, in UTF-8."""

_BESIDE = 50  # lines of what stands beside the verdicts
_FOR_THE_REST = 400  # bytes, for the sentence that counts what is left out
_MARKS = {"failed": "❌", "unverified": "⚠️", "skipped": "⚠️", "known": "🔷", "passed": "✅"}


def markdown(run: Run, most_bytes: int = MOST_BYTES) -> str:
    """The run as Markdown, in UTF-8 at most so many bytes: the gate, the table of recipes, then what failed or was not
    verified, then everything else, folded."""
    text = "\n".join(_head(run)) + "\n"
    room = max(0, most_bytes - _FOR_THE_REST - len(text.encode()))
    left_out = {}
    for name, blocks in (
        ("rows of the table", _table(run)),
        ("verdicts that failed or were not verified", _findings(run)),
        ("recipes' other verdicts", _others(run)),
    ):
        kept, missing = _fitting(list(blocks), room)
        added = "".join(kept)
        room -= len(added.encode())
        text += added
        if missing:
            left_out[name] = missing
    if left_out:
        said = ", ".join(f"{count} {name}" for name, count in left_out.items())
        text += f"\n\n**Left out, as GitHub takes at most {human(MOST_BYTES)} of a summary: {said}.** "
        text += "The JSON and HTML reports have all of it.\n"
    return text


def _fitting(blocks: Sequence[str], room: int) -> tuple[list[str], int]:
    """The first blocks, as many as fit into so many bytes, and how many are left."""
    for place, block in enumerate(blocks):
        room -= len(block.encode())
        if room < 0:
            return list(blocks[:place]), len(blocks) - place
    return list(blocks), 0


def _head(run: Run) -> list[str]:
    mark = "❌" if not run.gate.passed else "✅" if run.gate.strict else "⚠️"
    lines = ["## Optimization recipes", "", f"{mark} **{inline(run.gate.sentence)}**", ""]
    beside = run.gate.lines
    lines += [f"- {inline(line)}" for line in beside[:_BESIDE]]
    lines += [f"- and {len(beside) - _BESIDE} more"] if len(beside) > _BESIDE else []
    for key in run.accelerators:
        versions = ", ".join(f"{name} {version}" for name, version in key.versions.items())
        lines.append(f"- on {inline(key.place)}, with {inline(versions)}")
    lines.append(f"- pytest-diffopt {inline(run.pytest_diffopt)}, started {run.started}, took {run.seconds:.1f} s")
    if any(key.accelerator == "sim" for key in run.accelerators):
        lines.append("- times on the simulated device are the host's, and are not judged")
    return [*lines, ""]


def _table(run: Run) -> Iterator[str]:
    ran = [(name, recipe) for name, recipe in zip(run.names, run.recipes, strict=True) if recipe.was_run]
    rows = [recipe.figures.model_dump() for _, recipe in ran]
    columns = figures_of(rows)
    if ran:
        yield (
            "".join(f"| {title} " for title in ("", "recipe", *(c.heading for c in columns), "verdict"))
            + "|\n"
            + ("|---" * 2 + "|--:" * len(columns) + "|---|\n")
        )
    for (name, recipe), row in zip(ran, rows, strict=True):
        statuses = {verdict.check: verdict.status for verdict in recipe.verdicts}
        cells = [_MARKS[recipe.status], inline(name), *(c.shown(row[c.name]) for c in columns)]
        yield "".join(f"| {cell} " for cell in (*cells, inline(verdict_text(statuses)))) + "|\n"
    yield from (f"\n{_MARKS['skipped']} {inline(line)}\n" for line in run.skipped)


def _findings(run: Run) -> Iterator[str]:
    for status, title in (("failed", "Failed"), ("unverified", "Not verified"), ("skipped", "Skipped")):
        found = [
            (recipe, verdict)
            for recipe in run.recipes
            for verdict in recipe.verdicts
            if verdict.status == status and recipe.was_run  # the others have a line below the table
        ]
        for place, (recipe, verdict) in enumerate(found):
            heading = f"\n### {title}: {len(found)}\n" if place == 0 else ""
            yield heading + "\n".join(["", *_folded(_title(recipe, verdict), _details(recipe, verdict), status)]) + "\n"


def _title(recipe: RecipeRun, verdict: VerdictRecord) -> str:
    return f"<b>{html(recipe.recipe)} · {html(verdict.check)}</b>: {html(verdict.sentence)}"


def _details(recipe: RecipeRun, verdict: VerdictRecord) -> list[str]:
    where = f"{recipe.file}:{recipe.line}" if recipe.line is not None else recipe.source
    lines = [f"in {inline(where)}"]
    if verdict.evidence:
        lines += ["", *fenced("\n".join(verdict.evidence))]
    if verdict.traceback:
        lines += ["", *fenced("\n".join(verdict.traceback))]
    if verdict.check == "parity" and recipe.parity:
        lines += ["", "| component | required | allowed | floor | detects |", "|---|--:|--:|--:|--:|"]
        lines += [
            f"| {inline(one.component)} | {number(one.required)} | {number(one.allowed)} | {number(one.floor)} "
            f"| {'' if one.detects is None else number(one.detects)} |"
            for one in recipe.parity
        ]
    return lines


def _others(run: Run) -> Iterator[str]:
    for place, recipe in enumerate(run.recipes):
        rest = [verdict for verdict in recipe.verdicts if verdict.status in ("passed", "known")]
        lines = [f"- {_MARKS[verdict.status]} {inline(verdict.check)}: {inline(verdict.sentence)}" for verdict in rest]
        if recipe.baseline is not None and recipe.baseline.changes:
            lines += ["", "| against the baseline | recorded | now |", "|---|--:|--:|"]
            lines += [
                f"| {inline(change.name)} | {shown(change.recorded, change.unit)} | {shown(change.now, change.unit)} |"
                for change in recipe.baseline.changes
            ]
        if lines:
            heading = "\n### Everything else\n" if place == 0 else ""
            title = f"<b>{html(recipe.recipe)}</b>: {len(rest)} verdict{'' if len(rest) == 1 else 's'}"
            yield heading + "\n".join(["", *_folded(title, lines)]) + "\n"


def _folded(title: str, lines: list[str], status: str = "") -> list[str]:
    mark = f"{_MARKS[status]} " if status else ""
    return [f"<details><summary>{mark}{title}</summary>", "", *lines, "", "</details>"]


def shown(value: float | None, unit: str) -> str:
    """A figure with its unit: ``"9.45 MiB"``."""
    if value is None:
        return "-"
    return human(int(value)) if unit == "B" else f"{number(float(value))} {unit}".rstrip()


def html(text: str) -> str:
    """A text as HTML inside Markdown, on one line."""
    return re.sub(r"([*_`|~])", lambda found: f"&#{ord(found[0])};", escape(_one_line(text)))


def inline(text: str) -> str:
    """A text as it stands, on one line, inside Markdown or a cell of its tables."""
    return re.sub(r"([\\*_`|~\[\]#])", r"\\\1", escape(_one_line(text), quote=False)) or "-"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def fenced(text: str) -> list[str]:
    """A text as a block of code, whatever stands in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return [f"{marks}text", *text.splitlines(), marks]
