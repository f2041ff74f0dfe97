"""A VAE that works tile by tile or image by image: it really does, passes its checks, and is as before after the run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Offloading, Recipe
from pytest_diffopt.accelerators import select
from pytest_diffopt.checks.session import Session
from pytest_diffopt.errors import PreparationError
from pytest_diffopt.preparation.autoencoder import Switched
from pytest_diffopt.preparation.pipeline import prepared

FLUX: dict[str, Any] = {
    "pipeline": "tiny-flux",
    "dtype": "bfloat16",
    "call": Call(num_inference_steps=1, kwargs={"max_sequence_length": 32}),
}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    held = Session()
    yield held
    held.release()


@pytest.mark.parametrize("pipeline", ["tiny-flux", "tiny-sd"])
def test_a_recipe_with_tiles_passes_beside_a_reference_with_tiles(session: Session, pipeline: str) -> None:
    call = Call(num_inference_steps=2, kwargs={"max_sequence_length": 32} if pipeline == "tiny-flux" else {})
    recipe = Recipe(
        "tiled", pipeline, dtype="bfloat16", call=call, offloading=Offloading("model"), vae_tiling=32, vae_slicing=True
    )
    verdicts = {verdict.check: verdict for verdict in session.judge_all(recipe)}
    assert {name: verdict.status for name, verdict in verdicts.items()} == dict.fromkeys(verdicts, "passed"), [
        verdict.text for verdict in verdicts.values()
    ]
    assert recipe.without("offloading", "compilation").vae_tiling == 32


def test_it_works_tile_by_tile_and_the_switches_are_put_back() -> None:
    shapes: list[tuple[int, ...]] = []
    with prepared(Recipe("tiled", vae_tiling=32, **FLUX), select("sim")) as live:
        vae: Any = live.components["vae"]
        assert (vae.use_tiling, vae.use_slicing, vae.tile_sample_min_size) == (True, False, 32)
        vae.decoder.register_forward_pre_hook(lambda _module, given: shapes.append(tuple(given[0].shape)))
        live.run(live.arguments(0))
        live.release()
        assert (vae.use_tiling, vae.tile_sample_min_size) == (False, 64)
    assert len(shapes) > 1
    assert all(max(shape[-2:]) <= 32 // 2 for shape in shapes)


def test_true_takes_the_tiles_of_the_vae_itself() -> None:
    with prepared(Recipe("tiled", vae_tiling=True, **FLUX), select("sim")) as live:
        vae: Any = live.components["vae"]
        assert (vae.use_tiling, vae.tile_sample_min_size) == (True, 64)
        live.release()


class Newer(nn.Module):
    """A VAE that takes the size of its tiles, as those of videos do."""

    def __init__(self) -> None:
        super().__init__()
        self.use_tiling = False
        self.tile_sample_stride_height = 192

    def enable_tiling(self, tile_sample_min_height: int = 256, tile_sample_stride_height: int = 192) -> None:
        self.use_tiling = True
        self.tile_sample_min_height = tile_sample_min_height
        self.tile_sample_stride_height = tile_sample_stride_height


def test_a_vae_that_takes_the_size_is_given_it_and_what_it_did_not_have_goes_again() -> None:
    vae, switched = Newer(), Switched()
    switched.switch_on({"vae": vae}, Recipe("tiled", "tiny-flux", vae_tiling=128))
    assert (vae.use_tiling, vae.tile_sample_min_height, vae.tile_sample_stride_height) == (True, 128, 96)
    switched.put_back()
    assert (vae.use_tiling, vae.tile_sample_stride_height) == (False, 192)
    assert not hasattr(vae, "tile_sample_min_height")


class Old(nn.Module):
    """Its class has the method, and it does not."""

    def enable_tiling(self) -> None:
        raise NotImplementedError


class Fixed(nn.Module):
    """It has tiles, of a size that it does not tell."""

    use_tiling = False

    def enable_tiling(self) -> None:
        self.use_tiling = True


@pytest.mark.parametrize(
    ("components", "wanted", "sentence"),
    [
        ({"model": nn.Identity()}, {"vae_tiling": True}, "vae_tiling: the pipeline has no vae, but model"),
        ({"vae": Old()}, {"vae_tiling": True}, "vae_tiling: Old has no enable_tiling()"),
        ({"vae": Old()}, {"vae_slicing": True}, "vae_slicing: Old has no enable_slicing()"),
        ({"vae": Fixed()}, {"vae_tiling": 64}, "vae_tiling: Fixed does not say how large a tile is; write true"),
    ],
)
def test_what_has_no_such_switch_is_refused_by_name(
    components: dict[str, nn.Module], wanted: dict[str, Any], sentence: str
) -> None:
    switched = Switched()
    with pytest.raises(PreparationError) as error:
        switched.switch_on(components, Recipe("tiled", "tiny-flux", **wanted))
    assert str(error.value) == sentence
    switched.put_back()


def test_a_recipe_of_a_model_is_refused() -> None:
    recipe = Recipe("model", lambda: nn.Linear(2, 2), call=Call(inputs={"input": torch.ones(1, 2)}), vae_tiling=True)
    with (
        pytest.raises(PreparationError, match="vae_tiling: the pipeline has no vae, but model"),
        prepared(recipe, select("sim")),
    ):
        pass


def test_nothing_is_switched_where_nothing_is_asked() -> None:
    switched = Switched()
    switched.switch_on({"vae": SimpleNamespace()}, Recipe("plain", "tiny-flux"))  # type: ignore[dict-item]
    switched.put_back()
