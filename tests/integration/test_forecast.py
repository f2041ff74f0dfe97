"""Forecasts as a whole: against what is really allocated, against public figures, and what they leave behind."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt import Call, Compilation, Offloading, Quantization, Recipe, observe
from pytest_diffopt.accelerators import Accelerator, select
from pytest_diffopt.accelerators import simulated as module
from pytest_diffopt.errors import ForecastError
from pytest_diffopt.forecasting import running
from pytest_diffopt.forecasting.record import CONTEXT_BYTES, Forecast
from pytest_diffopt.forecasting.running import forecast
from pytest_diffopt.observation.observation import Residency
from pytest_diffopt.observation.residency import ResidencyLedger
from pytest_diffopt.preparation import borrowed_state, kept_tables
from pytest_diffopt.replicas import flux
from pytest_diffopt.replicas.description import write_configs

GIB = 2**30
NAIVE = {"convolution_workspace": "none", "attention": "fused", "cublas_workspace": False}
"""No kernel takes anything for itself, as on the host."""

NF4 = Quantization("bitsandbytes_4bit", components=["transformer"], kwargs={"bnb_4bit_quant_type": "nf4"})
INT8 = Quantization("bitsandbytes_8bit", components=["transformer"], kwargs={"llm_int8_threshold": 0.0})
GROUP: Callable[..., Offloading] = functools.partial(Offloading, "group")


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_frozen() -> None:
    """As for a user: a forecast freezes it by itself, and when garbage is collected decides what a residency says."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def simulated() -> Accelerator:
    return select("sim")


@pytest.fixture
def sim(simulated: Accelerator) -> Iterator[Any]:
    """The simulated GPU, rounding as CUDA's allocator does, with nothing on it."""
    with simulated.in_use():
        collect_what_is_left()
        caching = module.is_caching_allocator()
        module.set_caching_allocator(True)
        yield module
        module.set_caching_allocator(caching)
        collect_what_is_left()
        torch.cuda.empty_cache()


def collect_what_is_left() -> None:
    """Garbage that is on the device; to look for it takes 0.4 s where nothing is frozen."""
    if torch.cuda.memory_allocated() or module.host_memory_stats()["allocated"]:
        gc.collect()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with tiny-flux's configs and no weights: a model in its full size like any other."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    write_configs(flux._tiny(False), folder)
    return str(folder)


def recipe(**parts: Any) -> Recipe:
    return Recipe(**{"name": "r", "pipeline": "tiny-flux", **parts})


def forecast_tiny(tiny: str, asked: Recipe | None = None, **given: Any) -> Forecast:
    return forecast(asked or recipe(), tiny, **{"sizes": (32, 32), "assume": NAIVE, **given})


# ---------------------------------------------------------------------------------- what is really allocated

PARTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole, float32 as published": {"dtype": None},
    "model": {"offloading": Offloading("model")},
    "model, one": {"offloading": Offloading("model", components=["text_encoder_2", "vae"])},
    "sequential": {"offloading": Offloading("sequential")},
    "leaves, stream": {"offloading": GROUP(offload_type="leaf_level", use_stream=True, record_stream=True)},
    "blocks": {"offloading": GROUP(offload_type="block_level")},
    "blocks, stream, pinned on the fly": {
        "offloading": GROUP(offload_type="block_level", use_stream=True, low_cpu_mem_usage=True)
    },
    "nf4": {"quantization": NF4},
    "nf4, model": {"quantization": NF4, "offloading": Offloading("model")},
    "nf4, after placing": {"quantization": NF4, "order": ("offloading", "quantization", "compilation")},
    "int8": {"quantization": INT8},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_forecast_of_a_replicas_size_is_what_the_replica_really_takes(
    name: str, tiny: str, simulated: Accelerator, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "KERNELS", {})  # CUDA's of bitsandbytes take less than the host's, which run here
    asked = recipe(**{"dtype": "bfloat16", "call": Call(sizes=(32, 32), calls=1), **PARTS[name]})
    dry = forecast_tiny(tiny, asked, steps=3)
    with kept_tables.made_anew():
        wet = observe(asked, accelerator=simulated, precise=False)
    assert wet.failure is None, wet.failure
    assert wet.memory is not None
    loaded, call = wet.memory.load_peak_bytes - wet.memory.before_bytes, wet.memory.calls[0]
    assert max(dry.load_peak_bytes, dry.placement_peak_bytes) == loaded
    assert call_of(dry.residency) == call_of(wet.memory.residency)
    # an observation also copies what components return to the host
    called = call.peak_bytes - wet.memory.before_bytes
    assert (dry.call_peak_bytes, dry.h2d_bytes) == (called, call.h2d_bytes)
    assert dry.peak_bytes == max(loaded, called)
    assert sum(one.bytes for one in dry.live_at_peak) == dry.peak_bytes == dry.floor_bytes
    if asked.offloading is None:  # each tensor is rounded up to 512 bytes
        assert dry.weights_bytes == pytest.approx(wet.memory.loaded_residency, rel=0.05)
    assert not dry.unknown


def call_of(residency: Residency | None) -> tuple[Any, ...]:
    """Of the first call: the component at its peak, and how much of each was there at once, weights and working."""
    assert residency is not None
    phase = next(one for one in residency.phases if one.phase == "call 0")
    # an observation is not told what loads: tables that quantizing makes are nobody's there, and a component's here
    working = {name: size // 4096 for name, size in phase.working.items()}
    return phase.component, phase.weights, working


# -------------------------------------------------------------------------------------------- public figures

SEED = Quantization(
    "bitsandbytes_4bit",
    components=["transformer", "text_encoder_2"],
    kwargs={"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
)
DENOISER_4BIT = Quantization("bitsandbytes_4bit", components=["transformer"], kwargs=SEED.kwargs)
AROUND = GROUP(components=["text_encoder", "text_encoder_2", "vae"])
"""All but the denoiser leave while it runs: its peak is as if it were alone."""


def full(model: str, assume: dict[str, Any] | None = None, **parts: Any) -> Forecast:
    return forecast(Recipe("r", model, dtype="bfloat16", **parts), assume=assume)


@pytest.fixture(scope="module")
def flux_4bit(simulated: Accelerator) -> Forecast:
    """FLUX.1-dev at 1024², both large components in nf4, as the transformers of that time loaded them."""
    return full("flux.1-dev", {"t5_wo_float32": True}, quantization=SEED)


def test_flux_in_4_bits_takes_what_was_published(flux_4bit: Forecast) -> None:
    assert flux_4bit.peak_bytes / GIB == pytest.approx(14.9453, rel=0.015)
    assert flux_4bit.low_bytes < 14.9453 * GIB < flux_4bit.high_bytes
    assert (flux_4bit.peak_phase, flux_4bit.peak_component) == ("call", "vae")
    assert flux_4bit.peak_operation == "aten::convolution"
    assert sum(one.bytes for one in flux_4bit.live_at_peak) == flux_4bit.peak_bytes
    assert flux_4bit.parameters["transformer"] == 11_901_408_320
    assert flux_4bit.reserved_bytes >= flux_4bit.peak_bytes
    assert not flux_4bit.unknown


def test_with_model_offloading_loading_is_the_peak_as_published() -> None:
    made = full("flux.1-dev", {"t5_wo_float32": True}, quantization=SEED, offloading=Offloading("model"))
    assert made.peak_bytes / GIB == pytest.approx(12.2369, rel=0.015)
    assert (made.peak_phase, made.peak_bytes) == ("load", made.load_peak_bytes)


@pytest.mark.parametrize(("quantization", "published"), [(None, (22.61, 22.64)), (DENOISER_4BIT, (6.70, 6.72))])
def test_a_denoiser_alone_takes_what_was_published(
    quantization: Quantization | None, published: tuple[float, float]
) -> None:
    made = full("flux.1-dev", {"cublas_workspace": False}, quantization=quantization, offloading=AROUND)
    assert published[0] <= round(made.phase_peak("call", "transformer").expected / GIB, 2) <= published[1]


# ------------------------------------------------------------------------------------------- the same again


def without_seconds(made: Forecast) -> dict[str, Any]:
    return {**json.loads(made.to_json()), "seconds": 0}


PROGRAM = """
import sys
from pytest_diffopt import Quantization, Recipe
from pytest_diffopt.forecasting.running import forecast
quantization = Quantization("bitsandbytes_4bit", kwargs={"bnb_4bit_quant_type": "nf4"})
print(forecast(Recipe("r", "tiny-flux", dtype="bfloat16", quantization=quantization), sys.argv[1], sizes=(32, 32)).to_json())
"""


def test_every_process_makes_the_same_forecast_and_makes_it_again(tiny: str, sim: Any) -> None:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    other = {"PYTHONHASHSEED": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny], env={**os.environ, **other}, capture_output=True, text=True, check=True
    )
    made = [{**json.loads(ran.stdout.splitlines()[-1]), "seconds": 0}]
    quantization = Quantization("bitsandbytes_4bit", kwargs={"bnb_4bit_quant_type": "nf4"})
    for _ in range(2):  # here others ran before
        asked = recipe(dtype="bfloat16", quantization=quantization)
        made.append(without_seconds(forecast_tiny(tiny, asked, assume=None)))
    assert made[0] == made[1] == made[2]


def test_a_forecast_on_a_simulated_gpu_of_another_generation_is_the_same(tiny: str) -> None:
    asked = recipe(dtype="bfloat16", quantization=Quantization("bitsandbytes_4bit", components=["text_encoder_2"]))
    without = without_seconds(forecast_tiny(tiny, asked))
    with module.simulated_cuda("v100-16gb"):
        assert without_seconds(forecast_tiny(tiny, asked)) == without
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()


# ------------------------------------------------------------------------------------------------- what is left


def state(sim: Any) -> dict[str, Any]:
    """Everything that a forecast borrows."""
    import safetensors
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import pipeline_utils
    from transformers import T5EncoderModel, T5PreTrainedModel

    kept_tables.forget("cuda")  # what earlier tests left in libraries' caches may go with anything
    gc.collect()
    torch.cuda.empty_cache()
    ops = torch.ops.pytest_diffopt_sim
    snapshot = borrowed_state.take_snapshot()
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "host": {name: size for name, size in sim.host_memory_stats().items() if "peak" not in name},
        "allocator": (sim.is_caching_allocator(), ops.capacity(0), ops.allowed(0), sim.is_dry(), ops.real_bytes()),
        "environment": dict(os.environ),
        "frozen": gc.get_freeze_count(),
        "loading": (
            "extract_init_dict" in vars(DiffusionPipeline),
            pipeline_utils.load_sub_model,
            safetensors.safe_open,
            safetensors.torch.safe_open,
        ),
        "T5": [vars(one).get("_keep_in_fp32_modules_strict") for one in (T5EncoderModel, T5PreTrainedModel)],
        "folders": list(Path(tempfile.gettempdir()).iterdir()),
        "globals": (snapshot.values, {name: str(value) for name, value in snapshot.random.items()}),
    }


def raising(error: type[BaseException]) -> Callable[..., Any]:
    def stops(*args: Any, **kwargs: Any) -> Any:
        raise error("stopped here")

    return stops


def stop_in_a_call(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    from diffusers import FluxTransformer2DModel

    monkeypatch.setattr(FluxTransformer2DModel, "forward", raising(error))


def stop_in_loading(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    from transformers import T5EncoderModel

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", raising(error))


@pytest.mark.parametrize(
    ("stop", "error"),
    [
        (None, RuntimeError),
        *((stop, error) for stop in (stop_in_a_call, stop_in_loading) for error in (RuntimeError, KeyboardInterrupt)),
    ],
)
def test_everything_is_as_before_whatever_stops_a_forecast(
    stop: Callable[..., None] | None,
    error: type[BaseException],
    tiny: str,
    simulated: Accelerator,
    sim: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    asked = recipe(dtype="bfloat16", quantization=NF4)
    before = state(sim)
    if stop is None:
        forecast_tiny(tiny, asked, assume={"t5_wo_float32": True})
    else:
        with monkeypatch.context() as patched:
            stop(patched, error)
            with pytest.raises(ForecastError if error is RuntimeError else error) as caught:
                forecast_tiny(tiny, asked, assume={"t5_wo_float32": True})
            where = "the call, in transformer" if stop is stop_in_a_call else "loading text_encoder_2"
            if error is RuntimeError:
                sentence, *places = str(caught.value).splitlines()
                assert sentence == f"r on tiny stopped in {where}: RuntimeError: stopped here"
                assert "test_forecast.py:" in places[-1]
        del caught
    after = state(sim)
    assert before == after


def test_an_observation_after_a_forecast_is_as_one_before_it(tiny: str, simulated: Accelerator, sim: Any) -> None:
    asked = recipe(dtype="bfloat16", quantization=NF4, call=Call(sizes=(32, 32), calls=1))
    forecast_tiny(tiny, asked)
    first = observe(asked, accelerator=simulated, precise=False)
    assert first.failure is None
    forecast_tiny(tiny, asked)
    second = observe(asked, accelerator=simulated, precise=False)
    assert first.outputs == second.outputs
    assert first.memory is not None
    assert second.memory is not None
    assert first.memory.calls[0].h2d_bytes == second.memory.calls[0].h2d_bytes


def test_what_others_have_on_the_device_counts_in_no_forecast_and_stays(tiny: str, sim: Any) -> None:
    alone = without_seconds(forecast_tiny(tiny))
    theirs = torch.ones(1 << 18, device="cuda")
    on_the_host = torch.ones(1 << 18)
    assert without_seconds(forecast_tiny(tiny)) == alone
    assert theirs.sum().item() == on_the_host.sum().item() == 1 << 18

    class LetsGo(list[torch.Tensor]):
        def __call__(self, words: str) -> None:
            if words.startswith("the call"):
                self.clear()

    assert without_seconds(forecast_tiny(tiny, progress=LetsGo([theirs.clone()]))) == alone


def test_a_forecast_in_a_dry_device_is_the_same_and_leaves_it_dry(tiny: str, sim: Any) -> None:
    alone = without_seconds(forecast_tiny(tiny))
    with sim.dry() as outer:
        hollow = torch.ones(1 << 18, device="cuda")
        hollow.nonzero()
        guessed = outer.guesses
        assert guessed
        assert without_seconds(forecast_tiny(tiny)) == alone
        assert sim.is_dry()
        assert outer.guesses == guessed
    assert not sim.is_dry()


def test_a_forecast_does_not_write_over_what_somebody_else_records(tiny: str, simulated: Accelerator, sim: Any) -> None:
    ledger = ResidencyLedger(simulated)
    ledger.open(0)
    held = torch.ones(1000, device="cuda")
    with pytest.raises(ForecastError) as caught:
        forecast_tiny(tiny)
    assert str(caught.value) == (
        "r: what happens on the simulated device is recorded for somebody else; forecast before or after it."
    )
    ledger.close()
    assert ledger.record is not None
    assert max(map(sum, ledger.record.bytes)) == held.nbytes + 96  # rounded up
    assert forecast_tiny(tiny).peak_bytes > 0


# ---------------------------------------------------------------------------------------------- what is run


def test_several_sizes_are_a_call_each_and_every_part_of_a_call_has_its_component(tiny: str, sim: Any) -> None:
    made = forecast_tiny(tiny, sizes=[(32, 32), (128, 128)])
    assert made.sizes == ((32, 32), (128, 128))
    components = {"", "text_encoder", "text_encoder_2", "transformer", "vae"}
    for call in (0, 1):
        assert {one.component for one in made.phases if (one.phase, one.call) == ("call", call)} == components
    peaks = {(one.call, one.component): one.peak.expected for one in made.phases if one.phase == "call"}
    assert peaks[1, "vae"] > peaks[0, "vae"]
    alone = forecast_tiny(tiny, sizes=(128, 128))
    assert made.phase_peak("call", "vae").expected == pytest.approx(alone.phase_peak("call", "vae").expected, rel=0.01)


def test_a_part_that_the_pipeline_calls_by_itself_is_its_components(
    tiny: str, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxPipeline

    def order(made: Forecast) -> list[str]:
        return [one.component for one in made.phases if one.phase == "call" and one.component]

    assert order(forecast_tiny(tiny)) == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    original = FluxPipeline.prepare_latents

    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.vae.decoder.conv_in(torch.zeros(1, 32, 8, 8, device="cuda", dtype=self.vae.dtype))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FluxPipeline, "prepare_latents", prepare_latents)
    assert order(forecast_tiny(tiny)) == ["text_encoder", "text_encoder_2", "vae", "transformer"]


def test_arguments_that_a_recipe_means_for_its_replica_are_told(tiny: str, sim: Any) -> None:
    asked = recipe(call=Call(kwargs={"max_sequence_length": 16, "guidance_scale": 2.0}))
    said = "Calls get the recipe's own arguments, though they may be meant for a replica: max_sequence_length = 16."
    assert said in forecast_tiny(tiny, asked, kwargs={"guidance_scale": 3.5}).assumptions
    assert not any("replica" in one for one in forecast_tiny(tiny, kwargs={"max_sequence_length": 16}).assumptions)


@pytest.mark.parametrize(
    ("compilation", "records"),
    [
        (Compilation("vae", mode="max-autotune"), True),
        (Compilation("vae", options={"triton.cudagraphs": True}), True),
        (Compilation("vae", backend="cudagraphs"), True),
        (Compilation("vae", mode="max-autotune-no-cudagraphs"), False),
        (Compilation("vae", options={"triton.cudagraphs": False}), False),
    ],
)
def test_it_is_known_what_records_cuda_graphs(compilation: Compilation, records: bool) -> None:
    assert running._records_graphs(compilation) is records


def test_the_pool_of_cuda_graphs_is_in_the_most_that_is_reserved(tiny: str, sim: Any) -> None:
    eager = forecast_tiny(tiny)
    plain = forecast_tiny(tiny, recipe(compilation=Compilation("vae")))
    assert (plain.peak, plain.wide) == (eager.peak, ())
    made = forecast_tiny(tiny, recipe(compilation=Compilation("vae", mode="reduce-overhead")))
    assert eager.residency is not None
    works = max(phase.working.get("vae", 0) for phase in eager.residency.phases)
    assert works > 0
    assert made.peak == eager.peak
    assert (made.reserved.low, made.reserved.high) == (eager.reserved.low, eager.reserved.high + works)
    total = eager.reserved.high + CONTEXT_BYTES[1]
    assert (eager.fit_bytes(total), made.fit_bytes(total)) == ("fits", "may fit")
    kept = f"the most that it may keep, {works / GIB:.2f} GiB, is in the most that is reserved."
    assert made.wide == (f"vae is recorded as CUDA graphs, whose pool stays reserved; {kept}",)
