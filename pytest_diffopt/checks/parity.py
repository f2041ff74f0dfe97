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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, shortened

if TYPE_CHECKING:
    import numpy as np

    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import Observation, Output

    Array = np.ndarray[tuple[int], np.dtype[np.float64]]

NAME = "parity"

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "int8": 2.0**-7}
"""The spacing of each dtype's numbers at 1; an image in whole bytes moves by 1/255."""

ROUNDINGS = 0.25
"""Of a dtype's spacing: correct kernels differ by this much even where the reference's own floor happens to be nought."""

STACKED_ROUNDINGS = 16.0
"""What a stack of layers makes of one rounding; the floor where no run in a higher precision could be had."""

USABLE_FLOOR = 0.25
"""A higher precision that moves the result by more than this is no yardstick: the model decided something else there."""

GAIN_SIGMAS = 6.0
"""How many standard errors of its estimate the mean scale may be off before it counts as wrong."""

SENSITIVE = 10.0
"""Other inputs must move the output by this many times what a mere repetition does."""


@dataclass(frozen=True)
class Distance:
    """How far one result is from another, relative to the other's own size.

    Attributes:
        rms: root mean square of the difference over that of the values. largest: greatest difference over the greatest
            value. gain: best-fitting scale minus 1. gain_error: the standard error of that estimate.
    """

    rms: float
    largest: float
    gain: float
    gain_error: float


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

    @property
    def excess(self) -> float:
        """How many times over what is allowed; at most 1 where it is within."""
        return max(
            _ratio(self.found.rms, self.allowed),
            _ratio(self.found.largest, self.allowed_largest),
            _ratio(abs(self.found.gain), self.allowed_gain),
        )


def judge(given: Evidence) -> Verdict:
    """See the module."""
    if verdict := given.did_not_run(NAME):
        return verdict
    reference = given.reference
    if reference is None:
        return given.unverified(NAME, "there is no reference to compare with")
    if reference.failure is not None:
        return given.unverified(
            NAME, f"the eager reference did not run: {reference.failure}", evidence=[f"in {reference.name}"]
        )
    own = given.observation
    if problem := _degenerate(own) or _degenerate(reference, " of the eager reference"):
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
        "required": float(f"{worst.found.rms:.3g}"),
        "allowed": float(f"{worst.allowed:.3g}"),
        "required_multiple": float(f"{required:.3g}"),
        "multiple": given.limits.parity_multiple,
        "worst": describe(worst.output),
        "compared": len(comparisons),
        "yardstick": own_yardstick(reference),
    }
    if worst.excess > 1:
        first = next(c for c in comparisons if c.excess > 1)
        return given.failed(
            NAME,
            f"{describe(first.output)} is the first to differ: {_measured(first)}",
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
        f"({figures['yardstick']})",
        **figures,
    )


def own_yardstick(reference: Observation) -> str:
    """What the tolerance was measured against, in words."""
    if reference.precise_outputs:
        return f"against {reference.precise_dtype}"
    return "against the reference run again, and its dtype's rounding"


def describe(output: Output) -> str:
    """Which tensor, in words: ``transformer, step 2 of call 0``."""
    name = output.component or "the output"
    leaf = "" if output.leaf in ("0", "images", "sample") else f".{output.leaf}"
    step = f"step {output.step} of " if output.component and output.component != "inputs after the call" else ""
    return f"{name}{leaf}, {step}call {output.call}"


def _measured(c: Comparison) -> str:
    if _ratio(c.found.rms, c.allowed) >= 1:
        return f"by {c.found.rms:.3g} of its size (up to {c.allowed:.3g} allowed, the floor is {c.floor:.3g})"
    if _ratio(abs(c.found.gain), c.allowed_gain) >= 1:
        return f"scaled by {1 + c.found.gain:.5f} on average (up to ±{c.allowed_gain:.2g} allowed)"
    return f"one element by {c.found.largest:.3g} of the largest (up to {c.allowed_largest:.3g} allowed)"


def _line(c: Comparison) -> str:
    return f"{describe(c.output)}: {_measured(c)}"


def _degenerate(observation: Observation, whose: str = "") -> str:
    """Why an output proves nothing or was lost: not finite, constant, overwritten; empty where it is alive."""
    results = [o for o in observation.outputs if o.component == ""]
    if not results:
        return f"nothing came out{whose}"
    for output in observation.outputs:
        if output.component == "inputs after the call":
            continue
        if output.overwritten:
            return f"{describe(output)}{whose} was overwritten by a later call: clone it, or do not reuse its buffer"
    for output in observation.outputs:
        # masks hold infinities on purpose; what a component or the pipeline returns does not
        if not output.finite and output.component != "inputs after the call":
            return f"{describe(output)}{whose} is not finite (NaN or infinity)"
    for call in sorted({o.call for o in results}):
        arrays = [o.array() for o in results if o.call == call and math.prod(o.shape) > 1]
        if arrays and all(a.size and a.min() == a.max() for a in arrays):
            return f"the output{whose} of call {call} is constant"
    return ""


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
    """Whether other inputs leave the output as it was; empty where it changes."""
    pairs = _pairs(observation)
    repeated, changed = pairs
    if changed is None:
        return ""
    noise = max((distance(b, a).rms for a, b in repeated), default=0.0)
    moved = max((distance(b, a).rms for a, b in changed), default=math.inf)
    if moved <= SENSITIVE * noise or moved == 0.0:
        return f"the output{whose} ignores its inputs: other inputs move it by {moved:.3g}, a repetition by {noise:.3g}"
    return ""


def _pairs(
    observation: Observation,
) -> tuple[list[tuple[Output, Output]], list[tuple[Output, Output]] | None]:
    """(same inputs, other inputs): pairs of final outputs of two calls; None where no call had other inputs."""
    calls = {c.index: c for c in observation.calls}
    finals: dict[int, dict[str, Output]] = {}
    for output in observation.outputs:
        if output.component == "":
            finals.setdefault(output.call, {})[output.leaf] = output
    if 0 not in finals:
        return [], None
    repeated: list[tuple[Output, Output]] = []
    changed: list[tuple[Output, Output]] = []
    for index in sorted(finals):
        if index == 0 or index not in calls:
            continue
        other = calls[index].kind == "sensitivity" or calls[index].prompt != calls[0].prompt
        both = [
            (finals[0][leaf], output)
            for leaf, output in finals[index].items()
            if leaf in finals[0] and finals[0][leaf].shape == output.shape
        ]
        (changed if other else repeated).extend(both)
    has_prompts = bool(calls[0].prompt) if 0 in calls else False
    return (repeated if has_prompts else []), (changed or None)


def compare(own: Observation, reference: Observation, multiple: float) -> list[Comparison]:
    """Every tensor of the optimized run against the reference, in the order in which they came out."""
    theirs = {o.key: o for o in reference.outputs}
    precise = {o.key: o for o in reference.precise_outputs}
    floors = _repetition_floors(reference)
    usable = _usable(reference)
    comparisons = []
    for output in own.outputs:
        expected = theirs[output.key]
        rounding = ROUNDINGS * _epsilon(output, own)
        yardstick = precise.get(output.key) if usable else None
        repeat = floors.get((output.component, output.step, output.leaf), 0.0)
        if yardstick is not None and yardstick.shape == output.shape and yardstick.finite:
            found, floor = distance(output, yardstick), distance(expected, yardstick)
            gain_floor, error = abs(floor.gain), floor.gain_error
        else:
            # without a higher precision the floor is what a dtype's rounding does through a stack of layers
            found = distance(output, expected)
            stacked = repeat + STACKED_ROUNDINGS * rounding
            floor = Distance(stacked, 4 * stacked, 0.0, found.gain_error)
            gain_floor, error = 4 * rounding, found.gain_error
        # what is allowed of each quantity: a multiple of its measured floor, and some roundings whatever the floor
        rms, largest = max(floor.rms, repeat), 2 * max(floor.largest, repeat)
        spare_gain = GAIN_SIGMAS * error + rounding / 8
        comparisons.append(
            Comparison(
                output=output,
                found=found,
                floor=floor.rms,
                allowed=multiple * rms + rounding,
                allowed_largest=multiple * largest + 4 * rounding,
                allowed_gain=multiple * gain_floor + spare_gain,
                required=max(
                    _needed(found.rms, rounding, rms),
                    _needed(found.largest, 4 * rounding, largest),
                    _needed(abs(found.gain), spare_gain, gain_floor),
                ),
            )
        )
    return comparisons


def _usable(reference: Observation) -> bool:
    """Whether the run in a higher precision went the same way, so that it can serve as the yardstick."""
    theirs = {o.key: o for o in reference.outputs}
    for precise in reference.precise_outputs:
        expected = theirs.get(precise.key)
        if expected is None or expected.shape != precise.shape or not precise.finite:
            return False
        if distance(expected, precise).rms > USABLE_FLOOR:
            return False
    return bool(reference.precise_outputs)


def _repetition_floors(reference: Observation) -> dict[tuple[str, int, str], float]:
    """How far the reference is from itself, run again with the same inputs, by tensor."""
    calls = {c.index: c for c in reference.calls}
    floors: dict[tuple[str, int, str], float] = {}
    first = {(o.component, o.step, o.leaf): o for o in reference.outputs if o.call == 0}
    for output in reference.outputs:
        call, zeroth = calls.get(output.call), calls.get(0)
        if call is None or zeroth is None or output.call == 0 or call.kind != "call" or not call.prompt:
            continue
        if call.prompt != zeroth.prompt or call.size != zeroth.size:
            continue
        key = (output.component, output.step, output.leaf)
        if key in first and first[key].shape == output.shape:
            floors[key] = max(floors.get(key, 0.0), distance(output, first[key]).rms)
    return floors


def _epsilon(output: Output, observation: Observation) -> float:
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
        return _distance(a, b)


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
    error = float(np.sqrt(rest @ rest / max(1, b.size - 1)) / math.sqrt(energy)) if b.size > 1 else 0.0
    return Distance(rms / size, largest, gain, error)


def _needed(value: float, spare: float, floor: float) -> float:
    """The multiple of a floor that would have allowed a value."""
    return _ratio(max(0.0, value - spare), floor)


def _ratio(value: float, limit: float) -> float:
    if value == 0.0:
        return 0.0
    return value / limit if limit > 0 else math.inf
