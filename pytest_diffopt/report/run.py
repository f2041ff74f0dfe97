"""One model of a run, which every report is written from, and whose JSON has a schema.

Bytes are bytes, seconds are seconds, and what is not known is null.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, WithJsonSchema

from pytest_diffopt.baseline.key import Key
from pytest_diffopt.observation.observation import Residency
from pytest_diffopt.report.gathering import Carried
from pytest_diffopt.report.rows import merged, names_of, skipped_lines, worst

SCHEMA_VERSION = 1

_INFINITIES = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else _INFINITIES[str(value)]


Number = Annotated[
    float,
    PlainSerializer(_finite, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": list(_INFINITIES.values())}]}),
]
"""A float; JSON has no infinity and no NaN, so these are written as words."""

Status = Literal["failed", "unverified", "skipped", "known", "passed"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Figures(_Part):
    """What was measured of a recipe."""

    cold_seconds: Number | None = None
    """The first call, with its compilation, wall clock."""
    warm_seconds: Number | None = None
    """The last of the recipe's calls, wall clock. On the simulated device that is the host's time, and is not judged."""
    load_peak_bytes: int | None = None
    """The most on the accelerator while the pipeline was prepared, above what was there before."""
    peak_bytes: int | None = None
    """The most on the accelerator during a call, above what was there before."""
    h2d_bytes: int | None = None
    """Copied to the device in the last call."""
    d2h_bytes: int | None = None
    """Copied from the device in the last call."""
    host_syncs: int | None = None
    """How often the host waited for the device in a denoising step of the last call, at most; offloading apart."""
    graphs: int | None = None
    """Graphs with operations that were compiled."""
    breaks: int | None = None
    """Graph breaks, allowed ones too."""
    recompiles: int | None = None
    """Attempts to compile what had been compiled before, those during warm-up too."""
    required_tolerance: Number | None = None
    """What the worst output differs by from the eager reference's, relative to its size (root mean square)."""
    forecast_bytes: int | None = None
    """The peak that is expected of the full-size model."""
    forecast_low_bytes: int | None = None
    """The low end of its range."""
    forecast_high_bytes: int | None = None
    """The high end of its range."""
    forecast_model: str | None = None
    """The full-size model."""


class VerdictRecord(_Part):
    """The verdict of one check."""

    check: str
    """The name of the check, or of the test that the marker `recipes` runs."""
    status: Status
    """As counted: `known` is a fault that the recipe expects, `skipped` was not run."""
    sentence: str = ""
    """What holds or what broke; why it was skipped."""
    figures: dict[str, Any] = {}
    """The numbers behind it; each check has its own."""
    evidence: tuple[str, ...] = ()
    """Lines that say where, and what to try."""
    traceback: tuple[str, ...] = ()
    """Of the exception that ended the recipe's run, in the one verdict that has the cause in full."""


class ComponentParity(_Part):
    """How far the worst output of one component is from the eager reference's, relative to its size."""

    component: str
    """`output` is what the pipeline returns."""
    required: Number
    """The distance, root mean square."""
    allowed: Number
    """The greatest distance that would have passed."""
    floor: Number
    """The eager reference's own distance from a higher precision, or from itself run again."""
    excess: Number
    """How many times over what is allowed, by whichever measure is the worst; at most 1 where it passes."""
    detects: Number | None = None
    """The smallest scale error, in all that it returns, that would have failed; null where none is known."""
    detects_error: Number | None = None
    """The same of any error, as the root mean square relative to its size."""


class CodePlace(_Part):
    """A graph break, a recompile, a wait of the host, or the crash that ended the recipe's run, and where in the code."""

    kind: Literal["graph break", "recompile", "host sync", "crash"]
    component: str
    """Empty outside of any component."""
    file: str
    """From the import path that holds it."""
    line: int
    function: str = ""
    why: str
    """The break's reason; the guard that failed; the operation that waited; the exception."""
    count: int = 1
    failed: bool = False
    """Whether it is one for which its check fails."""


class Change(_Part):
    """A figure as the baseline has it, and now."""

    name: str
    """Of the figure; as in `figures`."""
    unit: str
    """`B`, or empty."""
    recorded: Number | None
    now: Number | None


class Difference(_Part):
    """One thing that is not as recorded."""

    what: str
    where: str = ""
    recorded: Any = None
    now: Any = None
    direction: Literal["worse", "better", "changed"]
    unit: str = ""


class Comparison(_Part):
    """A recipe against its baseline."""

    status: Status
    sentence: str
    against: Key | None = None
    """What the baseline was recorded on; null where there is none to compare with."""
    exact_key: bool = False
    """Whether that is the same device and the same versions as now."""
    differences: tuple[Difference, ...] = ()
    changes: tuple[Change, ...] = ()
    """Figures that both have, also where they are the same."""


class RecipeRun(_Part):
    """One recipe."""

    recipe: str
    source: str
    """Where it stands: the node id of a recipe of a file, or of a test over it."""
    file: str = ""
    """From the root of the tests."""
    line: int | None = None
    """From 1."""
    status: Status
    """The worst of its verdicts."""
    figures: Figures
    verdicts: tuple[VerdictRecord, ...]
    parity: tuple[ComponentParity, ...] = ()
    """In the order in which outputs came."""
    baseline: Comparison | None = None
    """Null where the run has no baselines."""
    places: tuple[CodePlace, ...] = ()
    residency: Residency | None = None
    """Whose bytes were on the accelerator, over time; null where the device does not tell."""
    forecast_residency: Residency | None = None
    """The same of the full-size model, as forecast."""
    key: Key | None = None
    """The device and the versions that it ran with; null where it did not run."""
    record: dict[str, Any] | None = None
    """What a baseline keeps of it."""

    @property
    def was_run(self) -> bool:
        """Whether any of its checks was not skipped."""
        return any(verdict.status != "skipped" for verdict in self.verdicts)


class GateRecord(_Part):
    """What the gate says of the run."""

    passed: bool
    """Whether nothing failed; without `strict` that is no gate passed."""
    sentence: str
    """The line that ends the run: GATE PASSED, GATE FAILED, or that it is no gate, with the counts."""
    strict: bool = False
    """Whether what is unverified, skipped or left out fails it."""
    counts: dict[Status, int] = {}
    """Verdicts by status."""
    problems: tuple[str, ...] = ()
    """What is no test's failure, a sentence each."""
    others_failed: tuple[str, ...] = ()
    """The node ids of failed tests without a recipe, and of files that were not collected."""
    left_out: tuple[str, ...] = ()
    """The node ids of checks that were not run, as the user asked."""

    @property
    def lines(self) -> list[str]:
        """What stands beside the verdicts, a line each."""
        failed = [f"failed, and no recipe of ours: {one}" for one in self.others_failed]
        return [*self.problems, *failed, *(f"left out: {one}" for one in self.left_out)]


class Run(_Part):
    """A run of pytest, as far as recipes go."""

    schema_version: Literal[1] = 1
    pytest_diffopt: str
    """The version that wrote it."""
    started: str
    """ISO 8601, with its offset from UTC."""
    seconds: Number
    """From the start of the session to this report, wall clock."""
    accelerators: tuple[Key, ...] = ()
    """Each device, with the versions, that a recipe ran on."""
    gate: GateRecord
    recipes: tuple[RecipeRun, ...] = ()
    """In the order in which they came."""

    @property
    def names(self) -> list[str]:
        """What each recipe is called: see :func:`names_of`."""
        return names_of((recipe.source, recipe.recipe) for recipe in self.recipes)

    @property
    def skipped(self) -> list[str]:
        """The recipes of which nothing was run, a line for each reason."""
        rows = [
            {
                "source": one.source,
                "recipe": one.recipe,
                "statuses": {verdict.check: verdict.status for verdict in one.verdicts},
            }
            for one in self.recipes
        ]
        return skipped_lines(rows, {one.source: one.verdicts[0].sentence for one in self.recipes if one.verdicts})


def run_of(items: Iterable[Carried], gate: GateRecord, *, version: str, started: str, seconds: float) -> Run:
    """The model of a run, out of what its items carried.

    Args:
        gate: its counts are taken from the items.
        version: of pytest-diffopt. started: ISO 8601. seconds: how long it took.
    """
    groups: dict[tuple[str, str], list[Carried]] = {}
    for item in items:
        groups.setdefault((item.source, item.recipe), []).append(item)
    recipes = tuple(_recipe(group) for group in groups.values())
    counts = Counter(verdict.status for recipe in recipes for verdict in recipe.verdicts)
    return Run(
        pytest_diffopt=version,
        started=started,
        seconds=round(seconds, 3),
        accelerators=_distinct(recipe.key for recipe in recipes),
        gate=gate.model_copy(update={"counts": dict(counts)}),
        recipes=recipes,
    )


def to_json(run: Run) -> str:
    """The run as JSON text."""
    return run.model_dump_json() + "\n"


def from_json(text: str) -> Run:
    """The inverse of :func:`to_json`.

    Raises:
        ValueError: the text is of another schema version, or damaged.
    """
    data = json.loads(text)
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(f"report: found schema version {found!r}; this release reads {SCHEMA_VERSION}")
    return Run.model_validate(data)


def schema_text() -> str:
    """The JSON schema of reports, as docs/report.schema.json has it."""
    schema = Run.model_json_schema(mode="serialization")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def _recipe(items: Sequence[Carried]) -> RecipeRun:
    (row, *_) = merged(row for item in items for row in item.rows)
    verdicts = [_verdict(item) for item in items]
    records = sorted((item for item in items if item.record is not None), key=lambda item: item.check == "baseline")
    record = records[-1].record if records else None  # that of the check baseline is the fullest
    residencies = {kind: held for item in items for kind, held in item.residencies.items()}
    first = items[0]
    figures = Figures(**{name: row.get(name) for name in Figures.model_fields})
    return RecipeRun(
        recipe=first.recipe,
        source=first.source,
        file=next((item.file for item in items if item.file), ""),
        line=next((item.line for item in items if item.line is not None), None),
        status=_status(worst({str(place): verdict.status for place, verdict in enumerate(verdicts)})),
        figures=figures,
        verdicts=tuple(verdicts),
        parity=_parity(verdicts),
        baseline=_comparison(verdicts, figures, (record or {}).get("record", {})),
        places=_places(verdicts, (record or {}).get("record", {})),
        residency=residencies.get("observed"),
        forecast_residency=residencies.get("forecast"),
        key=record["key"] if record is not None else None,
        record=dict(record["record"]) if record is not None else None,
    )


def _status(text: str) -> Any:
    return text or "skipped"


def _verdict(item: Carried) -> VerdictRecord:
    held = item.verdict or {}
    return VerdictRecord(
        check=item.check,
        status=_status(item.status),
        sentence=item.sentence,
        figures=held.get("figures", {}),
        evidence=tuple(held.get("evidence", ())),
        traceback=tuple(held.get("traceback", ())),
    )


def _figures_of(verdicts: Iterable[VerdictRecord], check: str) -> Mapping[str, Any]:
    return next((verdict.figures for verdict in verdicts if verdict.check == check), {})


def _parity(verdicts: Sequence[VerdictRecord]) -> tuple[ComponentParity, ...]:
    found = _figures_of(verdicts, "parity").get("components", {})
    return tuple(ComponentParity(component=name, **figures) for name, figures in found.items())


_UNITS = {"load_peak_bytes": "B", "peak_bytes": "B"}


def _comparison(verdicts: Sequence[VerdictRecord], figures: Figures, record: Mapping[str, Any]) -> Comparison | None:
    verdict = next((one for one in verdicts if one.check == "baseline"), None)
    if verdict is None:
        return None
    held = verdict.figures
    changes = []
    if recorded := held.get("recorded"):
        before = _compared(recorded)
        now = {**figures.model_dump(), **_compared(record)}
        changes = [
            Change(name=name, unit=_UNITS.get(name, ""), recorded=value, now=now.get(name))
            for name, value in before.items()
            if value is not None or now.get(name) is not None
        ]
    return Comparison(
        status=verdict.status,
        sentence=verdict.sentence,
        against=held.get("against"),
        exact_key=bool(held.get("exact_key")),
        differences=tuple(Difference(**one) for one in held.get("differences", ())),
        changes=tuple(changes),
    )


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a record that a baseline has too, by their names in :class:`Figures` where they stand there."""
    peaks, latency = record.get("peaks") or {}, record.get("latency") or {}
    loads = peaks.get("load_bytes")
    found: dict[str, Any] = {}
    if peaks:
        found["load_peak_bytes"] = max(loads) if isinstance(loads, list | tuple) else loads
        found["peak_bytes"] = peaks.get("call_bytes")
    if "required_tolerance" in record:
        found["required_tolerance"] = record["required_tolerance"]
    for name in ("cold", "warm", "steady"):
        ratio = latency.get(name)
        if ratio is not None:
            found[f"{name}_ratio"] = ratio["value"] if isinstance(ratio, Mapping) else ratio
    return found


def _places(verdicts: Sequence[VerdictRecord], record: Mapping[str, Any]) -> tuple[CodePlace, ...]:
    """First those for which a check fails, as it names them; then the others of the record."""
    found = [
        CodePlace(kind="crash", failed=verdict.status == "failed", **verdict.figures["crash"])
        for verdict in verdicts
        if "crash" in verdict.figures
    ]
    found += [
        CodePlace(kind=_KINDS[verdict.check], failed=verdict.status == "failed", **place)
        for verdict in verdicts
        if verdict.check in _KINDS
        for place in verdict.figures.get("places", ())
    ]
    told = {(place.kind, place.component, place.file, place.function) for place in found}
    kinds: tuple[tuple[Literal["graph break", "recompile"], str], ...] = (
        ("graph break", "breaks"),
        ("recompile", "recompiles"),
    )
    for kind, name in kinds:
        for one in record.get(name, ()):
            if (kind, one["component"], one["file"], one["function"]) not in told:
                found.append(
                    CodePlace(
                        kind=kind,
                        component=one["component"],
                        file=one["file"],
                        line=one["line"],
                        function=one["function"],
                        why=one["reason"] if kind == "graph break" else "; ".join(one["guards"]) or "no guard known",
                        count=one["count"],
                    )
                )
    return tuple(found)


_KINDS: dict[str, Literal["graph break", "recompile", "host sync"]] = {
    "graph_breaks": "graph break",
    "recompiles": "recompile",
    "host_syncs": "host sync",
}


def _distinct(keys: Iterable[Key | None]) -> tuple[Key, ...]:
    """Each device once, with the versions of all that ran there: recipes differ in the libraries that quantize them."""
    found: dict[tuple[Any, ...], Key] = {}
    for key in keys:
        if key is None:
            continue
        versions = {name: key.versions.get(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
        place = (key.accelerator, key.device, key.capability, key.compile_backend, *versions.values())
        held = found.get(place)
        found[place] = key if held is None else Key(**{**_fields(held), "versions": {**held.versions, **key.versions}})
    return tuple(found.values())


def _fields(key: Key) -> dict[str, Any]:
    return {name: getattr(key, name) for name in ("accelerator", "device", "capability", "compile_backend")}
