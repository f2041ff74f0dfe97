"""Which of a recipe's parts a failed check needs: the smallest subset that fails in the same way.

Parts are taken away, smallest subsets first, and each subset is judged by the same check with the limits of the whole
recipe. Not fooled by: a subset that fails for another reason, or that the check does not apply to, or that could not be
judged. What else a recipe says (its dtype, its calls, the tiling of its VAE) stays.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.subsets import smallest
from pytest_diffopt.recipe import Offloading, Quantization, Recipe

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict

MOST_RUNS = 16
"""Subsets that are judged for one failed check: all of four parts, and of more those with up to two or one."""

NOT_SEARCHED = ("forecast",)
"""Checks whose figures fall with each part: without them a recipe takes more, which says nothing of what is wrong."""

_FIELDS = ("quantization", "offloading", "compilation", "attention", "caching", "dynamo")


@dataclass(frozen=True)
class RecipePart:
    """One part that can be taken away: the recipe's key, its place where the key holds several, and how it is called."""

    field: str
    index: int
    label: str


@dataclass(frozen=True)
class Judged:
    """What a check says of a subset: None as its ``status`` where the check does not apply to it. ``causes`` tells failures
    apart: two with a cause in common are the same failure."""

    status: str | None
    causes: frozenset[str] = frozenset()


def parts_of(recipe: Recipe) -> tuple[RecipePart, ...]:
    """Each quantization, compilation and cache, the offloading, the attention backends and the Dynamo settings."""
    parts: list[RecipePart] = []
    for field in _FIELDS:
        held = recipe.quantizations if field == "quantization" else getattr(recipe, field)
        several = held if isinstance(held, tuple) else (held,) if held else ()
        words = [_word(one) for one in several]
        for index, one in enumerate(several):
            word = words[index]
            if isinstance(one, Quantization) and words.count(word) > 1:
                word = f"{word} of {', '.join(one.components or ())}"
            parts.append(RecipePart(field, index, f"{field} ({word})"))
    return tuple(parts)


def _word(part: Any) -> str:
    if isinstance(part, Quantization):
        return part.backend
    if isinstance(part, Offloading):
        return part.strategy
    if hasattr(part, "kind"):
        return f"{part.kind} of {part.component}"
    if hasattr(part, "component"):
        return str(part.component)
    return ", ".join(map(str, part)) if isinstance(part, dict) else str(part)


def with_only(recipe: Recipe, kept: Iterable[RecipePart]) -> Recipe:
    """The recipe with some of its parts; what is no part stays, its contract too."""
    indices: dict[str, list[int]] = {field: [] for field in _FIELDS}
    for part in kept:
        indices[part.field].append(part.index)
    gone = [field for field in _FIELDS if not indices[field]]
    fields: dict[str, Any] = {}
    for field in ("quantization", "compilation", "caching"):
        held = recipe.quantizations if field == "quantization" else getattr(recipe, field)
        fields[field] = tuple(held[index] for index in indices[field])
    if "attention" in gone:
        fields["attention"] = None
    dropped = [field for field in gone if field not in ("attention", "caching") and getattr(recipe, field)]
    return recipe.without(*dropped).replace(**fields, name=recipe.name, isolate=False)


def causes_of(verdict: Verdict, places: Iterable[tuple[str, str]] = ()) -> frozenset[str]:
    """What a failed verdict is about, without the numbers that differ from run to run.

    Args:
        places: of the breaks or recompiles that make it fail, and why each, where the check has such.
    """
    if "error" in verdict.figures:  # the run ended: how, whatever the check
        return frozenset({_stem(verdict.sentence.rpartition(" (while ")[0])})
    if found := frozenset(f"{where} {_stem(why)}" for where, why in places):
        return found
    if verdict.check == "state":
        return frozenset(verdict.figures.get("changed", ()))
    if " is the first to differ: " in verdict.sentence:
        named = verdict.sentence.partition(" is the first to differ: ")[0]
        named = re.sub(r", (?:step \d+ of )?call \d+$", "", named)  # which of its runs it was is no other failure
        return frozenset(f"{one} differs" for one in re.split(r", | or ", named))
    return frozenset(_stem(problem) for problem in verdict.sentence.split("; "))


_NUMBER = re.compile(r"(?<![A-Za-z_])[-+±]?\d[\d.,]*(?:e[-+]?\d+)?(?: ?(?:[KMGT]i?)?B\b)?")


def _stem(text: str) -> str:
    text = re.sub(r"0x[0-9a-fA-F]+", "#", text)
    text = re.sub(r"\b(?:the call|the first call|call \d+)\b", "a call", text)
    return _NUMBER.sub("#", text).strip()


def isolated(recipe: Recipe, verdict: Verdict, judge: Callable[[Recipe], Judged], causes: frozenset[str]) -> Verdict:
    """The failed verdict with a line more, which names the smallest subset of parts that fails in the same way.

    Its status and sentence stay as they are. ``figures["smallest_failing"]`` has the names of the subset's parts, or None
    where the search stopped before it knew.

    Args:
        recipe: the whole.
        judge: the same check, on another recipe, with the whole recipe's limits.
        causes: of the verdict.
    """
    parts = parts_of(recipe)
    if not parts or verdict.check in NOT_SEARCHED:
        return verdict
    answers: dict[tuple[RecipePart, ...], Judged] = {}

    def fails(subset: tuple[RecipePart, ...]) -> bool | None:
        answers[subset] = found = judge(with_only(recipe, subset))
        if found.status is None:
            return None
        return found.status == "failed" and bool(found.causes & causes)

    found = smallest(parts, fails, most=MOST_RUNS)
    figures = {
        "smallest_failing": None if found.subset is None else [part.label for part in found.subset],
        "subsets_judged": found.tried,
    }
    line = _line(parts, found.subset, found.tried, found.complete, answers)
    return dataclasses.replace(verdict, figures={**verdict.figures, **figures}, evidence=(*verdict.evidence, line))


def _line(
    parts: tuple[RecipePart, ...],
    subset: tuple[RecipePart, ...] | None,
    tried: int,
    complete: int,
    answers: dict[tuple[RecipePart, ...], Judged],
) -> str:
    if subset is None:
        fewer = f"none with up to {complete} of the {len(parts)} parts fails" if complete >= 0 else "none fails"
        return f"smallest failing: not found, {fewer} like this; the search stopped after {tried} subsets"
    if not subset:
        return "smallest failing: the bare pipeline fails like this, with none of the recipe's parts"
    line = f"smallest failing: {' + '.join(part.label for part in subset)}"
    smaller = [answers[one] for one in answers if len(one) < len(subset) and set(one) < set(subset)]
    alone = [answers.get((part,), Judged(None)) for part in subset]
    if unsure := [one for one in smaller if one.status == "unverified"]:
        line += f"; {len(unsure)} smaller {'subset' if len(unsure) == 1 else 'subsets'} could not be judged"
    elif len(subset) == 1:
        line += ", alone" if len(parts) > 1 else ""
    elif len(subset) == 2 and all(one.status == "passed" for one in alone):
        line += "; each alone passes"
    elif len(subset) == 2 and all(one.status != "failed" for one in alone):
        line += "; neither fails alone"
    else:
        line += "; no smaller subset fails like this"
    return line
