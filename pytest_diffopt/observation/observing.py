"""Observes a recipe: prepares it, runs its calls under every watch, and returns what was written down.

The run is the user's own: nothing is traced that would not be, no module that is compiled whole gets a hook, and every
global is given back. What the watches need is taken from outside the compiled code.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import CodeType
from typing import TYPE_CHECKING, Any, cast

from pytest_diffopt.accelerators import Accelerator, select
from pytest_diffopt.libraries import import_libraries, quietly, versions
from pytest_diffopt.observation import private_torch
from pytest_diffopt.observation.compilation import CompileWatch, meant_codes
from pytest_diffopt.observation.dispatching import AttentionWatch, CacheWatch
from pytest_diffopt.observation.failures import failure_of
from pytest_diffopt.observation.layers import dtype_name, kind_of, manifest
from pytest_diffopt.observation.memory import MemoryWatch
from pytest_diffopt.observation.observation import (
    DISABLED,
    PREPARING,
    CacheState,
    CallRecord,
    CompileRecord,
    ComponentRecord,
    Executions,
    Failure,
    Layer,
    Observation,
    OtherParameters,
    Output,
    StateChange,
)
from pytest_diffopt.observation.outputs import OutputRecorder, leaves
from pytest_diffopt.observation.probes import (
    SENSITIVITY_SEED,
    cast_tensors,
    counting_executions,
    perturb,
    recording,
    widen,
)
from pytest_diffopt.observation.syncs import SyncWatch
from pytest_diffopt.preparation import (
    attention,
    caching,
    compilation,
    dynamo,
    kept_tables,
    quantization,
    uninitialized_memory,
)
from pytest_diffopt.preparation import borrowed_state as state
from pytest_diffopt.preparation.pipeline import MODEL, Prepared, prepare
from pytest_diffopt.quantization_backends.backend import bytes_of

if TYPE_CHECKING:
    from pytest_diffopt.recipe import Recipe

REPEATS_WHERE_MEMORY_GREW = 4
"""More calls, for the memory alone, of each kind after which more was kept than before."""

REPEATS_WHERE_IT_GOES_ON = 8
"""And so many more where those kept more too: a ring of buffers is full one day."""

SENSITIVITY_PROMPT = "a blue teapot under a stormy sky"


def observe(
    recipe: Recipe,
    *,
    accelerator: Accelerator | str | None = None,
    precise: bool | None = None,
    force_eager: bool = False,
    allow_hub: bool = False,
    compile_backend: str | None = None,
    progress: Callable[[str], None] | None = None,
    timed_calls: int = 0,
) -> Observation:
    """Run a recipe once and write everything down.

    An exception inside the recipe ends its run and stands in :attr:`Observation.failure`; it is not raised.

    Args:
        recipe: what to run.
        accelerator: where, or the name of its kind; by default the one that :func:`pytest_diffopt.accelerators.select` finds.
        precise: also run the calls in a higher precision, as the yardstick of parity. By default where the recipe is a
            reference itself: neither compiled nor offloaded.
        force_eager: run eager whatever a factory compiled itself: a reference must be one.
        allow_hub: let hub ids that resolve to nothing local go to the hub.
        compile_backend: used instead of the backends that the recipe names.
        progress: called with a few words whenever a frame begins to compile.
        timed_calls: further calls that are made for their time alone.
    """
    from pytest_diffopt.recipe import Recipe

    if not isinstance(recipe, Recipe):
        raise TypeError(f"observe: found {type(recipe).__name__}; it takes a Recipe")
    if isinstance(accelerator, str):
        accelerator = select(accelerator)
    accelerator = accelerator or select()
    import_libraries(recipe)
    run = Run(recipe, accelerator, allow_hub, compile_backend, progress)
    run.force_eager = force_eager
    run.timed_calls = timed_calls
    if precise is None:
        precise = not recipe.compilation and recipe.offloading is None
    if not accelerator.is_host:
        kept_tables.forget(accelerator.device_type)
    with (
        state.borrowed_state(),
        accelerator.in_use(),
        kept_tables.made_anew(),
        uninitialized_memory.filled(),
        quietly() as caught,
    ):
        run.everything()
        if precise and run.failure is None:
            run.in_higher_precision()
    run.notes += dict.fromkeys(f"{w.category.__name__}: {str(w.message).strip()}" for w in caught)
    return run.observation()


class Run:
    """One run of a recipe, and what it wrote down.

    Attributes:
        keeps_result: whether what a call returned stands in ``result`` until the next one, for somebody who waits for it.
    """

    keeps_result = False
    result: Any = None

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        allow_hub: bool,
        backend: str | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.recipe = recipe
        self.accelerator = accelerator
        self.allow_hub = allow_hub
        self.backend = backend
        self.force_eager = False
        self.timed_calls = 0
        self.timed_seconds: list[float] = []
        self.random_after: dict[str, Any] = {}
        self.watch = CompileWatch()
        self.watch.call = PREPARING
        self.watch.on_compile = progress
        self.recorder = OutputRecorder()
        self.failure: Failure | None = None
        self.phase = "preparing"
        self.names: dict[int, tuple[str, str]] = {}
        self.calls: list[CallRecord] = []
        self.components: list[ComponentRecord] = []
        self.layers: list[Layer] = []
        self.other_parameters: list[OtherParameters] = []
        self.layers_after: list[Layer] = []
        self.executions: dict[tuple[int, str, str], int] = {}
        self.state_changes: list[StateChange] = []
        self.notes: list[str] = []
        self.outputs: tuple[Output, ...] = ()
        self.precise_outputs: tuple[Output, ...] = ()
        self.precise_dtype = ""
        self.breaks_of_diagnosis: CompileRecord | None = None
        self.memory = MemoryWatch(accelerator)
        self.syncs = SyncWatch(accelerator)
        self.attention = AttentionWatch()
        self.attention_after: dict[str, str] = {}
        self.caching = CacheWatch()
        self.caches: list[CacheState] = []
        self.starting_noise: dict[int, list[Any]] = {}

    def everything(self) -> None:
        """Prepare, call, and compare the globals; then, if a break ended it, find the other breaks too."""
        broke = False
        try:
            with dynamo.settings(self.recipe.dynamo):
                before = state.take_snapshot()
                with self.watch:
                    try:
                        self._prepare_and_call(before)
                    except BaseException as error:
                        if _is_for_others(error):
                            raise
                        self.note_failure(error)
                        broke = private_torch.is_graph_break(error)
                self._compare_state(before, state.take_snapshot(), with_random=False)
        except Exception as error:
            self.note_failure(error)
        self.outputs = self.recorder.outputs()
        if broke and any(entry.fullgraph for entry in self.recipe.compilation):
            self._diagnose_breaks()

    def _prepare_and_call(self, before: state.Snapshot) -> None:
        self.memory.open()
        try:
            prepared = prepare(
                self.recipe,
                self.accelerator,
                allow_hub=self.allow_hub,
                backend=self.backend,
                on_loaded=self._name_components,
            )
            with self._released(prepared):
                self._run_calls(prepared, before)
        finally:
            self.memory.close()

    def _name_components(self, prepared: Prepared) -> None:
        """So that an exception can be told by the component in which it was raised."""
        self.names = prepared.module_names()

    @contextlib.contextmanager
    def _released(self, prepared: Prepared) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.note_failure(error)  # to release may raise as well, and this came first
            raise
        finally:
            phase, self.phase = self.phase, "releasing"
            prepared.release()
            self.phase = phase

    def _run_calls(self, prepared: Prepared, before: state.Snapshot) -> None:
        self.is_loaded(prepared)
        self._compare_state(before, state.take_snapshot(), with_random=False, declared=self._declared())
        if prepared.is_model:  # inputs that a callable draws are drawn once, before anything is counted
            for call in range(self.recipe.call.count):
                self.recipe.call.model_inputs(call)
        random_before = state.read_random()
        with self.watching_calls(prepared):
            for call in range(self.recipe.call.count):
                self.call(prepared, call, "call")
            self.random_after = state.read_random()
            try:
                state.write_random(random_before)  # so that only the inputs differ from those of the first call
                self._sensitivity_call(prepared)
            except Exception as error:  # the recipe's own calls are made: inputs of ours may not suit a model
                self.notes.append(f"no sensitivity run: {type(error).__name__}: {error}")
        self.after_calls(prepared)
        try:
            self._time_calls(prepared)
        except Exception as error:  # the recipe's own calls are made: these are ours
            self.notes.append(f"the timed calls ended with {type(error).__name__}: {error}")
            self.timed_seconds.clear()
        for name in state.random_changed(random_before, self.random_after):
            self.state_changes.append(StateChange(name, "its state", "another state", "the calls"))

    def is_loaded(self, prepared: Prepared) -> None:
        """Write down what a pipeline is made of, before its first call."""
        self._name_components(prepared)
        self.memory.loaded(prepared.components)
        self._describe(prepared)
        self.hooks_of_caches = self._hooks_of_caches(prepared)
        self._note_what_disables()

    @contextlib.contextmanager
    def watching_calls(self, prepared: Prepared) -> Iterator[None]:
        """Inside this every call is watched: what each component returns, and which region of which module runs."""
        counting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not self.recipe.compilation:
            counting = counting_executions(prepared, self.executions, lambda: self.watch.call)
        self.watch.also_meant = self._behind_caches(prepared)
        self.watch.roots = {}
        for name, module in prepared.components.items():
            for code in meant_codes(compilation.original_module(module)._call_impl)[:1]:
                self.watch.roots[code] = (*self.watch.roots.get(code, ()), name)
        with (
            self.watch.naming(prepared.module_names()),
            recording(prepared, self.recorder, self.memory.ledger, self.syncs),
            self.syncs.watching(prepared),
            self._same_noise(prepared, replay=False),
            self._stance(),
            counting,
            self._watching_denoisers(prepared),
        ):
            yield

    def after_calls(self, prepared: Prepared) -> None:
        """What only further calls can tell, of memory, and what the calls did to the layers."""
        try:
            self._call_again_where_memory_grew(prepared)
        except Exception as error:  # the recipe's own calls are made: these are ours
            self.notes.append(f"the last call could not be repeated: {type(error).__name__}: {error}")
        self._compare_layers(prepared)
        self._describe_denoisers_after(prepared, self.hooks_of_caches)

    def _time_calls(self, prepared: Prepared) -> None:
        with self._stance():
            for _ in range(self.timed_calls):
                arguments = prepared.arguments(self.recipe.call.count - 1)
                self.accelerator.synchronize()
                started = time.perf_counter()
                result = prepared.run(arguments)
                self.accelerator.synchronize()
                self.timed_seconds.append(time.perf_counter() - started)
                del result, arguments

    def _stance(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        if not self.force_eager:
            return contextlib.nullcontext()
        return cast("contextlib.AbstractContextManager[Any]", torch.compiler.set_stance("force_eager"))

    def call(self, prepared: Prepared, call: int, kind: Any, **changed: Any) -> None:
        """Make one call under every watch.

        Args:
            kind: ``"call"``, or ``"sensitivity"`` with ``changed`` arguments of the first.
        """
        self.phase = f"call {call}" if kind == "call" else "the sensitivity run"
        self.watch.call = self.recorder.call = call
        arguments = prepared.arguments(0 if kind == "sensitivity" else call, **changed)
        if prepared.is_model and kind == "sensitivity" and not perturb(arguments):
            self.notes.append("no sensitivity run: the model's inputs hold nothing that could be changed")
            return
        inputs = digest(arguments)
        self.memory.call_begins(self.phase, self.recorder.held_bytes(self.accelerator.device_type), inputs)
        started = time.perf_counter()
        with self.syncs.call(call) if kind == "call" else contextlib.nullcontext():
            result = self._run(prepared, arguments)
        self.accelerator.synchronize()
        seconds = time.perf_counter() - started
        self.recorder.record("", result, hold=True)
        self.result = result if self.keeps_result else None
        del result
        self.memory.call_ends(
            call,
            prepared.components,
            self.recorder.held_bytes(self.accelerator.device_type, also=arguments),
            held_on_host=self._held_on_host(self.recorder, arguments),
        )
        if prepared.is_model:
            self.recorder.record("inputs after the call", arguments)
        asked = self.recipe.call
        self.calls.append(
            CallRecord(
                index=call,
                kind=kind,
                seconds=seconds,
                prompt="" if prepared.is_model else str(arguments.get("prompt", "")),
                size=tuple(asked.size(call) or ()),
                steps=0 if prepared.is_model else asked.num_inference_steps,
                inputs=inputs,
            )
        )

    def _run(self, prepared: Prepared, arguments: dict[str, Any]) -> Any:
        if not prepared.is_model:
            return prepared.run(arguments)
        with self.memory.ledger.running(MODEL), self.syncs.running(MODEL):
            return prepared.run(arguments)

    def _sensitivity_call(self, prepared: Prepared) -> None:
        """One more call with other inputs, unless two of the recipe's own calls differ in them already."""
        asked = self.recipe.call
        prompts = {asked.prompt(call) for call in range(asked.count)}
        if not prepared.is_model and len(prompts) > 1:
            return
        if prepared.is_model:
            self.call(prepared, asked.count, "sensitivity")
        else:
            self.call(
                prepared,
                asked.count,
                "sensitivity",
                prompt=SENSITIVITY_PROMPT,
                seed=asked.seed + SENSITIVITY_SEED,
            )

    def _call_again_where_memory_grew(self, prepared: Prepared) -> None:
        """Calls after which more was kept, for the memory alone: a leak goes on, what is kept once does not."""
        self.recorder.let_go()
        self.memory.results_let_go()
        inputs = {call.inputs: call.index for call in self.calls if call.kind == "call"}
        again = sorted({inputs.get(found, self.recipe.call.count - 1) for found in self.memory.kept_more()})
        if not again:
            return
        recorder = OutputRecorder()
        with self._stance(), recording(prepared, recorder, self.memory.ledger):
            for repeat in range(REPEATS_WHERE_MEMORY_GREW):
                for call in again:
                    self._call_for_the_memory(prepared, recorder, call, repeat + 1)
            if not self.memory.still_growing():
                return
            for more in range(REPEATS_WHERE_IT_GOES_ON):
                for call in again:
                    self._call_for_the_memory(prepared, recorder, call, REPEATS_WHERE_MEMORY_GREW + more + 1)

    def _held_on_host(self, recorder: OutputRecorder, arguments: Any) -> int:
        """Bytes of the host that the observation holds itself."""
        noise = sum(
            tensor.nbytes for _, tensor in leaves(list(self.starting_noise.values())) if tensor.device.type == "cpu"
        )
        return recorder.copied_bytes() + recorder.held_bytes("cpu", also=arguments) + int(noise)

    def _call_for_the_memory(self, prepared: Prepared, recorder: OutputRecorder, call: int, repeat: int) -> None:
        self.watch.call = max(self.watch.call, self.recipe.call.count) + 1
        arguments = prepared.arguments(call)
        self.memory.call_begins(f"call {call} again, {repeat}", 0, digest(arguments))
        self._run(prepared, arguments)
        self.accelerator.synchronize()
        held = self.recorder.held_bytes(self.accelerator.device_type, also=arguments)
        on_host = self._held_on_host(recorder, arguments)
        self.memory.call_ends(self.watch.call, prepared.components, held, held_on_host=on_host, repeated=True)

    def _describe(self, prepared: Prepared) -> None:
        seen: set[int] = set()
        for name, module in prepared.components.items():
            root = compilation.original_module(module)
            layers, others = manifest(name, root)
            self.layers += layers
            self.other_parameters += others
            parameters = {id(parameter): bytes_of(parameter) for parameter in root.parameters()}
            shared = sum(size for one, size in parameters.items() if one in seen)
            seen |= parameters.keys()
            self.components.append(
                ComponentRecord(
                    name=name,
                    kind=kind_of(root),
                    bytes=sum(parameters.values()),
                    shared_bytes=shared,
                    blocks=compilation.repeated_classes(root),
                    compiled=compilation.compiled_paths(module),
                    siblings_not_compiled=compilation.siblings_not_compiled(module),
                    disabled=compilation.disabled_paths(module),
                    kept_plain=prepared.kept_plain.get(name, ()),
                    own_exclusions=quantization.own_exclusions(root),
                    kept_float32=prepared.kept_float32.get(name, ()),
                    kept_resident=name in prepared.offloaded.kept_resident,
                    buffer_bytes=sum(bytes_of(buffer) for buffer in root.buffers()),
                    names_no_blocks=compilation.names_no_blocks(root),
                    stays_until=prepared.offloaded.stays_until.get(name),
                    types_of_file=prepared.types_of_file.get(name, {}),
                )
            )

    def _declared(self) -> set[str]:
        """The globals that diffusers sets because the recipe says so, while the pipeline lives."""
        return {attention.GLOBAL} if self.recipe.attention is not None else set()

    def _watching_denoisers(self, prepared: Prepared) -> contextlib.ExitStack:
        """Attention and caches, seen from within: nothing that is compiled may have these watches in it."""
        stack = contextlib.ExitStack()
        compiles = bool(self.recipe.compilation) or (bool(prepared.compiled_before) and not self.force_eager)
        if self.recipe.attention is not None and not compiles:
            stack.enter_context(self.attention.watching(prepared, lambda: self.watch.call))
        if self.recipe.caching and not compiles:
            stack.enter_context(self.caching.watching(prepared, lambda: self.watch.call))
        return stack

    def _hooks_of_caches(self, prepared: Prepared) -> dict[str, int]:
        components = {one.component: (prepared.components[one.component], one.kind) for one in self.recipe.caching}
        return {name: len(list(caching.cache_hooks(*given))) for name, given in components.items()}

    def _behind_caches(self, prepared: Prepared) -> dict[int, tuple[CodeType, ...]]:
        """id of a component with a cache → the code of the parts that it decides on, whose hooks run outside of graphs."""
        found: dict[int, tuple[CodeType, ...]] = {}
        for one in self.recipe.caching:
            root = compilation.original_module(prepared.components[one.component])
            hooked = [root.get_submodule(path) for path, _ in caching.cache_hooks(root, one.kind) if path]
            codes = [code for inner in hooked for code in meant_codes(inner._call_impl)[:1]]
            found[id(root)] = tuple(dict.fromkeys(codes))
        return found

    def _describe_denoisers_after(self, prepared: Prepared, hooks_before: dict[str, int]) -> None:
        """What the calls left of the attention backend and the caches."""
        if self.recipe.attention is not None:
            used = {name: attention.used_by(module) for name, module in prepared.components.items()}
            self.attention_after = {name: ", ".join(backends) for name, backends in used.items() if backends}
        hooks_after = self._hooks_of_caches(prepared)
        for name, count in hooks_before.items():
            found = caching.caching_of(prepared.components[name])
            kind = found[0] if found else ""
            hooked = dict.fromkeys(path for path, _ in caching.cache_hooks(prepared.components[name], kind) if path)
            self.caches.append(CacheState(name, kind, count, hooks_after[name], tuple(hooked)))

    def _compare_state(
        self, before: state.Snapshot, after: state.Snapshot, *, with_random: bool, declared: Iterable[str] = ()
    ) -> None:
        known = {change.name for change in self.state_changes} | set(declared)
        for difference in state.differences(before, after, with_random=with_random):
            if difference.name not in known:
                self.state_changes.append(StateChange(difference.name, difference.before, difference.after, self.phase))

    def _note_what_disables(self) -> None:
        """Say where a setting from outside keeps Dynamo from compiling anything."""
        import torch._dynamo

        for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            if os.environ.get(name, "0") not in ("", "0"):
                self.notes.append(f"{DISABLED} the environment variable {name} is set")
        if getattr(torch._dynamo.config, "disable", False):
            self.notes.append(f"{DISABLED} torch._dynamo.config.disable is set")

    def _compare_layers(self, prepared: Prepared) -> None:
        """Write down layers whose format a call changed: swapped, or dequantized."""
        before = {(layer.component, layer.path): layer for layer in self.layers}
        for name, module in prepared.components.items():
            root = compilation.original_module(module)
            for layer in manifest(name, root)[0]:
                earlier = before.get((layer.component, layer.path))
                weight = getattr(root.get_submodule(layer.path), "weight", None)
                if getattr(weight, "is_meta", False):
                    continue  # sequential offloading took it away: what it holds is elsewhere
                if earlier is None or earlier.format != layer.format:
                    self.layers_after.append(layer)

    def note_failure(self, error: BaseException) -> None:
        """Write down what ended the run; what is raised after that is a consequence of it, or no failure of the recipe."""
        if self.failure is None and not _is_for_others(error):
            self.failure = failure_of(error, self.phase, self.names)

    def _diagnose_breaks(self) -> None:
        """fullgraph stops at the first break: run one call without it, to name every break."""
        state.reset_compiler_caches()
        watch = CompileWatch()
        try:
            with dynamo.settings(self.recipe.dynamo), watch:
                prepared = prepare(
                    self.recipe,
                    self.accelerator,
                    allow_hub=self.allow_hub,
                    backend="eager",
                    fullgraph=False,
                    on_loaded=self._name_components,
                )
                with watch.naming(prepared.module_names()):
                    prepared.run(prepared.arguments(0))
        except BaseException as error:  # the first break stands already; this run only adds to it
            if _is_for_others(error):
                raise
            self.notes.append(f"a second run without fullgraph stopped: {type(error).__name__}: {error}")
            if self.failure is not None and not private_torch.is_graph_break(error):
                found = failure_of(error, self.phase, self.names)  # the exception that Dynamo saw coming
                lines = (
                    f"without fullgraph it raises {found}",
                    *(f"  {frame}" for frame in found.frames),
                    *found.behind,
                )
                self.failure = replace(self.failure, behind=(*self.failure.behind, *lines))
        if watch.record.graph_breaks:
            self.breaks_of_diagnosis = watch.record

    def in_higher_precision(self) -> None:
        """The same calls in a wider dtype: the yardstick that tells rounding from error."""
        import torch

        recorder = OutputRecorder()
        state.reset_compiler_caches()
        try:
            with dynamo.settings(self.recipe.dynamo):
                prepared = self._prepared_to_be_widened()
                wide = widen(prepared)
                with recording(prepared, recorder), self._same_noise(prepared, replay=True), self._stance():
                    for record in self.calls:
                        recorder.call = record.index
                        changed: dict[str, Any] = {}
                        if record.kind == "sensitivity" and not prepared.is_model:
                            changed = {
                                "prompt": SENSITIVITY_PROMPT,
                                "seed": self.recipe.call.seed + SENSITIVITY_SEED,
                            }
                        arguments = prepared.arguments(0 if record.kind == "sensitivity" else record.index, **changed)
                        if prepared.is_model:
                            if record.kind == "sensitivity":
                                perturb(arguments)
                            arguments = cast_tensors(arguments, wide)
                        result = prepared.run(arguments)
                        recorder.record("", result)
                        if prepared.is_model:
                            recorder.record("inputs after the call", arguments)
        except Exception as error:
            # not every model runs in another dtype than it was written for: then the dtype's own rounding is the floor
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            self.notes.append(f"no run in a higher precision: {type(error).__name__}: {first}")
            return
        self.precise_outputs = recorder.outputs()
        self.precise_dtype = dtype_name(wide)
        del prepared
        torch.compiler.reset()

    def _prepared_to_be_widened(self) -> Prepared:
        # a kernel of attention may refuse the wider dtype; what it computes is what any of them computes
        recipe = self.recipe.replace(attention=None)
        prepared = prepare(recipe, self.accelerator, allow_hub=self.allow_hub)
        prepared.detach()  # a factory may return the same object again, which must not stay wide
        return prepared

    @contextlib.contextmanager
    def _same_noise(self, prepared: Prepared, *, replay: bool) -> Iterator[None]:
        """Write the starting noise down, or start from the one written down.

        torch draws other numbers in another dtype, so a run in a higher precision must be handed the same noise.
        """
        original = getattr(prepared.pipeline, "prepare_latents", None)
        if prepared.is_model or original is None:
            yield
            return

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            import torch

            drawn = original(*args, **kwargs)
            parts = list(drawn) if isinstance(drawn, tuple) else [drawn]
            if not replay:
                # on the host: a copy on the accelerator would count as what the call left there
                self.starting_noise[self.watch.call] = [
                    part.detach().to("cpu", copy=True) if isinstance(part, torch.Tensor) else part for part in parts
                ]
                return drawn
            kept = self.starting_noise.get(self._replayed_call, parts)
            parts = [
                old.to(new) if isinstance(new, torch.Tensor) and new.is_floating_point() else new
                for old, new in zip(kept, parts, strict=True)
            ]
            self._replayed_call += 1
            return tuple(parts) if isinstance(drawn, tuple) else parts[0]

        self._replayed_call = 0
        prepared.pipeline.prepare_latents = prepare_latents
        try:
            yield
        finally:
            del prepared.pipeline.prepare_latents

    def observation(self) -> Observation:
        compiles = self.watch.record
        if self.breaks_of_diagnosis is not None:
            compiles = CompileRecord(
                frames=compiles.frames,
                graph_breaks=self.breaks_of_diagnosis.graph_breaks,
                regions=compiles.regions,
                graph_runs_outside=compiles.graph_runs_outside,
                inlined=compiles.inlined,
            )
        return Observation(
            recipe=self.recipe.to_dict(),
            content_hash=self.recipe.content_hash,
            accelerator=self.accelerator.kind,
            device=self.accelerator.name,
            versions=versions(),
            components=tuple(self.components),
            calls=tuple(self.calls),
            compiles=compiles,
            layers=tuple(self.layers),
            other_parameters=tuple(self.other_parameters),
            layers_after=tuple(self.layers_after),
            outputs=self.outputs,
            precise_outputs=self.precise_outputs,
            precise_dtype=self.precise_dtype,
            executions=tuple(
                Executions(call, component, region, count)
                for (call, component, region), count in sorted(self.executions.items())
            ),
            state_changes=tuple(self.state_changes),
            failure=self.failure,
            notes=tuple(self.notes),
            memory=self.memory.record,
            host_syncs=self.syncs.record,
            attention_uses=self.attention.record(),
            attention_after=self.attention_after,
            cache_uses=self.caching.record(),
            caches=tuple(self.caches),
            timed_seconds=tuple(self.timed_seconds),
        )


def _is_for_others(error: BaseException) -> bool:
    """Whether an exception is no failure of the recipe: the user's Ctrl-C, or pytest's own skip and exit."""
    return isinstance(error, KeyboardInterrupt) or type(error).__module__.startswith("_pytest.")


def digest(arguments: dict[str, Any]) -> str:
    """A digest of what goes into a call: tensors by their elements, everything else by its text where it is plain."""
    import hashlib

    import torch

    found = hashlib.sha256()
    for name, tensor in leaves(arguments):
        dense = tensor.detach().cpu().to_dense() if tensor.layout != torch.strided else tensor.detach().cpu()
        found.update(f"{name} {dense.dtype} {tuple(dense.shape)}".encode())
        found.update(dense.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    plain = {key: value for key, value in arguments.items() if isinstance(value, str | int | float | bool)}
    found.update(repr(sorted(plain.items())).encode())
    return found.hexdigest()
