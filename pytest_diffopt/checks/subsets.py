"""The smallest subset of some parts for which a property still holds, found by taking parts away: smallest first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Smallest(Generic[Part]):
    """What a search found.

    Attributes:
        subset: the smallest that holds, the first of its size in the order of the parts; None where the search stopped
            before it knew.
        tried: subsets that were asked about, and answered.
        complete: how many parts a subset may have so that all that are as small or smaller were asked about, from 0; -1
            for none.
    """

    subset: tuple[Part, ...] | None
    tried: int
    complete: int


def smallest(
    parts: Sequence[Part], holds: Callable[[tuple[Part, ...]], bool | None], *, most: int | None = None
) -> Smallest[Part]:
    """The smallest subset that holds, where all parts together are known to.

    Args:
        parts: all of them; the whole is never asked about.
        holds: of a subset, in the order of the parts. None where the question does not apply to it: it does not hold, and
            does not count.
        most: answers after which the search stops; None for no bound.
    """
    tried = 0
    for size in range(len(parts)):
        for subset in itertools.combinations(parts, size):
            if most is not None and tried >= most:
                return Smallest(None, tried, size - 1)
            answer = holds(subset)
            tried += answer is not None
            if answer:
                return Smallest(subset, tried, size - 1)
    return Smallest(tuple(parts), tried, len(parts) - 1)
