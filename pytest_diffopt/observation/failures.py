"""An exception that ended a run, as plain data: where it was raised, in which component, and what is behind it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_diffopt.observation import private_torch
from pytest_diffopt.observation.observation import Failure
from pytest_diffopt.source_places import (
    chain_of,
    first_line_of,
    last_frames,
    last_user_frame,
    message_of,
    raw_frames,
    traceback_lines,
    user_frame,
)

Names = Mapping[int, tuple[str, str]]
"""id of a live module → (component, path in it)."""


def failure_of(error: BaseException, phase: str, names: Names) -> Failure:
    """What is kept of an exception.

    Args:
        phase: that it ended. names: of the modules of the pipeline, as far as there was one.
    """
    # what Dynamo was tracing never ran: its own list of frames has the user's line
    frames = [*raw_frames(error), *private_torch.user_stack(error)]
    user = last_user_frame(frames) or user_frame(error)
    return Failure(
        phase=phase,
        error=type(error).__name__,
        message=message_of(error),
        place=user.place if user is not None else "",
        traceback=traceback_lines(error),
        component=component_of(error, names),
        raised_at=user,
        frames=last_frames(frames),
        behind=tuple(behind(error)),
    )


def behind(error: BaseException) -> Iterator[str]:
    """The exceptions behind one, a line each, and below it where the user's code raised it."""
    for how, one in chain_of(error):
        yield f"{how} {first_line_of(one)}"
        if (frame := last_user_frame(raw_frames(one))) is not None:
            yield f"  {frame}"


def component_of(error: BaseException, names: Names) -> str:
    """The component whose code ran when an exception, or one behind it, was raised; empty where none did."""
    for one in (error, *(found for _, found in chain_of(error))):
        for frame, _ in reversed(list(traceback.walk_tb(one.__traceback__))):
            owner: Any = frame.f_locals.get("self")
            if owner is not None and id(owner) in names:
                return names[id(owner)][0]
    return ""
