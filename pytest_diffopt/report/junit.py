"""JUnit's XML with our figures as flat properties: in pytest's own ``--junitxml``, and in a file of ours.

Ours is written with xml.etree: the format is five elements deep, pytest writes its own in the same way, and no library for
it is needed to install the plugin.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from pytest_diffopt.report.gathering import Carried
from pytest_diffopt.report.rows import merged

if TYPE_CHECKING:
    from pytest_diffopt.report.run import RecipeRun, Run

PREFIX = "diffopt_"
_OF_ROWS = ("recipe", "source", "statuses", "content")  # of a row, what is no figure


def flat_properties(carried: Carried) -> list[tuple[str, str]]:
    """What an item carries as JUnit's properties, each a name and a scalar: what is not known is left out.

    The figures of the recipe by their names, and those of the verdict that are scalars behind the name of its check.
    """
    (row, *_) = merged(carried.rows)
    known = {name: value for name, value in row.items() if name not in _OF_ROWS}
    figures = carried.verdict["figures"] if carried.verdict is not None else {}
    return _properties(carried.source, carried.recipe, carried.check, carried.status, carried.sentence, known, figures)


def flattened(properties: Iterable[tuple[str, Any]], carried: Carried) -> list[tuple[str, Any]]:
    """The properties of a report, ours in flat form, those of others as they are."""
    others = [(name, value) for name, value in properties if not name.startswith(PREFIX)]
    return [*others, *flat_properties(carried)]


def junit_xml(run: Run) -> str:
    """The run as JUnit's XML: a suite a recipe, a case a verdict; and the gate, which fails by more than verdicts."""
    counts = Counter(_kind(verdict.status) for recipe in run.recipes for verdict in recipe.verdicts)
    counts["passed" if run.gate.passed else "failures"] += 1
    root = ElementTree.Element("testsuites", _counted(counts), name="pytest-diffopt", time=f"{run.seconds:.3f}")
    for recipe in run.recipes:
        root.append(_suite(run, recipe))
    root.append(_gate(run))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _suite(run: Run, recipe: RecipeRun) -> ElementTree.Element:
    counts = Counter(_kind(verdict.status) for verdict in recipe.verdicts)
    suite = ElementTree.Element(
        "testsuite", _counted(counts), name=clean(recipe.source), timestamp=run.started, errors="0"
    )
    figures = recipe.figures.model_dump()
    _add_properties(suite, [(f"{PREFIX}{name}", scalar(value)) for name, value in figures.items() if value is not None])
    for verdict in recipe.verdicts:
        case = ElementTree.SubElement(
            suite, "testcase", classname=clean(recipe.source), name=clean(verdict.check), file=clean(recipe.file)
        )
        if recipe.line is not None:
            case.set("line", str(recipe.line))
        _add_properties(
            case,
            _properties(
                recipe.source,
                recipe.recipe,
                verdict.check,
                verdict.status,
                verdict.sentence,
                figures,
                verdict.figures,
            ),
        )
        text = clean("\n".join([verdict.sentence, *verdict.evidence, *verdict.traceback]))
        if _kind(verdict.status) == "failures":
            ElementTree.SubElement(case, "failure", message=clean(verdict.sentence)).text = text
        elif _kind(verdict.status) == "skipped":
            message = clean(f"{verdict.status}: {verdict.sentence}")
            ElementTree.SubElement(case, "skipped", type=f"diffopt.{verdict.status}", message=message).text = text
    return suite


def _gate(run: Run) -> ElementTree.Element:
    gate = run.gate
    counts = _counted({"passed" if gate.passed else "failures": 1})
    suite = ElementTree.Element("testsuite", counts, name="gate", timestamp=run.started, errors="0")
    case = ElementTree.SubElement(suite, "testcase", classname="pytest-diffopt", name="gate")
    if not gate.passed:
        text = clean("\n".join([gate.sentence, *gate.lines]))
        ElementTree.SubElement(case, "failure", message=clean(gate.sentence)).text = text
    return suite


def _kind(status: str) -> str:
    """JUnit knows no verdict that is neither a pass nor a failure but the skipped one."""
    return {"failed": "failures", "passed": "passed"}.get(status, "skipped")


def _counted(counts: Mapping[str, int]) -> dict[str, str]:
    return {
        "tests": str(sum(counts.values())),
        "failures": str(counts.get("failures", 0)),
        "skipped": str(counts.get("skipped", 0)),
    }


def _add_properties(element: ElementTree.Element, properties: Iterable[tuple[str, str]]) -> None:
    parent = ElementTree.SubElement(element, "properties")
    for name, value in properties:
        ElementTree.SubElement(parent, "property", name=clean(name), value=clean(value))


def _properties(
    source: str,
    recipe: str,
    check: str,
    status: str,
    sentence: str,
    known: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> list[tuple[str, str]]:
    found: dict[str, Any] = {"source": source, "recipe": recipe, "check": check, "status": status, "sentence": sentence}
    found |= known
    found |= {f"{check}_{name}": value for name, value in figures.items()}
    return [
        (f"{PREFIX}{name}", scalar(value))
        for name, value in found.items()
        if isinstance(value, str | int | float) and value != ""
    ]


def scalar(value: str | int | float) -> str:
    """A text as it is; a number or a truth value as JSON writes it, an infinity as ``Infinity``."""
    return value if isinstance(value, str) else json.dumps(value)


def clean(text: str) -> str:
    """A text without the characters that XML cannot hold."""
    return "".join(
        character
        for character in text
        if character in "\t\n\r"
        or " " <= character < "\ud800"
        or "\ue000" <= character < "\ufffe"
        or character > "\uffff"
    )
