"""memory: offloading lowers the peak, offloaded components leave, weights take what their format says, and nothing grows.

What must be saved is derived from the sizes of the recipe's own components, never from megabytes that somebody measured on
another card. Not fooled by: a state object that keeps a weight alive on the device though its parameter has left; a dense
copy beside a quantized weight; the peak of loading mistaken for the call's; a pipeline or a part of it that never ran on the
accelerator, and so has a low peak; layers that were to come in turn and come all at once; what stays after one of the calls
only; memory on another device of the same kind; something kept once mistaken for a leak, or a leak for that; a peak that
grows while nothing stays; what components share counted twice; a reference that is offloaded itself; a host that has no
memory of its own: there the verdict is unverified.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_diffopt.byte_sizes import human
from pytest_diffopt.checks.evidence import Evidence, counted
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.quantization_backends.backend import UNQUANTIZED

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import (
        CallMemory,
        ComponentRecord,
        Layer,
        MemoryRecord,
        Observation,
        Owner,
        PhaseResidency,
    )

NAME = "memory"

PROMISED_SHARE = 0.5
"""Of what a strategy could save at best: activations, streams and block groups take the rest."""

STRAY_SHARE, STRAY_BYTES = 0.001, 4096
"""Of offloaded weights may stay, and bytes that always may: code tables, a scheduler's numbers, buffers."""

CACHED_SHARE = 0.02
"""Of resident weights a pipeline may keep beside them: masks, positions, embeddings of a prompt, a scheduler's steps."""

TABLES_BYTES = 16 * 2**20
"""Of tables of positions a library may keep: they are as large beside a tiny model as beside the whole one."""

ENOUGH_REPEATS = 3
"""Of a call, to tell a slope and its error."""

REPEATS_JUDGED = 6
"""Of repeated calls: what was kept once, or a ring of buffers until it was full, lies before them."""

LEVEL = 4
"""Calls in a row after which as much is there as before: nothing grows, not even at every third call."""

SHARES_SHOWN = 6
"""Owners of memory that a line of evidence names."""


def judge(given: Evidence) -> Verdict:
    """See the module."""
    memory = given.observation.memory
    if memory is None or not memory.calls:
        device = given.observation.accelerator
        return given.unverified(NAME, f"the device in use, {device}, has no memory of its own that could be measured")
    figures: dict[str, Any] = {
        "call_peak_bytes": call_peak(memory),
        "load_peak_bytes": memory.load_peak_bytes - memory.before_bytes,
        "left_bytes": left_behind(memory),
        "growth_bytes_per_call": growth(memory)[0],
        "h2d_bytes": last_call(memory).h2d_bytes,
        "d2h_bytes": last_call(memory).d2h_bytes,
    }
    taken = host_peak(memory)
    if given.limits.max_host_memory_bytes is not None:  # what libraries keep once a process makes it differ by a little
        figures["host_peak_bytes"] = taken
    verdict = (_judge_resident if given.recipe.offloading is None else _judge_offloaded)(given, memory, figures)
    if verdict.status == "passed" and (grown := _grown_untold(memory)):
        why = f"a call left {human(grown)} more than the one before it, and could not be repeated to tell why"
        return given.unverified(NAME, why, evidence=given.observation.notes[-1:], **figures)
    if verdict.status == "passed" and given.limits.max_host_memory_bytes is not None and taken is None:
        why = f"max_host_memory is promised, and nobody counts the host's memory on {given.observation.accelerator}"
        return given.unverified(NAME, why, **figures)
    return verdict


def _judge_resident(given: Evidence, memory: MemoryRecord, figures: dict[str, Any]) -> Verdict:
    """A recipe whose components stay on the accelerator."""
    held = last_call(memory).weights_bytes
    figures["weights_bytes"] = held
    problems, evidence = _common_problems(given, memory, figures)
    if problems:
        return given.failed(NAME, "; ".join(problems), evidence=evidence, **figures)
    if given.limits.max_memory_ratio is not None:
        return given.unverified(
            NAME, "max_memory_ratio is against a run without offloading, and this is one", **figures
        )
    weights = "weights, as large as their formats say," if given.recipe.quantization is not None else "weights"
    return given.passed(
        NAME,
        f"a call peaks at {human(figures['call_peak_bytes'])}, of which {human(held)} are {weights} and nothing grows",
        **figures,
    )


def _judge_offloaded(given: Evidence, memory: MemoryRecord, figures: dict[str, Any]) -> Verdict:
    resident = given.resident
    if resident is None or resident.failure is not None or resident.memory is None or not resident.memory.calls:
        problems, evidence = _common_problems(given, memory, figures)  # these need nothing to compare with
        if problems:
            return given.failed(NAME, "; ".join(problems), evidence=evidence, **figures)
        failure = resident.failure if resident is not None else None
        return given.unverified(
            NAME,
            f"there is no run without offloading to compare with: {failure or 'it was not observed'}",
            evidence=failure.lines if failure is not None else (),
        )
    figures |= {
        "reference_call_peak_bytes": call_peak(resident.memory),
        "promised_saving_bytes": promised_saving(given),
    }
    peak, before = figures["call_peak_bytes"], figures["reference_call_peak_bytes"]
    figures["ratio"] = round(peak / before, 4) if before else None
    missing = _not_resident(resident, resident.memory)
    problems, evidence = _common_problems(given, memory, figures)
    more, further = _offloading_problems(given, memory, figures, comparable=not missing)
    problems, evidence = more + problems, list(dict.fromkeys(further + evidence))
    if problems:
        return given.failed(NAME, "; ".join(problems), evidence=evidence, **figures)
    if missing:
        why = f"the run without offloading is no reference: {missing}; does the pipeline offload by itself?"
        return given.unverified(NAME, why, **figures)
    stays = human(figures["left_bytes"])
    if (by_design := last_call(memory).weights_bytes) > STRAY_BYTES:
        stays += f" and {human(by_design)} that the strategy does not move"
    return given.passed(
        NAME,
        f"the peak of a call falls from {human(before)} to {human(peak)} ({peak / before:.2f}×), and {stays} stay after it",
        **figures,
    )


def _offloading_problems(
    given: Evidence, memory: MemoryRecord, figures: dict[str, Any], *, comparable: bool
) -> tuple[list[str], list[str]]:
    """(what offloading promised and did not do, where and what to try)."""
    limits = given.limits
    peak, before = figures["call_peak_bytes"], figures["reference_call_peak_bytes"]
    promised = figures["promised_saving_bytes"]
    problems: list[str] = []
    evidence: list[str] = []
    if comparable and (before - peak < promised * PROMISED_SHARE or (promised and peak >= before)):
        problems.append(
            f"the peak of a call is {human(peak)}, {human(before)} without offloading: "
            f"{human(max(0, before - peak))} saved, at least {human(int(promised * PROMISED_SHARE))} promised"
        )
        evidence.append(f"the components' sizes allow to save {human(promised)}; see which stay on the accelerator")
        evidence += at_the_peak(memory)
    if limits.max_memory_ratio is not None and before and peak / before > limits.max_memory_ratio:
        problems.append(
            f"the peak is {peak / before:.3f} of that without offloading, {limits.max_memory_ratio:g} allowed"
        )
        evidence += at_the_peak(memory)
    least, what = _least_peak(given)
    if peak < least:
        problems.append(
            f"the peak of a call is {human(peak)}, less than {what} with {human(least)}: "
            f"it did not run on the accelerator"
        )
        evidence.append("something keeps the computation on the host: look at the devices of weights and inputs")
    for record in offloaded_components(given):
        stayed = [
            call
            for call in own_calls(memory)
            if call.residency.get(record.name, 0) > stray(record.bytes) + _stays_by_design(given, call, record.name)
        ]
        if stayed:
            names = ", ".join(stayed[-1].staying.get(record.name, ()))
            # what stays counts more than parameters do, and in the allocator's blocks: it is no part of their bytes
            stays = f"{human(stayed[-1].residency[record.name])} stay, with buffers and quantization state"
            problems.append(f"{record.name} has not left the accelerator after {_which(memory, stayed[-1])}")
            evidence.append(
                f"{record.name}: {stays}; its parameters alone take {human(record.bytes)}{f': {names}, …' if names else ''}"
            )
            if _are_of_adapters(given, record.name, stayed[-1].staying.get(record.name, ())):
                evidence.append(
                    f"{record.name}: an adapter's (LoRA) weights stay: load it before the pipeline is offloaded"
                )
    for earlier, later in _idle_beside(given, memory):
        problems.append(f"{earlier} was still there as a whole when {later} ran, after its own last run")
        evidence.append(
            f"{earlier}: nothing sends it away before {later} comes: name both in the pipeline's model_cpu_offload_seq"
        )
    for name, whole in _whole_at_once(given, memory):
        problems.append(f"all {human(whole)} of {name} were on the accelerator at once, though its layers come in turn")
        evidence.append(
            "something moves the component as a whole: a hook that onloads all of it, or .to() in the pipeline"
        )
    return problems, evidence


def _are_of_adapters(given: Evidence, component: str, names: Sequence[str]) -> bool:
    paths = {layer.path for layer in given.observation.layers if layer.component == component and layer.adapter}
    return bool(names) and all(name.rpartition(".")[0] in paths for name in names)


def _common_problems(given: Evidence, memory: MemoryRecord, figures: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what no recipe may do, where and what to try)."""
    limits = given.limits
    peak = figures["call_peak_bytes"]
    problems: list[str] = []
    evidence: list[str] = []
    first = own_calls(memory)[0].peak_bytes - memory.before_bytes
    # a device that is full while the pipeline loads, or in the first call, never gets to the second
    phases = {"a call": peak, "the first call": first, "loading": memory.load_peak_bytes - memory.before_bytes}
    which, most = max(phases.items(), key=lambda phase: phase[1])
    if limits.max_memory_bytes is not None and most > limits.max_memory_bytes:
        problems.append(f"the peak of {which} is {human(most)}, {human(limits.max_memory_bytes)} allowed")
        if human(most) == human(limits.max_memory_bytes):
            problems[-1] += f" ({most - limits.max_memory_bytes} B more)"
        if which == "loading":
            evidence.append("what loads it puts more on the accelerator than a call needs: offload before it is placed")
        else:
            evidence += at_the_peak(memory, own_calls(memory)[:1] if which == "the first call" else ())
    host = host_peak(memory)
    if limits.max_host_memory_bytes is not None and host is not None and host > limits.max_host_memory_bytes:
        problems.append(f"the peak on the host is {human(host)}, {human(limits.max_host_memory_bytes)} allowed")
        evidence.append("weights wait on the host while they are offloaded, pinned ones in blocks of powers of two")
    over = [call for call in own_calls(memory) if _left_after(memory, call) > _may_stay(given)]
    if over:
        left, which = human(_left_after(memory, over[-1])), _which(memory, over[-1])
        if given.recipe.offloading is None:
            problems.append(f"{left} stay on the accelerator after {which} beside the weights")
            evidence += _who_holds(over[-1]) or [
                "something keeps tensors alive: a dense copy beside a quantized weight, a cache, an output"
            ]
        else:
            problems.append(f"{left} stay on the accelerator after {which}, though every parameter has left")
            evidence += _who_holds(over[-1]) or [
                "an object beside the parameters keeps tensors alive: a quantization state, a cache, a hook"
            ]
        evidence += after_call(memory, over[-1])
    more, further = _growth_problems(memory)
    problems, evidence = problems + more, evidence + further
    if (elsewhere := max(call.elsewhere_bytes for call in memory.calls)) > 0:
        problems.append(f"{human(elsewhere)} on another device of the same kind, which the recipe does not use")
    for name in _on_the_host(given, memory):
        problems.append(f"{name} ran with none of its weights on the accelerator: it computed on the host")
        evidence.append(f"{name}: look at the devices of its weights and inputs")
    evidence += (oversized := _larger_than_their_format(given.observation.layers))[:3]
    if oversized:
        problems.append(f"{counted(len(oversized), 'quantized layer')} larger than the format says")
    return problems, evidence


_HOLDS = {
    "graph": "an autograd graph is kept ({name}): something was called without torch.no_grad()",
    "module": "{bytes} are weights of a {name} that is none of this pipeline's: another one's is on the accelerator",
    "cache": "{bytes} are what the cache of {name} keeps from one call for the next: reset it after a call",
}


def _who_holds(call: CallMemory) -> list[str]:
    return [_HOLDS[one.kind].format(name=one.name, bytes=human(one.bytes)) for one in call.holders[:SHARES_SHOWN]]


def _growth_problems(memory: MemoryRecord) -> tuple[list[str], list[str]]:
    """(what each further call adds, how it went on)."""
    per_call, error = growth(memory)
    repeats = [call for call in memory.calls if call.repeated][-REPEATS_JUDGED:]
    if per_call - 2 * error > 0:
        problem = f"memory grows by {_measured(per_call, error)} a call, over {counted(len(repeats), 'repeated call')}"
        live = [call.live_bytes for call in memory.calls]
        beyond = ", ".join(human(count - min(live)) for count in live)
        return [problem], [f"after each call, beyond the least: {beyond}", *who_grows(memory)]
    per_call, error = peak_growth(memory)
    if per_call - 2 * error > 0:
        problem = f"the peak of a call grows by {_measured(per_call, error)} a call, though no more stays after it"
        peaks = ", ".join(human(call.peak_bytes - memory.before_bytes) for call in memory.calls)
        return [problem], [f"peak of each call: {peaks}", *at_the_peak(memory, memory.calls[-1:])]
    per_call, error = host_growth(memory)
    if per_call - 2 * error > STRAY_BYTES:
        problem = f"memory of the host grows by {_measured(per_call, error)} a call"
        held = ", ".join(human(call.host_bytes or 0) for call in memory.calls)
        return [problem], [
            f"on the host after each call: {held}",
            "something keeps tensors on the host from call to call",
        ]
    return [], []


def host_peak(memory: MemoryRecord) -> int | None:
    """The most bytes of the host, from loading to the last own call; None where nobody counted them."""
    peaks = [memory.load_host_peak_bytes, *(call.host_peak_bytes for call in own_calls(memory))]
    return max((peak for peak in peaks if peak is not None), default=None)


def host_growth(memory: MemoryRecord) -> tuple[float, float]:
    """As :func:`growth`, of what torch takes of the host."""
    held = [call.host_bytes for call in memory.calls if call.repeated and call.host_bytes is not None]
    return _slope(held)


def _measured(per_call: float, error: float) -> str:
    return human(math.ceil(per_call)) + (f" ± {human(math.ceil(error))}" if error else "")


def _larger_than_their_format(layers: tuple[Layer, ...]) -> list[str]:
    """Quantized layers whose stored bytes are more than their format needs, with both numbers."""
    return [
        f"{layer.component}.{layer.path}: {human(stored)} in {layer.format}, {human(most)} at most"
        for layer in layers
        if layer.format not in ("", UNQUANTIZED)
        and (stored := layer.weight_bytes + layer.state_bytes) > (most := format_bytes(layer))
    ]


def format_bytes(layer: Layer) -> int:
    """What a layer of its format takes at most, in bytes, its inner tensors included."""
    library = layer.library or "bitsandbytes"  # observations of before it was written down
    return next(backend for backend in BACKENDS.values() if backend.library == library).most_bytes(layer)


def last_call(memory: MemoryRecord) -> CallMemory:
    """The last call that is the recipe's own."""
    return next((call for call in reversed(memory.calls) if not call.repeated), memory.calls[-1])


def own_calls(memory: MemoryRecord) -> list[CallMemory]:
    """The recipe's own calls and the sensitivity run, the cold one first."""
    return [call for call in memory.calls if not call.repeated] or list(memory.calls)


def call_peak(memory: MemoryRecord) -> int:
    """The peak of the warm calls, in bytes, above what was there before the pipeline; of the first where it is alone."""
    calls = own_calls(memory)[1:] or own_calls(memory)
    return max(call.peak_bytes for call in calls) - memory.before_bytes


def _which(memory: MemoryRecord, call: CallMemory) -> str:
    return "the call" if call is last_call(memory) else f"call {call.call}"


def at_the_peak(memory: MemoryRecord, calls: Sequence[CallMemory] = ()) -> list[str]:
    """A line that says who held what when the calls peaked, and what ran; none where the device does not tell.

    Args:
        calls: the warm ones where none are given.
    """
    among = calls or own_calls(memory)[1:] or own_calls(memory)
    phases = [pair for pair in _phases_of_calls(memory) if any(pair[0] is call for call in among)]
    if memory.residency is None or not phases:
        return []
    _, phase = max(phases, key=lambda pair: pair[0].peak_bytes)
    by = f", while {phase.component or 'the pipeline'} ran {phase.operation}" if phase.operation else ""
    return [f"at the peak ({phase.phase}{by}): {_shares(memory.residency.at(phase.peak_at))}"]


def after_call(memory: MemoryRecord, call: CallMemory) -> list[str]:
    """A line that says whose bytes were there after a call; none where the device does not tell."""
    ends = [phase for one, phase in _phases_of_calls(memory) if one is call]
    if memory.residency is None or not ends:
        return []
    return [f"after {ends[0].phase}: {_shares(memory.residency.at(ends[0].last))}"]


def who_grows(memory: MemoryRecord) -> list[str]:
    """A line that says whose bytes the repeated calls added; none where the device does not tell."""
    repeats = [phase for call, phase in _phases_of_calls(memory) if call.repeated]
    if memory.residency is None or len(repeats) < 2:
        return []
    first, last = (memory.residency.at(phase.last) for phase in (repeats[0], repeats[-1]))
    added = {owner: count - first.get(owner, 0) for owner, count in last.items() if count > first.get(owner, 0)}
    return [f"from {repeats[0].phase} to {repeats[-1].phase} grew: {_shares(added)}"] if added else []


def _phases_of_calls(memory: MemoryRecord) -> list[tuple[CallMemory, PhaseResidency]]:
    # loading stands first; a call that was broken off has a phase and no record
    phases = memory.residency.phases[1:] if memory.residency is not None else ()
    return list(zip(memory.calls, phases, strict=False))


def _shares(held: Mapping[Owner, int]) -> str:
    """The largest of them by name, the rest in one; not what was there before, which a verdict must not depend on."""
    own = [(owner, count) for owner, count in held.items() if owner.kind != "before"]
    parts = [f"{owner} {human(count)}" for owner, count in own[:SHARES_SHOWN]]
    if rest := own[SHARES_SHOWN:]:
        parts.append(f"{len(rest)} more {human(sum(count for _, count in rest))}")
    return ", ".join(parts) or "nothing"


def stray(weights_bytes: int) -> int:
    """Bytes that may lie on the accelerator beside weights of that size."""
    return max(int(STRAY_SHARE * weights_bytes), STRAY_BYTES)


def _stays_by_design(given: Evidence, call: CallMemory, component: str) -> int:
    """Bytes of a component that its strategy does not move.

    Group offloading moves parameters and buffers, not the scales of quantized weights (absmax, SCB); sequential offloading
    moves parameters, and keeps buffers where the component runs.
    """
    strategy = given.recipe.offloading.strategy if given.recipe.offloading is not None else ""
    if strategy == "group":
        own = [layer for layer in given.observation.layers if layer.component == component]
        return sum(layer.state_bytes for layer in own if layer.library in ("", "bitsandbytes"))  # others: in the weight
    return call.buffers.get(component, 0) if strategy == "sequential" else 0


def _may_stay(given: Evidence) -> int:
    """Bytes that may lie on the accelerator beside the weights after a call."""
    total = sum(record.own_bytes for record in given.observation.components)
    if given.recipe.offloading is not None:
        # what a scheduler remembers of its steps stays with offloading and without: offloading never promised to move it
        without = given.resident.memory if given.resident is not None else None
        kept = left_behind(without) if without is not None and without.calls else 0
        return stray(total) + min(kept, int(CACHED_SHARE * total))
    # a dense copy is as large as its layer at least; smaller things a pipeline may well keep
    dense = min((2 * layer.parameters for layer in given.observation.layers if layer.format), default=0)
    return max(int(CACHED_SHARE * total), int(0.9 * dense), STRAY_BYTES)


def offloaded_components(given: Evidence) -> tuple[ComponentRecord, ...]:
    """The components that the recipe offloads: all of them unless it names some, but those that the pipeline's class keeps."""
    offloading = given.recipe.offloading
    if offloading is None:
        return ()
    return tuple(
        record
        for record in given.observation.components
        if not record.kept_resident and (offloading.components is None or record.name in offloading.components)
    )


def promised_saving(given: Evidence) -> int:
    """What a strategy can save at best, in bytes: by the sizes of the components that it offloads, and by what must be there
    while each of them runs.

    Whole models: all but the largest one, which must be there while it runs. Block by block or leaf by leaf: all of the
    largest one too, though not its largest part; half of it is counted.
    """
    offloading = given.recipe.offloading
    sizes = [record.own_bytes for record in offloaded_components(given)]
    if offloading is None or not sizes:
        return 0
    largest = max(sizes)
    by_size = sum(sizes) - (largest if offloading.strategy == "model" else largest // 2)
    resident = given.resident.memory if given.resident is not None else None
    if resident is None or (needed := _needed_at_once(given, resident)) is None:
        return by_size
    return max(0, min(by_size, call_peak(resident) - needed))


def _needed_at_once(given: Evidence, resident: MemoryRecord) -> int | None:
    """Bytes that a call needs at once in any case: what a component works with, in the run without offloading, and what of
    the weights is there meanwhile. None where the device does not tell."""
    offloading = given.recipe.offloading
    warm = own_calls(resident)[1:] or own_calls(resident)
    phases = [phase for call, phase in _phases_of_calls(resident) if any(call is one for one in warm)]
    moved = {record.name: record.own_bytes for record in offloaded_components(given)}
    if offloading is None or not phases:
        return None
    stays = sum(record.own_bytes for record in given.observation.components if record.name not in moved)
    needed = 0
    for name in _ran(given) & {record.name for record in given.observation.components}:
        works = max(phase.at_work.get(name, 0) for phase in phases)
        if offloading.strategy == "model":
            there = sum(moved.get(one, 0) for one in _loaded_with(given, name))
        else:
            sizes = [layer.weight_bytes for layer in given.observation.layers if layer.component == name]
            there = max(sizes, default=0) if name in moved else 0
        needed = max(needed, works + there + stays)
    return needed


def _loaded_with(given: Evidence, name: str) -> set[str]:
    """The components that may be there while one runs as a whole: itself, those that ran and run again, and those that a
    class of diffusers leaves there."""
    allowed = {name}
    for order in _orders(given):
        for other, places in order.items() if name in order else ():
            if places[0] < order[name][-1] and (places[-1] > order[name][0] or _stays(given, order, other, name)):
                allowed.add(other)
    return allowed


def _stays(given: Evidence, order: Mapping[str, Sequence[int]], earlier: str, later: str) -> bool:
    """Whether a class of diffusers leaves a component there until a later one has run, by its own chain."""
    until = next((record.stays_until for record in given.observation.components if record.name == earlier), None)
    if not until:
        return until == ""
    return not any(order[earlier][-1] < place <= order[later][-1] for place in order.get(until, ()))


def _orders(given: Evidence) -> list[dict[str, list[int]]]:
    """Component → the places of its runs in the order of a call; a call each."""
    found: dict[int, dict[str, list[int]]] = {}
    for place, output in enumerate(given.observation.outputs):
        if output.component and output.call in given.own_calls:
            found.setdefault(output.call, {}).setdefault(output.component, []).append(place)
    return list(found.values())


def _idle_beside(given: Evidence, memory: MemoryRecord) -> list[tuple[str, str]]:
    """(component that ran for the last time, component that runs after it with the first one still there as a whole).

    What a class of diffusers leaves there by its own chain stays by design.
    """
    if given.recipe.offloading is None or given.recipe.offloading.strategy != "model":
        return []
    sizes = {record.name: record.own_bytes - stray(record.bytes) for record in offloaded_components(given)}
    order = next(iter(_orders(given)), {})
    found: dict[tuple[str, str], None] = {}
    for call, phase in _phases_of_calls(memory):
        if call.repeated or call.call not in given.own_calls:
            continue
        for later, others in phase.beside.items():
            for earlier, there in others.items():
                done = {earlier, later} <= order.keys() and order[earlier][-1] < order[later][0]
                if (
                    done
                    and {earlier, later} <= sizes.keys()
                    and 0 < sizes[earlier] <= there
                    and 0 < sizes[later] <= phase.weights.get(later, 0)
                    and not _stays(given, order, earlier, later)
                ):
                    found[earlier, later] = None
    return list(found)


def _least_peak(given: Evidence) -> tuple[int, str]:
    """(bytes that must be on the accelerator at once, what they are), of the components that returned something."""
    offloading = given.recipe.offloading
    ran = _ran(given)
    sizes = {record.name: record.bytes for record in offloaded_components(given) if record.name in ran}
    if offloading is None or not sizes:
        return 0, ""
    if offloading.strategy == "model":
        name = max(sizes, key=lambda one: sizes[one])
        return sizes[name], name
    layers = [layer for layer in given.observation.layers if layer.component in sizes]
    largest = max(layers, key=lambda layer: layer.weight_bytes, default=None)
    return (largest.weight_bytes, f"{largest.component}.{largest.path}") if largest is not None else (0, "")


def _ran(given: Evidence, call: int | None = None) -> set[str]:
    """The components that returned something, in any call or in one; of a model, its one component."""
    names = {output.component for output in given.observation.outputs if call in (None, output.call)}
    records = given.observation.components
    return names | ({records[0].name} if "" in names and len(records) == 1 else set())


def _on_the_host(given: Evidence, memory: MemoryRecord) -> list[str]:
    """Components that ran in a call in which none of their weights were on the accelerator; none where it does not tell."""
    offloading = given.recipe.offloading
    # CUDA's history has no operations, and a file is no host memory: weights that come and go count as working memory there
    untold = given.observation.accelerator != "sim" or (offloading is not None and offloading.offload_to_disk_path)
    layered = {layer.component for layer in given.observation.layers}
    compiled = {one.owner for one in given.recipe.compilation}
    found: dict[str, None] = {}
    for call, phase in _phases_of_calls(memory):
        for record in given.observation.components if not call.repeated else ():
            # weights that come out of a cast, a file or another temporary are known by what is computed with them alone
            by_operations = record.name in layered and record.name not in compiled and not untold
            worked = (phase.products if by_operations else phase.working).get(record.name, 0)
            there = phase.weights.get(record.name, 0) or worked
            if record.own_bytes and not there and record.name in _ran(given, call.call):
                found[record.name] = None
    return list(found)


def _whole_at_once(given: Evidence, memory: MemoryRecord) -> list[tuple[str, int]]:
    """(component, bytes) of what was to come layer by layer, and was on the accelerator as a whole in a warm call.

    Only components of many layers, none of which is a large part of it: one or two layers may be there at a time.
    """
    offloading = given.recipe.offloading
    if offloading is None or not (
        offloading.strategy == "sequential" or offloading.resolved_offload_type == "leaf_level"
    ):
        return []
    warm = own_calls(memory)[1:] or own_calls(memory)
    phases = [phase for call, phase in _phases_of_calls(memory) if any(call is one for one in warm)]
    found = []
    for record in offloaded_components(given):
        sizes = [layer.weight_bytes for layer in given.observation.layers if layer.component == record.name]
        whole = record.own_bytes - stray(record.bytes) + record.buffer_bytes
        small = sum(sizes) >= record.bytes / 2 and max(sizes, default=0) <= record.bytes / 4
        if small and whole > 0 and any(phase.weights.get(record.name, 0) >= whole for phase in phases):
            found.append((record.name, record.own_bytes))
    return found


def _not_resident(resident: Observation, memory: MemoryRecord) -> str:
    """What of a pipeline that should be on the accelerator as a whole is not; empty where all is."""
    missing = [
        f"{human(record.bytes - there)} of {record.name}'s {human(record.bytes)} are not on the accelerator"
        for record in resident.components
        if (there := memory.loaded_residency.get(record.name, 0)) < record.bytes - stray(record.bytes)
    ]
    return ", ".join(missing[:2])


def left_behind(memory: MemoryRecord) -> int:
    """Bytes on the accelerator after the last call beyond the weights that stand there."""
    return _left_after(memory, last_call(memory))


def _left_after(memory: MemoryRecord, call: CallMemory) -> int:
    # what the pipeline keeps of its results shows once the observation has let them go
    kept = memory.kept_results_bytes if call is last_call(memory) else 0
    tables = min(call.tables_bytes, TABLES_BYTES)
    return max(0, call.live_bytes - memory.before_bytes - call.weights_bytes + kept - tables)


def _grown_untold(memory: MemoryRecord) -> int:
    """Bytes that a call left more than the one before it, where no repeated calls tell a leak from what is kept."""
    if sum(call.repeated for call in memory.calls) >= ENOUGH_REPEATS:
        return 0
    live = [call.live_bytes for call in own_calls(memory)]
    return max((later - earlier for earlier, later in itertools.pairwise(live)), default=0)


def growth(memory: MemoryRecord) -> tuple[float, float]:
    """(bytes that each call adds, the standard error of that), of calls that were repeated unchanged.

    Calls are repeated where one left more than the one before; where none did nothing grows.
    """
    return _slope([call.live_bytes for call in memory.calls if call.repeated])


def peak_growth(memory: MemoryRecord) -> tuple[float, float]:
    """The same for the peaks of calls with equal inputs; of several kinds of calls, the one that grows most."""
    kinds: dict[str, list[int]] = {}
    for call in memory.calls:
        if call.repeated:
            kinds.setdefault(call.inputs, []).append(call.peak_bytes)
    return max((_slope(peaks) for peaks in kinds.values()), key=lambda one: one[0] - 2 * one[1], default=(0.0, 0.0))


def _slope(values: Sequence[int]) -> tuple[float, float]:
    """(what each step adds to the last values, the standard error of that), by least squares; 0 where the end is level."""
    values = values[-REPEATS_JUDGED:]
    if len(values) < ENOUGH_REPEATS or len(set(values[-LEVEL:])) == 1:
        return 0.0, 0.0
    at = [index - (len(values) - 1) / 2 for index in range(len(values))]
    middle = sum(values) / len(values)
    spread = sum(x * x for x in at)
    slope = sum(x * (y - middle) for x, y in zip(at, values, strict=True)) / spread
    rest = sum((y - middle - slope * x) ** 2 for x, y in zip(at, values, strict=True))
    return slope, math.sqrt(rest / (len(values) - 2) / spread)
