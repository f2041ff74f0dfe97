"""What is asked of the process that runs a block, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_diffopt.documentation.record import Variant

ENDED = "ended"
"""The file, in a block's folder, that is there once the block's own code has ended: what runs on is ours."""


@dataclass(frozen=True)
class Code:
    """The text of a block, and where it stands on the page."""

    source: str
    line: int


@dataclass(frozen=True)
class Order:
    """What is to be run, as plain data.

    Attributes:
        name: of the recipe that is read off the block.
        page: the file that tracebacks name.
        before: blocks that run first, in the same namespace; they are not judged.
        folder: the block's own.
        small: whether calls are made small.
        sizes: hub id → height, width and frames of a call of its replica.
        first_call: the first of the block's calls that is judged, by its number; None for the first one with anything
            configured.
        compile_backend: in place of the backends that the block names.
    """

    name: str
    page: str
    block: Code
    before: tuple[Code, ...]
    variant: Variant
    folder: str
    small: bool = True
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    first_call: int | None = None
    compile_backend: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Order:
        """What `dataclasses.asdict` made of one."""
        codes = {"block": Code(**data["block"]), "before": tuple(Code(**one) for one in data["before"])}
        return cls(**{**data, **codes})
