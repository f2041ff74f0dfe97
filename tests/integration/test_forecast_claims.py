"""What diffusers' guide "Compile and offload quantized models" says of memory, against forecasts in full size.

The guide says that caching costs memory, that model offloading suits pictures, and that group offloading suits videos. The
first is of memory alone. The other two weigh memory against time: a forecast shows what is saved, and what has to be moved
for it while how much is computed. That group offloading saves a larger *part* on videos is not what they show, see
`test_the_part_that_group_offloading_saves_does_not_tell_videos_from_pictures`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pytest_diffopt import Forecast, Offloading, Quantization, Recipe, forecast

GIB = 2**30
GROUP = Offloading("group", use_stream=True)
MODEL = Offloading("model")
KWARGS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}

FLUX = Recipe("flux", "tiny-flux", dtype="bfloat16")
FLUX_NF4 = FLUX.replace(quantization=Quantization("bitsandbytes_4bit", ["transformer", "text_encoder_2"], KWARGS))
VIDEO = Recipe("wan", "tiny-wan", dtype="bfloat16")
VIDEO_NF4 = VIDEO.replace(quantization=Quantization("bitsandbytes_4bit", ["transformer", "text_encoder"], KWARGS))

Told = Callable[..., Forecast]


@pytest.fixture(scope="module")
def told() -> Told:
    """A forecast of a recipe with its full size, made once."""
    made: dict[Any, Forecast] = {}

    def tell(recipe: Recipe, offloading: Offloading | None = None) -> Forecast:
        asked = recipe.replace(offloading=offloading)
        if asked not in made:
            made[asked] = forecast(asked, "flux.1-dev" if recipe.pipeline == "tiny-flux" else "wan2.1-t2v-14b")
        return made[asked]

    return tell


def test_model_offloading_saves_on_pictures_quantized_or_not(told: Told) -> None:
    for recipe in (FLUX, FLUX_NF4):
        assert told(recipe, MODEL).high_bytes < told(recipe).low_bytes
    # what stays is the largest component and what it computes, of the sum of all
    whole, offloaded = told(FLUX), told(FLUX, MODEL)
    assert offloaded.peak_component == "transformer"
    assert offloaded.peak_bytes < 1.1 * whole.weights_bytes["transformer"]


def test_quantized_and_offloaded_by_model_peaks_while_it_loads_as_the_guide_has_it(told: Told) -> None:
    """So 12.24 GB of the guide's table: loading quantizes on the accelerator, before any hook is there."""
    offloaded = told(FLUX_NF4, MODEL)
    assert offloaded.peak_phase == "load"
    assert offloaded.call_peak_bytes < 0.7 * offloaded.load_peak_bytes


def test_group_offloading_takes_less_than_model_offloading_on_videos_and_on_pictures(told: Told) -> None:
    for recipe in (FLUX, VIDEO):
        assert told(recipe, GROUP).high_bytes < 0.25 * told(recipe, MODEL).low_bytes
    # gibibytes, more on the video
    saved = {one.name: told(one, MODEL).peak_bytes - told(one, GROUP).peak_bytes for one in (FLUX, VIDEO)}
    assert saved["wan"] > 1.2 * saved["flux"]


def test_the_part_that_group_offloading_saves_does_not_tell_videos_from_pictures(told: Told) -> None:
    """Each gives back about nine tenths of what model offloading takes: the guide's reason is time, not memory."""
    for recipe in (FLUX, VIDEO):
        left = told(recipe, GROUP).peak_bytes / told(recipe, MODEL).peak_bytes
        assert 0.08 < left < 0.2


def test_a_quantized_recipe_gains_nothing_of_group_offloading_until_it_is_called(told: Told) -> None:
    """Both peak while loading, alike; in the call the video's falls."""
    assert told(VIDEO_NF4, GROUP).peak_bytes == told(VIDEO_NF4, MODEL).peak_bytes
    assert told(VIDEO_NF4, GROUP).peak_phase == "load"
    assert told(VIDEO_NF4, GROUP).call_peak_bytes < 0.6 * told(VIDEO_NF4, MODEL).call_peak_bytes


def test_videos_compute_more_for_each_byte_that_group_offloading_moves(told: Told) -> None:
    """The guide's reason. A weight is used once for each token: tokens are products for each weight that is moved."""
    (height, width), (video_height, video_width, frames) = told(FLUX, GROUP).sizes[0], told(VIDEO, GROUP).sizes[0]
    picture_tokens = height // 16 * (width // 16) + 512  # and those of the prompt, which the blocks see too
    video_tokens = (frames // 4 + 1) * (video_height // 16) * (video_width // 16)
    # each forward moves the transformer's weights once; guidance makes two a step
    assert told(FLUX, GROUP).step_h2d_bytes == pytest.approx(told(FLUX).weights_bytes["transformer"], rel=0.01)
    assert told(VIDEO, GROUP).step_h2d_bytes == pytest.approx(2 * told(VIDEO).weights_bytes["transformer"], rel=0.01)
    assert video_tokens > 7 * picture_tokens


def test_model_offloading_moves_nothing_for_a_further_step_and_group_offloading_everything(told: Told) -> None:
    for recipe in (FLUX, VIDEO):
        offloaded = told(recipe, MODEL)
        assert (offloaded.step_h2d_bytes, offloaded.step_d2h_bytes) == (0, 0)
        assert offloaded.h2d_bytes < told(recipe, GROUP).h2d_bytes
        assert told(recipe, GROUP).step_d2h_bytes == 0  # the host keeps its copy


def test_caching_costs_memory_by_what_it_stores(told: Told) -> None:
    from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig

    def broadcast(pipeline: Any) -> None:
        pipeline.transformer.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 950),
                current_timestep_callback=lambda: pipeline._current_timestep,
            )
        )

    def faster(pipeline: Any) -> None:
        pipeline.transformer.enable_cache(
            FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 681),
                current_timestep_callback=lambda: pipeline._current_timestep,
                attention_weight_callback=lambda _: 0.3,
                is_guidance_distilled=True,
            )
        )

    attention_bytes = (64 * 64 + 512) * 3072 * 2  # tokens of 1024×1024 and of the prompt, bfloat16
    plain = told(FLUX)
    for config, stored in ((broadcast, 1), (faster, 2)):
        cached = forecast(FLUX, "flux.1-dev", modify=config)
        more = cached.phase_peak("call", "transformer").expected - plain.phase_peak("call", "transformer").expected
        assert more == pytest.approx(stored * 57 * attention_bytes, rel=0.02)  # 19 + 38 blocks
        assert cached.low_bytes > plain.high_bytes


def test_a_cache_that_decides_by_values_is_refused_with_where(told: Told) -> None:
    from diffusers import FirstBlockCacheConfig

    from pytest_diffopt.errors import ForecastError

    def first_block(pipeline: Any) -> None:
        pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))

    with pytest.raises(ForecastError, match=r"flux on flux.1-dev stopped in the call.*the value of a tensor is needed"):
        forecast(FLUX, "flux.1-dev", modify=first_block)


def test_what_modifies_the_pipeline_and_raises_says_where() -> None:
    from pytest_diffopt.errors import ForecastError

    def wrong(pipeline: Any) -> None:
        raise KeyError("nothing of that name")

    with pytest.raises(ForecastError, match=r"stopped in loading.*nothing of that name"):
        forecast(FLUX, "flux.1-dev", modify=wrong)
