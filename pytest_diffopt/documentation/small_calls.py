"""Calls are made small: a replica has no use for a megapixel. What was asked for and what was made of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STEPS = 4
TEXT_TOKENS = 64
BATCH = 2

IMAGES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
"""What pipelines call the number of results for each prompt."""

_SIZES = {"height": 64, "width": 64, "num_frames": 5, "video_length": 5}
"""Of a pipeline that no replica stands for; a replica has sizes of its own."""


@dataclass(frozen=True)
class Shrunk:
    """One argument that was made small; ``given`` is None where it was left to the pipeline."""

    name: str
    given: int | None
    used: int

    def __str__(self) -> str:
        return f"{self.name}={'its own' if self.given is None else self.given} as {self.used}"


def made_small(
    arguments: Mapping[str, Any], default_size: tuple[int, ...] | None = None, *, keeps_steps: bool = False
) -> tuple[dict[str, Any], list[Shrunk]]:
    """The arguments of a pipeline's call with nothing large in them, and what was made small.

    Args:
        arguments: all that the call takes, defaults too.
        default_size: of the replica, ``(height, width)`` or ``(height, width, frames)``.
        keeps_steps: for a pipeline that reuses steps: it would have nothing to reuse in a few.
    """
    limits = dict(_SIZES)
    if default_size is not None:
        limits |= dict(zip(("height", "width", "num_frames"), default_size, strict=False))
        limits["video_length"] = limits["num_frames"]
    small = dict(arguments)
    shrunk: list[Shrunk] = []

    def cut(name: str, most: int, *, also_none: bool = False) -> None:
        if name not in small:
            return
        given = small[name]
        too_much = isinstance(given, int) and not isinstance(given, bool) and given > most
        if too_much or (given is None and also_none):
            small[name] = most
            shrunk.append(Shrunk(name, given, most))

    for name, most in limits.items():
        cut(name, most, also_none=True)  # what is left to a pipeline is its own megapixel
    if not keeps_steps:
        cut("num_inference_steps", STEPS)
    cut("max_sequence_length", TEXT_TOKENS)
    for name in IMAGES_PER_PROMPT:
        cut(name, BATCH)
    prompt = small.get("prompt")
    if isinstance(prompt, list) and len(prompt) > BATCH:
        count = len(prompt)
        for name, value in small.items():  # what goes with the prompts goes with fewer
            if isinstance(value, list) and len(value) == count:
                small[name] = value[:BATCH]
        shrunk.append(Shrunk("prompts", count, BATCH))
    return small, shrunk
