"""A digest of what the eager reference returns: so small that a baseline keeps it, and enough to tell that it moved.

A fault that lies in the library is in a recipe and in its reference alike, and parity cannot see it. What is kept is the
reference's output of a higher precision, where there is one, since a dtype of few bits hides what is small: the values of
some elements, sums of all of them under fixed signs, the size, and by how much any of these moves by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks import parity
from pytest_diffopt.preparation.borrowed_state import RNG_NAMES

if TYPE_CHECKING:
    from pytest_diffopt.observation.observation import Observation, Output

SAMPLES, SUMS = 16, 8
MOST_STEPS = 8
"""Runs of one component that are kept, spread over all of the first call."""

NOISE_MULTIPLE = 8.0
"""How many times its noise a figure may move: other processors and other versions of torch add in other orders."""

STACKED = 16.0
"""Roundings of float32 that its noise is at least: the starting noise, positions and timesteps are made in float32."""

COARSE = 2.0**-10
"""The spacing where a higher precision has no more bits than float16: TF32 on a GPU, 8-bit layers, quantized activations."""


@dataclass(frozen=True)
class OutputDigest:
    """One tensor that a component of the eager reference returned in the first call.

    Attributes:
        component: ``""`` for what the pipeline returns. step: which run of the component, from 0.
        dtype: that the values were computed in: wider than the recipe's, where it could be run in such.
        rms: the size. noise: by how much of it the values move by themselves.
        samples: some elements, chosen by a fixed rule. sums: of all elements under fixed signs. Both in decimals, as text.
        spacing: of the recipe's dtype. rounding, gain: how far the recipe's own dtype is from the values, as root mean square
            relative to the size, and as a scale; None where the values are in that dtype.
    """

    component: str
    step: int
    leaf: str
    dtype: str
    shape: tuple[int, ...]
    rms: float
    noise: float
    samples: str
    sums: str
    spacing: float
    rounding: float | None = None
    gain: float | None = None

    def __post_init__(self) -> None:
        for text, count in ((self.samples, SAMPLES), (self.sums, SUMS)):
            numbers = _numbers(text)
            if len(numbers) != count or not all(map(math.isfinite, numbers)):
                raise ValueError(f"expected {count} finite numbers, got {text[:40]!r}")

    @property
    def key(self) -> tuple[str, int, str]:
        return self.component, self.step, self.leaf

    @property
    def where(self) -> str:
        """``transformer, step 2``."""
        name = (self.component or "the pipeline") + parity.leaf_shown(self.leaf)
        return f"{name}, step {self.step}" if self.component else name

    @property
    def allowed(self) -> float:
        """By how much of its size it may move."""
        return NOISE_MULTIPLE * self.noise


def digests_of(reference: Observation) -> tuple[OutputDigest, ...]:
    """What a baseline keeps of an eager reference's outputs, in the order in which they came; nothing of a model that draws
    random numbers, whose outputs differ from version to version."""
    if any(change.name in RNG_NAMES for change in reference.state_changes):
        return ()
    precise = {output.key: output for output in reference.precise_outputs}
    repeats = parity.repetition_floors(reference)
    of_first_call = [
        one for one in reference.outputs if one.call == 0 and one.component != parity.INPUTS_AFTER and one.finite
    ]
    steps: dict[str, set[int]] = {}
    for one in of_first_call:
        steps.setdefault(one.component, set()).add(one.step)
    kept = {component: _spread(sorted(found)) for component, found in steps.items()}
    digests = []
    for one in of_first_call:
        if one.step in kept[one.component] and not one.dtype.startswith("complex"):
            repeat = repeats.get((one.component, one.step, one.leaf), 0.0)
            found = _digest(one, parity.usable(one, precise.get(one.key)), reference, repeat)
            digests += [found] if found is not None else []
    return tuple(digests)


def _spread(steps: Sequence[int]) -> set[int]:
    if len(steps) <= MOST_STEPS:
        return set(steps)
    return {steps[round(place * (len(steps) - 1) / (MOST_STEPS - 1))] for place in range(MOST_STEPS)}


def _digest(output: Output, precise: Output | None, reference: Observation, repeat: float) -> OutputDigest | None:
    import numpy as np

    values = (precise or output).array()
    rms = float(np.sqrt(np.mean(values * values))) if values.size else 0.0
    if not 0 < rms < math.inf:
        return None
    spacing = parity.epsilon(output, reference)
    rounding = gain = None
    noise = spacing
    if precise is not None:
        apart = parity.distance(output, precise)
        rounding, gain = _short(apart.rms), _short(apart.gain)
        coarse = reference.accelerator == "cuda" or any(
            layer.activations or (layer.format, layer.library) == ("int8", "bitsandbytes") for layer in reference.layers
        )
        finest = COARSE if coarse else parity.EPSILON["float32"]
        # as much of the recipe's own rounding as the wider dtype's spacing is of its spacing
        noise = max(apart.rms * finest / spacing, finest if coarse else STACKED * finest)
    return OutputDigest(
        component=output.component,
        step=output.step,
        leaf=output.leaf,
        dtype=reference.precise_dtype if precise is not None else output.dtype,
        shape=output.shape,
        rms=_short(rms),
        noise=_short(max(noise, repeat)),
        samples=_text(values[_places(values.size)]),
        sums=_text(_signs(values.size) @ values),
        spacing=_short(spacing),
        rounding=rounding,
        gain=gain,
    )


def _places(count: int) -> Any:
    """Indices of the elements that are kept: a multiplicative hash of 0, 1, 2, …, the same for ever."""
    import numpy as np

    hashes = (np.arange(1, SAMPLES + 1, dtype=np.uint64) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    return ((hashes * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def _signs(count: int) -> Any:
    """+1 and -1 of shape (:data:`SUMS`, count), by bits of a hash (the finalizer of MurmurHash3, 32 bits)."""
    import numpy as np

    mask = np.uint64(0xFFFFFFFF)
    mixed = np.arange(1, count + 1, dtype=np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = ((mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)) & mask
    bits = (mixed[None, :] >> np.arange(SUMS, dtype=np.uint64)[:, None]) & np.uint64(1)
    return bits.astype(np.float64) * 2 - 1


@dataclass(frozen=True)
class Moved:
    """A tensor that is not as recorded: ``how`` says more, in words that follow its name. Where its values moved, ``now`` is
    by how much of its size, and ``recorded`` 0."""

    where: str
    how: str
    recorded: float | str
    now: float | str


def first_moved(recorded: Sequence[OutputDigest], now: Sequence[OutputDigest]) -> Moved | None:
    """The first tensor, in the order in which they were computed, that differs by more than its noise."""
    return next(_moved(recorded, now), None)


def _moved(recorded: Sequence[OutputDigest], now: Sequence[OutputDigest]) -> Iterator[Moved]:
    found = {one.key: one for one in now}
    for before in recorded:
        after = found.pop(before.key, None)
        if after is None:
            yield Moved(before.where, "", "there", "missing")
            continue
        if after.shape != before.shape:
            yield Moved(before.where, ": its shape", str(list(before.shape)), str(list(after.shape)))
            continue
        if after.dtype != before.dtype:
            yield Moved(before.where, ": computed in", before.dtype, after.dtype)
            continue
        apart = _apart(before, after)
        if apart > before.allowed:
            scale = after.rms / before.rms - 1
            scaled = f"scaled by {1 + scale:.4f}; " if abs(scale) > apart / 2 else ""
            yield Moved(
                before.where, f" ({scaled}up to {before.allowed:.2g} of its size is rounding)", 0.0, _short(apart)
            )
        else:
            yield from _rounding_moved(before, after)
    for extra in found.values():
        yield Moved(extra.where, "", "missing", "there")


def _apart(before: OutputDigest, after: OutputDigest) -> float:
    """By how much of its size a tensor moved: by its samples, by its sums, and by its size, whichever is the most."""
    count = min(math.prod(before.shape), 2**18)  # of a larger one every n-th element is in the sums
    samples = [b - a for a, b in zip(_numbers(before.samples), _numbers(after.samples), strict=True)]
    sums = [b - a for a, b in zip(_numbers(before.sums), _numbers(after.sums), strict=True)]
    of_samples = math.sqrt(sum(d * d for d in samples) / len(samples))
    of_sums = math.sqrt(sum(d * d for d in sums) / len(sums) / max(1, count))
    return max(of_samples, of_sums, abs(after.rms - before.rms)) / before.rms


def _rounding_moved(before: OutputDigest, after: OutputDigest) -> Iterator[Moved]:
    """Where the recipe's own dtype is further from the wider one than it was: kernels of that dtype alone are at fault."""
    if before.rounding is None or after.rounding is None:
        return
    allowed = 3 * before.rounding + parity.ROUNDINGS * before.spacing
    if after.rounding > allowed:
        how = f": its rounding error in the recipe's dtype (up to {allowed:.2g} allowed)"
        yield Moved(before.where, how, before.rounding, after.rounding)
        return
    if before.gain is None or after.gain is None:
        return
    scatter = GAIN_SIGMAS * before.rounding / math.sqrt(max(1, min(math.prod(before.shape), 2**18)))
    allowed = 2 * abs(before.gain) + scatter + parity.ROUNDINGS * before.spacing
    if abs(after.gain - before.gain) > allowed:
        how = f": its scale in the recipe's dtype (±{allowed:.2g} allowed)"
        yield Moved(before.where, how, before.gain, after.gain)


GAIN_SIGMAS = 6.0 * math.sqrt(2)
"""Of the difference of two mean scales, each with its scatter."""


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def _text(values: Any) -> str:
    return " ".join(f"{value:.9g}" for value in values)


def _short(value: float) -> float:
    return float(f"{value:.9g}")
