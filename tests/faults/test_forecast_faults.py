"""Forecasts with something wrong, each beside a healthy twin: what must not pass for a recipe that fits."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pytest_diffopt import Compilation, Offloading, Quantization, Recipe, observe
from pytest_diffopt.accelerators import select
from pytest_diffopt.accelerators.simulated import register_dry_kernel
from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.forecasting import running
from pytest_diffopt.forecasting.record import Forecast
from pytest_diffopt.forecasting.running import forecast
from pytest_diffopt.replicas import flux
from pytest_diffopt.replicas.description import write_configs
from tests.made_forecasts import GIB, gib, judged, made, phase, recipe

# What is judged, of forecasts that are written by hand.


def test_an_expected_peak_below_the_limit_with_a_range_that_reaches_over_it_is_unverified() -> None:
    assert judged(made(gib(14, 15, 16))).status == "passed"
    over = judged(made(replace(gib(14, 15, 16), high=16 * GIB + 1)))
    assert over.status == "unverified"
    assert over.sentence.endswith("while transformer runs: its range reaches 1 B over the 16.00 GiB allowed")


def test_only_a_range_that_lies_over_the_limit_as_a_whole_fails() -> None:
    assert judged(made(gib(16, 17, 18))).status == "unverified"
    assert judged(made(replace(gib(16, 17, 18), low=16 * GIB + 1))).status == "failed"


@pytest.mark.parametrize("told", ["in phases alone", "as the peak"])
def test_a_peak_of_loading_counts_though_every_call_stays_below_the_limit(told: str) -> None:
    def with_loading(size: float) -> Any:
        phases = (phase("load", "transformer", gib(size)), *made().phases[1:])
        if told == "in phases alone":
            return made(phases=phases)
        return made(phases=phases, peak=gib(size), peak_phase="load", peak_operation="aten::to")

    assert judged(with_loading(15.75)).status == "passed"
    verdict = judged(with_loading(17))
    assert verdict.status == "failed"
    assert "while transformer loads: 16.00 GiB allowed, at least 1.00 GiB too little" in verdict.sentence
    assert (verdict.figures["phase"], verdict.figures["load_peak_bytes"]) == ("load", 17 * GIB)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"recipe": "other"}, "the forecast is of the recipe 'other', not of this one"),
        ({"model": "flux.1-schnell"}, "the forecast is of flux.1-schnell; asked for was flux.1-dev"),
    ],
)
def test_a_forecast_of_another_recipe_or_model_is_unverified(fields: dict[str, str], why: str) -> None:
    verdict = judged(made(**fields))
    assert (verdict.status, verdict.sentence) == ("unverified", why)
    assert judged(made(model="Black-Forest-Labs/flux.1-dev")).status == "passed"
    assert judged(made(model="a-directory"), models=()).status == "passed"


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"peak": replace(gib(1), high=float("nan"))}, f"{GIB}, {GIB}, nan"),  # type: ignore[arg-type]
        ({"peak": replace(gib(1), low=-1)}, f"-1, {GIB}, {GIB}"),
        ({"peak": replace(gib(1), low=GIB + 1)}, f"{GIB + 1}, {GIB}, {GIB}"),
        ({"reserved": replace(gib(1), expected=float("inf"))}, f"{GIB}, inf, {GIB}"),  # type: ignore[arg-type]
        ({"phases": (phase("call", "", replace(gib(1), high=0)),)}, f"{GIB}, {GIB}, 0"),
    ],
)
def test_numbers_that_are_no_range_of_bytes_are_unverified(fields: dict[str, Any], shown: str) -> None:
    verdict = judged(made(**fields))
    why = f"the forecast of flux.1-dev has no range of bytes where one must be, but {shown}"
    assert (verdict.status, verdict.sentence) == ("unverified", why)


def test_a_forecast_in_which_nothing_came_to_the_accelerator_is_unverified() -> None:
    verdict = judged(made(gib(0), phases=(), live_at_peak=()))
    why = "nothing of flux.1-dev was on the accelerator in its forecast"
    assert (verdict.status, verdict.sentence) == ("unverified", why)


def test_a_forecast_without_a_call_proves_nothing_but_that_loading_takes_too_much() -> None:
    loading = (phase("load", "transformer", gib(15)),)
    verdict = judged(made(gib(15), phases=loading, peak_phase="load"))
    assert verdict.status == "unverified"
    assert verdict.sentence.endswith(
        "within the 16.00 GiB allowed as far as is known; unknown: no call was forecast, so the peak of one is not known"
    )
    assert judged(made(gib(17), phases=loading, peak_phase="load")).status == "failed"
    assert judged(made(gib(15), phases=(*loading, phase("call", "vae", gib(2))), peak_phase="load")).status == "passed"


def test_a_peak_below_the_weights_that_must_be_there_is_unverified() -> None:
    weights = {"transformer": 12 * GIB, "text_encoder": 4 * GIB}
    without_offloading = judged(made(weights_bytes=weights))
    assert without_offloading.status == "unverified"
    assert without_offloading.sentence.endswith(
        "unknown: all weights take 16.00 GiB, so some were never on the accelerator"
    )
    by_model = recipe(offloading={"strategy": "model"})
    assert judged(made(weights_bytes=weights), by_model).status == "passed"
    never = judged(made(weights_bytes={**weights, "transformer": 15.75 * GIB}), by_model)
    assert never.sentence.endswith("the weights of transformer take 15.75 GiB, so it was never there as a whole")
    assert judged(made(weights_bytes={**weights, "vae": 20 * GIB}), by_model).status == "passed"  # it never ran
    by_group = recipe(offloading={"strategy": "group"})
    assert judged(made(weights_bytes={"transformer": 22 * GIB}), by_group).status == "passed"


def test_what_could_not_be_known_never_passes() -> None:
    verdict = judged(made(unknown=("a kernel of flash_attn was not run.",)))
    assert verdict.status == "unverified"
    assert verdict.sentence.endswith(
        "within the 16.00 GiB allowed as far as is known; unknown: a kernel of flash_attn was not run"
    )
    assert judged(made(gib(17), unknown=("a kernel of flash_attn was not run.",))).status == "failed"


def test_a_card_must_hold_what_the_allocator_reserves_and_cudas_context_too() -> None:
    on_card = recipe(None, "rtx-4090")
    assert judged(made(gib(22)), on_card).status == "passed"
    reserving = judged(made(gib(22), reserved=gib(22, 22.5, 23)), on_card)
    assert reserving.status == "unverified"
    assert judged(made(gib(22), reserved=gib(0)), on_card).status == "passed"
    assert judged(made(gib(22, 23, 23.4), reserved=gib(0)), on_card).status == "unverified"
    assert judged(made(gib(23.2)), on_card).status == "failed"


def test_one_promise_that_holds_does_not_hide_one_that_is_broken() -> None:
    assert judged(made(), recipe("16GiB", "rtx-4090")).status == "passed"
    assert judged(made(), recipe("16GiB", "rtx-4060")).status == "failed"
    assert judged(made(), recipe("14GiB", "rtx-4090")).status == "failed"
    assert judged(made(), recipe("15.2GiB", "rtx-4060")).status == "failed"
    assert judged(made(), recipe("15.2GiB", "rtx-4090")).status == "unverified"


# What is forecast, of a pipeline that really does it; in its smallest size, where no kernel takes anything for itself.

NAIVE = {"convolution_workspace": "none", "attention": "fused", "cublas_workspace": False}
NF4 = Quantization("bitsandbytes_4bit", components=["transformer"], kwargs={"bnb_4bit_quant_type": "nf4"})
READ = "what it does for other values is not known."

Break = Callable[[Callable[..., Any]], None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the configs of a small FLUX.1."""
    select("sim")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    write_configs(flux._tiny(False), folder)
    return str(folder)


@pytest.fixture(scope="module")
def healthy(tiny: str) -> Forecast:
    """With nothing wrong."""
    return forecast_of(tiny)


def forecast_of(tiny: str, **parts: Any) -> Forecast:
    return forecast(Recipe("r", "tiny-flux", **parts), tiny, sizes=(32, 32), assume=NAIVE)


def works(made: Forecast, component: str) -> int:
    assert made.residency is not None
    return max(one.working.get(component, 0) for one in made.residency.phases if one.phase.startswith("call"))


@pytest.fixture
def after_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> Iterator[Break]:
    """Lets a function do something with the denoiser and with what it returns, whenever it ran."""
    from diffusers import FluxTransformer2DModel

    original = FluxTransformer2DModel.forward

    def does(what: Callable[..., Any]) -> None:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            return (what(self, result[0]),)

        monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)

    yield does
    gc.collect()


@pytest.fixture
def once_loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], Any]], None]:
    """Lets a function change the components, once they are loaded."""
    prepare = running.prepare

    def does(what: Callable[[dict[str, Any]], Any]) -> None:
        def changed(*args: Any, on_loaded: Callable[..., Any], **kwargs: Any) -> Any:
            def first(prepared: Any) -> None:
                what(prepared.components)
                on_loaded(prepared)

            return prepare(*args, on_loaded=first, **kwargs)

        monkeypatch.setattr(running, "prepare", changed)

    return does


def test_a_component_under_two_names_counts_once(tiny: str, healthy: Forecast, once_loaded: Any) -> None:
    once_loaded(lambda components: components.update(again=components["transformer"]))
    twice = forecast_of(tiny)
    assert twice.weights_bytes == {**healthy.weights_bytes, "again": 0}
    assert (twice.peak, twice.reserved) == (healthy.peak, healthy.reserved)


def test_a_weight_that_two_layers_or_two_components_share_counts_once(
    tiny: str, healthy: Forecast, once_loaded: Any
) -> None:
    sizes: list[int] = []

    def tie(components: dict[str, Any]) -> None:
        first, second = components["transformer"].transformer_blocks
        sizes.append(sum(parameter.nbytes for parameter in second.ff.parameters()))
        second.ff = first.ff
        components["vae"].shared = first.ff  # in another component as well

    once_loaded(tie)
    tied = forecast_of(tiny)
    assert sum(tied.weights_bytes.values()) == sum(healthy.weights_bytes.values()) - sizes[0]
    assert healthy.peak_bytes - tied.peak_bytes == pytest.approx(sizes[0], abs=8 * 512)


def test_a_value_that_nobody_computed_and_the_host_needs_ends_the_forecast(
    tiny: str, after_the_denoiser: Break
) -> None:
    after_the_denoiser(lambda self, x: x if x.mean().item() < 1 else x + x)
    with pytest.raises(DiffoptError) as caught:
        forecast_of(tiny)
    sentence, pipeline, _, own = str(caught.value).splitlines()
    assert sentence == (
        "r on tiny stopped in the call, in transformer: NotImplementedError: On the dry device the value of a tensor is "
        "needed that nobody computed, and there is no rule for it (when running aten::_local_scalar_dense). "
        "pytest_diffopt.accelerators.simulated.register_dry_kernel gives it one."
    )
    assert pipeline.startswith("  diffusers/pipelines/flux/pipeline_flux.py:")
    assert re.fullmatch(r"  \S*test_forecast_faults.py:\d+, in <lambda>: after_the_denoiser\(.*", own)


def test_a_value_that_was_computed_may_be_read(tiny: str, healthy: Forecast, after_the_denoiser: Break) -> None:
    after_the_denoiser(lambda self, x: x if torch.ones(8, device=x.device).mean().item() < 2 else x + x)
    assert forecast_of(tiny).peak == healthy.peak


def test_a_copy_to_the_host_that_may_decide_something_is_unknown_and_nothing_fits(
    tiny: str, healthy: Forecast, after_the_denoiser: Break
) -> None:
    after_the_denoiser(lambda self, x: x if x.mean().cpu() < 1 else x + x)
    made = forecast_of(tiny)
    assert made.unknown == (f"The host reads what transformer computed (by aten::mean, at most 512 bytes); {READ}",)
    assert (made.within(2 * GIB), healthy.within(2 * GIB)) == ("may fit", "fits")
    assert (made.fit_bytes(8 * GIB), healthy.fit_bytes(8 * GIB)) == ("may fit", "fits")


@pytest.mark.parametrize("strategy", ["model", "sequential", "group"])
def test_weights_that_offloading_takes_to_the_host_are_no_values_that_it_reads(tiny: str, strategy: Any) -> None:
    assert forecast_of(tiny, offloading=Offloading(strategy)).unknown == ()


def test_a_tensor_that_outlives_its_module_is_in_the_peak_and_named(
    tiny: str, healthy: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    original = FluxTransformerBlock.forward

    def keeps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        self.map = result[0].repeat(1, 1, 64)
        return result

    monkeypatch.setattr(FluxTransformerBlock, "forward", keeps)
    made = forecast_of(tiny)
    maps = [one for one in made.live_at_peak if one.operation == "aten::unfold" and one.component]
    # of two blocks, and the first one's new map while the old one is there
    assert [(one.component, one.module, one.kind, one.count) for one in maps] == [
        ("transformer", "transformer_blocks.*", "working", 3)
    ]
    assert made.peak_bytes > healthy.phase_peak("call", "transformer").expected + maps[0].bytes // 2
    assert made.peak_component == "transformer"
    assert not any(one.operation == "aten::unfold" and one.component for one in healthy.live_at_peak)


def test_a_hook_that_frees_a_group_too_late_is_in_the_peak(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.hooks.group_offloading import ModuleGroup

    blocks = Offloading("group", offload_type="block_level")
    in_turn = forecast_of(tiny, offloading=blocks)
    original, waiting = ModuleGroup.offload_, list[Any]()

    def late(self: Any) -> None:
        if not type(self.modules[0]).__name__.endswith("Block"):
            return original(self)
        waiting.append(self)
        if len(waiting) > 1:
            original(waiting.pop(0))
        return None

    monkeypatch.setattr(ModuleGroup, "offload_", late)
    made = forecast_of(tiny, offloading=blocks)
    waiting.clear()

    def held(one: Forecast) -> int:
        assert one.residency is not None
        return max(phase.weights.get("transformer", 0) for phase in one.residency.phases)

    assert held(made) >= 1.4 * held(in_turn)
    assert made.phase_peak("call", "transformer").expected > in_turn.phase_peak("call", "transformer").expected


@pytest.fixture
def opaque() -> Iterator[torch.library.Library]:
    """An operator of a third party that no meta kernel describes."""
    library = torch.library.Library("diffopt_faults", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("opaque(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    library.impl("opaque", lambda x: x.clone(), "CPU")  # type: ignore[no-untyped-call]
    yield library
    library._destroy()  # type: ignore[no-untyped-call]


def test_an_operation_that_nothing_describes_ends_the_forecast_by_its_name(
    tiny: str, healthy: Forecast, after_the_denoiser: Break, opaque: torch.library.Library
) -> None:
    after_the_denoiser(lambda self, x: torch.ops.diffopt_faults.opaque(x))
    with pytest.raises(DiffoptError, match=r"stopped in the call, in transformer: .*diffopt_faults::opaque"):
        forecast_of(tiny)
    rule = register_dry_kernel("diffopt_faults::opaque", torch.empty_like)
    try:
        by_rule = forecast_of(tiny)
    finally:
        rule.remove()
    torch.library.register_fake("diffopt_faults::opaque", torch.empty_like, lib=opaque)
    by_fake = forecast_of(tiny)
    assert by_rule.peak == by_fake.peak == healthy.peak
    assert works(by_rule, "transformer") == works(by_fake, "transformer")


def test_a_size_that_depends_on_values_is_named_and_the_most_is_taken(
    tiny: str, healthy: Forecast, after_the_denoiser: Break
) -> None:
    elements = []

    def finds(self: Any, x: torch.Tensor) -> torch.Tensor:
        elements.append(x.numel() * x.dim() * 8)
        x.repeat(1, 1, 64).nonzero()
        return x

    after_the_denoiser(finds)
    made = forecast_of(tiny)
    assert made.wide == ("aten::nonzero: how many elements it finds depends on values, and all were taken",)
    assert works(made, "transformer") >= 64 * elements[0]
    assert healthy.wide == ()


# Mistakes, word for word.


def wrong(model: str | None, asked: Recipe | None = None, **given: Any) -> str:
    with pytest.raises(DiffoptError) as caught:
        forecast(asked or Recipe("r", "tiny-flux"), model, **given)
    return str(caught.value)


def test_a_model_that_is_not_meant_or_not_known_is_told(tiny: str) -> None:
    assert wrong(None) == (
        "r: tiny-flux is a replica; name the full-size model that it stands for: flux.1-dev, flux.1-schnell."
    )
    factory = Recipe("r", lambda: None)
    assert wrong(None, factory) == "r: its pipeline is made by a factory, so a full-size model must be named."
    assert wrong("wan2.1-t2v-14b") == "r: its pipeline tiny-flux is a FluxPipeline, and wan2.1-t2v-14b a WanPipeline."
    assert wrong("flux.1-def").startswith("No full-size model is called 'flux.1-def'. Did you mean 'flux.1-dev'?")


@pytest.mark.parametrize(
    ("part", "parts"),
    [
        ("compilation", {"compilation": Compilation("unet")}),
        ("quantization", {"quantization": Quantization("bitsandbytes_4bit", components=["unet"])}),
        ("offloading", {"offloading": Offloading("model", components=["vae", "unet"])}),
    ],
)
def test_a_part_that_names_what_the_model_lacks_is_told(tiny: str, part: str, parts: dict[str, Any]) -> None:
    assert wrong(tiny, Recipe("r", "tiny-flux", **parts)) == (
        f"r: {part} names 'unet', which tiny does not have; it has transformer, vae, text_encoder, text_encoder_2."
    )


def test_a_directory_that_lacks_a_file_or_names_an_unknown_class_is_told(tmp_path: Any) -> None:
    assert (
        wrong(str(tmp_path))
        == f"The directory {str(tmp_path)!r} holds no diffusers pipeline: it lacks model_index.json."
    )
    index = '{{"_class_name": "FluxPipeline", "transformer": ["diffusers", "{}"]}}'
    (tmp_path / "model_index.json").write_text(index.format("FluxTransformer2DModel"))
    assert wrong(str(tmp_path)) == (
        f"The directory {str(tmp_path)!r} lacks transformer/config.json, which its model_index.json asks for."
    )
    (tmp_path / "model_index.json").write_text(index.format("Flux9Model"))
    assert wrong(str(tmp_path)).endswith(" has no Flux9Model.")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sizes": (96,)}, "sizes: found (96,); (height, width) or (height, width, frames), positive ints"),
        ({"sizes": 96}, "sizes: found 96; (height, width)"),
        ({"sizes": []}, "sizes: found []; (height, width)"),
        ({"sizes": [(96, 96), (96, 9.5)]}, "sizes[1]: found (96, 9.5); (height, width)"),
        ({"sizes": (96, 0)}, "sizes: found (96, 0); (height, width)"),
        ({"sizes": (96, 96, 5)}, "r: the size (96, 96, 5) has frames, and FluxPipeline makes images: (height, width)."),
        ({"steps": 0}, "num_inference_steps: found 0; an int >= 1"),
        ({"steps": True}, "num_inference_steps: found True; an int >= 1"),
        ({"gpu": "rtx-4091"}, "No card is called 'rtx-4091'. Did you mean 'rtx-4090'?"),
        ({"gpu": 4090}, "No card is called 4090."),
        ({"assume": {"attentoin": "math"}}, "A forecast cannot assume 'attentoin'. Did you mean 'attention'?"),
        ({"assume": "math"}, "A forecast cannot assume 'math'. It takes a table of transformers, t5_wo_float32,"),
    ],
)
def test_a_mistake_in_what_is_asked_for_is_told_before_anything_runs(
    tiny: str, given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running._Run, "everything", lambda self: pytest.fail("it ran"))
    assert said in wrong(tiny, **given)


def test_an_argument_that_the_pipeline_does_not_take_is_told(tiny: str) -> None:
    said = wrong(tiny, sizes=(32, 32), kwargs={"colour": 1})
    assert said.startswith("call.kwargs: found 'colour'; FluxPipeline takes: prompt, ")


def test_a_size_that_is_too_small_stops_where_it_is_too_small(tiny: str) -> None:
    said = wrong(tiny, sizes=(8, 8))
    assert said.startswith(
        "r on tiny stopped in the call, in vae: RuntimeError: Calculated padded input size per channel"
    )


def test_what_the_libraries_refuse_is_told_in_their_own_words(tiny: str) -> None:
    refused = Recipe("r", "tiny-flux", quantization=NF4, offloading=Offloading("sequential"))
    seen = observe(refused, accelerator="sim", precise=False).failure
    assert seen is not None
    words = f"{seen.error}: {seen.message.splitlines()[0]}"
    sentence, *places = wrong(tiny, refused, sizes=(32, 32)).splitlines()
    assert sentence == f"r on tiny stopped in the call, in transformer: {words}"
    assert places[0].startswith("  bitsandbytes/nn/modules.py:")
