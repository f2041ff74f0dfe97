"""``advise``: a ladder of recipes for a full-size model, from the one that costs least time to the dearest, each forecast.

What a rung costs in time cannot be known with no GPU, so no latency is told. Rungs are ordered by what is known, in turn:

1. the bytes that a denoising step moves between the host and the accelerator, which the forecast counts;
2. of two that move as many, whether they are copied beside the computing (on a stream of their own);
3. the quantization: none, then eight bits, then four. Each quantized product has more to do than a plain one; which of
   the two formats is faster depends on the GPU, so the one that keeps more of the weights is first;
4. the VAE's tiles: they overlap, so some of the picture is decoded twice, and blended.

That transfers come before all else agrees with the one public ladder that we know of, in diffusers' guide "Compile and offload
quantized models" (FLUX.1-dev, 4-bit, RTX 4090): 32.6 s, compiled 25.8 s, compiled with model offloading 32.3 s. Offloading
takes back what compiling gave: 6.5 s, in which by our forecast 10.6 GiB go each way, 3.5 GB/s for memory that is not pinned.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.accelerators.gpus import Card
from pytest_diffopt.accelerators.gpus import card as find_card
from pytest_diffopt.byte_sizes import human, parse_bytes
from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.libraries import found_in
from pytest_diffopt.recipe import Offloading, Quantization, Recipe
from pytest_diffopt.replicas.catalogue import registry
from pytest_diffopt.replicas.description import Description, kind
from pytest_diffopt.replicas.resolution import resolve_full_size

if TYPE_CHECKING:
    from pytest_diffopt.forecasting.record import Fit, Forecast

SCHEMA_VERSION = 1

ENOUGH = 2
"""Rungs that surely fit, after which the dearer ones are not forecast."""

BUS_BYTES_PER_SECOND = 16e9 * 16 * 128 / 130 / 8
"""PCI Express 4.0 with 16 lanes: 16 GT/s a lane, 128 of 130 bits are data (PCI-SIG, PCI Express Base Specification 4.0).
No copy is faster; copies of memory that is not pinned are much slower."""

FORECAST_STEPS = 3
"""Steps that are run for a forecast; more of them take no more memory. What a longer call moves follows from the last one."""

DEFAULT_STEPS = 50
"""Of a call, where the pipeline's class does not say: what most pipelines of diffusers have by default."""

_GIB = 2**30
_NEGLIGIBLE_BYTES = 16 * 2**20  # a step: prompts, latents and results are moved by every recipe
_ALIKE = 1.1
_LARGE_BYTES = _GIB  # what is quantized: components whose weights take so much
_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_FORMATS = {"": "", "bitsandbytes_8bit": "int8", "bitsandbytes_4bit": "nf4"}
_PLACEMENTS = ("", "model", "group", "sequential")
_QUANTIZED_WORDS = {"": "", "bitsandbytes_8bit": "8-bit", "bitsandbytes_4bit": "4-bit (nf4)"}
_PLACED_WORDS = {
    "": "all on the GPU",
    "model": "model offloading",
    "group": "group offloading by layer, on a stream",
    "sequential": "sequential offloading",
}

BROKEN: Mapping[tuple[str, str], str] = {
    (
        "bitsandbytes_8bit",
        "model",
    ): "8-bit layers keep their weights where offloading does not see them: they never leave",
    (
        "bitsandbytes_8bit",
        "group",
    ): "8-bit layers keep their weights where offloading does not see them: they never leave",
    (
        "bitsandbytes_8bit",
        "sequential",
    ): "8-bit layers keep their weights where offloading does not see them: they never leave",
    (
        "bitsandbytes_4bit",
        "sequential",
    ): "accelerate sends the quantization state away with the weight, and cannot bring it back: it does not run",
}
"""(quantization, offloading) → why no rung has both: what the libraries break today. Each is a recipe in
``examples/known-library-faults.recipes.toml``, whose test says when one is mended."""


@dataclass(frozen=True)
class Cost:
    """What is known of what a rung costs in time; ordered by :attr:`key`, see the module.

    Attributes:
        step_bytes: moved between host and accelerator a denoising step, both ways, a call's whole traffic in equal parts.
        overlapped: whether it is copied on a stream of its own.
        quantization: the backend; ``""`` for none.
        tiled: whether the VAE works tile by tile.
    """

    step_bytes: int
    overlapped: bool = False
    quantization: str = ""
    tiled: bool = False

    @property
    def key(self) -> tuple[int, bool, int, bool]:
        """The least first. Transfers within a tenth of each other are alike: there the next thing tells."""
        moved = 0
        if self.step_bytes >= _NEGLIGIBLE_BYTES:
            moved = 1 + round(math.log(self.step_bytes / _NEGLIGIBLE_BYTES, _ALIKE))
        return moved, moved > 0 and not self.overlapped, list(_FORMATS).index(self.quantization), self.tiled

    @property
    def bus_seconds(self) -> float:
        """The least time that the transfers of a step take, at :data:`BUS_BYTES_PER_SECOND`."""
        return self.step_bytes / BUS_BYTES_PER_SECOND

    @property
    def why(self) -> str:
        """What makes it dearer than the plain recipe, in a sentence."""
        reasons = []
        if self.step_bytes >= _NEGLIGIBLE_BYTES:
            beside = ", beside the computing" if self.overlapped else ""
            reasons.append(
                f"{human(self.step_bytes)} a step over the bus{beside}: {self.bus_seconds:.2g} s at the least"
            )
        if self.quantization:
            reasons.append("quantized layers have more to do at each product")
        if self.tiled:
            reasons.append("what the VAE's tiles share is decoded twice")
        return "; ".join(reasons) or "nothing is moved or quantized"


@dataclass(frozen=True)
class Rung:
    """A recipe of the ladder, and what its forecast says.

    Attributes:
        name: e.g. ``"nf4-model-tiled"``. words: what it does.
        recipe: which can be written as TOML, with the budget that was asked for.
        forecast: None where it failed; failure: then why, a sentence; and where, a line each.
        fit: of the budget; None without a budget, and without a forecast.
        cost: None without a forecast.
    """

    name: str
    words: str
    recipe: Recipe
    forecast: Forecast | None = None
    failure: str = ""
    fit: Fit | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class LeftOut:
    """A recipe that was not forecast, and why in words."""

    name: str
    why: str


@dataclass(frozen=True)
class Advice:
    """A ladder for a model.

    Attributes:
        model: its name. dtype: of what is not quantized.
        budget_bytes: that torch's peak is to stay within. gpu: the card that it is to fit. Either may be None.
        steps: denoising steps a call, over which transfers are spread.
        rungs: those that were forecast, the one that is expected to cost least first; failed ones last.
        left_out: those that were not, and why.
    """

    model: str
    dtype: str
    budget_bytes: int | None
    gpu: str | None
    steps: int
    rungs: tuple[Rung, ...]
    left_out: tuple[LeftOut, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def fitting(self) -> tuple[Rung, ...]:
        """The rungs that surely fit, the one that is expected to cost least first."""
        return tuple(rung for rung in self.rungs if rung.fit == "fits")

    @property
    def best(self) -> Rung | None:
        """The first of them."""
        return next(iter(self.fitting), None)

    def to_toml(self) -> str:
        """The recipes that surely fit, as a file that pytest-diffopt collects; each has its budget."""
        return "\n".join(rung.recipe.to_toml() for rung in self.fitting)

    def to_json(self) -> str:
        """Everything as JSON text; a recipe as its TOML, a forecast as :meth:`Forecast.to_json` has it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["rungs"] = [_plain(rung) for rung in self.rungs]
        fields["left_out"] = [dataclasses.asdict(one) for one in self.left_out]
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"


def _plain(rung: Rung) -> dict[str, Any]:
    cost = None
    if rung.cost is not None:
        cost = {**dataclasses.asdict(rung.cost), "bus_seconds": rung.cost.bus_seconds, "why": rung.cost.why}
    return {
        "name": rung.name,
        "words": rung.words,
        "recipe": rung.recipe.to_toml(),
        "forecast": json.loads(rung.forecast.to_json()) if rung.forecast is not None else None,
        "failure": rung.failure,
        "fit": rung.fit,
        "cost": cost,
    }


def advise(
    model: str,
    *,
    budget: str | int | None = None,
    gpu: str | Card | None = None,
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
    steps: int | None = None,
    assume: Mapping[str, object] | None = None,
    dtype: str = "bfloat16",
    all: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Advice:
    """Which of the known recipes fit, the one that is expected to cost least time first. No GPU, no weights.

    Rungs are forecast from the cheapest on, until :data:`ENOUGH` surely fit. Combinations that the libraries break are left
    out, see :data:`BROKEN`, and so are tiles where they cannot help.

    Args:
        model: a full-size model's name, its hub id, or a directory of config files.
        budget: that torch may have allocated at once, as an int or like ``"16GiB"``.
        gpu: a card, or its name; what the allocator reserves and CUDA takes must fit it, and its kernels are assumed.
        sizes: as :func:`.running.forecast` takes them.
        steps: denoising steps a call; by default what the pipeline's class has. Memory is forecast with
            :data:`FORECAST_STEPS`.
        assume: as :func:`.running.forecast` takes it.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, of what is not quantized.
        all: forecast every rung.
        progress: told in a few words what is done.

    Raises:
        ReplicaError: the model is unknown.
        DiffoptError: the card or an assumption is unknown.
        RecipeError: the dtype is unknown.
        ValueError: the budget is no size.
    """
    description = resolve_full_size(model)
    limit = parse_bytes(budget, "budget") if budget is not None else None
    known = find_card(gpu) if isinstance(gpu, str) else gpu
    asked = steps if steps is not None else default_steps(description.pipeline_class)
    ladder = _Ladder(description, model, limit, known, sizes, asked, dict(assume or {}), dtype, progress)
    ladder.climb(everything=all)
    return Advice(
        description.name,
        dtype,
        limit,
        known.name if known is not None else None,
        asked,
        tuple(sorted(ladder.rungs, key=_place)),
        tuple(ladder.left_out),
    )


def _place(rung: Rung) -> tuple[Any, ...]:
    return (False, *rung.cost.key) if rung.cost is not None else (True,)


def default_steps(pipeline_class: str) -> int:
    """Denoising steps of a call that says nothing, as the pipeline's class has them; else :data:`DEFAULT_STEPS`."""
    found = found_in("diffusers", pipeline_class)
    if not callable(found):
        return DEFAULT_STEPS
    parameter = inspect.signature(found.__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else DEFAULT_STEPS


def cost_of(recipe: Recipe, forecast: Forecast, steps: int) -> Cost:
    """The cost of a recipe in a call of ``steps`` steps, of which the forecast may have run fewer."""
    further = steps - forecast.steps
    moved = forecast.h2d_bytes + forecast.d2h_bytes + further * (forecast.step_h2d_bytes + forecast.step_d2h_bytes)
    return Cost(
        max(0, moved) // steps,
        overlapped=recipe.offloading is not None and recipe.offloading.use_stream,
        quantization=recipe.quantizations[0].backend if recipe.quantizations else "",
        tiled=bool(recipe.vae_tiling),
    )


def combinations() -> Iterator[tuple[str, str]]:
    """(quantization, offloading) of every rung, broken ones too, in the order in which they are expected to cost time.

    What is offloaded is quantized first: there is less to move.
    """
    for placement in _PLACEMENTS:
        formats = list(_FORMATS)
        yield from ((backend, placement) for backend in (reversed(formats) if placement else formats))


def tiles_may_help(forecast: Forecast, fits_bytes: Callable[[int], bool]) -> bool:
    """Whether the VAE alone makes the peak, so that tiles lower it: and then all else might fit.

    Args:
        fits_bytes: whether a peak of so many bytes might fit.
    """
    vae = forecast.phase_peak("call", "vae")
    others = [one.peak for one in forecast.phases if (one.phase, one.component) != ("call", "vae")]
    return vae.high > max((peak.high for peak in others), default=0) and fits_bytes(
        max((peak.low for peak in others), default=0)
    )


class _Ladder:
    """Makes the rungs and climbs them."""

    def __init__(
        self,
        description: Description,
        model: str,
        budget_bytes: int | None,
        gpu: Card | None,
        sizes: Sequence[int] | Sequence[Sequence[int]] | None,
        steps: int,
        assume: dict[str, object],
        dtype: str,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.description, self.model, self.budget_bytes, self.gpu = description, model, budget_bytes, gpu
        self.sizes, self.steps, self.assume = sizes, steps, assume
        self.say = progress or (lambda words: None)
        self.plain = Recipe(_DTYPE_NAMES.get(dtype, dtype), self._pipeline(), dtype=dtype, forecast=self._promise())
        self.large: tuple[str, ...] = tuple(
            name for name, one in description.components.items() if kind(one) == "module" and name != "vae"
        )
        self.rungs: list[Rung] = []
        self.left_out: list[LeftOut] = []

    def climb(self, *, everything: bool) -> None:
        """Forecast rungs in the expected order."""
        for backend, placement in combinations():
            recipe = self._recipe(backend, placement)
            if (backend, placement) in BROKEN:
                self.left_out.append(LeftOut(recipe.name, BROKEN[backend, placement]))
                continue
            if not everything and sum(rung.fit == "fits" for rung in self.rungs) >= ENOUGH:
                self.left_out.append(LeftOut(recipe.name, f"{ENOUGH} that cost less time surely fit"))
                continue
            rung = self._forecast(recipe, backend, placement)
            if rung.forecast is None:
                continue
            if not self.rungs[1:]:
                self._knows(rung.forecast)
            tiled = recipe.replace(name=f"{recipe.name}-tiled", vae_tiling=self._tile())
            if not tiles_may_help(rung.forecast, self._might_fit if not everything else lambda _: True):
                self.left_out.append(LeftOut(tiled.name, f"tiles of the VAE would not make {recipe.name} fit"))
            elif rung.fit == "fits" and not everything:
                self.left_out.append(LeftOut(tiled.name, f"{recipe.name} fits without tiles"))
            else:
                self._forecast(tiled, backend, placement)

    def _forecast(self, recipe: Recipe, backend: str, placement: str) -> Rung:
        from pytest_diffopt.forecasting.running import forecast

        about = ", ".join(
            filter(
                None,
                [
                    _QUANTIZED_WORDS[backend] or recipe.dtype,
                    _PLACED_WORDS[placement],
                    f"the VAE in tiles of {recipe.vae_tiling}" if recipe.vae_tiling else "",
                ],
            )
        )
        self.say(recipe.name)
        try:
            found = forecast(
                recipe,
                self.model,
                sizes=self.sizes,
                steps=min(self.steps, FORECAST_STEPS),
                gpu=self.gpu.name if self.gpu is not None else None,
                assume=self.assume or None,
                progress=lambda words: self.say(f"{recipe.name} · {words}"),
            )
        except DiffoptError as error:
            rung = Rung(recipe.name, about, recipe, failure=str(error))
        else:
            cost = cost_of(recipe, found, self.steps)
            rung = Rung(recipe.name, about, recipe, found, fit=self._fit(found), cost=cost)
        self.rungs.append(rung)
        return rung

    def _fit(self, forecast: Forecast) -> Fit | None:
        fits: list[Fit] = []
        if self.budget_bytes is not None:
            fits.append(forecast.within(self.budget_bytes))
        if self.gpu is not None:
            fits.append(forecast.fit(self.gpu))
        worst: tuple[Fit, ...] = ("does not fit", "may fit", "fits")
        return min(fits, key=worst.index, default=None)

    def _might_fit(self, peak_bytes: int) -> bool:
        limits = [self.budget_bytes, self.gpu.total_bytes if self.gpu is not None else None]
        return all(peak_bytes <= limit for limit in limits if limit is not None)

    def _knows(self, forecast: Forecast) -> None:
        """What is worth quantizing, once the weights are known."""
        held = {name: forecast.weights_bytes[name] for name in self.large if name in forecast.weights_bytes}
        large = [name for name, size in held.items() if size >= _LARGE_BYTES]
        self.large = tuple(large or [max(held, key=lambda name: held[name])])

    def _recipe(self, backend: str, placement: str) -> Recipe:
        name = "-".join(filter(None, [_FORMATS[backend] or self.plain.name, placement]))
        quantization = offloading = None
        if backend:
            kwargs = {}
            if backend == "bitsandbytes_4bit":
                kwargs = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": self.plain.dtype}
            quantization = Quantization(backend, self.large, kwargs)  # type: ignore[arg-type]
        if placement:
            offloading = Offloading(placement, use_stream=placement == "group")  # type: ignore[arg-type]
        return self.plain.replace(name=name, quantization=quantization, offloading=offloading)

    def _tile(self) -> int:
        """Pixels of a tile's side: half an image, and what diffusers' own VAEs of videos have."""
        sizes: Any = self.sizes if self.sizes is not None else self.description.default_size or ()
        first = sizes[0] if sizes and not isinstance(sizes[0], int) else sizes
        return 512 if len(first) == 2 and max(first) > 512 else 256

    def _pipeline(self) -> str:
        """The replica that stands for the model, so that every other check runs as well; else the model itself."""
        for family in registry.families.values():
            if family.pipeline_class == self.description.pipeline_class:
                return family.name
        return self.description.hub_id or self.model

    def _promise(self) -> dict[str, Any] | None:
        if self.budget_bytes is None and self.gpu is None:
            return None
        promised: dict[str, Any] = {
            "model": self.description.name if registry.find_full_size(self.description.name) else self.model,
            "max_memory": self.budget_bytes,
            "gpu": self.gpu.name if self.gpu is not None else None,
            "sizes": self.sizes,
            "assume": self.assume,
        }
        return {name: value for name, value in promised.items() if value}
