"""memory: offloading lowers the peak, offloaded components leave, and nothing grows from call to call.

What must be saved is derived from the sizes of the recipe's own components, never from megabytes that somebody measured on
another card. Not fooled by: a state object that keeps a weight alive on the device though its parameter has left; the peak of
loading mistaken for the call's; a host that has no memory of its own to measure: there the verdict is unverified.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import CallMemory, MemoryRecord

NAME = "memory"

PROMISED_SHARE = 0.5
"""Of what a strategy could save at best: activations, streams and block groups take the rest."""

LEFT_BEHIND = 0.02
"""Of the offloaded bytes may stay: small tensors beside the weights, such as a format's code table."""

GROWTH = 0.005
"""Of the loaded bytes a call may add: more is a leak, as ten calls would show."""


def judge(given: Evidence) -> Verdict:
    """See the module."""
    if verdict := given.did_not_run(NAME):
        return verdict
    memory = given.observation.memory
    if memory is None or not memory.calls:
        device = given.observation.accelerator
        return given.unverified(NAME, f"the device in use, {device}, has no memory of its own that could be measured")
    resident = given.resident
    if resident is None or resident.failure is not None or resident.memory is None or not resident.memory.calls:
        why = resident.failure if resident is not None and resident.failure is not None else "it was not observed"
        return given.unverified(NAME, f"there is no run without offloading to compare with: {why}")
    peak, before = call_peak(memory), call_peak(resident.memory)
    promised = promised_saving(given)
    figures: dict[str, Any] = {
        "call_peak_bytes": peak,
        "load_peak_bytes": memory.load_peak_bytes - memory.before_bytes,
        "reference_call_peak_bytes": before,
        "ratio": round(peak / before, 4) if before else None,
        "promised_saving_bytes": promised,
        "left_bytes": left_behind(given, memory),
        "growth_bytes_per_call": growth(memory),
    }
    problems, evidence = _problems(given, memory, figures)
    if problems:
        return given.failed(NAME, "; ".join(problems), evidence=evidence, **figures)
    return given.passed(
        NAME,
        f"the peak of a call falls from {human(before)} to {human(peak)} "
        f"({peak / before:.2f}×), and {human(figures['left_bytes'])} stay after it",
        **figures,
    )


def _problems(given: Evidence, memory: MemoryRecord, figures: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what is wrong, where and what to try)."""
    limits = given.limits
    peak, before = figures["call_peak_bytes"], figures["reference_call_peak_bytes"]
    promised = figures["promised_saving_bytes"]
    problems: list[str] = []
    evidence: list[str] = []
    if before - peak < promised * PROMISED_SHARE or (promised and peak >= before):
        problems.append(
            f"the peak of a call is {human(peak)}, {human(before)} without offloading: "
            f"{human(max(0, before - peak))} saved, at least {human(int(promised * PROMISED_SHARE))} promised"
        )
        evidence.append(f"the components' sizes allow to save {human(promised)}; see which stay on the accelerator")
    if limits.max_memory_ratio is not None and before and peak / before > limits.max_memory_ratio:
        problems.append(
            f"the peak is {peak / before:.3f} of that without offloading, {limits.max_memory_ratio:g} allowed"
        )
    if limits.max_memory_bytes is not None and peak > limits.max_memory_bytes:
        problems.append(f"the peak of a call is {human(peak)}, {human(limits.max_memory_bytes)} allowed")
    last = memory.calls[-1]
    sizes = {record.name: record.bytes for record in given.observation.components}
    for name in offloaded_components(given):
        stays = last.residency.get(name, 0)
        if stays > LEFT_BEHIND * sizes.get(name, 0):
            problems.append(f"{name} has not left the accelerator after the call")
            evidence.append(f"{name}: {human(stays)} of its {human(sizes.get(name, 0))} stay")
    total = sum(sizes.get(name, 0) for name in offloaded_components(given))
    left = figures["left_bytes"]
    if left > LEFT_BEHIND * total and not any("has not left" in problem for problem in problems):
        problems.append(f"{human(left)} stay on the accelerator after the call, though every parameter has left")
        evidence.append("an object beside the parameters keeps tensors alive: a quantization state, a cache, a hook")
    per_call = figures["growth_bytes_per_call"]
    if per_call > GROWTH * max(1, memory.loaded_bytes - memory.before_bytes, total):
        warm = counted(len(memory.calls) - 1, "warm call")
        problems.append(f"memory grows by {human(int(per_call))} a call, over {warm}")
        evidence.append(f"after each call: {', '.join(human(call.live_bytes) for call in memory.calls)}")
    return problems, evidence


def call_peak(memory: MemoryRecord) -> int:
    """The peak of the warm calls, in bytes, above what was there before the pipeline; of the first where it is alone."""
    calls = memory.calls[1:] or memory.calls
    return max(call.peak_bytes for call in calls) - memory.before_bytes


def offloaded_components(given: Evidence) -> tuple[str, ...]:
    """The components that the recipe offloads; all of them unless it names some."""
    offloading = given.recipe.offloading
    if offloading is None:
        return ()
    if offloading.components is not None:
        return offloading.components
    return tuple(record.name for record in given.observation.components)


def promised_saving(given: Evidence) -> int:
    """What a strategy can save at best, in bytes, by the sizes of the components that it offloads.

    Whole models: all but the largest one, which must be there while it runs. Block by block or leaf by leaf: all of the
    largest one too, though not its largest part; half of it is counted.
    """
    offloading = given.recipe.offloading
    names = offloaded_components(given)
    sizes = [record.bytes for record in given.observation.components if record.name in names]
    if offloading is None or not sizes:
        return 0
    largest = max(sizes)
    if offloading.strategy == "model":
        return sum(sizes) - largest
    return sum(sizes) - largest // 2


def left_behind(given: Evidence, memory: MemoryRecord) -> int:
    """Bytes on the accelerator after the last call beyond the parameters and buffers that stand there."""
    last: CallMemory = memory.calls[-1]
    return max(0, last.live_bytes - memory.before_bytes - sum(last.residency.values()))


def growth(memory: MemoryRecord) -> float:
    """Bytes that each warm call adds, by the smallest step between two of them; 0 where any step adds nothing."""
    live = [call.live_bytes for call in memory.calls[1:]]
    steps = [later - earlier for earlier, later in itertools.pairwise(live)]
    return max(0.0, float(min(steps))) if steps else 0.0


def human(count: int) -> str:
    """Bytes for a person: ``"9.45 MiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
