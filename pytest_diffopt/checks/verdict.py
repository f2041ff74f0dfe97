"""Verdict: what a check says of a recipe, with one sentence, the numbers and the next step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "unverified"]


@dataclass(frozen=True)
class Verdict:
    """The verdict of one check on one recipe.

    Attributes:
        check: the check's name, e.g. ``"recompiles"``.
        recipe: the recipe's name.
        status: ``unverified`` is never a pass: the check could not be judged, and the sentence says why.
        sentence: what holds or what broke, in one line.
        figures: the numbers behind it, plain data.
        evidence: lines that say where, and what to try.
        traceback: of the exception that ended the recipe's run, with the one verdict that has the cause in full.
    """

    check: str
    recipe: str
    status: Status
    sentence: str
    figures: dict[str, Any] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()
    traceback: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The verdict as a person reads it: ``recipe · check: sentence`` and the evidence, a line each, indented."""
        return "\n".join([f"{self.recipe} · {self.check}: {self.sentence}", *(f"  {line}" for line in self.evidence)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "evidence": list(self.evidence), "traceback": list(self.traceback)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        """The inverse of :meth:`to_dict`."""
        lines = {name: tuple(data.get(name, ())) for name in ("evidence", "traceback")}
        return cls(**{**data, **lines})
