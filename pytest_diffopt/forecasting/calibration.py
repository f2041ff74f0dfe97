"""``calibrate``: a recipe is forecast, then run for real on a device, and the two are compared, phase by phase.

No weights are needed: what a run allocates does not depend on their values, so by default it loads a checkpoint whose
weights are holes, with the real ``from_pretrained`` and the real kernels.

The measuring runs on every device that counts its memory, the simulated one as well, which is how it is tested. It has not
run on a GPU yet: on CUDA it is torch's documented counters and nothing else. Two things of loading are measured as people
have them and forecast otherwise: the libraries load components in the order of a set, and transformers reads in several
threads, so a few more weights may wait to be quantized. On the simulated device bitsandbytes quantizes with the host's
kernels, which take more than CUDA's, so there the loading of a quantized recipe is off.

A row (:meth:`Calibration.to_json`, one line of JSON) is what somebody with a GPU may give away. It has:

- ``schema_version``, and ``model``, the name of a public full size, or the pipeline's class for a directory;
- ``recipe``: as TOML, without its prompts and other texts of its calls, its pipeline and folders; ``sizes``, ``steps``;
- ``weights``: ``"holes"`` or ``"real"``;
- ``device``: kind, name, compute capability and memory as torch tells them; ``versions``: of the driver, CUDA, cuDNN and the
  libraries; ``system``: such as ``"Linux"``;
- ``generation``, ``assumptions``: whose kernels the forecast took, and what it took for granted;
- ``compared``: a phase (``load``, ``place``, ``call``, ``peak`` and ``reserved``), a component, what was forecast (``low``,
  ``expected``, ``high``) and ``measured``, in bytes;
- ``beside_bytes``: in use on the device and not torch's: the driver's context, and whatever other processes had;
- ``stopped``: the class of the error that ended the run, and where; ``""`` if none did.

It has no host's name, no user's and no path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytest_diffopt.accelerators import Accelerator
from pytest_diffopt.accelerators.gpus import CARDS
from pytest_diffopt.accelerators.gpus import card as find_card
from pytest_diffopt.errors import DiffoptError, ForecastError
from pytest_diffopt.forecasting.generations import GENERATIONS
from pytest_diffopt.libraries import import_libraries, quietly, versions
from pytest_diffopt.observation.outputs import OutputRecorder
from pytest_diffopt.observation.probes import recording
from pytest_diffopt.preparation import dynamo
from pytest_diffopt.preparation.borrowed_state import borrowed_state
from pytest_diffopt.preparation.pipeline import Prepared, prepare
from pytest_diffopt.replicas.catalogue import registry
from pytest_diffopt.replicas.checkpoint import PUBLISHED_SHARD_BYTES, write_checkpoint
from pytest_diffopt.replicas.resolution import resolve_full_size

if TYPE_CHECKING:
    from pytest_diffopt.forecasting.record import Estimate, Forecast, Phase
    from pytest_diffopt.observation.residency import ResidencyLedger
    from pytest_diffopt.recipe import Recipe
    from pytest_diffopt.replicas.description import Description

SCHEMA_VERSION = 1
HOLES, REAL = "holes", "real"

PROMISED = 0.005
"""How far what a forecast is exact about, weights above all, may be off."""

SIMULATED: Mapping[str, object] = {"convolution_workspace": "none", "attention": "fused", "cublas_workspace": False}
"""Assumed of the simulated device, whose kernels take nothing for themselves."""


@dataclass(frozen=True)
class Span:
    """The highest counters while a component ran in a phase, over all calls.

    Attributes:
        phase: ``"load"``, ``"place"`` or ``"call"``. component: ``""`` for what the pipeline does between them, and for
            loading and placing, which are measured as a whole.
        allocated_bytes, reserved_bytes: as ``max_memory_allocated`` and ``max_memory_reserved``.
    """

    phase: str
    component: str
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Measured:
    """A recipe as it ran on a device.

    Attributes:
        spans: in the order in which they first were.
        beside_bytes: of the device's memory, what was in use at the end and not torch's; None where it is not told.
        stopped: what ended the run, in a sentence; ``""`` if nothing did.
        stopped_by: the error's class and where, ``"OutOfMemoryError in the call of vae"``.
    """

    spans: tuple[Span, ...]
    beside_bytes: int | None = None
    stopped: str = ""
    stopped_by: str = ""

    def highest(self, phase: str | None = None, component: str | None = None) -> int | None:
        """The peak of allocated bytes of a phase, or of a component in it, or of all; None where there was none."""
        return max(
            (
                span.allocated_bytes
                for span in self.spans
                if phase in (None, span.phase) and component in (None, span.component)
            ),
            default=None,
        )

    @property
    def reserved_bytes(self) -> int:
        """The highest that the caching allocator held."""
        return max((span.reserved_bytes for span in self.spans), default=0)


@dataclass(frozen=True)
class Compared:
    """What was forecast for a phase and component, and what was measured, in bytes."""

    phase: str
    component: str
    low: int
    expected: int
    high: int
    measured: int

    @property
    def inside(self) -> bool:
        """Whether the range, widened by :data:`PROMISED`, holds what was measured."""
        return self.low - self.measured <= self.low * PROMISED and self.measured - self.high <= self.high * PROMISED

    @property
    def off(self) -> float:
        """How far what was measured is from what was expected: 0.02 is 2% more."""
        return self.measured / self.expected - 1 if self.expected else 0.0


@dataclass(frozen=True)
class Calibration:
    """A forecast and a measurement of one recipe; see the module for what a row of it holds."""

    recipe: Recipe
    forecast: Forecast
    measured: Measured
    weights: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    system: str = field(default_factory=platform.system)

    @property
    def compared(self) -> tuple[Compared, ...]:
        """Phase by phase what both know; the whole peak and what is reserved last."""
        return compare(self.forecast, self.measured)

    @property
    def holds(self) -> bool:
        """Whether the run ended well, and every range holds what was measured."""
        return not self.measured.stopped and all(one.inside for one in self.compared)

    def to_json(self) -> str:
        """The row to contribute: one line of JSON, with no name of a host or a user and no path."""
        known = registry.find_full_size(self.forecast.model)
        row = {
            "schema_version": SCHEMA_VERSION,
            "model": known.name if known is not None else self.forecast.pipeline,
            "pipeline": self.forecast.pipeline,
            "recipe": anonymous(self.recipe, self.forecast.pipeline).to_toml(),
            "sizes": self.forecast.sizes,
            "steps": self.forecast.steps,
            "weights": self.weights,
            "device": dict(self.device),
            "versions": dict(self.versions),
            "system": self.system,
            "generation": self.forecast.generation,
            "assumptions": self.forecast.assumptions,
            "compared": [dataclasses.asdict(one) for one in self.compared],
            "beside_bytes": self.measured.beside_bytes,
            "stopped": self.measured.stopped_by,
        }
        return json.dumps(row, ensure_ascii=False)


def calibrate(
    recipe: Recipe,
    model: str | None = None,
    *,
    accelerator: Accelerator,
    weights: str | None = None,
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
    steps: int | None = None,
    gpu: str | None = None,
    assume: Mapping[str, object] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Forecast a recipe with a full-size model, run it on a device, and compare.

    Args:
        recipe, model, sizes, steps, assume: as :func:`.running.forecast` takes them.
        accelerator: where it runs; a GPU, or the simulated device for a model that the host can compute.
        weights: a directory or a hub id with the model's weights; None for a checkpoint of holes, which needs no download.
        gpu: the card whose kernels are assumed; by default one of the accelerator's generation, see :func:`card_of`.
        progress: told in a few words what is done.

    Raises:
        DiffoptError: as :func:`.running.forecast`, and where the device does not count its memory.
    """
    from pytest_diffopt.forecasting.running import forecast

    say = progress or (lambda words: None)
    if accelerator.peak_bytes() is None:
        raise DiffoptError(f"calibrate: the device {accelerator.kind} does not count its memory.")
    asked: dict[str, Any] = {
        "sizes": sizes,
        "steps": steps,
        "gpu": gpu if gpu is not None else card_of(accelerator),
        "assume": {**(SIMULATED if accelerator.is_simulated else {}), **(assume or {})},
    }
    say("forecasting")
    if accelerator.is_simulated:
        told = forecast(recipe, model, **asked, progress=lambda words: say(f"forecasting · {words}"))
    else:
        told = forecast_apart(recipe, model, **asked)
    named = model if model is not None else recipe.pipeline
    assert isinstance(named, str)  # or the forecast had refused it
    with _checkpoint(weights, resolve_full_size(named), say) as loaded:
        call = dataclasses.replace(
            recipe.call, sizes=told.sizes, calls=len(told.sizes), num_inference_steps=told.steps, inputs=None
        )
        real = recipe.replace(pipeline=loaded, call=call)
        measured = measure(real, accelerator, allow_hub=weights is not None, progress=lambda w: say(f"measuring · {w}"))
    kind = REAL if weights is not None else HOLES
    return Calibration(recipe, told, measured, kind, device_of(accelerator), versions_of(accelerator))


def forecast_apart(recipe: Recipe, model: str | None, **asked: Any) -> Forecast:
    """The forecast, made in a process of its own: once torch has the simulated device, libraries take it for the accelerator.

    Args:
        asked: as :func:`.running.forecast` takes them.

    Raises:
        DiffoptError: as :func:`.running.forecast`.
        RecipeError: the recipe holds what cannot be written as TOML.
    """
    from pytest_diffopt.forecasting.record import Forecast

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        made, failure = pool.submit(_forecast_here, recipe.to_toml(), recipe.name, model, asked).result()
    if failure:
        raise ForecastError(failure)
    return Forecast.from_json(made)


def _forecast_here(toml: str, name: str, model: str | None, asked: dict[str, Any]) -> tuple[str, str]:
    """The forecast as JSON, or why there is none: plain text crosses processes."""
    from pytest_diffopt.forecasting.running import forecast
    from pytest_diffopt.recipe_loading import loads_recipes

    try:
        return forecast(loads_recipes(toml)[name], model, **asked).to_json(), ""
    except DiffoptError as error:
        return "", str(error)


def measure(
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    allow_hub: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Measured:
    """Load, place and call a recipe on a device, and read the device's counters; every global is given back.

    An error that ends the run is part of what is returned: where memory is short is what one wants to know.
    """
    import_libraries()
    gc.collect()
    accelerator.empty_cache()
    spans = _Spans(accelerator, progress or (lambda words: None))
    prepared: Prepared | None = None
    stopped = stopped_by = ""
    with borrowed_state(), quietly(), accelerator.in_use(), dynamo.settings(recipe.dynamo):
        try:
            spans.begin("load")
            prepared = prepare(recipe, accelerator, allow_hub=allow_hub, on_loaded=lambda _: spans.begin("place"))
            spans.end()
            # a ledger is told which component runs, and nothing more is asked of it
            with recording(prepared, _KeepsNothing(), cast("ResidencyLedger", spans)):
                for call in range(recipe.call.count):
                    spans.begin("call")
                    prepared.run(prepared.arguments(call))
                    accelerator.synchronize()
                    spans.end()
        except Exception as error:
            words = str(error).strip().splitlines()
            stopped = f"it stopped in the {spans.where}: {type(error).__name__}: {words[0] if words else ''}"
            stopped_by = f"{type(error).__name__} in the {spans.where}"
            spans.end()
        finally:
            beside = accelerator.beside_bytes()
            if prepared is not None:
                prepared.release()
            prepared = None
    gc.collect()
    accelerator.empty_cache()
    return Measured(spans.found(), beside, stopped, stopped_by)


class _KeepsNothing(OutputRecorder):
    """What components return is not looked at: of holes it means nothing."""

    def record(self, component: str, value: Any, *, hold: bool = False) -> None:
        pass


class _Spans:
    """Reads the counters and begins them anew whenever another component, or the pipeline itself, goes on."""

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self._accelerator, self._say = accelerator, say
        self._found: dict[tuple[str, str], list[int]] = {}
        self._phase = ""
        self._running: list[str] = []
        self._ended_in = ""
        self._before = accelerator.live_bytes() or 0  # is somebody else's

    def begin(self, phase: str) -> None:
        """A phase begins; what there was ends."""
        self.end()
        self._phase = phase
        self._say(phase)
        self._accelerator.reset_peak()

    def end(self) -> None:
        """The phase that there was ends."""
        self._read()
        self._phase, self._running = "", []

    def entered(self, component: str) -> None:
        """A component's call begins."""
        self._read()
        self._running.append(component)
        self._accelerator.reset_peak()

    def left(self, component: str) -> None:
        """It has ended."""
        self._read()
        if sys.exc_info()[0] is not None:  # by an error, which is on its way out
            self._ended_in = component
        self._running.pop()
        self._accelerator.reset_peak()

    @property
    def where(self) -> str:
        """Where an error came from: ``"call of vae"``."""
        return f"{self._phase} of {self._ended_in}" if self._ended_in else self._phase

    def found(self) -> tuple[Span, ...]:
        """What was read."""
        return tuple(Span(phase, component, *highest) for (phase, component), highest in self._found.items())

    def _read(self) -> None:
        if not self._phase:
            return
        highest = self._found.setdefault((self._phase, self._running[-1] if self._running else ""), [0, 0])
        now = ((self._accelerator.peak_bytes() or 0) - self._before, self._accelerator.peak_reserved_bytes() or 0)
        highest[:] = map(max, highest, now)


def compare(forecast: Forecast, measured: Measured) -> tuple[Compared, ...]:
    """Both, for each phase and component that both know; loading and placing as a whole."""
    found = []
    whole: tuple[Phase, ...] = ("load", "place")
    for phase in whole:
        real = measured.highest(phase)
        if real is not None and any(one.phase == phase for one in forecast.phases):
            found.append(_compared(phase, "", forecast.phase_peak(phase), real))
    for component in dict.fromkeys(one.component for one in forecast.phases if one.phase == "call"):
        if (real := measured.highest("call", component)) is not None:
            found.append(_compared("call", component, forecast.phase_peak("call", component), real))
    if found and not measured.stopped:
        found.append(_compared("peak", "", forecast.peak, measured.highest() or 0))
        found.append(_compared("reserved", "", forecast.reserved, measured.reserved_bytes))
    return tuple(found)


def _compared(phase: str, component: str, told: Estimate, measured: int) -> Compared:
    return Compared(phase, component, told.low, told.expected, told.high, measured)


def anonymous(recipe: Recipe, pipeline_class: str) -> Recipe:
    """The recipe without what says whose it is: its name, prompts, promises, and every folder."""
    offloading = recipe.offloading
    if offloading is not None and offloading.offload_to_disk_path is not None:
        offloading = dataclasses.replace(offloading, offload_to_disk_path="offloaded")
    numbers = {name: value for name, value in recipe.call.kwargs.items() if isinstance(value, bool | int | float)}
    call = dataclasses.replace(recipe.call, prompts=type(recipe.call)().prompts, kwargs=numbers, inputs=None)
    return recipe.replace(
        name="recipe",
        pipeline=pipeline_class,
        offloading=offloading,
        call=call,
        forecast=None,
        known_faults={},
        contract={},
    )


def card_of(accelerator: Accelerator) -> str | None:
    """The card that an accelerator is, by its own name; else one of its generation; None for what is no GPU of NVIDIA's."""
    if accelerator.kind != "cuda":
        return None
    with contextlib.suppress(DiffoptError):
        return find_card(accelerator.name).name
    has = accelerator.capability or (0, 0)
    older = [one for one in GENERATIONS.values() if one.capability <= has]
    if not older:
        return None
    nearest = max(older, key=lambda one: one.capability)
    return next((card.name for card in CARDS.values() if card.generation == nearest.name), None)


def device_of(accelerator: Accelerator) -> dict[str, Any]:
    """What a device says of itself."""
    return {
        "kind": accelerator.kind,
        "name": accelerator.name,
        "capability": accelerator.capability,
        "total_bytes": accelerator.total_memory_bytes,
    }


def versions_of(accelerator: Accelerator) -> dict[str, str]:
    """Of the libraries, and on CUDA of the driver, CUDA and cuDNN, as far as they are told."""
    import torch

    found = {name: version for name, version in versions().items() if name != "python"}
    if accelerator.kind == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        if driver := _driver():
            found["driver"] = driver
    return found


def _driver() -> str:
    """The version of NVIDIA's driver; ``""`` where its own tool does not tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        return said[0] if said else ""
    return ""


@contextlib.contextmanager
def _checkpoint(weights: str | None, description: Description, say: Callable[[str], None]) -> Iterator[str]:
    """What is loaded: the weights that are there, or holes in a folder that is deleted afterwards."""
    if weights is not None:
        yield weights
        return
    with tempfile.TemporaryDirectory(prefix="diffopt-") as folder:
        say(f"writing {description.name} without weights")
        yield str(write_checkpoint(description, Path(folder) / "checkpoint", max_shard_bytes=PUBLISHED_SHARD_BYTES))
