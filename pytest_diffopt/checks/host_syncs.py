"""host_syncs: in a denoising step of a warm call the host waits for the accelerator no more often than the contract allows.

Not fooled by: a wait in the pipeline's own loop, its scheduler or a hook, outside of any model's code; one that comes in a
single step, or in later calls alone; a mask as an index, a ``print``, a blocking copy, which name no ``.item()``; the waits of
offloading, which move weights, and are apart; what only the first call reads, to keep it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, shortened

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import HostSyncs, HostWait, Observation
    from pytest_diffopt.source_places import CodeFrame

NAME = "host_syncs"


def judge(given: Evidence) -> Verdict:
    """See the module."""
    allowed = given.limits.max_host_syncs_per_step
    found = given.observation.host_syncs
    if allowed is None:
        return given.unverified(NAME, "the contract has no max_host_syncs_per_step")
    if found is None:
        return given.unverified(NAME, _who_does_not_tell(given.observation))
    warm = warm_calls(found, given.limits.warmup_calls)
    worst = max((max(found.per_step(call), default=-1) for call in warm), default=-1)
    if worst < 0:
        return given.unverified(NAME, "no denoising step was seen: no component ran in the calls")
    call = next(call for call in warm if worst in found.per_step(call))
    step = found.per_step(call).index(worst)
    waits = [wait for wait in found.waits if wait.call in warm]
    counting = _counting(given, found)
    steps = sum(found.steps[one] for one in warm)
    offloading = sum(wait.count for wait in waits if wait.offloading and wait.step >= 0)
    figures: dict[str, Any] = {
        "most_in_a_step": worst,
        "allowed": allowed,
        "in_steps": sum(wait.count for wait in counting),
        "steps": steps,
        "outside_steps": sum(wait.count for wait in waits if wait.step < 0 and not wait.offloading),
        "offloading": offloading,
        "places": _placed(counting),
    }
    evidence = shortened(_lines(counting, steps))
    if offloading:
        evidence.append(f"not counted: {counted(offloading, 'wait')} of the offloading's own code, which moves weights")
    if worst > allowed:
        where = f"in step {step} of call {call}"
        sentence = (
            f"the host waited {counted(worst, 'time')} for the GPU {where}, {allowed} allowed in a denoising step"
        )
        return given.failed(NAME, sentence, evidence=evidence, **figures)
    if worst == 0:
        return given.passed(NAME, f"the host did not wait for the GPU in {counted(steps, 'denoising step')}", **figures)
    sentence = f"the host waited at most {counted(worst, 'time')} for the GPU in a denoising step, {allowed} allowed"
    return given.passed(NAME, sentence, evidence=evidence, **figures)


def warm_calls(found: HostSyncs, warmup: int) -> list[int]:
    """The calls after the warm-up; the last where there are none."""
    calls = list(range(len(found.steps)))
    return calls[warmup:] or calls[-1:]


def places(given: Evidence) -> list[tuple[str, str]]:
    """Where the host waits in the steps of warm calls, and for what: what two failures may have in common."""
    found = given.observation.host_syncs
    if found is None:
        return []
    return list(dict.fromkeys((f"{w.component} {_at(w.place)}", w.operation) for w in _counting(given, found)))


def _counting(given: Evidence, found: HostSyncs) -> list[HostWait]:
    warm = warm_calls(found, given.limits.warmup_calls)
    return [wait for wait in found.waits if wait.call in warm and wait.step >= 0 and not wait.offloading]


def _who_does_not_tell(observation: Observation) -> str:
    if observation.accelerator == "cpu":
        return "the recipe ran on the host, which waits for no GPU"
    return (
        f"{observation.device} does not tell where the host waits for it; the simulated GPU does: --diffopt-device=sim"
    )


def _lines(waits: Iterable[HostWait], steps: int) -> list[str]:
    """One for each place in a step, the most frequent first."""
    grouped: dict[tuple[str, CodeFrame | None, CodeFrame | None], list[HostWait]] = {}
    for wait in waits:
        grouped.setdefault((wait.component, wait.place, wait.user), []).append(wait)
    lines = []
    for (component, place, user), group in sorted(grouped.items(), key=lambda one: -sum(w.count for w in one[1])):
        times = sum(wait.count for wait in group)
        in_steps = len({(wait.call, wait.step) for wait in group})
        operations = ", ".join(dict.fromkeys(wait.operation for wait in group))
        owner = f"{component} " if component else ""
        text = f" ({place.text})" if place is not None and place.text else ""
        called = f", called from {user.place}" if user is not None else ""
        how_often = f"{counted(times, 'wait')} in {in_steps} of {counted(steps, 'step')}"
        lines.append(f"{owner}{_at(place)}{text}: {how_often}, by {operations}{called}")
    return lines


def _placed(waits: Iterable[HostWait]) -> list[dict[str, Any]]:
    """The same as plain data, as `evidence.placed` has it."""
    counts: Counter[tuple[str, str, int, str, str]] = Counter()
    for wait in waits:
        if (place := wait.place) is not None:
            counts[wait.component, place.file, place.line, place.function, wait.operation] += wait.count
    names = ("component", "file", "line", "function", "why")
    return [{**dict(zip(names, key, strict=True)), "count": count} for key, count in counts.items()]


def _at(place: CodeFrame | None) -> str:
    return place.place if place is not None else "outside of Python"
