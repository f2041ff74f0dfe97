"""``forecast``: runs a recipe with a full-size model, with no weights, on the simulated device, dry.

It is the recipe's own way: the libraries load a checkpoint (of holes), quantize, place, put hooks on and call, as in an
observation. Only, nothing is computed but what is small, and each byte is written down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytest_diffopt.accelerators import Accelerator, select, simulated, simulated_gpu
from pytest_diffopt.accelerators.gpus import CARDS, card
from pytest_diffopt.errors import DiffoptError, ForecastError, ReplicaError
from pytest_diffopt.forecasting import loading
from pytest_diffopt.forecasting.assumptions import Assumptions, assumed
from pytest_diffopt.forecasting.costs import costs_on
from pytest_diffopt.forecasting.cuda_kernels import KERNELS
from pytest_diffopt.forecasting.generations import Generation, generation
from pytest_diffopt.forecasting.peaks import (
    CALL,
    PLACE,
    Peaks,
    live_at,
    load_of_any_order,
    peaks_of,
    read_by_the_host,
    with_load,
    with_unknown_sizes,
)
from pytest_diffopt.forecasting.record import Estimate, Forecast
from pytest_diffopt.libraries import LIBRARIES, found_in, import_libraries, quietly, versions
from pytest_diffopt.observation.failures import failure_of
from pytest_diffopt.observation.memory import somebody_froze
from pytest_diffopt.observation.outputs import OutputRecorder
from pytest_diffopt.observation.probes import recording
from pytest_diffopt.observation.residency import ResidencyLedger, mapped_bytes, weights_of
from pytest_diffopt.preparation import kept_tables
from pytest_diffopt.preparation.borrowed_state import borrowed_state
from pytest_diffopt.preparation.pipeline import Prepared, prepare
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.recipe import FACTORY
from pytest_diffopt.replicas.catalogue import registry
from pytest_diffopt.replicas.checkpoint import PUBLISHED_SHARD_BYTES, write_checkpoint
from pytest_diffopt.replicas.description import Description, kind, parameter_count
from pytest_diffopt.replicas.resolution import resolve_full_size

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.recipe import Compilation, Recipe

DEFAULT_GENERATION = "ada"
"""Whose kernels are assumed where no GPU is named."""

LEAST_STEPS = 3
"""Schedulers of the second order hold what they held at most from the third step on."""

CONTROL_BYTES = 64 * 1024
"""What the host reads of at most so many bytes may decide what it does next."""

_ROOM_BYTES = 2**50
_T5 = ("T5EncoderModel", "UMT5EncoderModel")


def forecast(
    recipe: Recipe,
    model: str | None = None,
    *,
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
    steps: int | None = None,
    gpu: str | None = None,
    assume: Mapping[str, object] | None = None,
    kwargs: Mapping[str, object] | None = None,
    progress: Callable[[str], None] | None = None,
    modify: Callable[[Any], object] | None = None,
) -> Forecast:
    """What a recipe takes with a full-size model: peaks, what makes them, and how sure they are. No GPU, no weights.

    Every global is as before when it returns or raises, and nothing is left on the simulated device; what the frames of an
    exception hold is, until it is let go.

    Args:
        recipe: its parts are used as they are; of its calls the prompts, the steps and ``kwargs``, not the sizes, which
            are a replica's.
        model: a full-size model's name (``"flux.1-dev"``), its hub id, or a directory of config files; by default the one
            that the recipe's own pipeline names.
        sizes: ``(height, width)`` or ``(height, width, frames)`` in pixels, or several, one a call; by default the
            model's own.
        steps: denoising steps a call; by default the recipe's, and at least :data:`LEAST_STEPS`.
        gpu: a card's name (:mod:`pytest_diffopt.accelerators.gpus`), whose generation's kernels are assumed; else those of
            :data:`DEFAULT_GENERATION`.
        assume: versions and flags to take for granted, see :class:`.assumptions.Assumptions`.
        kwargs: further keyword arguments of the calls, over the recipe's.
        progress: told in a few words what is done.
        modify: called with the pipeline once it is loaded, before it is placed: for what a recipe cannot say, such as
            ``pipeline.transformer.enable_cache(...)``.

    Raises:
        ReplicaError: the model is unknown, or not given where the recipe names none.
        ForecastError: the recipe does not suit the model, or its run stopped; the sentence says where.
        DiffoptError: a card or an assumption is unknown.
        UnverifiableError: the simulated device cannot be built on this machine.
    """
    from pytest_diffopt.recipe import Recipe

    if not isinstance(recipe, Recipe):
        raise TypeError(f"forecast: found {type(recipe).__name__}; it takes a Recipe")
    begun = time.perf_counter()
    import_libraries()
    assumptions = assumed(assume)
    on = generation(card(gpu).generation if gpu is not None else DEFAULT_GENERATION)
    description = _described(recipe, model)
    full = _full_size_recipe(recipe, description, sizes, steps, kwargs or {})
    say = progress or (lambda words: None)
    formats = _memory_formats(recipe)
    run = _Run(full, description, assumptions, on, say, frozenset(kwargs or {}), modify, formats)
    with borrowed_state(reset_compiler=False), quietly():
        run.everything()
    return run.forecast(recipe, time.perf_counter() - begun, gpu)


def _described(recipe: Recipe, model: str | None) -> Description:
    """The full-size model, which the recipe suits."""
    named = recipe.pipeline if isinstance(recipe.pipeline, str) else None
    family = registry.find(named) if named is not None else None
    if model is None:
        if named is None or ":" in named:
            raise ReplicaError(f"{recipe.name}: its pipeline is made by a factory, so a full-size model must be named.")
        if family is not None and registry.find_full_size(named) is None:
            known = ", ".join(one.name for one in family.full_sizes) or "none that is known"
            raise ReplicaError(
                f"{recipe.name}: {named} is a replica; name the full-size model that it stands for: {known}."
            )
        model = named
    description = resolve_full_size(model)
    if family is not None and family.pipeline_class != description.pipeline_class:
        raise ForecastError(
            f"{recipe.name}: its pipeline {named} is a {family.pipeline_class}, "
            f"and {description.name} a {description.pipeline_class}."
        )
    modules = [name for name, component in description.components.items() if kind(component) == "module"]
    parts: list[tuple[str, Sequence[str]]] = [
        ("compilation", [one.owner for one in recipe.compilation if one.component != FACTORY])
    ]
    for quantization in recipe.quantizations:
        if not BACKENDS[quantization.backend].forecasts:
            known = ", ".join(name for name, backend in BACKENDS.items() if backend.forecasts)
            raise ForecastError(
                f"{recipe.name}: what {quantization.backend} takes is not forecast yet; of the backends {known} are."
            )
        parts.append(("quantization", quantization.components or ()))
    if recipe.offloading is not None:
        parts.append(("offloading", recipe.offloading.components or ()))
    for part, names in parts:
        for name in names:
            if name not in modules:
                raise ForecastError(
                    f"{recipe.name}: {part} names {name!r}, which {description.name} does not have; "
                    f"it has {', '.join(modules)}."
                )
    return description


def _full_size_recipe(
    recipe: Recipe,
    description: Description,
    sizes: Sequence[int] | Sequence[Sequence[int]] | None,
    steps: int | None,
    kwargs: Mapping[str, object],
) -> Recipe:
    """The recipe as it is run: not compiled, and with full-size calls."""
    wanted = _full_sizes(recipe, description, sizes)
    call = dataclasses.replace(
        recipe.call,
        sizes=wanted,
        calls=max(1, len(wanted or ())),
        num_inference_steps=steps if steps is not None else max(LEAST_STEPS, recipe.call.num_inference_steps),
        kwargs={**recipe.call.kwargs, **kwargs},
        inputs=None,
    )
    order = tuple(part for part in recipe.order if part != "compilation")
    return recipe.replace(pipeline=description.name, compilation=(), dynamo={}, call=call).replace(
        order=(*order, "compilation")
    )


def _full_sizes(
    recipe: Recipe, description: Description, sizes: Sequence[int] | Sequence[Sequence[int]] | None
) -> tuple[tuple[int, ...], ...] | None:
    """One size a call, each with as many numbers as the pipeline takes; None for what it makes by itself."""
    default = description.default_size
    if sizes is None:
        return (default,) if default is not None else None
    takes = inspect.signature(found_in("diffusers", description.pipeline_class).__call__).parameters
    frames = "num_frames" in takes
    wanted = dataclasses.replace(recipe.call, sizes=cast("Any", sizes)).sizes or ()
    found = []
    for size in wanted:
        if len(size) == 3 and not frames:
            raise ForecastError(
                f"{recipe.name}: the size {size} has frames, and {description.pipeline_class} makes images: "
                f"(height, width)."
            )
        found.append((*size, *(default or ())[2:]) if len(size) == 2 and frames else size)
    return tuple(found)


def _memory_formats(recipe: Recipe) -> list[tuple[str, torch.memory_format]]:
    """What compiling a component does to its weights, which are placed all the same."""
    import torch

    return [
        (one.owner, getattr(torch, one.memory_format)) for one in recipe.compilation if one.memory_format is not None
    ]


class _KeepsNothing(OutputRecorder):
    """What components return is not looked at: it is not known."""

    def record(self, component: str, value: Any, *, hold: bool = False) -> None:
        pass


class _Run:
    """One dry run, and what it wrote down."""

    def __init__(
        self,
        recipe: Recipe,
        description: Description,
        assumptions: Assumptions,
        on: Generation,
        say: Callable[[str], None],
        given: frozenset[str],
        modify: Callable[[Any], object] | None,
        memory_formats: Sequence[tuple[str, torch.memory_format]],
    ) -> None:
        self._memory_formats = memory_formats
        self._given = given  # arguments of the call that are not the recipe's
        self._modify = modify
        self.recipe, self.description, self.assumptions, self.on, self.say = recipe, description, assumptions, on, say
        select("sim")  # which builds it, where it was not yet
        self.accelerator: Accelerator = simulated_gpu(
            next(one.name for one in CARDS.values() if one.generation == on.name)
        )
        self.ledger = ResidencyLedger(self.accelerator)
        self.phase = "loading"
        self.guesses: tuple[str, ...] = ()
        self.read: tuple[int, ...] = ()
        self.parameters: dict[str, int] = {}
        self.weights_bytes: dict[str, int] = {}
        self.host_bytes = self.pinned_bytes = self.h2d_bytes = self.d2h_bytes = 0
        self._host_before = self._pinned_before = 0
        self.reserved = Estimate(0, 0, 0)
        self.last_runs: dict[
            str, tuple[int, int, int]
        ] = {}  # component → runs in the call, (h2d, d2h) bytes of the last
        self._names: dict[int, tuple[str, str]] = {}
        self._workspace: torch.Tensor | None = None
        self._freezes = False

    def everything(self) -> None:
        """Load, place, call. Raises ForecastError where the recipe's own code stops."""
        with tempfile.TemporaryDirectory(prefix="diffopt-") as folder:
            self.say(f"describing {self.description.name}")
            checkpoint = write_checkpoint(
                self.description,
                Path(folder) / "checkpoint",
                max_shard_bytes=PUBLISHED_SHARD_BYTES,
                on_built=self._count_parameters,
            )
            recipe = self.recipe.replace(pipeline=str(checkpoint))
            with (
                self._frozen(),
                self.accelerator.in_use(),
                simulated.as_capability(self.on.capability),
                self._settings(),
                kept_tables.made_anew(),
                self._dry() as dry,
            ):
                guessed = dry.guesses  # of one that was open before
                try:
                    self._prepare_and_call(recipe)
                except DiffoptError:
                    raise
                except Exception as error:
                    raise ForecastError(self._stopped(error)) from error
                finally:
                    self.guesses = tuple(guess for guess in dry.guesses if guess not in guessed)
                    self.read = dry.blocks_read
                    self._workspace = None

    def _prepare_and_call(self, recipe: Recipe) -> None:
        self.ledger.open(0)
        try:
            if not self.ledger.is_open:
                raise ForecastError(
                    f"{self.recipe.name}: what happens on the simulated device is recorded for somebody else; "
                    f"forecast before or after it."
                )
            quantized = self._quantizes_t5(recipe)
            with (
                self.assumptions.in_force(text_encoder_is_quantized=quantized),
                loading.in_order(self._loads, self.ledger.left),
            ):
                prepared = prepare(recipe, self.accelerator, on_loaded=self._loaded)
            try:
                self.ledger.look()
                if recipe.quantization is not None and recipe.order[0] != "quantization":
                    self._count_weights(prepared)
                self._note_host(prepared)
                self._call(prepared)
            finally:
                prepared.release()
        finally:
            low, expected, high = (simulated.replay_reserved_memory(at) for at in ("low", "expected", "high"))
            # less may be worse: other blocks are cut otherwise
            self.reserved = Estimate(min(low, expected, high), expected, max(low, expected, high))
            self.ledger.close()

    def _loads(self, component: str) -> None:
        self.phase = f"loading {component}"
        self.say(self.phase)
        self.ledger.entered(component)

    def _loaded(self, prepared: Prepared) -> None:
        self._note_host(prepared)
        self.ledger.knows(prepared.components)
        self.ledger.look()
        prepared.default_size = self.description.default_size
        self._count_weights(prepared)
        for component, format_ in self._memory_formats:
            prepared.components[component].to(memory_format=format_)  # type: ignore[call-overload]
        if self._modify is not None:
            self._modify(prepared.pipeline)
        self.phase = "placing"
        self.say(self.phase)
        self.ledger.phase(PLACE)

    def _call(self, prepared: Prepared) -> None:
        import torch

        self._names = prepared.module_names()
        self.ledger.phase("")
        with self._modules(), recording(prepared, _KeepsNothing(), self.ledger):
            for call in range(self.recipe.call.count):
                self.phase = "the call" if self.recipe.call.count == 1 else f"call {call}"
                self.ledger.phase(f"{CALL}{call}")
                if self.assumptions.cublas_workspace and self._workspace is None:
                    size = self.on.cublas_workspace_bytes
                    self._workspace = torch.empty(size, dtype=torch.uint8, device=self.accelerator.device)
                self.last_runs = {}
                before = self.accelerator.transferred_bytes() or {}
                prepared.run(prepared.arguments(call))
                after = self.accelerator.transferred_bytes() or {}
                self.h2d_bytes, self.d2h_bytes = (after[way] - before[way] for way in ("h2d", "d2h"))
                self.ledger.look()
                self._note_host(prepared)
        self.ledger.phase("")

    @contextlib.contextmanager
    def _modules(self) -> Iterator[None]:
        """The ledger is told which module runs, and the progress which component."""
        from torch.nn.modules import module as hooks

        said = ""
        entered: list[str] = []  # for each module that runs the component whose part it is, where nobody else said so
        begun: list[dict[str, int]] = []

        def begins(module: torch.nn.Module, _args: Any) -> None:
            nonlocal said
            component, path = self._names.get(id(module), ("", ""))
            if component and component != said:
                said = component
                self.say(f"{self.phase}: {component}")
            if component and not path:
                begun.append(self.accelerator.transferred_bytes() or {})
            # a pipeline may call a part of a component itself
            entered.append(component if component and path and component not in self.ledger.running_now else "")
            if entered[-1]:
                self.ledger.entered(component)
            self.ledger.module_entered(path)

        def ends(module: torch.nn.Module, _args: Any, _result: Any) -> None:
            component, path = self._names.get(id(module), ("", ""))
            if component and not path and begun:
                now, before = self.accelerator.transferred_bytes() or {}, begun.pop()
                runs = self.last_runs.get(component, (0,))[0] + 1
                self.last_runs[component] = (runs, now["h2d"] - before["h2d"], now["d2h"] - before["d2h"])
            self.ledger.module_left()
            if entered and (component := entered.pop()):
                self.ledger.left(component)

        first = hooks.register_module_forward_pre_hook(begins)
        last = hooks.register_module_forward_hook(ends, always_call=True)
        try:
            yield
        finally:
            first.remove()
            last.remove()

    def _note_host(self, prepared: Prepared) -> None:
        """The highest on the host so far: what torch's allocators held, and weights that lie in mapped files now."""
        mapped = mapped_bytes(prepared.components, self.accelerator)
        stats = simulated.host_memory_stats()
        simulated.reset_peak_host_memory_stats()
        self.host_bytes = max(self.host_bytes, stats["peak_allocated"] - self._host_before + mapped)
        self.pinned_bytes = max(self.pinned_bytes, stats["peak_pinned"] - self._pinned_before)

    def _count_weights(self, prepared: Prepared) -> None:
        """Weights that two components share are the first one's."""
        seen: set[tuple[str, int]] = set()
        for name, module in prepared.components.items():
            self.weights_bytes[name] = 0
            for _, tensor in weights_of(module):
                where = (tensor.device.type, tensor.untyped_storage().data_ptr())
                if where not in seen:
                    seen.add(where)
                    self.weights_bytes[name] += tensor.untyped_storage().nbytes()

    def _count_parameters(self, name: str, module: torch.nn.Module) -> None:
        self.parameters[name] = parameter_count(module)

    def _quantizes_t5(self, recipe: Recipe) -> bool:
        return any(recipe.quantization_for(name) is not None for name in self._t5_encoders())

    def _t5_encoders(self) -> list[str]:
        return [name for name, one in self.description.components.items() if one.class_name in _T5]

    def _stopped(self, error: Exception) -> str:
        failure = failure_of(error, self.phase, self._names)
        where = f"{self.phase}, in {failure.component}" if failure.component else self.phase
        sentence = f"{self.recipe.name} on {self.description.name} stopped in {where}: {failure}"
        return "\n".join([sentence, *(f"  {line}" for line in failure.lines)])

    # what is borrowed

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """The device rounds and keeps blocks as CUDA's allocator does, and has room for everything."""
        import torch

        index = self.accelerator.device.index
        ops = torch.ops.pytest_diffopt_sim
        capacity, allowed, caching = ops.capacity(index), ops.allowed(index), simulated.is_caching_allocator()
        self.accelerator.empty_cache()
        others = self.accelerator.live_bytes() or 0
        simulated.set_memory_limit(_ROOM_BYTES)
        simulated.set_caching_allocator(True)
        simulated.empty_host_cache()  # of what others pinned
        simulated.reset_peak_host_memory_stats()
        stats = simulated.host_memory_stats()
        self._host_before, self._pinned_before = stats["allocated"], stats["pinned"]
        try:
            yield
        finally:
            gc.collect()
            if (self.accelerator.live_bytes() or 0) > others:
                self._thaw()  # the tables of what was imported before
                kept_tables.forget(self.accelerator.device_type)
                gc.collect()
            self.accelerator.empty_cache()
            simulated.set_caching_allocator(caching)
            simulated.set_memory_limit(capacity)
            ops.set_allowed(index, allowed)

    @contextlib.contextmanager
    def _dry(self) -> Iterator[Any]:
        costs = costs_on(
            self.on.name,
            convolution_workspace=self.assumptions.convolution_workspace,
            attention=self.assumptions.attention,
        )
        three = {name: _numbers(cost) for name, cost in costs.items()}
        with simulated.dry(kernels=KERNELS, costs=three) as dry:
            yield dry

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Half a million objects of the libraries need not be looked at whenever garbage is; what is garbage now goes."""
        gc.collect()
        self._freezes = not somebody_froze()
        if self._freezes:
            gc.freeze()
        try:
            yield
        finally:
            self._thaw()

    def _thaw(self) -> None:
        if self._freezes:
            gc.unfreeze()

    # what was found

    def forecast(self, recipe: Recipe, seconds: float, gpu: str | None) -> Forecast:
        """Everything that was written down, as plain data."""
        events, marks = self.ledger.events, self.ledger.marks
        peaks = with_load(peaks_of(events, marks), load_of_any_order(events, marks))
        if self.guesses:
            peaks = with_unknown_sizes(peaks)
        pools = self._graph_pools(recipe, peaks)
        self.reserved = dataclasses.replace(self.reserved, high=self.reserved.high + sum(pools.values()))
        highest = peaks.highest
        assert highest is not None  # a call always takes something
        wide, unknown = self._doubts(peaks, pools)
        return Forecast(
            recipe=recipe.name,
            model=self.description.name,
            pipeline=self.description.pipeline_class,
            dtype=recipe.dtype or "float32",
            sizes=self.recipe.call.sizes or (),
            steps=self.recipe.call.num_inference_steps,
            peak=peaks.total,
            peak_phase=highest.phase,
            peak_component=highest.component,
            peak_operation=highest.operation,
            phases=peaks.phases,
            live_at_peak=live_at(events, marks, peaks.at, self.ledger.paths),
            reserved=self.reserved,
            floor_bytes=peaks.floor_bytes,
            weights_bytes=self.weights_bytes,
            parameters=self.parameters,
            host_bytes=self.host_bytes,
            pinned_bytes=self.pinned_bytes,
            h2d_bytes=self.h2d_bytes,
            d2h_bytes=self.d2h_bytes,
            step_h2d_bytes=self._of_a_step(1),
            step_d2h_bytes=self._of_a_step(2),
            assumptions=self._assumed(recipe, gpu),
            wide=wide,
            unknown=unknown,
            generation=self.on.name,
            libraries=_library_versions(),
            seconds=seconds,
            residency=self.ledger.record,
        )

    def _of_a_step(self, way: int) -> int:
        """What the components that run at every step moved at the last one; one that runs twice a step counts twice."""
        steps = self.recipe.call.num_inference_steps
        return sum(run[way] * (run[0] // steps) for run in self.last_runs.values())

    def _assumed(self, recipe: Recipe, gpu: str | None) -> tuple[str, ...]:
        libraries = ", ".join(f"{name} {version}" for name, version in _library_versions().items())
        said = [
            f"Libraries as installed: {libraries}.",
            f"Kernels of {self.on.name.capitalize()} GPUs"
            + (f", as {gpu} is one." if gpu is not None else "; no GPU was named."),
            "Components load one after the other, each with one thread, in the order of the pipeline's arguments.",
        ]
        quantized = self._quantizes_t5(recipe)
        said += self.assumptions.sentences(
            text_encoder_is_quantized=quantized, has_t5=bool(self._t5_encoders()) and recipe.dtype == "bfloat16"
        )
        passed = {name: value for name, value in self.recipe.call.kwargs.items() if name not in self._given}
        if passed:
            shown = ", ".join(f"{name} = {value!r}" for name, value in passed.items())
            said.append(f"Calls get the recipe's own arguments, though they may be meant for a replica: {shown}.")
        if recipe.compilation:
            said.append(
                "torch.compile is not run: eager's peak stands for that of compiled code, which fuses operations."
            )
        return tuple(said)

    def _graph_pools(self, recipe: Recipe, peaks: Peaks) -> dict[str, int]:
        """Component that is recorded as CUDA graphs → the most that their pool may keep: all it works with at once.

        A pool is reserved; what was given back in it while it was recorded is not allocated. So is the guide's second row,
        which compiles with max-autotune, 14.9448 GiB where its first has 14.9453, both at their VAE's peak.
        """
        pools: dict[str, int] = {}
        record = self.ledger.record
        for compilation in recipe.compilation:
            if not _records_graphs(compilation):
                continue
            component = compilation.owner
            works = max((phase.working.get(component, 0) for phase in (record.phases if record else ())), default=0)
            own = [one.peak for one in peaks.phases if one.phase == "call" and one.component == component]
            pools[component] = works + max((peak.high - peak.expected for peak in own), default=0)
        return pools

    def _doubts(self, peaks: Peaks, pools: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        wide: list[str] = []
        matter = [one for one in peaks.phases if one.peak.high > peaks.total.low]  # the others are below the range
        loads = [one.peak for one in matter if one.phase == "load" and one.peak.high > one.peak.low]
        if loads:
            load = max(loads, key=lambda peak: peak.high)
            wide.append(f"The libraries load components in an order that differs between processes: {load}.")
        if not self.guesses and any(one.phase == "call" and one.peak.high > one.peak.low for one in matter):
            wide.append(
                f"What cuDNN's convolutions and attention take while they run depends on the GPU and its libraries: "
                f"{peaks.total}."
            )
        for component, size in pools.items():
            wide.append(
                f"{component} is recorded as CUDA graphs, whose pool stays reserved; the most that it may keep, "
                f"{size / 2**30:.2f} GiB, is in the most that is reserved."
            )
        wide += self.guesses
        unknown = []
        for component, operation, size in read_by_the_host(self.ledger.events, self.ledger.marks, self.read):
            if size <= CONTROL_BYTES:
                unknown.append(
                    f"The host reads what {component or 'the pipeline'} computed (by {operation}, at most {size} bytes); "
                    f"what it does for other values is not known."
                )
        return tuple(wide), tuple(unknown)


def _records_graphs(compilation: Compilation) -> bool:
    """Whether compiled code is recorded as CUDA graphs."""
    options = compilation.options or {}
    return (
        compilation.mode in ("reduce-overhead", "max-autotune")
        or compilation.backend == "cudagraphs"
        or bool(options.get("triton.cudagraphs"))
    )


def _library_versions() -> dict[str, str]:
    """Of the libraries whose code a forecast runs."""
    return {name: version for name, version in versions().items() if name in LIBRARIES}


def _numbers(cost: Callable[..., Estimate]) -> Callable[..., list[int]]:
    def three(*args: Any, **kwargs: Any) -> list[int]:
        found = cost(*args, **kwargs)
        return [found.low, found.expected, found.high]

    return three
