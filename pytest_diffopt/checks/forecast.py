"""forecast: with a full-size model the recipe stays within its ``max_memory``, and fits its ``gpu``.

What is judged was forecast on the simulated accelerator, with no GPU and no weights; the recipe itself need not run.
Not fooled by: an expected peak below the limit whose range reaches over it; a peak of loading above the limit while the
calls stay below; a forecast of another recipe or model than was asked for; numbers that are none, or nought bytes because
nothing came to the accelerator; a forecast without a call; weights that were never there; what could not be known. Only a
forecast whose most is within the limit, with nothing unknown, passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_diffopt.byte_sizes import human, parse_bytes
from pytest_diffopt.checks.evidence import ForecastEvidence, message_lines, shortened
from pytest_diffopt.forecasting.record import CONTEXT_BYTES, Estimate, Fit, Forecast, LiveTensors, PhaseForecast

if TYPE_CHECKING:
    from pytest_diffopt.accelerators.gpus import Card
    from pytest_diffopt.checks.verdict import Status, Verdict
    from pytest_diffopt.recipe import Recipe

NAME = "forecast"

_STATUS: dict[Fit, Status] = {"fits": "passed", "may fit": "unverified", "does not fit": "failed"}
_WORST_FIRST: tuple[Fit, ...] = ("does not fit", "may fit", "fits")


def judge(given: ForecastEvidence) -> Verdict:
    """See the module."""
    made, budget = given.forecast, given.recipe.forecast
    if made is None or budget is None:
        error = given.error or "the recipe has no part forecast"
        sentence = f"no forecast was made: {error.splitlines()[0]}"
        return given.unverified(NAME, sentence, evidence=message_lines(error))
    if why := _not_of_this(given, made) or _no_numbers(made):
        return given.unverified(NAME, why, model=made.model)
    highest = _highest(made)
    peak = highest.peak
    made = replace(
        made,
        peak=peak,
        reserved=_at_least(made.reserved, peak),  # what is allocated is reserved
        unknown=(*made.unknown, *_doubts(given.recipe, made, peak)),
    )
    promises = []
    limit_bytes = parse_bytes(budget.max_memory) if budget.max_memory is not None else None
    if limit_bytes is not None:
        promises.append(_within(made, limit_bytes))
    if given.card is not None:
        promises.append(_on_card(made, given.card))
    if not promises:
        return given.unverified(NAME, "the recipe promises neither max_memory nor gpu", model=made.model)
    fit = next(word for word in _WORST_FIRST if any(promise.fit == word for promise in promises))
    told = "; ".join(promise.words for promise in promises if promise.fit == fit)
    if fit == "may fit" and made.unknown:
        told = f"{told}; unknown: {made.unknown[0].rstrip('.')}"
    figures: dict[str, Any] = {
        "model": made.model,
        "phase": highest.phase,
        "component": highest.component,
        "operation": highest.operation,
        "peak_low_bytes": peak.low,
        "peak_expected_bytes": peak.expected,
        "peak_high_bytes": peak.high,
        "load_peak_bytes": made.load_peak_bytes,
        "call_peak_bytes": made.call_peak_bytes,
        "reserved_expected_bytes": made.reserved.expected,
        "reserved_high_bytes": made.reserved.high,
        "limit_bytes": limit_bytes,
        "gpu": given.card.name if given.card is not None else None,
        "gpu_bytes": given.card.total_bytes if given.card is not None else None,
    }
    return given.verdict(
        NAME,
        _STATUS[fit],
        f"{made.model} peaks at {peak} while {_doing(highest)}: {told}",
        evidence=[*_evidence(made, highest), *(_hints(given.recipe, made, fit) if fit != "fits" else ())],
        **figures,
    )


# What cannot be judged.


def _not_of_this(given: ForecastEvidence, made: Forecast) -> str:
    if made.recipe != given.recipe.name:
        return f"the forecast is of the recipe {made.recipe!r}, not of this one"
    if given.models and made.model.casefold() not in (name.casefold() for name in given.models):
        return f"the forecast is of {made.model}; asked for was {given.models[0]}"
    return ""


def _no_numbers(made: Forecast) -> str:
    for estimate in (made.peak, made.reserved, *(phase.peak for phase in made.phases)):
        numbers = (estimate.low, estimate.expected, estimate.high)
        whole = all(isinstance(number, int) and number >= 0 for number in numbers)
        if not whole or not numbers[0] <= numbers[1] <= numbers[2]:
            shown = ", ".join(map(str, numbers))
            return f"the forecast of {made.model} has no range of bytes where one must be, but {shown}"
    if made.peak.expected == 0:
        return f"nothing of {made.model} was on the accelerator in its forecast"
    return ""


def _doubts(recipe: Recipe, made: Forecast, peak: Estimate) -> Iterator[str]:
    """What makes a forecast no proof that the recipe fits, though its numbers are small."""
    ran = {phase.component for phase in made.phases if phase.phase == "call" and phase.peak.expected > 0}
    if not ran:
        yield "no call was forecast, so the peak of one is not known"
    weights = made.weights_bytes
    if recipe.offloading is None and peak.high < (total := sum(weights.values())):
        yield f"all weights take {human(total)}, so some were never on the accelerator"
    elif recipe.offloading is not None and recipe.offloading.strategy == "model":
        for component in weights.keys() & ran:
            if peak.high < weights[component]:
                yield f"the weights of {component} take {human(weights[component])}, so it was never there as a whole"


# What is promised.


@dataclass(frozen=True)
class _Promise:
    """How far a promise is kept, and in which words."""

    fit: Fit
    words: str


def _within(made: Forecast, limit_bytes: int) -> _Promise:
    fit, limit = made.within(limit_bytes), human(limit_bytes)
    if fit == "does not fit":
        return _Promise(fit, f"{limit} allowed, at least {human(made.peak.low - limit_bytes)} too little")
    if made.peak.high > limit_bytes:
        return _Promise(fit, f"its range reaches {human(made.peak.high - limit_bytes)} over the {limit} allowed")
    return _Promise(fit, f"within the {limit} allowed{_as_far(fit)}")


def _on_card(made: Forecast, card: Card) -> _Promise:
    least, most = CONTEXT_BYTES
    fit, total = made.fit(card), human(card.total_bytes)
    if fit == "does not fit":
        short = human(made.floor_bytes + least - card.total_bytes)
        return _Promise(
            fit, f"the {card.name} has {total}, with CUDA's context of at least {human(least)} {short} too little"
        )
    if (over := made.reserved.high + most - card.total_bytes) > 0:
        return _Promise(
            fit,
            f"with what the allocator reserves and CUDA's context of up to {human(most)} its range reaches {human(over)} "
            f"over the {total} of the {card.name}",
        )
    return _Promise(fit, f"it fits the {total} of the {card.name}{_as_far(fit)}")


def _as_far(fit: Fit) -> str:
    return "" if fit == "fits" else " as far as is known"


# Where the peak is.


def _highest(made: Forecast) -> PhaseForecast:
    """The highest of all phases and of the forecast's own peak: a peak of loading counts too."""
    own = PhaseForecast(made.peak_phase, made.peak_component, made.peak, operation=made.peak_operation)
    first = max([own, *made.phases], key=lambda phase: phase.peak.expected)
    if first.peak.expected == own.peak.expected:  # and then its call is known
        same = (one for one in made.phases if one.peak == own.peak and _at(one) == _at(own))
        first = next(same, own)
    whole = own.peak
    for phase in made.phases:
        whole = _at_least(whole, phase.peak)
    return replace(first, peak=whole)


def _at(phase: PhaseForecast) -> tuple[str, str]:
    return phase.phase, phase.component


def _at_least(one: Estimate, other: Estimate) -> Estimate:
    return Estimate(max(one.low, other.low), max(one.expected, other.expected), max(one.high, other.high))


def _doing(phase: PhaseForecast) -> str:
    who = phase.component or "the pipeline"
    if phase.phase == "call":
        return f"{who} runs" if phase.component else "the pipeline runs between its components"
    return f"{who} {'loads' if phase.phase == 'load' else 'is placed'}"


def _evidence(made: Forecast, highest: PhaseForecast) -> Iterator[str]:
    where = (
        f"call {highest.call}" if highest.phase == "call" else {"load": "loading", "place": "placing"}[highest.phase]
    )
    steps = [where, highest.component, highest.operation]
    yield f"the peak: {', '.join(step for step in steps if step)}; {_calls(made)}"
    yield from shortened([_alive(tensors) for tensors in made.live_at_peak])
    if made.peak.low < made.peak.high:
        yield from (f"the range is wide: {reason}" for reason in made.wide)
    yield from (f"unknown: {reason}" for reason in made.unknown)


def _calls(made: Forecast) -> str:
    sizes = dict.fromkeys("×".join(map(str, size)) for size in made.sizes)
    return f"calls of {made.steps} steps" + (f" at {', '.join(sizes)}" if sizes else "")


def _alive(tensors: LiveTensors) -> str:
    where = "/".join(step for step in (tensors.component or "the pipeline", tensors.module) if step)
    by = f" of {tensors.operation}" if tensors.operation else ""
    count = f" ({tensors.count} tensors)" if tensors.count > 1 else ""
    return f"{human(tensors.bytes)}  {where}  {tensors.kind}{by}{count}"


# What to try.


def _hints(recipe: Recipe, made: Forecast, fit: Fit) -> Iterator[str]:
    weights = sum(tensors.bytes for tensors in made.live_at_peak if tensors.kind == "weights")
    if made.live_at_peak and 2 * weights < sum(tensors.bytes for tensors in made.live_at_peak):
        yield "most of it is working memory: fewer pixels, frames or images a call lower it, and tiling where a VAE runs"
    elif made.weights_bytes:
        largest = max(made.weights_bytes, key=made.weights_bytes.__getitem__)
        if recipe.quantization is None:
            example = f'{{ backend = "bitsandbytes_4bit", components = ["{largest}"] }}'
            yield f"{largest} has {human(made.weights_bytes[largest])} of weights: quantization = {example}"
        if recipe.offloading is None:
            yield 'components need not be there all at once: offloading = { strategy = "model" }'
        elif recipe.offloading.strategy == "model":
            yield f'{largest} need not be there as a whole: offloading = {{ strategy = "group", offload_type = "leaf_level" }}'
    if fit == "may fit" and not made.unknown:
        yield f"up to {human(made.peak.high)} may be taken: promise that, or say in assume what is known of the machine"
