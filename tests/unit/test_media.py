"""What stands in a recipe for pictures, masks, control images and videos."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.preparation import media


@pytest.fixture(autouse=True)
def functions() -> Iterator[Any]:
    """A module with things that a recipe can name."""
    module: Any = types.ModuleType("drawn_here")
    module.still = Image.new("RGB", (8, 8), "red")
    module.sized = lambda height, width: Image.new("RGB", (width, height))
    module.numbered = lambda call: call
    module.plain = lambda: "made"
    sys.modules["drawn_here"] = module
    yield module
    del sys.modules["drawn_here"]


def made(name: str, value: Any, size: tuple[int, ...] = (32, 48), call: int = 0) -> Any:
    return media.made(f"call.kwargs.{name}", name, value, size, call)


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        *(
            (name, True)
            for name in ("image", "mask_image", "control_image", "video", "image_2", "ip_adapter_image", "mask")
        ),
        *(
            (name, False)
            for name in ("prompt", "negative_prompt", "image_embeds", "num_images_per_prompt", "control_mode")
        ),
        *(
            (name, False)
            for name in ("controlnet_conditioning_scale", "image_guidance_scale", "num_frames", "output_type")
        ),
    ],
)
def test_what_takes_a_picture_is_known_by_its_name(name: str, takes: bool) -> None:
    assert media.takes_media(name) == takes


def test_each_word_is_made_at_the_calls_size_and_the_same_in_every_run() -> None:
    for word in ("picture", "control", "mask"):
        image = made("image", word)
        assert (image.size, image.mode) == ((48, 32), "L" if word == "mask" else "RGB")
        assert len(np.unique(np.asarray(image))) > 1, "it must not be of one colour"
        assert np.array_equal(np.asarray(image), np.asarray(made("image", word)))
    frames = made("video", "video", (32, 48, 3))
    assert [frame.size for frame in frames] == [(48, 32)] * 3
    assert not np.array_equal(np.asarray(frames[0]), np.asarray(frames[1]))
    assert made("image", "picture", ()).size == (media.SIDE, media.SIDE)
    assert [one.mode for one in made("image", ["picture", "mask"])] == ["RGB", "L"]


def test_a_name_stands_for_what_the_module_has_or_what_its_function_makes(functions: Any) -> None:
    assert made("image", "drawn_here:sized").size == (48, 32)
    assert made("latents", "drawn_here:numbered", call=2) == 2
    assert made("image", "drawn_here:plain") == "made"
    still = made("image", "drawn_here:still")
    assert still == functions.still
    assert still is not functions.still, "a call may change what it is given"


def test_a_file_is_read_and_found_from_the_recipes_folder(tmp_path: Path) -> None:
    Image.new("RGB", (5, 7)).save(tmp_path / "cat.png")
    kwargs = media.located({"image": "cat.png", "images": ["cat.png"], "prompt": "a cat", "n": 1}, tmp_path)
    assert kwargs == {
        "image": str(tmp_path / "cat.png"),
        "images": [str(tmp_path / "cat.png")],
        "prompt": "a cat",
        "n": 1,
    }
    assert made("image", kwargs["image"]).size == (5, 7)


@pytest.mark.parametrize("value", ["a cat", "picture", "drawn_here:plain"])
def test_a_prompt_is_text_whatever_it_says(value: str) -> None:
    assert made("negative_prompt", value) == value
    assert media.refused("negative_prompt", value) == ""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "pictur",
            "did you mean 'picture'? it takes 'picture', 'mask', 'control', 'video', a picture's or a video's file, or",
        ),
        ("nowhere.png", "there is no such file"),
        ("drawn_here:stil", "it must be importable ('drawn_here' has no attribute 'stil'; did you mean 'still'?)"),
    ],
)
def test_what_stands_for_no_picture_is_refused_with_what_may(value: str, said: str) -> None:
    with pytest.raises(PreparationError) as caught:
        made("image", value)
    assert str(caught.value).startswith(f"call.kwargs.image: found {value!r}; {said}")


def test_what_a_call_was_given_is_written_as_its_word() -> None:
    picture = Image.new("RGB", (4, 4))
    words = [media.word_for(*given) for given in (("image", picture), ("mask_image", picture), ("video", [picture]))]
    assert words == ["picture", "mask", "video"]
    assert media.word_for("image", "picture") == media.word_for("prompt", picture) == ""
