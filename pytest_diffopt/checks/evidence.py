"""What a check is given: the observation, its reference, and the limits that the recipe promises; or a forecast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.verdict import Status, Verdict
from pytest_diffopt.observation.observation import PREPARING

if TYPE_CHECKING:
    from pytest_diffopt.accelerators.gpus import Card
    from pytest_diffopt.contract import Limits
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.observation.observation import ComponentRecord, Observation, Place
    from pytest_diffopt.recipe import Recipe

SHOWN = 6
"""Lines of evidence that are shown one by one; the rest are counted."""


@dataclass(frozen=True)
class Given:
    """The recipe that is judged, and how a check says its verdict."""

    recipe: Recipe

    def verdict(
        self, check: str, status: Status, sentence: str, *, evidence: Iterable[str] = (), **figures: Any
    ) -> Verdict:
        return Verdict(check, self.recipe.name, status, sentence, figures, tuple(evidence))

    def passed(self, check: str, sentence: str, *, evidence: Iterable[str] = (), **figures: Any) -> Verdict:
        return self.verdict(check, "passed", sentence, evidence=evidence, **figures)

    def failed(self, check: str, sentence: str, *, evidence: Iterable[str] = (), **figures: Any) -> Verdict:
        return self.verdict(check, "failed", sentence, evidence=evidence, **figures)

    def unverified(self, check: str, sentence: str, *, evidence: Iterable[str] = (), **figures: Any) -> Verdict:
        return self.verdict(check, "unverified", sentence, evidence=evidence, **figures)


@dataclass(frozen=True)
class ForecastEvidence(Given):
    """Everything that the check `forecast` may read: no run of the recipe is needed for it.

    Attributes:
        forecast: of the recipe, as its ``forecast`` part asks; None where none could be made.
        error: why none could be made.
        models: the names of the model that was asked for; empty where nobody named one.
        card: that the recipe has to fit; None for none.
    """

    forecast: Forecast | None = None
    error: str = ""
    models: tuple[str, ...] = ()
    card: Card | None = None


@dataclass(frozen=True)
class Evidence(Given):
    """Everything that the other checks may read. A check is a pure function of it.

    Attributes:
        reference: the same recipe, neither compiled nor offloaded, on the same accelerator; None for a check that needs
            none.
        resident: the same recipe without offloading; None where memory is not judged.
    """

    observation: Observation
    limits: Limits
    reference: Observation | None = None
    resident: Observation | None = None

    @property
    def own_calls(self) -> set[int]:
        """The calls that the recipe asks for; the sensitivity run's inputs are ours."""
        return set(range(self.recipe.call.count))

    @property
    def compiling_calls(self) -> set[int]:
        """The recipe's own calls, and the preparation before them, in which a factory may compile as well."""
        return {PREPARING, *self.own_calls}

    def component(self, name: str) -> ComponentRecord | None:
        """What was written down of a component."""
        return next((record for record in self.observation.components if record.name == name), None)

    @property
    def compiled_components(self) -> tuple[str, ...]:
        return tuple(entry.component for entry in self.recipe.compilation)


def message_lines(message: str, most: int = 5) -> list[str]:
    """The rest of an exception's message, without its first line."""
    return [line.rstrip() for line in message.strip().splitlines()[1:] if line.strip()][:most]


def counted(number: int, noun: str) -> str:
    """``1 graph``, ``2 graphs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def placed(found: Iterable[tuple[str, Place, str]]) -> list[dict[str, Any]]:
    """Where a verdict points to, as plain data for its figures: ``{"component", "file", "line", "function", "why", "count"}``.

    Args:
        found: (component, place, why); equal ones are one, and counted.
    """
    counts: dict[tuple[str, str, int, str, str], int] = {}
    for component, place, why in found:
        key = (component, place.file, place.line, place.function, why)
        counts[key] = counts.get(key, 0) + 1
    names = ("component", "file", "line", "function", "why")
    return [{**dict(zip(names, key, strict=True)), "count": count} for key, count in counts.items()]


def shortened(lines: list[str]) -> list[str]:
    """At most :data:`SHOWN` lines, and a last one that counts the rest."""
    rest = len(lines) - SHOWN
    return lines if rest <= 0 else [*lines[:SHOWN], f"… and {rest} more"]


def region_name(component: str, region: str, place: Place) -> str:
    """``transformer/FluxTransformerBlock.forward``: where in the pipeline, and which function."""
    function = place.function or region
    return f"{component}/{function}" if component else function
