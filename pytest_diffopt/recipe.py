"""Recipes: what to run, how it is made cheap, and what it promises; as Python objects and as plain data.

Importing this module imports neither torch nor diffusers. Files of recipes are read in
`pytest_diffopt.recipe_loading`; what only an installation can tell is in `pytest_diffopt.installation`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    PlainValidator,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from pytest_diffopt.contract import Contract, Memory
from pytest_diffopt.denoising import Caching, attention_backends, each_component_once
from pytest_diffopt.errors import Problem, RecipeError
from pytest_diffopt.part import (
    CONFIG,
    Bool,
    FrozenDict,
    Location,
    Mistake,
    Mistakes,
    Names,
    Natural,
    Part,
    Positive,
    Text,
    array_bytes,
    content_of,
    did_you_mean,
    imported,
    name_of,
    one_or_many,
    plain,
    problems_of,
    refused,
    shown,
    unknown_key,
    with_every_mistake,
)
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.quantization_backends.backend import dtype_name, implied
from pytest_diffopt.references import UnresolvedReference, resolve_callable

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Caching", "Call", "Compilation", "Contract", "ForecastBudget", "Offloading", "Quantization", "Recipe"]

QuantizationBackend = Literal[
    "bitsandbytes_4bit", "bitsandbytes_8bit", "torchao", "quanto", "gguf", "layerwise_casting"
]
Scope = Literal["module", "repeated_blocks", "factory"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
MemoryFormat = Literal["contiguous_format", "channels_last", "channels_last_3d"]
Strategy = Literal["model", "sequential", "group"]
OffloadType = Literal["block_level", "leaf_level"]
Dtype = Literal["float32", "float16", "bfloat16"]
DynamoValue = bool | int | float | str | None
Strings = str | Sequence[str]

PARTS_TO_DROP = ("compilation", "offloading", "quantization", "dynamo")

ABOUT_THE_VERDICT = ("name", "contract", "known_faults", "forecast", "exclusive", "isolate", "requires", "reference")
"""Fields that change nothing of what is observed."""

ORDER = ("quantization", "offloading", "compilation")
"""In which a recipe's parts are applied to a pipeline, unless it says another."""


# Field types.


def _frozen(value: object, mistakes: list[Mistake], location: Location = ()) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                mistakes.append(Mistake(location, f"the key {shown(key)}", "keys are strings"))
        return FrozenDict({k: _frozen(v, mistakes, (*location, str(k))) for k, v in value.items()})
    if isinstance(value, list | tuple):
        held = [_frozen(v, mistakes, (*location, i)) for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return type(value)(*held) if hasattr(value, "_fields") else tuple(held)
        return held
    if isinstance(value, datetime.date | datetime.time):
        mistakes.append(Mistake(location, shown(value), "write a date or time as a string"))
    return value


def _frozen_table(value: object) -> FrozenDict:
    if not isinstance(value, Mapping):
        raise refused(value, "a table")
    mistakes: list[Mistake] = []
    frozen: FrozenDict = _frozen(value, mistakes)
    if mistakes:
        raise Mistakes(mistakes)
    return frozen


def is_reference(text: str) -> bool:
    """Whether it is ``"package.module:attribute"``, both dotted identifiers."""
    words = text.split(":")
    return len(words) == 2 and all(step.isidentifier() for word in words for step in word.split("."))


def _pipeline(value: Any) -> Any:
    if isinstance(value, str):
        drive = re.match(r"[A-Za-z]:[\\/]", value)
        if value.strip() and (":" not in value or drive or is_reference(value)):
            return value
        raise refused(
            value, 'a replica\'s name, a local directory, a hub id, or "package.module:factory" (identifiers both)'
        )
    if any((c.__module__, c.__name__) == ("torch.nn.modules.module", "Module") for c in type(value).__mro__):
        # A module that was run once is compiled, hooked or moved; each observation needs a fresh one.
        raise refused(type(value), "a callable that makes the module anew, e.g. lambda: MyModel()")
    if not callable(value):
        raise refused(value, "a string, or a callable that returns a pipeline or a torch.nn.Module")
    return value


def _compile_backend(value: Any) -> Any:
    named = isinstance(value, str) and value.strip() != "" and (":" not in value or is_reference(value))
    if not named and (isinstance(value, str) or not callable(value)):
        raise refused(value, 'a name of torch._dynamo.list_backends(), "package.module:function", or a callable')
    return value


def _sizes(value: Any) -> tuple[tuple[int, ...], ...]:
    allowed = "(height, width) or (height, width, frames), positive ints; or a list of these"
    if not isinstance(value, list | tuple) or not value:
        raise refused(value, allowed)
    alone = not any(isinstance(size, list | tuple) for size in value)
    sizes = [value] if alone else value
    mistakes = []
    for index, size in enumerate(sizes):
        whole = isinstance(size, list | tuple) and all(type(side) is int and side > 0 for side in size)
        if not whole or len(size) not in (2, 3):
            mistakes.append(Mistake(() if alone else (index,), shown(size), allowed))
    if mistakes:
        raise Mistakes(mistakes)
    return tuple(tuple(size) for size in sizes)


def _inputs(value: Any) -> Any:
    allowed = (
        "a table of keyword arguments, a list of these (one a call, in turn), or a callable that makes one "
        '(in a file "package.module:function")'
    )
    if callable(value) or (isinstance(value, str) and is_reference(value)):
        return value
    tables = (value,) if isinstance(value, Mapping) else value
    if not isinstance(tables, list | tuple) or not tables:
        raise refused(value, allowed)
    mistakes: list[Mistake] = []
    for index, table in enumerate(tables):
        if not isinstance(table, Mapping):
            mistakes.append(Mistake((index,), shown(table), allowed))
    frozen = tuple(_frozen(table, mistakes, (index,)) for index, table in enumerate(tables))
    if mistakes:
        raise Mistakes(mistakes)
    return frozen


Sizes = Annotated[tuple[tuple[int, ...], ...], PlainValidator(_sizes)]
SomeNames = Annotated[
    tuple[Text, ...], one_or_many("a component, or a list of at least one; leave it out for all", str, at_least=1)
]
Table = Annotated[Mapping[str, Any], PlainValidator(_frozen_table)]


# Quantization.


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class Quantization(Part):
    """Which components' Linear layers are quantized, and how.

    Args:
        backend: ``"bitsandbytes_4bit"``, ``"bitsandbytes_8bit"``, ``"torchao"``, ``"quanto"``, ``"gguf"`` or
            ``"layerwise_casting"``.
        components: their names; None for every component that has Linear layers. ``"gguf"`` needs exactly one.
        kwargs: what the backend's config takes, e.g. ``{"bnb_4bit_quant_type": "nf4"}``. Dtypes are kept as their
            names; ``load_in_4bit`` and ``load_in_8bit`` are accepted and left out, since the backend implies them.
            ``"torchao"`` needs ``quant_type``, a config's name, and takes that config's arguments; ``"gguf"`` needs
            ``file``, a path or an address on the hub.
        skip_modules: names of modules inside the components that stay as they are.

    Raises:
        RecipeError: with every wrong field or key.
    """

    backend: QuantizationBackend
    components: SomeNames | None = None
    kwargs: Table = dataclasses.field(default_factory=FrozenDict)
    skip_modules: Names = ()

    if TYPE_CHECKING:

        def __init__(
            self,
            backend: QuantizationBackend,
            components: Strings | None = None,
            kwargs: Mapping[str, Any] = ...,
            skip_modules: Strings = (),
        ) -> None: ...

    @field_validator("kwargs")
    @classmethod
    def _keys_of_the_backend(cls, kwargs: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        backend = info.data.get("backend")
        if backend is None:
            return kwargs
        known = BACKENDS[backend]
        rules = known.rules_of(kwargs)
        kept: dict[str, Any] = {}
        mistakes: list[Mistake] = []
        for key, value in kwargs.items():
            if key in rules:
                try:
                    kept[key] = rules[key](value)
                except Mistakes as error:
                    mistakes += [m._replace(location=(key, *m.location)) for m in error.mistakes]
                continue
            mistake = unknown_key((), key, rules)
            if key in known.rules:
                mistake = mistake._replace(
                    found=f"a key of another {next(iter(known.required))}",
                    allowed=f"{kwargs[next(iter(known.required))]!r} takes: {', '.join(rules)}",
                )
            for other, others in BACKENDS.items():
                if key in others.rules and key not in known.rules:
                    mistake = mistake._replace(
                        found=f"a key of {other}", allowed=f"{backend} takes: {', '.join(rules)}"
                    )
            mistakes.append(mistake)
        mistakes += known.together(kept)
        if mistakes:
            raise Mistakes(mistakes)
        return FrozenDict({key: value for key, value in kept.items() if rules[key] is not implied})

    @model_validator(mode="after")
    def _has_what_the_backend_needs(self) -> Self:
        mistakes = [
            Mistake(("kwargs", key), "nothing", f"{self.backend} needs {what}")
            for key, what in BACKENDS[self.backend].required.items()
            if key not in self.kwargs
        ]
        if mistakes:
            raise Mistakes(mistakes)
        if self.backend == "gguf" and (self.components is None or len(self.components) != 1):
            found = "nothing" if self.components is None else f"{len(self.components)} of them"
            raise Mistakes([Mistake(("components",), found, "exactly one: a .gguf file holds one component")])
        return self


# Compilation.


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class Compilation(Part):
    """How one component is compiled, or a part or a method of it.

    Args:
        component: its name in the pipeline; of a part or a method with the path to it, ``"vae.decoder"``, ``"vae.decode"``.
        scope: ``"module"``, the whole component; ``"repeated_blocks"``, each repeated block class once; ``"factory"``:
            the factory compiles it, and the recipe does not.
        backend: a name, ``"package.module:function"``, or a callable.
        mode: as in torch.compile; not together with ``options``.
        fullgraph: whether a graph break is an error.
        dynamic: as in torch.compile.
        memory_format: what the component is converted to before.
        options: as in torch.compile.

    Raises:
        RecipeError: with every wrong field.
    """

    component: Text
    scope: Scope = "module"
    backend: Annotated[str | Callable[..., Any], PlainValidator(_compile_backend)] = "inductor"
    mode: Mode | None = None
    fullgraph: Bool = False
    dynamic: Bool | None = None
    memory_format: MemoryFormat | None = None
    options: Table | None = None

    @property
    def owner(self) -> str:
        """The component's own name: ``"vae"`` of ``"vae.decode"``."""
        return self.component.partition(".")[0]

    @property
    def part(self) -> str:
        """The path of what is compiled in its component, ``"decode"``; empty for the whole."""
        return self.component.partition(".")[2]

    @field_validator("options")
    @classmethod
    def _not_with_a_mode(cls, options: Mapping[str, Any] | None, info: ValidationInfo) -> Mapping[str, Any] | None:
        if options is not None and (mode := info.data.get("mode")) is not None:
            allowed = "mode or options: torch.compile refuses both together"
            raise Mistakes([Mistake((), f"options together with mode = {mode!r}", allowed)])
        return options


FACTORY = "factory"
"""In place of a recipe's compilation: whatever its factory compiles is judged, and the recipe compiles nothing."""

# Offloading.

_HOOK_FUNCTIONS = {
    "model": "accelerate's CpuOffload.pre_forward",
    "sequential": "accelerate's AlignDevicesHook.pre_forward",
    "group": "diffusers' ModuleGroup.onload_",
}


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class Offloading(Part):
    """How components leave the accelerator while they are not needed.

    Args:
        strategy: ``"model"`` (whole components), ``"sequential"`` (each layer) or ``"group"`` (groups of layers).
        components: their names; None for all.
        offload_type: of strategy ``"group"``; None for its default, see `resolved_offload_type`.
        num_blocks_per_group: of ``offload_type="block_level"``; None for 1.
        use_stream: of strategy ``"group"``, as the rest: copy on a stream of its own.
        record_stream: needs ``use_stream``.
        non_blocking: copy without waiting.
        low_cpu_mem_usage: pin memory on the fly; needs ``use_stream``.
        offload_to_disk_path: a directory.

    Raises:
        RecipeError: with every wrong field.
    """

    strategy: Strategy
    components: SomeNames | None = None
    offload_type: OffloadType | None = None
    num_blocks_per_group: Positive | None = None
    use_stream: Bool = False
    record_stream: Bool = False
    non_blocking: Bool = False
    low_cpu_mem_usage: Bool = False
    offload_to_disk_path: Text | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            strategy: Strategy,
            components: Strings | None = None,
            offload_type: OffloadType | None = None,
            num_blocks_per_group: int | None = None,
            use_stream: bool = False,
            record_stream: bool = False,
            non_blocking: bool = False,
            low_cpu_mem_usage: bool = False,
            offload_to_disk_path: str | None = None,
        ) -> None: ...

    @property
    def resolved_offload_type(self) -> OffloadType | None:
        """``offload_type``, or ``"leaf_level"`` if strategy ``"group"`` leaves it open; None for the other ones."""
        return self.offload_type or ("leaf_level" if self.strategy == "group" else None)

    @field_validator(
        "offload_type",
        "num_blocks_per_group",
        "use_stream",
        "record_stream",
        "non_blocking",
        "low_cpu_mem_usage",
        "offload_to_disk_path",
    )
    @classmethod
    def _only_where_it_means_something(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or value is False:
            return value
        strategy, field = info.data.get("strategy", "group"), info.field_name
        if strategy != "group":
            raise Mistakes([Mistake((), f"{value!r} with strategy = {strategy!r}", "only strategy = 'group' takes it")])
        if field in ("record_stream", "low_cpu_mem_usage") and not info.data.get("use_stream", True):
            raise Mistakes([Mistake((), f"{value!r} without use_stream", "it needs use_stream = true")])
        if field == "num_blocks_per_group" and info.data.get("offload_type", "block_level") != "block_level":
            found = f"{value!r} with offload_type = {info.data['offload_type'] or 'leaf_level'!r}"
            raise Mistakes([Mistake((), found, "only offload_type = 'block_level' takes it")])
        return value


# Call.

_PROMPT, _OTHER_PROMPT = "a small red cube on a table", "a lighthouse in the fog"


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class Call(Part):
    """What is run: how often, and with what. Calls are counted from 0; lists are taken in turn.

    Args:
        prompts: by default the first call is cold, the second is warm with the same prompt, the third has another.
        sizes: ``(height, width)`` or ``(height, width, frames)`` in pixels, one a call; None for the pipeline's own.
        num_inference_steps: denoising steps a call.
        calls: how many; None for as many as there are prompts, sizes or inputs, and at least 3.
        seed: of the generator that each call gets.
        kwargs: further keyword arguments of every call.
            A parameter that takes a picture, a mask, a control image or a video is given ``"picture"``, ``"mask"``,
            ``"control"`` or ``"video"``, made at the call's size; the path of a file; or ``"package.module:function"``, for
            any parameter but a prompt: given ``height``, ``width``, ``num_frames`` and ``call``, as far as it takes them.
        inputs: keyword arguments that differ by call, one dict a call, in turn; for a model all that it is given. Or a
            callable that makes them, given the call's number if it takes one, or its name, ``"package.module:function"``.
            Tensors may have any shape. Strings are taken as in ``kwargs``.

    Raises:
        RecipeError: with every wrong field.
    """

    prompts: Annotated[
        tuple[Annotated[str, Strict()], ...], one_or_many("a string, or a list of at least one", str, at_least=1)
    ] = (_PROMPT, _PROMPT, _OTHER_PROMPT)
    sizes: Sizes | None = None
    num_inference_steps: Positive = 3
    calls: Positive | None = None
    seed: Natural = 0
    kwargs: Table = dataclasses.field(default_factory=FrozenDict)
    inputs: (
        Annotated[tuple[Mapping[str, Any], ...] | Callable[..., Mapping[str, Any]] | str, PlainValidator(_inputs)]
        | None
    ) = None

    if TYPE_CHECKING:

        def __init__(
            self,
            prompts: Strings = ...,
            sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
            num_inference_steps: int = 3,
            calls: int | None = None,
            seed: int = 0,
            kwargs: Mapping[str, Any] = ...,
            inputs: Mapping[str, Any]
            | Sequence[Mapping[str, Any]]
            | Callable[..., Mapping[str, Any]]
            | str
            | None = None,
        ) -> None: ...

    @property
    def count(self) -> int:
        """How many calls are made."""
        if self.calls is not None:
            return self.calls
        inputs = len(self.inputs) if isinstance(self.inputs, tuple) else 0
        return max(3, len(self.prompts), len(self.sizes or ()), inputs)

    def prompt(self, k: int) -> str:
        """The prompt of call ``k``, counted from 0."""
        return self.prompts[k % len(self.prompts)]

    def size(self, k: int) -> tuple[int, ...] | None:
        """``(height, width)`` or ``(height, width, frames)`` of call ``k``, from 0; None for the pipeline's own."""
        return self.sizes[k % len(self.sizes)] if self.sizes else None

    def model_inputs(self, k: int) -> dict[str, Any]:
        """A new dict of keyword arguments for a model's call ``k``, counted from 0.

        Raises:
            RecipeError: there are no inputs, or the callable made something else than a dict.
        """
        made: object = self.inputs
        if isinstance(self.inputs, tuple):
            made = self.inputs[k % len(self.inputs)]
        elif self.inputs is not None:
            made = _made(_imported(self.inputs) if isinstance(self.inputs, str) else self.inputs, k)
        if not isinstance(made, Mapping):
            found = "nothing" if self.inputs is None else f"{shown(made)} for call {k}"
            allowed = "a dict of the model's keyword arguments, a list of these, or a callable that makes one"
            raise RecipeError([Problem("call.inputs", found, allowed)], "Call.model_inputs(...)")
        return dict(made)


_made_inputs: weakref.WeakKeyDictionary[Callable[..., object], dict[int, object]] = weakref.WeakKeyDictionary()


def _made(make: Callable[..., object], k: int) -> object:
    """What a callable makes for call ``k``, made once: it may draw, and a recipe and its reference need the same."""
    try:
        kept = _made_inputs.setdefault(make, {})
    except TypeError:  # it cannot be referred to weakly, or hashed
        kept = {}
    if k not in kept:
        kept[k] = make(k) if _takes_one(make) else make()
    return kept[k]


def _imported(reference: str) -> Callable[..., object]:
    try:
        return resolve_callable(reference)
    except UnresolvedReference as error:
        problem = Problem("call.inputs", repr(reference), f"it must be importable ({error})")
        raise RecipeError([problem], "Call.model_inputs(...)") from error


def _takes_one(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:  # some builtins have no signature
        return True
    return True


# The forecast.


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class ForecastBudget(Part):
    """What the recipe may take with a full-size model, which is forecast with no GPU and no weights.

    Args:
        model: a full-size model's name (``"flux.1-dev"``), hub id or directory; None for the one that the recipe's own
            pipeline names.
        max_memory: what torch may have allocated at once, loading included, as an int or like ``"16GiB"``.
        gpu: a card that the recipe has to fit, ``"rtx-4090"``. One of ``max_memory`` and ``gpu`` must be given.
        sizes: ``(height, width)`` or ``(height, width, frames)`` in pixels, one a call; None for the model's own.
        num_inference_steps: denoising steps a call; None for the forecast's own.
        assume: what is taken for granted of the machine that is forecast.
        kwargs: further keyword arguments of every call.

    Raises:
        RecipeError: with every wrong field.
    """

    model: Text | None = None
    max_memory: Memory | None = None
    gpu: Text | None = None
    sizes: Sizes | None = None
    num_inference_steps: Positive | None = None
    assume: Table = dataclasses.field(default_factory=FrozenDict)
    kwargs: Table = dataclasses.field(default_factory=FrozenDict)

    if TYPE_CHECKING:

        def __init__(
            self,
            model: str | None = None,
            max_memory: str | int | None = None,
            gpu: str | None = None,
            sizes: Sequence[int] | Sequence[Sequence[int]] | None = None,
            num_inference_steps: int | None = None,
            assume: Mapping[str, Any] = ...,
            kwargs: Mapping[str, Any] = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _promises_something(self) -> Self:
        if self.max_memory is None and self.gpu is None:
            allowed = "max_memory, gpu or both must be given: what the full-size recipe may take"
            raise Mistakes([Mistake(("max_memory",), "nothing", allowed)])
        return self


# The recipe.

_NEW_DYNAMO_NAMES = {
    "cache_size_limit": "recompile_limit",
    "accumulated_cache_size_limit": "accumulated_recompile_limit",
}
OTHER_DYNAMO_NAME = _NEW_DYNAMO_NAMES | {new: old for old, new in _NEW_DYNAMO_NAMES.items()}
"""The other name of a setting that has two."""


def recipe_name(value: Any) -> Any:
    """The same, if a recipe may have that name; else `Mistakes`."""
    forbidden = isinstance(value, str) and any(mark in value for mark in ("::", "/", "[", "]"))
    if not isinstance(value, str) or not value.strip() or forbidden or not value.isprintable():
        raise refused(value, "a string that is not empty, on one line, without '::', '/', '[' or ']': it names a test")
    return value


def _dynamo(value: Any) -> FrozenDict:
    given = _frozen_table(value)
    mistakes: list[Mistake] = []
    settings: dict[str, Any] = {}
    for key, setting in given.items():
        new = _NEW_DYNAMO_NAMES.get(key, key)
        limit = new in _NEW_DYNAMO_NAMES.values()
        if limit and (type(setting) is not int or setting < 1):
            mistakes.append(Mistake((key,), shown(setting), "an int >= 1"))
        elif setting is not None and not isinstance(setting, bool | int | float | str):
            mistakes.append(Mistake((key,), shown(setting), "true, false, a number or a string"))
        elif new != key and new in given and given[new] != setting:
            allowed = f"only one of them: {key} is the old name of {new}"
            mistakes.append(Mistake((key,), f"{shown(setting)} together with {new} = {shown(given[new])}", allowed))
        settings[new] = setting
    if mistakes:
        raise Mistakes(mistakes)
    return FrozenDict(settings)


DOES_NOT_RUN = "run"
"""The key of a known fault that ends the run of its recipe."""

_FAULTY = (
    DOES_NOT_RUN,
    "engagement",
    "graph_breaks",
    "recompiles",
    "quantization",
    "attention",
    "caching",
    "memory",
    "host_syncs",
    "parity",
    "state",
    "forecast",
)


def _known_faults(value: object) -> FrozenDict:
    given = _frozen_table(value)
    mistakes = [unknown_key((), key, _FAULTY) for key in given if key not in _FAULTY]
    mistakes += [
        Mistake((key,), shown(cause), "a part of what the verdict says, as a string that is not empty")
        for key, cause in given.items()
        if key in _FAULTY and not (isinstance(cause, str) and cause.strip())
    ]
    if mistakes:
        raise Mistakes(mistakes)
    return given


def _requirements(value: object) -> tuple[str, ...]:
    from packaging.requirements import InvalidRequirement, Requirement

    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        raise refused(value, _REQUIREMENTS)
    mistakes = []
    for index, text in enumerate(given):
        try:
            requirement = Requirement(text) if isinstance(text, str) else None
        except InvalidRequirement:
            requirement = None
        if requirement is None or requirement.url:
            mistakes.append(Mistake((index,), shown(text), _REQUIREMENTS))
    if mistakes:
        raise Mistakes(mistakes)
    return tuple(given)


_REQUIREMENTS = "a package and its versions, 'torchao>=0.18', or a list of them"


def _order(value: object) -> tuple[str, ...]:
    parts = tuple(value) if isinstance(value, list | tuple) else ()
    if sorted(map(str, parts)) != sorted(ORDER):
        raise refused(value, f"a list of {', '.join(map(repr, ORDER))}, each once")
    return parts


LEAST_TILE = 32
"""Pixels of a tile's side: less holds no pixel of the latents of some VAEs."""


def _tiling(value: object) -> object:
    if not isinstance(value, int) or (not isinstance(value, bool) and value < LEAST_TILE):
        raise refused(value, f"true, false, or the side of a tile in pixels, an int >= {LEAST_TILE}")
    return value


def _none_as_empty(value: object) -> object:
    return () if value is None else value


def _by_the_factory(value: object) -> object:
    return (Compilation(FACTORY, scope="factory"),) if isinstance(value, str) and value == FACTORY else value


def _alone_as_it_is(quantizations: tuple[Quantization, ...]) -> object:
    return quantizations if len(quantizations) > 1 else next(iter(quantizations), None)


if TYPE_CHECKING:
    NoneOneOrSeveral = Quantization | tuple[Quantization, ...] | None
else:
    NoneOneOrSeveral = Annotated[
        tuple[Quantization, ...],
        one_or_many("a table, or a list of tables", (Quantization, Mapping)),
        BeforeValidator(_none_as_empty),
        AfterValidator(_alone_as_it_is),
    ]


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class Recipe(Part):
    """A pipeline, how it is made cheap, the calls to make, and what that promises. Frozen; equal and hashed by content.

    Args:
        name: names a test, so it is one line without ``::``, ``/``, ``[`` or ``]``.
        pipeline: a replica's name, a local directory, a hub id, ``"package.module:factory"``, or a callable that
            returns a pipeline or a ``torch.nn.Module``.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, or the torch.dtype; None: as the pipeline is built.
        quantization: one, a list, or None for none; in a list each component is named by one of them at most. Each part
            may be given as a dict, as in TOML. None, one `Quantization`, or a tuple of several: see `quantizations`.
        compilation: one, a list, or none; ``"factory"`` where the factory compiles by itself.
        offloading: None for none.
        dynamo: settings of torch._dynamo.config and torch.fx.experimental._config. The old names of the recompile limits
            are turned into the new ones.
        call: what is run.
        contract: limits; what it leaves open is derived from the parts.
        known_faults: of libraries: check → a part of what its failed verdict says, or ``"run"`` → of the exception that
            ends the run. A test item is then expected to fail, with that cause and no other.
        order: in which the parts are applied. Quantization that is not first is done in place, on the live modules.
        forecast: what the recipe may take with a full-size model; None forecasts nothing.
        vae_tiling: the VAE works tile by tile, as after diffusers' ``vae.enable_tiling()``; a number is the side of a tile
            in pixels, in place of the VAE's own. A reference does as well, since tiles are blended.
        vae_slicing: the VAE works image by image, as after diffusers' ``vae.enable_slicing()``.
        attention: the backend of diffusers' attention dispatcher, ``"_native_efficient"``: a table by component, or one
            name for every component that can be told. None leaves it as it is.
        caching: one, a list, or none. Approximate on purpose: a reference keeps it, and the attention backend too.
        exclusive: no other worker of the host uses the accelerator while the recipe or a reference of it runs.
        isolate: where a check fails, find the smallest subset of the recipe's parts that still fails, which takes runs.
            True of the combinations of a matrix, unless it says otherwise.
        requires: packages and their versions, as pip writes them, ``"torchao>=0.18"``: one, a list, or none. Where one is
            not installed, a test item is skipped with that reason, and nothing else that its libraries lack is a mistake.
        reference: what the recipe is compared with, made as ``pipeline`` says it; run without compilation and offloading.
            None for the recipe's own pipeline.

    Raises:
        RecipeError: with every mistake in the recipe and its parts.
    """

    name: Annotated[str, PlainValidator(recipe_name)]
    pipeline: Annotated[str | Callable[..., Any], PlainValidator(_pipeline)]
    dtype: Annotated[Dtype, BeforeValidator(dtype_name)] | None = None
    quantization: NoneOneOrSeveral = None
    compilation: Annotated[
        tuple[Compilation, ...],
        one_or_many('a table, a list of tables, or "factory"', (Compilation, Mapping)),
        BeforeValidator(_none_as_empty),
        BeforeValidator(_by_the_factory),
    ] = ()
    offloading: Offloading | None = None
    dynamo: Annotated[Mapping[str, DynamoValue], PlainValidator(_dynamo)] = dataclasses.field(
        default_factory=FrozenDict
    )
    call: Call = Call()
    contract: Contract = Contract()
    order: Annotated[tuple[str, ...], PlainValidator(_order)] = ORDER
    known_faults: Annotated[Mapping[str, str], PlainValidator(_known_faults)] = dataclasses.field(
        default_factory=FrozenDict
    )
    forecast: ForecastBudget | None = None
    vae_tiling: Annotated[bool | int, PlainValidator(_tiling)] = False
    vae_slicing: Bool = False
    attention: Annotated[str | Mapping[str, str], PlainValidator(attention_backends)] | None = None
    caching: Annotated[
        tuple[Caching, ...],
        one_or_many("a table, or a list of tables", (Caching, Mapping)),
        BeforeValidator(_none_as_empty),
    ] = ()
    exclusive: Bool = False
    isolate: Bool = False
    requires: Annotated[tuple[str, ...], PlainValidator(_requirements)] = ()
    reference: Annotated[str | Callable[..., Any], PlainValidator(_pipeline)] | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            name: str,
            pipeline: str | Callable[..., Any],
            dtype: Any = None,
            quantization: Quantization | Mapping[str, Any] | Sequence[Quantization | Mapping[str, Any]] | None = None,
            compilation: Compilation
            | Mapping[str, Any]
            | Sequence[Compilation | Mapping[str, Any]]
            | Literal["factory"]
            | None = (),
            offloading: Offloading | Mapping[str, Any] | None = None,
            dynamo: Mapping[str, DynamoValue] = ...,
            call: Call | Mapping[str, Any] = ...,
            contract: Contract | Mapping[str, Any] = ...,
            order: Sequence[str] = ...,
            known_faults: Mapping[str, str] = ...,
            forecast: ForecastBudget | Mapping[str, Any] | None = None,
            vae_tiling: bool | int = False,
            vae_slicing: bool = False,
            attention: str | Mapping[str, str] | None = None,
            caching: Caching | Mapping[str, Any] | Sequence[Caching | Mapping[str, Any]] | None = (),
            exclusive: bool = False,
            isolate: bool = False,
            requires: Strings = (),
            reference: str | Callable[..., Any] | None = None,
        ) -> None: ...

    @field_validator("quantization")
    @classmethod
    def _each_quantized_once(cls, quantization: Any) -> Any:
        several = quantization if isinstance(quantization, tuple) else ()
        mistakes = []
        for index, one in enumerate(several):
            if one.components is None:
                allowed = "several backends name their components: 'all' is for one alone"
                mistakes.append(Mistake((index, "components"), "nothing", allowed))
            for name in one.components or ():
                first = next(i for i, other in enumerate(several) if name in (other.components or ()))
                if first < index:
                    found = f"{name!r}, which quantization[{first}] quantizes already"
                    mistakes.append(Mistake((index, "components"), found, "quantize each component once"))
        if mistakes:
            raise Mistakes(mistakes)
        return quantization

    @property
    def quantizations(self) -> tuple[Quantization, ...]:
        """All of them, in order: none, one or several."""
        if self.quantization is None:
            return ()
        return self.quantization if isinstance(self.quantization, tuple) else (self.quantization,)

    def quantization_for(self, component: str) -> Quantization | None:
        """The one that means this component, if any does."""
        meant = (one for one in self.quantizations if one.components is None or component in one.components)
        return next(meant, None)

    @field_validator("compilation")
    @classmethod
    def _each_component_once(cls, compilations: tuple[Compilation, ...]) -> tuple[Compilation, ...]:
        mistakes = []
        for index, compilation in enumerate(compilations):
            first = next(i for i, other in enumerate(compilations) if other.component == compilation.component)
            if first < index:
                found = f"{compilation.component!r}, which compilation[{first}] compiles already"
                mistakes.append(Mistake((index, "component"), found, "compile each component once"))
        if mistakes:
            raise Mistakes(mistakes)
        return compilations

    @field_validator("offloading")
    @classmethod
    def _no_hooks_in_one_graph(cls, offloading: Offloading | None, info: ValidationInfo) -> Offloading | None:
        if offloading is None:
            return None
        mistakes = []
        for index, compilation in enumerate(info.data.get("compilation", ())):
            hooked = offloading.components is None or compilation.owner in offloading.components
            if compilation.fullgraph and compilation.scope == "module" and hooked:
                found = f"true with scope = 'module' on {compilation.component!r}, "
                found += f"which offloading strategy = {offloading.strategy!r} puts hooks on"
                allowed = f"Dynamo refuses the torch.compiler.disable()d {_HOOK_FUNCTIONS[offloading.strategy]}: "
                allowed += "write scope = 'repeated_blocks' with fullgraph, or fullgraph = false"
                mistakes.append(Mistake(("..", "compilation", index, "fullgraph"), found, allowed))
        if mistakes:
            raise Mistakes(mistakes)
        return offloading

    @field_validator("caching")
    @classmethod
    def _one_cache_a_component(cls, cachings: tuple[Caching, ...]) -> tuple[Caching, ...]:
        return each_component_once(cachings)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256, in hex, of everything that changes what is observed: not the name, the contract, the known faults,
        the forecast, ``isolate``, what is required, and whether it has the accelerator alone.

        The same in every process for what TOML can hold and for importable functions; closures, lambdas and other
        objects count by identity.
        """
        observed = {field: value for field, value in self.given().items() if field not in ABOUT_THE_VERDICT}
        return hashlib.sha256(content_of(observed).encode()).hexdigest()

    def without(self, *parts: str) -> Self:
        """The recipe without some of ``"compilation"``, ``"offloading"``, ``"quantization"`` and ``"dynamo"``.

        Its name says so.

        Raises:
            RecipeError: a part that is none of these.
        """
        if mistakes := unknown_parts(parts):
            raise RecipeError(problems_of(mistakes, ("without",)), "Recipe.without(...)")
        if not parts:
            return self
        bare: dict[str, Any] = {"compilation": (), "offloading": None, "quantization": None, "dynamo": {}}
        dropped = [part for part in PARTS_TO_DROP if part in parts]
        name = f"{self.name} without {', '.join(dropped)}"
        fields = {part: bare[part] for part in dropped}
        left = [part for part in ORDER if fields.get(part, getattr(self, part))]
        if [part for part in self.order if part in left] == left:
            fields["order"] = ORDER  # what is left has no other order: two recipes' references are one
        return self.replace(name=name, **fields)

    def replace(self, **fields: Any) -> Self:
        """Another recipe with these fields, validated as by the constructor."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(**{**kept, **fields})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The recipe of `to_dict`'s data.

        Raises:
            RecipeError: with every mistake in the data.
        """
        if not isinstance(data, Mapping):
            raise RecipeError([Problem("Recipe", shown(data), "a dict of its fields")], "Recipe.from_dict(...)")
        return cls(**{str(key): value for key, value in data.items()})

    def to_toml(self) -> str:
        """A text with the one table ``[recipe.NAME]``, which `loads_recipes` turns into an equal recipe.

        Raises:
            RecipeError: for what TOML cannot hold: callables, tensors and other objects, and None inside a table.
        """
        import tomli_w

        mistakes: list[Mistake] = []

        def refuse(value: object, location: Location) -> None:
            mistakes.append(Mistake(location, shown(value), _why_not_in_toml(value)))

        fields = plain(self, refuse)
        if not mistakes:
            nulls = [location for location, value in _leaves(fields) if value is None]
            mistakes = [Mistake(location, "None", "TOML has no null: leave the key out") for location in nulls]
        if mistakes:
            raise RecipeError(problems_of(mistakes), f"{self.name}.to_toml()")
        del fields["name"]
        for part in ("compilation", "caching"):
            if len(getattr(self, part)) == 1:
                (fields[part],) = fields[part]
        if self.compilation == _by_the_factory(FACTORY):
            fields["compilation"] = FACTORY
        return tomli_w.dumps({"recipe": {self.name: fields}})


def unknown_parts(parts: Iterable[object]) -> list[Mistake]:
    """A mistake for each that is none of `PARTS_TO_DROP`."""
    allowed = f"allowed: {', '.join(map(repr, PARTS_TO_DROP))}"
    return [
        Mistake((), shown(part), did_you_mean(part, PARTS_TO_DROP) + allowed)
        for part in parts
        if part not in PARTS_TO_DROP
    ]


def _why_not_in_toml(value: object) -> str:
    if array_bytes(value) is not None:
        return "TOML holds no tensors: make them in a callable, and keep the recipe in Python"
    if callable(value):
        written = repr(name_of(value)) if imported(name_of(value)) is value else '"package.module:function"'
        return f"TOML holds no callables: write {written}, which is imported when the recipe runs"
    return "TOML holds strings, numbers, true, false, lists and tables"


def _leaves(value: object, location: Location = ()) -> Iterator[tuple[Location, object]]:
    if isinstance(value, dict):
        for key, held in value.items():
            yield from _leaves(held, (*location, key))
    elif isinstance(value, list):
        for index, held in enumerate(value):
            yield from _leaves(held, (*location, index))
    else:
        yield location, value
