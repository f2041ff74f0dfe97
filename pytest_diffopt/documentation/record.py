"""What one run of a block wrote down, as plain data: it crosses processes as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe

Variant = Literal["as written", "eager", "resident"]
"""Which run of a block: ``eager`` neither compiles nor offloads; ``resident`` compiles, and does not offload."""


@dataclass(frozen=True)
class Raised:
    """An exception of the block's code.

    Attributes:
        line: of the page, at which it left the page's code; 0 where it never was in it.
        kinds: names of its class and of those it is derived from.
        missing: the module that an import did not find, or the name that is not defined.
        traceback: the last lines, with the page's own.
    """

    error: str
    message: str
    line: int = 0
    kinds: tuple[str, ...] = ()
    missing: str = ""
    traceback: tuple[str, ...] = ()

    @property
    def first_line(self) -> str:
        return next((line.strip() for line in self.message.splitlines() if line.strip()), "")

    def __str__(self) -> str:
        return f"{self.error}: {self.first_line}" if self.first_line else self.error


@dataclass(frozen=True)
class BlockRun:
    """What one run of a block wrote down.

    Attributes:
        ended: ``ran`` to its end; ``raised``; ``exited`` by sys.exit; ``died``, with its process; ``timed out``.
        how: what is to be said of an end that is neither ``ran`` nor ``raised``.
        own_code_ended: what did not end was ours, not the block's.
        raised: the exception that ended it.
        swallowed: exceptions that its own code caught.
        recipe: of the pipeline that was judged, as the block left it; None where there is none.
        recipe_error: why what is set on the pipeline is no recipe.
        toml: the recipe's text, with what it cannot say.
        observation: of its calls, as JSON; of its layers alone where nothing was called; empty where there is none.
        called: pipelines that were called, by class.
        idle: what was configured and never called, a sentence each.
        not_judged: calls that were made and are not judged, a sentence each.
        beside: what a recipe cannot say.
        shrunk: what was made small.
        pictures: addresses that a generated picture stands for.
        not_there: components that the block names and its pipeline does not have, a sentence each.
        not_encoded: videos that were not written, since nothing that encodes them is installed.
        configured: the parts that the block set on any pipeline or module.
        first_call: which of the block's calls is the first that is judged.
        device_bytes: the most that was allocated on the accelerator; None where it does not count.
        output: the end of what it printed.
        seconds: from its first line to its last.
    """

    ended: Literal["ran", "raised", "exited", "died", "timed out"]
    how: str = ""
    own_code_ended: bool = False
    raised: Raised | None = None
    swallowed: tuple[Raised, ...] = ()
    recipe: Mapping[str, Any] | None = None
    recipe_error: str = ""
    toml: str = ""
    observation: str = ""
    called: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    not_judged: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    shrunk: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    not_encoded: tuple[str, ...] = ()
    not_there: tuple[str, ...] = ()
    configured: tuple[str, ...] = ()
    first_call: int = 0
    device_bytes: int | None = None
    output: str = ""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    accelerator: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockRun:
        """What `to_dict` made."""
        fields = _frozen(data)
        if fields.get("raised"):
            fields["raised"] = _raised(fields["raised"])
        fields["swallowed"] = tuple(_raised(one) for one in fields.get("swallowed", ()))
        return cls(**fields)

    def read_observation(self) -> Observation | None:
        from pytest_diffopt.observation.observation import Observation

        return Observation.from_json(self.observation) if self.observation else None

    def read_recipe(self) -> Recipe | None:
        from pytest_diffopt.recipe import Recipe

        return None if self.recipe is None else Recipe.from_dict(self.recipe)


def _raised(data: Mapping[str, Any]) -> Raised:
    return Raised(**_frozen(data))


def _frozen(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
