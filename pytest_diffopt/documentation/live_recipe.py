"""The recipe of a live pipeline: what code that nobody changed made of it, read off its components.

Only what is really there counts: layers by what their weights hold, hooks by their own settings, compiled calls by what
torch.compile was given for them. What a recipe has no word for is told beside it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import RecipeError
from pytest_diffopt.preparation import attention, caching, compilation, media, offloading, quantization
from pytest_diffopt.recipe import Caching, Call, Compilation, Offloading, Quantization, Recipe
from pytest_diffopt.replicas import registry

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.documentation.interception import CompileCall, Interception

_PLAIN = (bool, int, float, str)
SIZE = ("height", "width", "num_frames", "num_inference_steps")
"""Arguments of a call that a recipe says whether the block gave them or not."""

_NO_KWARGS = ("prompt", *SIZE, "generator", "return_dict", "output_type")


@dataclass(frozen=True)
class LiveRecipe:
    """A recipe as it was read.

    Attributes:
        recipe: what was read.
        beside: what is set on the pipeline and cannot be said by a recipe, a sentence each.
    """

    recipe: Recipe
    beside: tuple[str, ...] = ()

    @property
    def configures(self) -> tuple[str, ...]:
        """Which parts make it more than the plain pipeline, in words."""
        return configured(self.recipe)


@dataclass
class _Reading:
    """What is found on the way."""

    fields: dict[str, Any] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)


def configured(recipe: Recipe) -> tuple[str, ...]:
    """The parts of a recipe that make it more than the plain pipeline."""
    parts = {
        "quantization": recipe.quantization is not None,
        "compilation": bool(recipe.compilation),
        "offloading": recipe.offloading is not None,
        "caching": bool(recipe.caching),
        "attention": recipe.attention is not None,
        "VAE tiling": bool(recipe.vae_tiling),
        "VAE slicing": recipe.vae_slicing,
    }
    return tuple(name for name, there in parts.items() if there)


def described(recipe: Recipe) -> str:
    """What a recipe is made of, in a line: ``bitsandbytes_4bit + compile transformer + model offloading``."""
    parts: list[str] = [one.backend for one in recipe.quantizations]
    for one in recipe.compilation:
        blocks = " by block" if one.scope == "repeated_blocks" else ""
        parts.append(f"compile {one.component}{blocks}")
    if recipe.offloading is not None:
        kind = recipe.offloading.resolved_offload_type
        parts.append(f"{recipe.offloading.strategy} offloading{f' ({kind})' if kind else ''}")
    parts += [one.kind for one in recipe.caching]
    named = ("quantization", "compilation", "offloading", "caching")
    parts += [word for word in configured(recipe) if word not in named]
    return " + ".join(parts) or "plain"


def configuration(recipe: Recipe) -> str:
    """What two recipes have in common that differ only in their calls."""
    return recipe.replace(call=Call()).content_hash


def read(
    name: str,
    pipeline: Any,
    components: Mapping[str, torch.nn.Module],
    seen: Interception,
    dynamo: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
) -> LiveRecipe:
    """The recipe of a pipeline, or of a module by itself, as it stands now.

    Args:
        seen: what torch.compile was called with.
        dynamo: settings of torch._dynamo.config that differ from what they were.
        arguments: that its first call was given; None where it was not called.

    Raises:
        RecipeError: what is set on it cannot be together in a recipe.
    """
    reading = _Reading()
    reading.fields |= {"name": name, "pipeline": _source(pipeline, components, reading), "dynamo": dict(dynamo)}
    if dtype := _dtype(components.values()):
        reading.fields["dtype"] = dtype
    _quantization(components, seen, reading)
    _compilation(components, seen, reading)
    _offloading(pipeline, components, reading)
    _autoencoder(components, reading)
    _denoisers(components, reading)
    if arguments is not None:
        reading.fields["call"] = call_of(arguments)
    _beside(pipeline, reading)
    return LiveRecipe(Recipe(**reading.fields), tuple(reading.beside))


def call_of(arguments: Mapping[str, Any]) -> Call:
    """A call with these arguments, as far as a recipe can say them."""
    said: dict[str, Any] = {}
    prompt = arguments.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
        prompt = prompt[0]
    if isinstance(prompt, str):
        said["prompts"] = (prompt,)
    size = [arguments.get(side) for side in SIZE[:3]]
    if all(isinstance(side, int) for side in size[:2]):
        said["sizes"] = tuple(side for side in size if isinstance(side, int))
    if isinstance(steps := arguments.get("num_inference_steps"), int):
        said["num_inference_steps"] = steps
    kwargs = {name: value for name, value in arguments.items() if name not in _NO_KWARGS and isinstance(value, _PLAIN)}
    said["kwargs"] = kwargs | {name: word for name, value in arguments.items() if (word := media.word_for(name, value))}
    return Call(**said)


# Where it comes from.


def _source(pipeline: Any, components: Mapping[str, torch.nn.Module], reading: _Reading) -> str:
    """What a recipe names as its pipeline: where it was loaded from, else the replica of its class."""
    own = loaded_from(pipeline)
    if own:
        for name, module in components.items():
            other = loaded_from(module)
            if other and other.casefold() != own.casefold() and not _is_part_of(other, own):
                reading.beside.append(f"{name} comes from {other}")
        return own
    kind = type(pipeline).__name__
    family = next((f for f in registry.families.values() if f.pipeline_class == kind), None)
    if family is not None:
        reading.beside.append(f"the {kind} is put together by hand; {family.name} stands for it")
        return family.name
    reading.beside.append(f"where the {kind} comes from is not known")
    return next(filter(None, map(loaded_from, components.values())), kind)


def loaded_from(module: Any) -> str:
    """The hub id or directory that it was loaded from; empty where it was not."""
    name = getattr(getattr(module, "config", None), "_name_or_path", None) or vars(module).get("_name_or_path")
    if not isinstance(name, str):
        return ""
    snapshot = re.search(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/", name)
    return f"{snapshot['org']}/{snapshot['name']}" if snapshot else name


def _is_part_of(name: str, whole: str) -> bool:
    return name.startswith(whole.rstrip("/") + "/")


def _dtype(modules: Iterable[torch.nn.Module]) -> str:
    """The dtype of most parameters that are floats and not kept in another by their class; empty where there are none, or
    where it is none of a recipe's."""
    counts: dict[str, int] = {}
    for module in modules:
        kept = quantization.kept_float32(compilation.original_module(module))
        for path, parameter in compilation.original_module(module).named_parameters():
            if parameter.is_floating_point() and not any(quantization.is_named(path, name) for name in kept):
                name = str(parameter.dtype).removeprefix("torch.")
                counts[name] = counts.get(name, 0) + parameter.numel()
    name = max(counts, key=lambda one: counts[one], default="")
    return name if name in ("float32", "float16", "bfloat16") else ""


# Its parts.


def _quantization(components: Mapping[str, torch.nn.Module], seen: Interception, reading: _Reading) -> None:
    found: dict[tuple[str, str], tuple[str, dict[str, Any], list[str]]] = {}
    for name, module in components.items():
        read = quantization.quantization_of(compilation.original_module(module))
        if read is None:
            continue
        backend, kwargs = read
        if (file := seen.single_files.get(id(compilation.original_module(module)))) and backend == "gguf":
            kwargs = {"file": file, **kwargs}
        found.setdefault((backend, repr(sorted(kwargs.items()))), (backend, kwargs, []))[2].append(name)
    parts = [Quantization(backend, names, kwargs) for backend, kwargs, names in found.values()]  # type: ignore[arg-type]
    if parts:
        reading.fields["quantization"] = parts[0] if len(parts) == 1 else parts


def _compilation(components: Mapping[str, torch.nn.Module], seen: Interception, reading: _Reading) -> None:
    compiled: dict[str, Compilation] = {}
    known: set[int] = set()
    for name, module in components.items():
        root = compilation.original_module(module)
        paths = {id(inner): path for path, inner in compilation.named_modules(root)}
        blocks = {paths[id(inner)] for inner in root.modules() if type(inner).__name__ in _repeated(root)}
        blocks |= set(compilation.repeated_classes(root))
        for call in (one for one in seen.compiles if one.module_id in paths):
            known.add(id(call))
            path = paths[call.module_id]
            method = "" if call.method in ("", "forward", "_call_impl") else call.method
            regional = path in blocks and not method
            target = name if regional else ".".join(part for part in (name, path, method) if part)
            scope = "repeated_blocks" if regional else "module"
            if regional and target in compiled and compiled[target].scope == "module":
                continue  # what is compiled whole has its blocks in it
            compiled[target] = _one(target, scope, call, seen.memory_formats.get(id(root)))
    for call in seen.compiles:
        if id(call) not in known:  # of the pipeline itself, or of nothing that it holds
            compiled.setdefault(call.function, _one(call.function, "factory", call, None))
    reading.fields["compilation"] = tuple(compiled.values())


def _repeated(root: torch.nn.Module) -> set[str]:
    return set(getattr(root, "_repeated_blocks", None) or ())


def _one(name: str, scope: Any, call: CompileCall, memory_format: str | None) -> Compilation:
    said = call.kwargs
    return Compilation(
        name,
        scope=scope,
        backend=said.get("backend", "inductor"),
        mode=said.get("mode"),
        fullgraph=bool(said.get("fullgraph", False)),
        dynamic=said.get("dynamic"),
        memory_format=memory_format,  # type: ignore[arg-type]
        options=said.get("options"),
    )


def _offloading(pipeline: Any, components: Mapping[str, torch.nn.Module], reading: _Reading) -> None:
    found = {name: offloading.offloading_of(compilation.original_module(module)) for name, module in components.items()}
    hooked = {name: one for name, one in found.items() if one is not None}
    if not hooked:
        return
    kinds = list(dict.fromkeys(hooked.values()))
    excluded = set(getattr(pipeline, "_exclude_from_cpu_offload", ()))
    everything = set(hooked) >= set(components) - excluded and len(kinds) == 1
    chosen = hooked.get("transformer") or hooked.get("unet") or kinds[0]  # the denoiser's is what the recipe is about
    names = [name for name, one in hooked.items() if one == chosen]
    ways = {name: _way(one, chosen) for name, one in hooked.items()}
    reading.beside += [f"{name} is offloaded in another way ({way})" for name, way in ways.items() if way]
    reading.fields["offloading"] = chosen if everything else dataclasses.replace(chosen, components=tuple(names))


def _way(one: Offloading, chosen: Offloading) -> str:
    """What of it differs, in a few words; empty where nothing does."""
    if one.strategy != chosen.strategy:
        return str(one.strategy)
    given, usual = one.given(), chosen.given()
    return ", ".join(f"{key} = {given.get(key)}" for key in {**given, **usual} if given.get(key) != usual.get(key))


def _autoencoder(components: Mapping[str, torch.nn.Module], reading: _Reading) -> None:
    for name, module in components.items():
        for switch, said in (("use_tiling", "vae_tiling"), ("use_slicing", "vae_slicing")):
            if getattr(module, switch, False) is True:
                reading.fields[said] = True
                if name != "vae":
                    reading.beside.append(f"{said} is on for {name}")


def _denoisers(components: Mapping[str, torch.nn.Module], reading: _Reading) -> None:
    told = {name: attention.attention_of(module) for name, module in components.items()}
    if chosen := {name: backend for name, backend in told.items() if backend is not None}:
        reading.fields["attention"] = chosen
    found = {name: caching.caching_of(module) for name, module in components.items()}
    reading.fields["caching"] = tuple(
        Caching(name, kind=read[0], kwargs=read[1]) for name, read in found.items() if read is not None
    )


def _beside(pipeline: Any, reading: _Reading) -> None:
    """What changes the pipeline's output or cost and has no word in a recipe."""
    getter = getattr(pipeline, "get_active_adapters", None)
    if callable(getter) and hasattr(pipeline, "_lora_loadable_modules"):
        try:
            adapters = getter()
        except Exception:  # without peft it refuses: then there are none
            adapters = []
        if adapters:
            reading.beside.append(f"adapters are loaded: {', '.join(map(str, adapters))}")
    device_map = getattr(pipeline, "hf_device_map", None)
    if device_map:
        reading.beside.append(f"a device map places it: {device_map}")


def toml_of(live: LiveRecipe, comments: Iterable[str] = ()) -> str:
    """The recipe as TOML, with what it cannot say, and what else is told, as comments above it."""
    # what the block compiles beside the components only a factory could compile again
    kept = tuple(one for one in live.recipe.compilation if one.scope != "factory")
    dropped = [
        f"{one.component} is compiled, which is no component" for one in live.recipe.compilation if one not in kept
    ]
    lines = [f"# {line}" for text in (*comments, *live.beside, *dropped) for line in text.splitlines()]
    try:
        body = live.recipe.replace(compilation=kept).to_toml()
    except RecipeError as error:
        body = "".join(f"# {line}\n" for line in str(error).splitlines())
    return "\n".join([*lines, body])
