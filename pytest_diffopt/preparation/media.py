"""Pictures, masks, control images and videos that a recipe's call takes: made at the call's size, read, or made by a function.

In a recipe a string stands for each, since TOML has no pictures: ``"picture"``, the path of a file, or ``"module:function"``.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.part import did_you_mean
from pytest_diffopt.recipe import is_reference
from pytest_diffopt.references import UnresolvedReference, accepted, resolve

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 128
"""Pixels, where neither the call nor the pipeline says a size."""

FRAMES = 5

_TAKES_MEDIA = re.compile(r"image|mask|video|picture|frames|control|condition|reference")
_IS_NONE = re.compile(r"prompt|embed|scale|guidance|num_|_size|type|mode|path|index|strength|start|end|length|noise")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_VIDEOS = (".mp4", ".gif", ".mov", ".webm", ".avi")


def takes_media(name: str) -> bool:
    """Whether a parameter of a pipeline's call takes pictures or videos, by its name."""
    return bool(_TAKES_MEDIA.search(name)) and not _IS_NONE.search(name)


def is_text(name: str) -> bool:
    """Whether it takes text, by its name: nothing in it is ever made into something else."""
    return "prompt" in name and "embed" not in name and "mask" not in name


def strings_in(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(parameter, string) of every string in a call's table that may stand for something else, in its lists as well."""
    for name, value in table.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, str) and not is_text(name):
                yield name, one


def picture(height: int = SIDE, width: int = SIDE) -> Image:
    """A picture in colours, that is the same in every run."""
    import numpy as np
    from PIL import Image

    down, across = np.mgrid[0:height, 0:width]
    channels = [across * 256 // width, down * 256 // height, (across ^ down) * 2]
    return Image.fromarray(np.stack(channels, -1).astype("uint8"))


def mask(height: int = SIDE, width: int = SIDE) -> Image:
    """White in the middle, where something is to be made, and black around it."""
    import numpy as np
    from PIL import Image

    values = np.zeros((height, width), "uint8")
    values[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
    return Image.fromarray(values)


def control(height: int = SIDE, width: int = SIDE) -> Image:
    """White edges on black, as a detector of edges gives them."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), outline="white", width=2)
    draw.line((0, height - 1, width - 1, 0), fill="white", width=2)
    return image


def video(height: int = SIDE, width: int = SIDE, num_frames: int = FRAMES) -> list[Image]:
    """Pictures that differ."""
    return [picture(height, width).rotate(15 * index) for index in range(num_frames)]


_MADE: dict[str, Callable[..., Any]] = {"picture": picture, "mask": mask, "control": control, "video": video}
WORDS = tuple(_MADE)

ALLOWED = f"{', '.join(map(repr, WORDS))}, a picture's or a video's file, or \"package.module:function\""


def made(at: str, name: str, value: Any, size: Sequence[int], call: int) -> Any:
    """What stands for a value of a call; the value itself where it stands for nothing else.

    Args:
        at: where it stands in the recipe, for the message.
        name: of the parameter. value: as the recipe has it.
        size: ``(height, width)`` or ``(height, width, frames)`` in pixels of the call; empty where nobody says.
        call: from 0; a function may take it, and ``height``, ``width`` and ``num_frames``.

    Raises:
        PreparationError: a string that is none of what may stand there, a file that is not there, a function that is not.
    """
    if isinstance(value, list | tuple) and takes_media(name):
        return [made(at, name, one, size, call) for one in value]
    if not isinstance(value, str) or is_text(name):
        return value
    sides = dict(zip(("height", "width", "num_frames"), size, strict=False))
    if is_reference(value):
        return _by_reference(at, value, sides, call)
    if not takes_media(name):
        return value
    if value in _MADE:
        return _MADE[value](**accepted(_MADE[value], sides))
    if allowed := refused(name, value):
        raise PreparationError(f"{at}: found {value!r}; {allowed}")
    from diffusers.utils import load_image, load_video

    return load_image(value) if Path(value).suffix.lower() in _PICTURES else load_video(value)


def refused(name: str, value: str) -> str:
    """What may stand for a parameter instead of this string; empty where the string may. No module is imported."""
    if is_text(name) or is_reference(value) or not takes_media(name) or value in _MADE:
        return ""
    if Path(value).suffix.lower() not in _PICTURES + _VIDEOS:
        return f"{did_you_mean(value, WORDS)}it takes {ALLOWED}"
    return "" if Path(value).is_file() else "there is no such file"


def _by_reference(at: str, value: str, sides: dict[str, int], call: int) -> Any:
    try:
        found = resolve(value)
    except UnresolvedReference as error:
        raise PreparationError(f"{at}: found {value!r}; it must be importable ({error})") from error
    if not inspect.isroutine(found) and not inspect.isclass(found):
        return copy.deepcopy(found)  # a call may change what it is given
    return found(**accepted(found, {**sides, "call": call}))


def word_for(name: str, value: Any) -> str:
    """What a recipe writes for a picture, a mask or a video that a call was given; empty for anything else."""
    if not takes_media(name):
        return ""
    if isinstance(value, list) and value and hasattr(value[0], "getbands"):
        return "video"
    return ("mask" if "mask" in name else "picture") if hasattr(value, "getbands") else ""


def located(value: Any, folder: Path) -> Any:
    """A value of a call with the files that it names found in a folder, e.g. that of the recipe file."""
    if isinstance(value, Mapping):
        return {name: located(one, folder) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(located(one, folder) for one in value)
    if isinstance(value, str) and Path(value).suffix.lower() in _PICTURES + _VIDEOS and (folder / value).is_file():
        return str(folder / value)
    return value
