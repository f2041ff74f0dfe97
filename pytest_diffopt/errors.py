"""Every error that the package raises on purpose.

Each message names what is wrong, where, what was found and what is allowed, so that it can be acted on as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class DiffoptError(Exception):
    """Base of all errors that pytest-diffopt raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: where it stands, what was found there, and what is allowed.

    Args:
        path: dotted path inside the file or object, e.g. ``"recipe.flux.compilation.mode"``.
        found: what stands there, as the author wrote it.
        allowed: what may stand there, or what to do instead.
    """

    path: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}; {self.allowed}"


class RecipeError(DiffoptError, ValueError):
    """A recipe, or a file of recipes, is wrong. Holds every mistake at once.

    Args:
        problems: the mistakes, in the order in which they stand.
        source: the file (or ``"Recipe(...)"``) that holds them.
    """

    def __init__(self, problems: Iterable[Problem], source: str = "recipe") -> None:
        self.problems = tuple(problems)
        self.source = source
        self.recipes: dict[str, Any] = {}  # those of a file that are right, by name
        self.tables: dict[str, Any] = {}  # the same, each matrix as such
        count = len(self.problems)
        lines = [f"{source}: {count} mistake{'' if count == 1 else 's'}"]
        lines += [f"  {problem}" for problem in self.problems]
        super().__init__("\n".join(lines))


class PreparationError(DiffoptError):
    """A live pipeline could not be made out of a recipe: a factory raised, a component is missing, …"""


class ReplicaError(DiffoptError):
    """A replica is unknown, or a hub id resolves to nothing local."""


class ForecastError(DiffoptError):
    """A recipe could not be forecast: what its full-size model needs is not known, or its own code stopped."""


class UnsupportedTorchError(DiffoptError):
    """The installed torch lacks a private name that the compile watch needs."""


class UnverifiableError(DiffoptError):
    """What was asked cannot be judged on this machine; the verdict is ``unverified``, never ``passed``."""


class MarkerError(DiffoptError, TypeError):
    """A marker was used with arguments that it does not take."""


class PageError(DiffoptError):
    """A documentation page cannot be read."""


class BaselineError(DiffoptError):
    """A recorded baseline cannot be used: it is damaged, was changed by hand, or is of a newer release."""
