"""What a baseline keeps of an observation: its structure, and of times, lines and addresses nothing that moves by itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_diffopt.baseline.outputs import OutputDigest, digests_of
from pytest_diffopt.recipe import ABOUT_THE_VERDICT

if TYPE_CHECKING:
    from pytest_diffopt.observation.observation import MemoryRecord, Observation, Place


@dataclass(frozen=True)
class Break:
    """Graph breaks of one kind: ``count`` in a function, for a reason. ``line`` is the first one's, and not compared."""

    component: str
    file: str
    line: int
    function: str
    reason: str
    skipped_frame: bool
    count: int


@dataclass(frozen=True)
class Recompile:
    """Recompiles of one function for the same failed guards, ``count`` of them. ``line`` is not compared."""

    component: str
    file: str
    line: int
    function: str
    guards: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Engaged:
    """Calls of a component's compiled regions, and how many of them ran compiled code."""

    entries: int
    engaged: int


@dataclass(frozen=True)
class QuantizedLayers:
    """A component's layers of one format: their paths, and the bytes of all their weights and inner tensors."""

    layers: tuple[str, ...]
    weight_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Resident:
    """Component → bytes of its weights on the accelerator: once it was prepared, and after each of the recipe's calls."""

    loaded: dict[str, int]
    calls: tuple[dict[str, int], ...]


@dataclass(frozen=True)
class Peaks:
    """Peaks on the accelerator, in bytes, above what was there before.

    Attributes:
        load_bytes: of each preparation that was measured; libraries load with several threads, so they differ.
        call_bytes: the highest of any call.
        noise: how far the peaks of calls with equal inputs were apart, as a share of the highest; the first call is left out.
    """

    load_bytes: tuple[int, ...]
    call_bytes: int
    noise: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of times, the recipe's to its eager reference's, with the interval that holds it at 95%."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Of a real accelerator: the first call, the second, and those after, each against the same of the eager reference."""

    cold: Ratio | None = None
    warm: Ratio | None = None
    steady: Ratio | None = None


@dataclass(frozen=True)
class Record:
    """What one recipe did, as far as a later run must do the same.

    Attributes:
        recipe: as plain data, without its name and what it says of verdicts; a local pipeline as its file names it.
        failure: the exception that ended its run, by class; ``""`` where none did.
        graphs: component → graphs with operations. ``""`` stands for code outside of any component, here as below.
        limits_exhausted: frames that were refused as a recompile limit was exhausted.
        engaged: of each compiled component. quantized: component → format → layers.
        component_bytes: component → bytes of its parameters, quantization's inner tensors left out.
        residency, peaks: None where the device does not count its memory.
        latency: None on a device that is none of its own. required_tolerance: as parity found it; None where it found none.
        tolerance_floor: what the eager reference itself is off by, as far as parity measured it.
        outputs: a digest of what the eager reference returned, in that order; None where nobody kept one.
    """

    recipe: dict[str, Any]
    failure: str = ""
    graphs: dict[str, int] = field(default_factory=dict)
    breaks: tuple[Break, ...] = ()
    recompiles: tuple[Recompile, ...] = ()
    limits_exhausted: int = 0
    engaged: dict[str, Engaged] = field(default_factory=dict)
    quantized: dict[str, dict[str, QuantizedLayers]] = field(default_factory=dict)
    component_bytes: dict[str, int] = field(default_factory=dict)
    residency: Resident | None = None
    peaks: Peaks | None = None
    latency: Latency | None = None
    required_tolerance: float | None = None
    tolerance_floor: float = 0.0
    outputs: tuple[OutputDigest, ...] | None = None


def record_of(
    observation: Observation,
    *,
    folder: str = "",
    required_tolerance: float | None = None,
    tolerance_floor: float = 0.0,
    load_peaks: tuple[int, ...] = (),
    latency: Latency | None = None,
    reference: Observation | None = None,
) -> Record:
    """What a baseline keeps of an observation.

    Args:
        folder: of the recipe's file: a pipeline in it is kept by its path from there, the same on every machine.
        required_tolerance, tolerance_floor: as the check parity found them.
        load_peaks: of further preparations of the same recipe, in bytes.
        latency: against the eager reference, where it was measured.
        reference: the eager reference, whose outputs are kept.
    """
    compiles = observation.compiles
    graphs: Counter[str] = Counter()
    for frame in compiles.frames:
        graphs[frame.component] += frame.graphs if frame.outcome == "compiled" else 0
    entries: Counter[str] = Counter()
    engaged: Counter[str] = Counter()
    own = {call.index for call in observation.calls if call.kind == "call"}
    for region in compiles.regions:
        if region.call in own:
            entries[region.component] += region.entries
            engaged[region.component] += region.engaged
    return Record(
        recipe=_recipe(observation.recipe, folder),
        failure=observation.failure.error if observation.failure is not None else "",
        graphs={component: count for component, count in sorted(graphs.items()) if count},
        breaks=_breaks(observation),
        recompiles=_recompiles(observation),
        limits_exhausted=len(compiles.limits),
        engaged={component: Engaged(count, engaged[component]) for component, count in sorted(entries.items())},
        quantized=_quantized(observation),
        component_bytes={one.name: one.bytes for one in observation.components},
        residency=_resident(observation.memory, own),
        peaks=_peaks(observation.memory, load_peaks),
        latency=latency,
        required_tolerance=required_tolerance,
        tolerance_floor=tolerance_floor,
        outputs=digests_of(reference) if reference is not None and reference.failure is None else None,
    )


def _recipe(recipe: Mapping[str, Any], folder: str) -> dict[str, Any]:
    kept = {key: value for key, value in recipe.items() if key not in ABOUT_THE_VERDICT}
    pipeline = kept.get("pipeline")
    if folder and isinstance(pipeline, str) and Path(pipeline).is_relative_to(folder):
        kept["pipeline"] = Path(pipeline).relative_to(folder).as_posix()
    return kept


def _breaks(observation: Observation) -> tuple[Break, ...]:
    found: dict[tuple[str, str, str, str, bool], list[int]] = {}
    for one in observation.compiles.graph_breaks:
        file, function = _where(one.place)
        key = (one.component, file, function, _steady(one.reason), one.skipped_frame)
        found.setdefault(key, []).append(one.place.line)
    return tuple(
        Break(component, file, min(lines), function, reason, skipped, len(lines))
        for (component, file, function, reason, skipped), lines in sorted(found.items())
    )


def _recompiles(observation: Observation) -> tuple[Recompile, ...]:
    found: dict[tuple[str, str, str, tuple[str, ...]], list[int]] = {}
    for frame in observation.compiles.recompiles:
        file, function = _where(frame.place)
        guards = tuple(sorted({_steady(guard) for guard in frame.guards}))
        found.setdefault((frame.component, file, function, guards), []).append(frame.place.line)
    return tuple(
        Recompile(component, file, min(lines), function, guards, len(lines))
        for (component, file, function, guards), lines in sorted(found.items())
    )


def _where(place: Place) -> tuple[str, str]:
    """A place's file and function. Dynamo names what it resumes after the line where it left: that is not kept."""
    return place.file, re.sub(r"(torch_dynamo_resume_in_\w+?)_at_\d+", r"\1", place.function)


def _steady(text: str) -> str:
    """A text without what differs from process to process: addresses, and the numbers that stand for objects."""
    return re.sub(r"\b\d{12,}\b", "…", re.sub(r"0x[0-9a-fA-F]+", "0x…", text))


def _quantized(observation: Observation) -> dict[str, dict[str, QuantizedLayers]]:
    found: dict[str, dict[str, list[tuple[str, int, int]]]] = {}
    for layer in observation.layers:
        if layer.format:
            kinds = found.setdefault(layer.component, {})
            kinds.setdefault(layer.format, []).append((layer.path, layer.weight_bytes, layer.state_bytes))
    return {
        component: {
            kind: QuantizedLayers(
                tuple(path for path, _, _ in sorted(layers)),
                sum(weight for _, weight, _ in layers),
                sum(state for _, _, state in layers),
            )
            for kind, layers in sorted(kinds.items())
        }
        for component, kinds in sorted(found.items())
    }


def _resident(memory: MemoryRecord | None, own: set[int]) -> Resident | None:
    if memory is None:
        return None
    calls = tuple(
        dict(sorted(call.residency.items())) for call in memory.calls if call.call in own and not call.repeated
    )
    return Resident(dict(sorted(memory.loaded_residency.items())), calls)


def _peaks(memory: MemoryRecord | None, load_peaks: tuple[int, ...]) -> Peaks | None:
    if memory is None or not memory.calls:
        return None
    same: dict[str, list[int]] = {}
    for call in memory.calls[1:]:  # the first call is also where libraries set things up
        same.setdefault(call.inputs, []).append(call.peak_bytes - memory.before_bytes)
    noise = max(((max(peaks) - min(peaks)) / max(1, *peaks) for peaks in same.values()), default=0.0)
    loads = (memory.load_peak_bytes - memory.before_bytes, *load_peaks)
    return Peaks(tuple(sorted(loads)), memory.call_peak_bytes, round(noise, 6))


def flat(recipe: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A recipe's data as dotted path → value, so that a changed one can be named."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        here = f"{path}.{key}" if path else str(key)
        found |= flat(value, here) if isinstance(value, Mapping) and value else {here: value}
    return found
