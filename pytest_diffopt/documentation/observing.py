"""Runs one block in this process and writes everything down; the process is not fit for anything else after that.

The block drives: a pipeline's first call is where its observation begins, and once the block has ended the pipeline is
called again, so that there is a warm call, and one with another prompt.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from pytest_diffopt.documentation import live_recipe, pages, rewriting, small_calls
from pytest_diffopt.documentation.interception import Interception
from pytest_diffopt.documentation.order import ENDED, Code, Order
from pytest_diffopt.documentation.record import BlockRun, Raised
from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.libraries import versions
from pytest_diffopt.observation.observing import SENSITIVITY_PROMPT, Run
from pytest_diffopt.observation.outputs import leaves
from pytest_diffopt.observation.probes import SENSITIVITY_SEED, perturb
from pytest_diffopt.preparation import autoencoder, compilation, dynamo, offloading, quantization, uninitialized_memory
from pytest_diffopt.preparation import borrowed_state as state
from pytest_diffopt.preparation.pipeline import Prepared, thawed
from pytest_diffopt.recipe import Recipe
from pytest_diffopt.replicas import gguf_files, registry
from pytest_diffopt.source_places import with_short_paths

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators import Accelerator

CALLS = 3
"""At least so many calls are judged: cold, warm, and one with another prompt. Those that the block does not make, we do."""

_KEPT_LINES = 40


@dataclass
class LivePipeline(Prepared):
    """A pipeline that a block made, and the arguments of its own calls.

    Attributes:
        captured: of each of the block's calls, in order, as they were before it.
    """

    captured: list[dict[str, Any]] = field(default_factory=list)

    def arguments(self, call: int, *, seed: int | None = None, prompt: str | None = None) -> dict[str, Any]:
        """Those of the block's call of that number; after its last call, of the first again, the last with another prompt."""
        other = prompt is not None or (call >= len(self.captured) and call == CALLS - 1)
        shift = SENSITIVITY_SEED if other else 0
        _seed(shift if seed is None else seed)
        given = self.captured[call] if call < len(self.captured) else self.captured[0]
        arguments: dict[str, Any] = {name: thawed(value) for name, value in given.items()}
        if not other:
            return arguments
        text = prompt or SENSITIVITY_PROMPT
        own = arguments.get("prompt")
        if isinstance(own, str):
            arguments["prompt"] = text
        elif isinstance(own, list):
            arguments["prompt"] = [text] * len(own)
        else:
            tensors = {name: value for name, value in arguments.items() if any(leaves(value))}
            tensors = {name: value for name, value in tensors.items() if not isinstance(value, bool | int | float)}
            copied = copy.deepcopy(tensors)
            perturb(copied)
            arguments |= copied
        return arguments


class _WatchedBlock(Run):
    """The observation of a block's pipeline."""

    keeps_result = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(Recipe(name="block", pipeline="block"), accelerator, False, None, None)
        self.live: LivePipeline | None = None
        self.made = 0
        self.tiled: list[str] = []
        self._around: state.Snapshot | None = None

    def begin(self, live: LivePipeline, recipe: Recipe) -> None:
        """A pipeline is about to be called for the first time."""
        self.live, self.recipe = live, recipe
        self._around = (
            state.take_snapshot()
        )  # inference mode, autocast, kernels of attention: calls of ours need them too
        self.is_loaded(live)

    def next_call(self) -> Any:
        """The next of the block's calls, or of ours; its result."""
        assert self.live is not None
        call, self.made = self.made, self.made + 1
        with (
            self.watching_calls(self.live),  # not for longer: the block may compile what is watched now
            autoencoder.counting_tiles(self.live.components, self.tiled),
        ):
            self.call(self.live, call, "call")
        result, self.result = self.result, None
        return result

    def finish(self) -> None:
        """Make the calls that are still missing, and close the watches."""
        if self.live is None:
            return
        assert self._around is not None
        after_the_block = state.take_snapshot()
        state.give_back(self._around)
        try:
            while self.made < CALLS:
                self.next_call()
                self.result = None
            self.after_calls(self.live)
        except Exception as error:
            self.note_failure(error)
        finally:
            state.give_back(after_the_block)
        prompts = [call.prompt for call in self.calls if call.kind == "call"]
        said: dict[str, Any] = {"calls": max(1, self.made)}
        if all(prompts):
            said["prompts"] = tuple(prompts)
        self.recipe = self.recipe.replace(call=replace(self.recipe.call, **said))
        self.outputs = self.recorder.outputs()

    def _prepared_to_be_widened(self) -> Prepared:
        assert self.live is not None
        return self.live


@dataclass
class _Seen:
    """What happened to pipelines and modules beside the one that is judged."""

    called: list[str] = field(default_factory=list)
    not_judged: list[str] = field(default_factory=list)
    shrunk: list[small_calls.Shrunk] = field(default_factory=list)
    swallowed: list[Raised] = field(default_factory=list)
    recipe_error: str = ""
    first_call: int = 0
    inside: bool = False
    setting_up: bool = False


def run_block(order: Order, accelerator: Accelerator) -> BlockRun:
    """Run a block and write everything down. The libraries stay patched, and every global as the block left it."""
    import torch

    run = _Observing(order, accelerator)
    stack = contextlib.ExitStack()
    stack.enter_context(accelerator.in_use())
    stack.enter_context(quantization.quantizers_accept(accelerator))
    stack.enter_context(gguf_files.loadable())
    stack.enter_context(uninitialized_memory.filled())
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.fallback_random = True  # numbers that a model draws must be the eager ones
    torch._dynamo.config  # noqa: B018 - imported before it is read
    return run.everything()


class _Observing:
    """One run of one block."""

    def __init__(self, order: Order, accelerator: Accelerator) -> None:
        self.order = order
        self.accelerator = accelerator
        self.watched = _WatchedBlock(accelerator)
        self.seen = _Seen()
        self.interception = Interception()
        self.dynamo_before: dict[str, Any] = {}
        self._unread = ""

    def everything(self) -> BlockRun:
        order, device = self.order, self.accelerator.device_type
        self.interception.install(
            self._on_call,
            compiles=order.variant != "eager",
            compile_backend=order.compile_backend,
            offloads=order.variant == "as written",
            device=device,
        )
        namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__, "__file__": order.page}
        namespace[rewriting.NOTE_CAUGHT] = rewriting.on_caught(self._note_caught, order.page)
        _see_suppressed(self._note_caught, order.page)
        for one in (*order.before, order.block):
            for path in rewriting.placeholders(one.source, order.folder):
                path.parent.mkdir(parents=True, exist_ok=True)  # so that something can be written there
        try:
            codes = [self._compiled(code) for code in (*order.before, order.block)]
        except SyntaxError as error:
            return BlockRun("raised", raised=_told(error, order.page))
        self.dynamo_before = dynamo.values()
        _seed(0)
        ended: Any = "ran"
        how, raised = "", None
        started = time.perf_counter()
        self.watched.memory.open()
        with self.watched.watch:
            try:
                self.seen.setting_up = True
                for code in codes[:-1]:
                    exec(code, namespace)
                self.seen.setting_up = False
                exec(codes[-1], namespace)
            except SystemExit as error:
                ended, how = "exited", f"it ends itself with sys.exit({'' if error.code is None else error.code!r})"
            except BaseException as error:
                ended, raised = "raised", _told(error, order.page)
            seconds = time.perf_counter() - started
            Path(order.folder, ENDED).touch()
            if ended == "ran":
                self.seen.inside = True  # what is called from here on are calls of ours
                self.watched.finish()
        return self._record(namespace, ended, how, raised, seconds)

    def _compiled(self, code: Code) -> CodeType:
        return rewriting.compiled(
            code.source,
            page=self.order.page,
            line=code.line,
            device=self.accelerator.device_type,
            folder=self.order.folder,
        )

    def _note_caught(self, error: BaseException, line: int) -> None:
        if isinstance(error, Exception) and not self.seen.setting_up:
            self.seen.swallowed.append(replace(_told(error, self.order.page), line=line))

    # A pipeline is called.

    def _on_call(self, pipeline: Any, arguments: dict[str, Any], said: frozenset[str], call: Callable[..., Any]) -> Any:
        if self.seen.inside:
            return call(**arguments)
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)
        if self.order.small:
            arguments, shrunk = small_calls.made_small(
                arguments, self._size_of(pipeline), keeps_steps=_reuses_steps(pipeline)
            )
            self.seen.shrunk += shrunk
        self.seen.inside = True
        try:
            if self.seen.setting_up:
                _seed(0)
                return call(**arguments)
            self.seen.called.append(type(pipeline).__name__)
            own = {name: value for name, value in arguments.items() if name in said or name in live_recipe.SIZE}
            return self._judged_call(arguments) if self._takes(pipeline, own) else call(**arguments)
        finally:
            self.seen.inside = False

    def _size_of(self, pipeline: Any) -> tuple[int, ...] | None:
        """The size of its replica, or of the one that stands for its class; more than a tile of its VAE."""
        size = self.order.sizes.get(live_recipe.loaded_from(pipeline))
        if size is None:
            kind = type(pipeline).__name__
            family = next((one for one in registry.families.values() if one.pipeline_class == kind), None)
            size = family.default_size if family is not None else None
        if not size:
            return None
        side = autoencoder.more_than_a_tile(getattr(pipeline, "vae", None))
        return (max(size[0], side), max(size[1], side), *size[2:])

    def _takes(self, pipeline: Any, arguments: dict[str, Any]) -> bool:
        """Whether this call is one of those that are judged: of the pipeline that is first called with anything configured."""
        live = self.watched.live
        ordinal, first = len(self.seen.called) - 1, self.order.first_call
        if first is not None and ordinal < first:
            return False
        read = self._read(pipeline, arguments)
        if live is None:
            return self._begin(pipeline, read)
        own = live_recipe.configuration(self.watched.recipe)
        if live.pipeline is pipeline and (read is None or live_recipe.configuration(read.recipe) == own):
            return True
        if first is None and read is not None and read.configures and not live_recipe.configured(self.watched.recipe):
            self._begin_anew()
            return self._begin(pipeline, read)
        if live.pipeline is pipeline:
            self.seen.not_judged.append("the pipeline is called again, configured in another way")
        else:
            self.seen.not_judged.append(f"another pipeline, {type(pipeline).__name__}, is called as well")
        return False

    def _begin_anew(self) -> None:
        before = self.watched
        before.memory.close()
        self.watched = _WatchedBlock(self.accelerator)
        self.watched.watch = before.watch  # it is open, and has seen what was compiled so far
        self.watched.memory.open()

    def _begin(self, pipeline: Any, read: live_recipe.LiveRecipe | None) -> bool:
        if read is None:
            self.seen.recipe_error = self._unread
            return False
        live = self._live(pipeline, read)
        self.seen.first_call = len(self.seen.called) - 1
        self.watched.begin(live, read.recipe)
        return True

    def _live(self, pipeline: Any, read: live_recipe.LiveRecipe, name: str = "") -> LivePipeline:
        components = _components(pipeline, name)
        live = LivePipeline(read.recipe, self.accelerator, pipeline, components, is_model=False)
        for name, module in components.items():
            live.kept_plain[name] = quantization.kept_plain(module, read.recipe.quantization_for(name))
            live.types_of_file[name] = quantization.types_of_file(module)
            live.kept_float32[name] = quantization.kept_float32(module)
        if read.recipe.offloading is not None:
            live.offloaded = offloading.by_class(pipeline, components)
        return live

    def _judged_call(self, arguments: dict[str, Any]) -> Any:
        live = self.watched.live
        assert live is not None
        live.captured.append({name: thawed(value) for name, value in arguments.items()})
        return self.watched.next_call()

    def _read(self, pipeline: Any, arguments: dict[str, Any] | None, name: str = "") -> live_recipe.LiveRecipe | None:
        components = _components(pipeline, name)
        try:
            return live_recipe.read(self.order.name, pipeline, components, self.interception, self._dynamo(), arguments)
        except DiffoptError as error:
            self._unread = str(error)
            return None

    def _dynamo(self) -> dict[str, Any]:
        now = dynamo.values()
        return {name: value for name, value in now.items() if value != self.dynamo_before.get(name)}

    # What is left.

    def _record(
        self, namespace: Mapping[str, Any], ended: Any, how: str, raised: Raised | None, seconds: float
    ) -> BlockRun:
        watched = self.watched
        read: live_recipe.LiveRecipe | None = None
        observation = ""
        if watched.live is not None:
            if self.order.variant == "eager" and watched.failure is None and ended == "ran":
                watched.in_higher_precision()
            watched.memory.close()
            if ended == "ran":
                observation = watched.observation().to_json()
            last = self._read(watched.live.pipeline, None)
            read = live_recipe.LiveRecipe(watched.recipe)
            if last is not None:
                read = replace(last, recipe=watched.recipe)
        else:
            read = self._uncalled(namespace) if ended == "ran" else None
            if read is not None:
                observation = watched.observation().to_json()
            watched.memory.close()
        return BlockRun(
            ended=ended,
            how=how,
            raised=raised,
            swallowed=tuple(self.seen.swallowed),
            recipe=read.recipe.to_dict() if read is not None else None,
            recipe_error=self.seen.recipe_error,
            toml=live_recipe.toml_of(read, self._comments()) if read is not None else "",
            observation=observation,
            called=tuple(dict.fromkeys(self.seen.called)),
            idle=(*self._idle(namespace), *self._switches_without_use()),
            not_judged=tuple(dict.fromkeys(self.seen.not_judged)),
            beside=read.beside if read is not None else (),
            shrunk=tuple(dict.fromkeys(map(str, self.seen.shrunk))),
            pictures=tuple(dict.fromkeys(self.interception.pictures)),
            not_encoded=tuple(dict.fromkeys(self.interception.not_encoded)),
            not_there=tuple(dict.fromkeys(self.interception.not_there)),
            configured=tuple(read.configures) if read is not None else (),
            first_call=self.seen.first_call,
            device_bytes=self._device_bytes(),
            seconds=seconds,
            versions=versions(),
            accelerator=self.accelerator.kind,
        )

    def _device_bytes(self) -> int | None:
        """The most that was allocated on the accelerator at any time."""
        if (now := self.accelerator.peak_bytes()) is None:
            return None
        record = self.watched.memory.record
        calls = [call.peak_bytes for call in record.calls] if record is not None else []
        return max([now, record.load_peak_bytes if record is not None else 0, *calls])

    def _comments(self) -> list[str]:
        lines = [f"{self.order.page.rpartition('/')[2]}, line {self.order.block.line - 1}"]
        if self.seen.shrunk:
            lines.append(f"the page's call, made small here: {', '.join(dict.fromkeys(map(str, self.seen.shrunk)))}")
        return lines

    def _uncalled(self, namespace: Mapping[str, Any]) -> live_recipe.LiveRecipe | None:
        """The recipe of a pipeline or module that the block left and did not call; what it is made of is written down."""
        left = _left(namespace)
        found = [(name, value, read) for name, value in left if (read := self._read(value, None, name)) is not None]
        found.sort(key=lambda one: not one[2].configures)
        if not found:
            return None
        name, value, read = found[0]
        modules = [
            (other, module)
            for other, module, its in found
            if _is_module(module) and its.configures and _alike(its.recipe, read.recipe)
        ]
        if _is_module(value) and modules:  # of one pipeline that the block does not make: one recipe
            value = _Together(modules)
            read = self._read(value, None) or read
        self.watched.recipe = read.recipe
        self.watched.is_loaded(self._live(value, read, name))
        return read

    def _idle(self, namespace: Mapping[str, Any]) -> list[str]:
        """What was configured and never called, a sentence each."""
        judged = self.watched.live.pipeline if self.watched.live is not None else None
        parts = _components(judged).values() if judged is not None else ()
        held = {id(inner) for module in parts for inner in compilation.original_module(module).modules()}
        sentences = []
        for name, value in _left(namespace):
            modules = {id(compilation.original_module(one)) for one in _components(value, name).values()}
            if value is judged or modules <= held:
                continue
            read = self._read(value, None, name)
            if read is not None and read.configures and not self._was_called(name, value):
                what = " and ".join(read.configures)
                sentences.append(f"{name} ({type(value).__name__}) has {what} configured, and nothing ever calls it")
        return sentences

    def _switches_without_use(self) -> list[str]:
        """What is switched on of the judged pipeline's VAE and made no difference to any call, a sentence each."""
        watched = self.watched
        if watched.live is None:
            return []
        sentences = []
        if watched.recipe.vae_tiling and not watched.tiled:
            sentences.append("VAE tiling is on, and no call made anything that is larger than a tile")
        batches = [_batch_of(arguments) for arguments in watched.live.captured]
        if watched.recipe.vae_slicing and max(batches, default=1) < 2:
            sentences.append("VAE slicing is on, and every call made one image")
        return sentences

    def _was_called(self, name: str, value: Any) -> bool:
        kind = type(value).__name__
        return kind in self.seen.called or name in pages.called_names(self.order.block.source)


class _Together:
    """Modules that stand by themselves, as the components of a pipeline."""

    def __init__(self, modules: list[tuple[str, Any]]) -> None:
        self.components: dict[str, Any] = {}
        for name, module in modules:
            self.components.setdefault(_component_name(module, name), module)
        self._name_or_path = next(filter(None, map(live_recipe.loaded_from, self.components.values())), None)


def _alike(one: Recipe, other: Recipe) -> bool:
    """Whether two modules may be of one pipeline."""
    return (one.pipeline, one.dtype) == (other.pipeline, other.dtype)


def _is_module(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _left(namespace: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The pipelines that a block left in its namespace, then the modules that are in none of them; by name."""
    import torch
    from diffusers import DiffusionPipeline

    pipelines = [(name, value) for name, value in namespace.items() if isinstance(value, DiffusionPipeline)]
    held = {id(module) for _, value in pipelines for module in _components(value).values()}
    modules = [
        (name, value)
        for name, value in namespace.items()
        if isinstance(value, torch.nn.Module) and id(value) not in held
    ]
    found: dict[int, tuple[str, Any]] = {}
    for name, value in (*pipelines, *modules):
        found.setdefault(id(value), (name, value))
    return list(found.values())


def _components(pipeline: Any, name: str = "") -> dict[str, torch.nn.Module]:
    """Of a pipeline by their names; a module by itself by the name of the component that it is."""
    import torch

    if isinstance(pipeline, torch.nn.Module):
        return {_component_name(pipeline, name): pipeline}
    held = getattr(pipeline, "components", None)
    held = held if isinstance(held, Mapping) else {}
    return {name: value for name, value in held.items() if isinstance(value, torch.nn.Module)}


def _component_name(module: torch.nn.Module, name: str) -> str:
    """Which component of its repository's pipeline a module is: by its class there, by its own name in the block else."""
    from huggingface_hub import try_to_load_from_cache

    source = live_recipe.loaded_from(module)
    try:
        index = try_to_load_from_cache(source, "model_index.json") if source else None
    except ValueError:  # no hub id
        index = None
    kind = type(compilation.original_module(module)).__name__
    parts = json.loads(Path(index).read_text(encoding="utf-8")) if isinstance(index, str) else {}
    of_its_class = [key for key, part in parts.items() if isinstance(part, list) and part[-1] == kind]
    return name if name in of_its_class or not of_its_class else of_its_class[0]


def _batch_of(arguments: Mapping[str, Any]) -> int:
    """How many images a call makes."""
    prompt = arguments.get("prompt")
    each = next((arguments[name] for name in small_calls.IMAGES_PER_PROMPT if isinstance(arguments.get(name), int)), 1)
    return (len(prompt) if isinstance(prompt, list) else 1) * int(each)


def _reuses_steps(pipeline: Any) -> bool:
    return any(getattr(module, "is_cache_enabled", False) for module in _components(pipeline).values())


def _seed(seed: int) -> None:
    """So that the block's calls draw the same as those of its references."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _told(error: BaseException, page: str) -> Raised:
    missing = getattr(error, "name", None) if isinstance(error, ImportError | NameError) else None
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename != page:
        trace = trace.tb_next  # what is before the page's own code is ours
    lines = "".join(traceback.format_exception(type(error), error, trace)).splitlines()
    return Raised(
        error=type(error).__name__,
        message=str(error),
        line=rewriting.line_in(error, page),
        kinds=tuple(kind.__name__ for kind in type(error).__mro__[:-1]),
        missing=missing or "",
        traceback=tuple(with_short_paths(line) for line in lines[-_KEPT_LINES:]),
    )


def _see_suppressed(note: Callable[[BaseException, int], None], page: str) -> None:
    """``contextlib.suppress`` in the page's own code is an ``except`` too."""
    leave: Any = contextlib.suppress.__exit__

    def leaving(self: Any, kind: Any, error: Any, trace: Any) -> Any:
        suppressed = leave(self, kind, error, trace)
        caller = sys._getframe(1).f_code.co_filename
        if suppressed and error is not None and caller == page:
            note(error, rewriting.line_in(error, page))
        return suppressed

    contextlib.suppress.__exit__ = leaving  # type: ignore[method-assign]
