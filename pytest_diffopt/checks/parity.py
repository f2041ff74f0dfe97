"""parity: what comes out equals what the eager reference gives, within a tolerance set from measured floors.

The yardstick is measured, not chosen: the reference against itself run again, and against itself in a higher precision.
The optimized run may be no further from the precise one than a small multiple of the reference's own distance, as
PyTorch's benchmarks judge. Beside the distance two more quantities are held: the *gain* (a scale that is wrong by a
little everywhere hides in rounding noise element by element, but not on average) and the largest single difference.

Not fooled by: NaN on both sides; constants on both sides; an output that ignores its inputs; an output whose buffer a
later call overwrote; inputs whose in-place updates were lost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, shortened
from pytest_diffopt.checks.upcasting import what_stays
from pytest_diffopt.errors import UnverifiableError
from pytest_diffopt.preparation.borrowed_state import RNG_NAMES

if TYPE_CHECKING:
    import numpy as np

    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import Observation, Output

    Array = np.ndarray[tuple[int], np.dtype[np.float64]]

NAME = "parity"

RESULT, INPUTS_AFTER = "output", "inputs after the call"
"""What is written for the component of what the pipeline returns, and of what a call leaves in its inputs."""

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
EPSILON |= {"complex128": 2.0**-52, "complex64": 2.0**-23, "uint8": 1.1 / 255, "int8": 1.1 / 127}
"""The spacing of each dtype's numbers at 1; an image in whole bytes moves by one of its 255 steps."""

ROUNDINGS = 0.25
"""Of a dtype's spacing: correct kernels differ by this much even where the reference's own floor happens to be zero."""

ROUNDINGS_OF_SUMS = 16.0
"""The same for float32 and float64: sums of half precision are added up in float32 and rounded once, sums of these in their
own dtype, where another order of the additions moves each sum by several roundings."""

STACKED_ROUNDINGS = 16.0
"""What a stack of layers makes of one rounding; the floor where no run in a higher precision could be had."""

USABLE_FLOOR = 0.25
"""A higher precision that moves the result by more than this is no yardstick: the model decided something else there."""

GAIN_SIGMAS = 2.0
"""How many standard deviations of a healthy mean scale one unit of ``parity_multiple`` allows: six by default."""

INDEPENDENT, PRIOR_RUNS = 256, 4
"""A rounding error has so many independent parts at most, however many elements: behind a stack of layers, behind steps and
a VAE, neighbours round together. Measured over all replicas (``benchmarks/parity.py``); it counts as so many runs beside
those of the reference itself."""

SENSITIVE = 2.0
"""Other inputs must move the output by this many times what a mere repetition does."""

SLICE_ELEMENTS, SLICE_MULTIPLE = 16, 8.0
"""A channel of at least so many elements is compared by itself, with this many times the multiple: fewer scatter more."""

PRIMARY = ("images", "frames", "videos", "audios", "image", "sample", "latents")
"""What a pipeline's result is called, first that is there; else the first tensor counts."""


@dataclass(frozen=True)
class Distance:
    """How far one result is from another, relative to the other's own size.

    Attributes:
        rms: root mean square of the difference over that of the values. largest: greatest difference over the greatest
            value. gain: best-fitting scale minus 1. rest: the rms of what is off beside that scale.
    """

    rms: float
    largest: float
    gain: float
    rest: float


@dataclass(frozen=True)
class Seen:
    """The smallest errors of one tensor that its comparison would have failed, relative to its size.

    Attributes:
        scale: every element times 1 ± so much. error: any difference whose root mean square is so much.
    """

    scale: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """One tensor of the optimized run against the reference: what was found, and what is allowed."""

    output: Output
    found: Distance
    floor: float
    allowed: float
    allowed_largest: float
    allowed_gain: float
    required: float
    slice_excess: float = 0.0
    seen: Seen | None = None

    @property
    def excess(self) -> float:
        """How many times over what is allowed; at most 1 where it is within."""
        return max(self.shares.values())

    @property
    def shares(self) -> dict[str, float]:
        """Quantity → its share of what is allowed of it."""
        return {
            "rms": _ratio(self.found.rms, self.allowed),
            "largest": _ratio(self.found.largest, self.allowed_largest),
            "scale": _ratio(abs(self.found.gain), self.allowed_gain),
            "channel": self.slice_excess,
        }


def judge(given: Evidence) -> Verdict:
    """See the module."""
    reference = given.reference
    if reference is None:
        return given.unverified(NAME, "there is no reference to compare with")
    if reference.failure is not None:
        return given.unverified(
            NAME,
            f"the eager reference did not run: {reference.failure}",
            evidence=[f"in {reference.name}", *reference.failure.lines],
        )
    inlined = set(given.observation.compiles.inlined)
    own, reference = _seen_outside(given.observation, inlined), _seen_outside(reference, inlined)
    dead = _overwritten(own, reference) or _degenerate(own) or _degenerate(reference, " of the eager reference")
    if problem := dead:
        return given.failed(NAME, problem)
    if problem := _not_comparable(own, reference):
        return given.failed(NAME, problem)
    if problem := _insensitive(reference, " of the eager reference") or _insensitive(own):
        return given.failed(
            NAME,
            problem,
            evidence=["an output that ignores its inputs agrees with anything: parity would prove nothing"],
        )
    comparisons = compare(own, reference, given.limits.parity_multiple)
    if not comparisons:
        return given.unverified(NAME, "nothing came out that could be compared")
    worst = max(comparisons, key=lambda c: c.excess)
    required = max(c.required for c in comparisons)
    figures: dict[str, Any] = {
        "required": _short(worst.found.rms),
        "allowed": _short(worst.allowed),
        "required_multiple": _short(required),
        "multiple": given.limits.parity_multiple,
        "worst": describe(worst.output),
        "compared": len(comparisons),
        "yardstick": own_yardstick(reference),
        "components": by_component(comparisons),
    }
    changed = changed_components(given)
    meant = {name for name, how in changed.items() if how == "compiled"} or changed
    seen = {name: found for name, found in seen_in(comparisons).items() if name in meant}
    least = max(seen.items(), key=lambda one: one[1].scale, default=None)
    figures |= {
        "detects": None if least is None else _short(least[1].scale),
        "detects_error": None if least is None else _short(least[1].error),
        "detects_in": "" if least is None else least[0],
    }
    if worst.excess > 1:
        first = next(c for c in comparisons if c.excess > 1)
        return given.failed(
            NAME,
            _blamed(first, comparisons, changed),
            evidence=[
                *shortened([_line(c) for c in comparisons if c.excess > 1]),
                f"a parity_multiple of {required:.3g} would have been required, {given.limits.parity_multiple:g} is set",
            ],
            **figures,
        )
    if reference.content_hash == own.content_hash:
        return given.passed(
            NAME, "the output is alive and repeats; nothing is compiled or offloaded that it could differ by", **figures
        )
    return given.passed(
        NAME,
        f"{counted(len(comparisons), 'tensor')} equal within {worst.allowed:.2g}, {worst.found.rms:.2g} required "
        f"({figures['yardstick']}){_would_have_caught(seen)}",
        **figures,
    )


def _seen_outside(observation: Observation, inlined: set[str]) -> Observation:
    """The observation without what components return that run inside of other compiled code: nobody sees that there."""
    if not inlined:
        return observation
    outputs, precise = (
        tuple(output for output in found if output.component not in inlined)
        for found in (observation.outputs, observation.precise_outputs)
    )
    return replace(observation, outputs=outputs, precise_outputs=precise)


def sharper(verdict: Verdict, wide: Evidence | UnverifiableError, dtype: str) -> Verdict:
    """The verdict of ``contract.parity_dtype``: that of the recipe as it is, where it is no pass, else that in a wider dtype.

    Args:
        wide: the upcast recipe and its reference, or why there is none.
    """
    if verdict.status != "passed":
        return verdict
    if isinstance(wide, UnverifiableError):
        return replace(verdict, status="unverified", sentence=f"cannot be judged in {dtype}: {wide}")
    if (failure := wide.observation.failure) is not None:
        return replace(
            verdict, status="unverified", sentence=f"cannot be judged in {dtype}, where it ends with {failure}"
        )
    found = judge(wide)
    told = [] if found.status == "passed" else [f"as the recipe has it: {verdict.sentence}"]
    return replace(
        found,
        recipe=verdict.recipe,
        sentence=f"{found.sentence}; judged in {dtype}",
        evidence=(*found.evidence, *told, *what_stays(wide.observation)),
        figures={**found.figures, "parity_dtype": dtype},
    )


def own_yardstick(reference: Observation) -> str:
    """What the tolerance was measured against, in words."""
    if reference.precise_outputs:
        return f"against {reference.precise_dtype}"
    return "against the reference run again, and its dtype's rounding"


def by_component(comparisons: Iterable[Comparison]) -> dict[str, dict[str, float | None]]:
    """Component → the worst of its tensors: ``required`` and ``allowed``, relative to their size, the ``floor``, and
    ``excess``, how many times over what is allowed. ``detects`` and ``detects_error`` are the smallest errors in its
    outputs that would have failed, a scale and any other; None where none is known. What the pipeline returns is called
    ``output``."""
    worst: dict[str, Comparison] = {}
    seen = seen_in(comparisons := list(comparisons))
    for c in comparisons:
        name = c.output.component or RESULT
        if name not in worst or c.excess > worst[name].excess:
            worst[name] = c
    return {
        name: {
            "required": _short(c.found.rms),
            "allowed": _short(c.allowed),
            "floor": _short(c.floor),
            "excess": _short(c.excess),
            "detects": _short(seen[name].scale) if name in seen else None,
            "detects_error": _short(seen[name].error) if name in seen else None,
        }
        for name, c in worst.items()
    }


def seen_in(comparisons: Iterable[Comparison]) -> dict[str, Seen]:
    """Component → the smallest errors in all that it returns that this comparison would have failed.

    Of a component's first run in the first call: what comes later may be other than recorded, where that was wrong. The
    coarsest of its tensors counts, so that an error in any one of them is meant.
    """
    found: dict[str, Seen] = {}
    for c in comparisons:
        if c.seen is not None:
            name = c.output.component or RESULT
            before = found.get(name, Seen(0.0, 0.0))
            found[name] = Seen(max(before.scale, c.seen.scale), max(before.error, c.seen.error))
    return found


def changed_components(given: Evidence) -> dict[str, str]:
    """Component → what the recipe has done to it that the reference does without: ``compiled``, or ``offloaded``."""
    names = {record.name: "compiled" for record in given.observation.components if record.compiled}
    names |= dict.fromkeys(given.compiled_components, "compiled")
    if given.recipe.offloading is not None:
        moved = given.recipe.offloading.components or [record.name for record in given.observation.components]
        names = {**dict.fromkeys(moved, "offloaded"), **names}
    if names and all(output.component in ("", INPUTS_AFTER) for output in given.observation.outputs):
        names[RESULT] = names.get("model", "compiled")  # a plain module: what comes out of it is the result
    return names


def percent(share: float) -> str:
    """A share in per cent, two figures, rounded up and never as a power of ten: ``0.42%``."""
    if not 0 < share < math.inf:
        return "0%" if share == 0 else "no size"
    digits = 1 - math.floor(math.log10(float(f"{100 * share:.1e}")))
    rounded = math.ceil(100 * share * 10**digits - 1e-9) / 10**digits
    return f"{rounded:.{max(0, digits)}f}%"


def _would_have_caught(seen: dict[str, Seen]) -> str:
    if not seen:
        return ""
    name, least = max(seen.items(), key=lambda one: one[1].scale)
    where = name if len(seen) == 1 else f"{name}, and smaller ones in {', '.join(n for n in seen if n != name)}"
    return (
        f"; would have caught a scale that is off by {percent(least.scale)}, or any error of {percent(least.error)}, "
        f"in what comes out of {where}"
    )


ENLARGED = 8.0
"""How many times an unseen error of one component may be larger, relative to its size, in one that comes after it."""


def _blamed(first: Comparison, comparisons: list[Comparison], changed: dict[str, str]) -> str:
    """Which component is at fault: the first one to differ, unless one before it may have made that with an error too small
    to be seen in its own output."""
    place = comparisons.index(first)
    name = first.output.component
    seen = seen_in(comparisons)
    before = dict.fromkeys(
        c.output.component
        for c in comparisons[:place]
        if c.output.call == first.output.call and c.output.component in changed and c.output.component != name
    )
    own = (name or RESULT) in changed or not changed or name == INPUTS_AFTER
    if own:
        before = {one: None for one in before if one in seen and ENLARGED * seen[one].error >= first.found.rms}
    if not before:
        return f"{describe(first.output)} is the first to differ: {_measured(first)}"
    unseen = "; ".join(
        f"in {one} itself a scale off by less than {percent(seen[one].scale)} is not seen"
        for one in before
        if one in seen
    )
    suspects = [*before, *([name] if own and name else [])]
    among = " or ".join([", ".join(suspects[:-1]), suspects[-1]] if len(suspects) > 1 else suspects)
    as_it_is = "" if own else f", where the code is that of the reference{' too' if name else ''}"
    return (
        f"{among} is the first to differ: seen in {describe(first.output)}{as_it_is}, {_measured(first)}"
        f"{'; ' if unseen else ''}{unseen}"
    )


def leaf_shown(leaf: str) -> str:
    """A tensor's place in what was returned, as it follows a name; empty for the one that a result is about."""
    return "" if leaf in ("0", "images", "sample") else f".{leaf}"


def describe(output: Output) -> str:
    """Which tensor, in words: ``transformer, step 2 of call 0``."""
    name = output.component or "the output"
    leaf = leaf_shown(output.leaf)
    step = f"step {output.step} of " if output.component and output.component != INPUTS_AFTER else ""
    return f"{name}{leaf}, {step}call {output.call}"


def _measured(c: Comparison) -> str:
    if _ratio(c.found.rms, c.allowed) >= 1:
        return f"by {c.found.rms:.3g} of its size (up to {c.allowed:.3g} allowed, the floor is {c.floor:.3g})"
    if _ratio(c.found.largest, c.allowed_largest) < 1 and c.slice_excess >= 1:
        return f"in one of its channels, by {c.slice_excess:.3g} times what is allowed there"
    if _ratio(abs(c.found.gain), c.allowed_gain) >= 1:
        return f"scaled by {scale_shown(c.found.gain)} on average (up to ±{c.allowed_gain:.2g} allowed)"
    return f"one element by {c.found.largest:.3g} of the largest (up to {c.allowed_largest:.3g} allowed)"


def scale_shown(gain: float) -> str:
    """A scale, with as many places as it takes to be told from 1 by two figures: ``1.0030``, ``0.99999981``."""
    places = 1 - math.floor(math.log10(abs(gain))) if 0 < abs(gain) < 1 else 2
    return f"{1 + gain:.{max(2, places)}f}"


def _line(c: Comparison) -> str:
    return f"{describe(c.output)}: {_measured(c)}"


def _overwritten(own: Observation, reference: Observation) -> str:
    """An output that a later call wrote into, though the eager model's is left alone; empty where there is none."""
    reused = {o.key for o in reference.outputs if o.overwritten}  # a model may return a buffer of its own
    for output in own.outputs:
        if output.overwritten and output.key not in reused:
            later = "run" if output.component else "call"
            return f"{describe(output)} was overwritten by a later {later}: clone it, or do not reuse its buffer"
    return ""


def _degenerate(observation: Observation, whose: str = "") -> str:
    """Why an output proves nothing: missing, not finite, or constant; empty where it is alive."""
    own_calls = _own_calls(observation)
    results = [o for o in observation.outputs if o.component == "" and o.call in own_calls]
    if not results:
        return f"nothing came out{whose}"
    for output in observation.outputs:
        # masks hold infinities on purpose; what a component or the pipeline returns does not
        if not output.finite and output.component != INPUTS_AFTER and output.call in own_calls:
            return f"{describe(output)}{whose} is not finite (NaN or infinity)"
    for call in sorted({o.call for o in results}):
        primary = _primary([o for o in results if o.call == call])
        array = primary.array() if primary is not None else None
        if array is not None and array.size > 1 and array.min() == array.max():
            return f"the output{whose} of call {call} is constant"
    return ""


def _own_calls(observation: Observation) -> set[int]:
    """The calls that the recipe asks for; the inputs of the sensitivity run are ours, and may not suit a model."""
    return {call.index for call in observation.calls if call.kind == "call"}


def _primary(results: list[Output]) -> Output | None:
    """The tensor that a result is about: what pipelines call their images, else the first with several elements."""
    larger = [o for o in results if math.prod(o.shape) > 1]
    named = {o.leaf.split(".")[0]: o for o in reversed(larger)}
    return next((named[name] for name in PRIMARY if name in named), larger[0] if larger else None)


def _not_comparable(own: Observation, reference: Observation) -> str:
    """What is missing or of another shape or dtype in the optimized run; empty where all is there."""
    mine, theirs = {o.key: o for o in own.outputs}, {o.key: o for o in reference.outputs}
    for key, expected in theirs.items():
        found = mine.get(key)
        if found is None:
            return f"{describe(expected)} is missing from the optimized run"
        if found.shape != expected.shape:
            return f"{describe(found)} has shape {list(found.shape)}, {list(expected.shape)} in the eager reference"
        if found.dtype != expected.dtype:
            return f"{describe(found)} is {found.dtype}, {expected.dtype} in the eager reference"
    extra = [o for key, o in mine.items() if key not in theirs]
    if extra:
        return f"{describe(extra[0])} is missing from the eager reference"
    return ""


def _insensitive(observation: Observation, whose: str = "") -> str:
    """Whether other inputs leave the output as it was; empty where it changes, or where no call had other inputs."""
    calls = {c.index: c for c in observation.calls}
    draws = any(change.name in RNG_NAMES for change in observation.state_changes)
    finals: dict[int, list[Output]] = {}
    for output in observation.outputs:
        if output.component == "" and output.call in calls:
            finals.setdefault(output.call, []).append(output)
    first = _primary(finals.get(0, []))
    if first is None or 0 not in calls:
        return ""
    repeated: list[float] = []
    changed: list[float] = []
    for index, outputs in finals.items():
        other = next((o for o in outputs if o.leaf == first.leaf and o.shape == first.shape), None)
        if index == 0 or other is None or not (other.finite and first.finite):
            continue
        same = calls[index].inputs == calls[0].inputs
        if draws and not same and calls[index].kind != "sensitivity":
            continue  # it would differ by what it draws; the sensitivity run draws what the first call drew
        (repeated if same else changed).append(distance(other, first).rms)
    if not changed:
        return ""
    if draws:
        repeated = []
    moved, noise = max(changed), max(repeated, default=0.0)
    if noise > USABLE_FLOOR and moved <= SENSITIVE * noise:
        return f"the output{whose} does not repeat: the same inputs move it by {noise:.3g}, others by {moved:.3g}"
    if moved == 0.0 or moved <= SENSITIVE * noise:
        return f"the output{whose} ignores its inputs: other inputs move it by {moved:.3g}, a repetition by {noise:.3g}"
    return ""


def compare(own: Observation, reference: Observation, multiple: float) -> list[Comparison]:
    """Every tensor of the optimized run against the reference, in the order in which they came out."""
    theirs = {o.key: o for o in reference.outputs}
    # a model that draws numbers draws others in another dtype, and in another call: neither measures rounding then
    draws = any(change.name in RNG_NAMES for change in reference.state_changes)
    precise = {} if draws else {o.key: o for o in reference.precise_outputs}
    floors = {} if draws else repetition_floors(reference)
    alignments = _alignments(reference, precise)
    own_calls = _own_calls(own)
    comparisons = []
    first_runs: dict[str, tuple[int, int]] = {}
    for output in own.outputs:
        expected = theirs[output.key]
        first_run = first_runs.setdefault(output.component, (output.call, output.step))
        if output.call not in own_calls and not (output.finite and expected.finite):
            continue
        rounding = _rounding(epsilon(output, own))
        repeat = floors.get((output.component, output.step, output.leaf), 0.0)
        yardstick = usable(expected, precise.get(output.key))
        slices = 0.0
        if yardstick is not None:
            found, floor = distance(output, yardstick), distance(expected, yardstick)
            aligned = _alignment(alignments.get((output.component, output.leaf), ()), math.prod(output.shape))
            gain_least = 0.0
            slices = _slice_excess(output, yardstick, expected, multiple, rounding)
        else:
            # without a higher precision the floor is what a dtype's rounding does through a stack of layers
            found = distance(output, expected)
            stacked = repeat + STACKED_ROUNDINGS * rounding
            floor = Distance(stacked, 4 * stacked, 0.0, stacked)
            aligned, gain_least = _alignment((), math.prod(output.shape)), 4 * rounding
        # what is allowed of each quantity: a multiple of its measured floor, and some roundings whatever the floor
        rms, largest = max(floor.rms, repeat), 2 * max(floor.largest, repeat)
        per_rest = GAIN_SIGMAS * aligned
        gain_floor, spare_gain = max(gain_least, per_rest * max(rms, found.rest)), rounding / 2
        allowed, allowed_gain = multiple * rms + rounding, multiple * gain_floor + spare_gain
        seen = None
        if first_run == (output.call, output.step) and output.component != INPUTS_AFTER:
            seen = _seen(output, found, allowed, allowed_gain, multiple * per_rest)
        comparisons.append(
            Comparison(
                output=output,
                found=found,
                floor=floor.rms,
                allowed=allowed,
                allowed_largest=multiple * largest + 4 * rounding,
                allowed_gain=allowed_gain,
                seen=seen,
                slice_excess=slices,
                required=max(
                    _needed(found.rms, rounding, rms),
                    _needed(found.largest, 4 * rounding, largest),
                    _needed(abs(found.gain), spare_gain, gain_floor),
                    multiple * slices if slices > 1 else 0.0,
                ),
            )
        )
    return comparisons


def _rounding(spacing: float) -> float:
    """How far correct kernels may differ whatever the floor, in a dtype of that spacing."""
    return spacing * (ROUNDINGS if spacing > EPSILON["float32"] else ROUNDINGS_OF_SUMS)


def _alignments(reference: Observation, precise: dict[Any, Output]) -> dict[tuple[str, str], set[float]]:
    """(component, leaf) → of each of its runs, which share of the reference's own rounding error is a scale.

    An error of independent elements has hardly any: one in the root of their number. Where elements round together the
    share is larger, by chance and of either sign; runs with the same inputs round alike, and count once.
    """
    found: dict[tuple[str, str], set[float]] = {}
    for output in reference.outputs:
        if (yardstick := usable(output, precise.get(output.key))) is not None:
            floor = distance(output, yardstick)
            if 0 < floor.rms < math.inf:
                found.setdefault((output.component, output.leaf), set()).add(floor.gain / floor.rms)
    return found


def _alignment(shares: Collection[float], elements: int) -> float:
    """The standard deviation of that share in a healthy run: of the runs that there are, and of what is known before any."""
    before = PRIOR_RUNS / min(elements, INDEPENDENT)
    return math.sqrt((before + sum(share * share for share in shares)) / (PRIOR_RUNS + len(shares)))


def _seen(output: Output, found: Distance, allowed: float, allowed_gain: float, per_rest: float) -> Seen | None:
    """The smallest errors that would have failed, had this very output had them; None where there is none that would.

    What is already off may lie the other way, and an output that is wrong is rounded to its dtype like any other: both are
    added to what is allowed, and a scale of less than half of the dtype's spacing would have been rounded away.

    Args:
        per_rest: what the allowed scale grows by as the rest of what is off grows.
    """
    import numpy as np

    values = output.array()
    energy = float(values @ values)
    if not (output.finite and energy > 0 and math.isfinite(found.rms) and abs(found.gain) < 1):
        return None
    spacing = EPSILON.get(output.dtype, EPSILON["float32"])
    error = (allowed + found.rms + spacing / math.sqrt(12)) / (1 - spacing)
    # roundings of single elements are even, and their mean scatters by so much
    scatter = spacing * float(np.sqrt(np.sum(values**4))) / energy / math.sqrt(12)
    rounded = spacing / math.sqrt(12)
    off = allowed_gain + abs(found.gain) + spacing / 8 + 3 * scatter + per_rest * rounded
    # what is off beside the scale is scaled too
    share = 1 - abs(found.gain) - per_rest * (found.rest + rounded)
    scale = error / (1 - abs(found.gain))
    if share > 0:
        scale = min(scale, off / share)
    return Seen(max(scale, spacing / 2), error)


def usable(expected: Output, precise: Output | None) -> Output | None:
    """The same tensor in a higher precision, where it went the same way and so can serve as the yardstick."""
    if precise is None or precise.shape != expected.shape or not (precise.finite and expected.finite):
        return None
    return precise if distance(expected, precise).rms <= USABLE_FLOOR else None


def _slice_excess(output: Output, yardstick: Output, expected: Output, multiple: float, rounding: float) -> float:
    """How many times over what is allowed the worst channel is, each compared by itself; 0 where none is judged.

    One large channel must not hide that a small one is lost: the root mean square over all of them does not see it.
    """
    import numpy as np

    if output.stride != 1 or len(output.shape) < 2 or output.dtype.startswith("complex"):
        return 0.0
    worst = 0.0
    found, precise, plain = (o.array().reshape(o.shape) for o in (output, yardstick, expected))
    for axis in {1, len(output.shape) - 1}:
        if output.shape[axis] < 2 or found.size // output.shape[axis] < SLICE_ELEMENTS:
            continue
        others = tuple(k for k in range(len(output.shape)) if k != axis)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            size, floor, difference = (
                np.sqrt(np.mean(values * values, axis=others)) for values in (precise, plain - precise, found - precise)
            )
            allowed = SLICE_MULTIPLE * (multiple * floor + rounding * size)
            excess = np.where(difference > 0, difference / np.maximum(allowed, 1e-300), 0.0)
        judged = size > 1e-6 * size.max()  # a channel that is nothing but rounding of its neighbours has no scale
        if judged.any():
            worst = max(worst, float(np.nanmax(excess[judged])))
    return worst


def repetition_floors(reference: Observation) -> dict[tuple[str, int, str], float]:
    """How far the reference is from itself, run again with the same inputs, by tensor."""
    calls = {c.index: c for c in reference.calls}
    floors: dict[tuple[str, int, str], float] = {}
    first = {(o.component, o.step, o.leaf): o for o in reference.outputs if o.call == 0}
    for output in reference.outputs:
        call, zeroth = calls.get(output.call), calls.get(0)
        # a model may keep state from call to call; a pipeline starts anew with each
        if call is None or zeroth is None or output.call == 0 or call.kind != "call" or not call.prompt:
            continue
        if call.inputs != zeroth.inputs:
            continue
        key = (output.component, output.step, output.leaf)
        if key in first and first[key].shape == output.shape:
            floors[key] = max(floors.get(key, 0.0), distance(output, first[key]).rms)
    return floors


def epsilon(output: Output, observation: Observation) -> float:
    """The rounding of the arithmetic behind an output: of its own dtype, or of the recipe's where that is coarser."""
    own = EPSILON.get(output.dtype, EPSILON["float32"])
    recipe = EPSILON.get(str(observation.recipe.get("dtype") or ""), 0.0)
    weights = [EPSILON.get(o.dtype, 0.0) for o in observation.other_parameters]
    if any(layer.format == "int8" for layer in observation.layers):
        weights.append(EPSILON["float16"])  # 8-bit layers multiply in float16, whatever comes in
    return max([own, recipe, *weights])


def distance(found: Output, expected: Output) -> Distance:
    """How far ``found`` is from ``expected``; both of the same shape."""
    import numpy as np

    a, b = found.array(), expected.array()
    with np.errstate(over="ignore", invalid="ignore"):
        result = _distance(a, b)
        if found.sketch and expected.sketch and a.size == b.size and result.rms < math.inf:
            # elements that are not kept: random sums of all of them differ by as much as the elements themselves do
            elements = math.prod(expected.shape)
            whole = float(np.sqrt(np.mean((found.sums() - expected.sums()) ** 2) / elements))
            size = float(np.sqrt(np.mean(b * b)))
            result = replace(result, rms=max(result.rms, whole / size if size else 0.0))
    return result


def _distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> Distance:
    import numpy as np

    if a.shape != b.shape:
        return Distance(math.inf, math.inf, math.inf, 0.0)
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return Distance(math.inf, math.inf, math.inf, 0.0)
    a, b = a[finite], b[finite]
    size = float(np.sqrt(np.mean(b * b))) if b.size else 0.0
    difference = a - b
    rms = float(np.sqrt(np.mean(difference * difference))) if b.size else 0.0
    if size == 0.0:
        return Distance(0.0 if rms == 0.0 else math.inf, 0.0 if rms == 0.0 else math.inf, 0.0, 0.0)
    largest = float(np.abs(difference).max() / np.abs(b).max())
    energy = float(b @ b)
    gain = float(difference @ b) / energy
    rest = difference - gain * b
    return Distance(rms / size, largest, gain, math.sqrt(float(rest @ rest) / energy))


def _needed(value: float, spare: float, floor: float) -> float:
    """The multiple of a floor that would have allowed a value."""
    return _ratio(max(0.0, value - spare), floor)


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _ratio(value: float, limit: float) -> float:
    if value == 0.0:
        return 0.0
    return value / limit if limit > 0 else math.inf
