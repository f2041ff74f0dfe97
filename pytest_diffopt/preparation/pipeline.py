"""A live pipeline out of a recipe: built or loaded, quantized, offloaded, compiled, and called."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.libraries import dtype_argument, no_progress_bars
from pytest_diffopt.preparation import (
    attention,
    autoencoder,
    caching,
    compilation,
    dynamo,
    media,
    offloading,
    quantization,
)
from pytest_diffopt.preparation.loading_order import in_order
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.references import UnresolvedReference, accepted, resolve_callable

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.recipe import Recipe

MODEL = "model"
"""The one component's name where a factory returns a plain module."""


@dataclass
class Prepared:
    """A live pipeline and what is needed to call it as its recipe says.

    Attributes:
        pipeline: the pipeline, or the module where the recipe is a model's.
        components: name → module, as the pipeline holds them.
        is_model: the pipeline is a plain ``torch.nn.Module``.
        kept_plain, kept_float32: component → modules that the libraries leave unquantized, or in float32.
        types_of_file: component → Linear layer → its type in the ``.gguf`` file that it was loaded from.
    """

    recipe: Recipe
    accelerator: Accelerator
    pipeline: Any
    components: dict[str, torch.nn.Module]
    is_model: bool
    default_size: tuple[int, ...] | None = None
    default_kwargs: dict[str, Any] = field(default_factory=dict)
    compiled_before: set[compilation.Compiled] = field(default_factory=set)
    kept_plain: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kept_float32: dict[str, tuple[str, ...]] = field(default_factory=dict)
    types_of_file: dict[str, dict[str, str]] = field(default_factory=dict)
    offloaded: offloading.Offloaded = field(default_factory=offloading.Offloaded)
    switched: autoencoder.Switched = field(default_factory=autoencoder.Switched)
    attended: attention.Attended = field(default_factory=attention.Attended)
    cached: caching.Cached = field(default_factory=caching.Cached)

    def module_names(self) -> dict[int, tuple[str, str]]:
        """id of a module → (component, path in it), for every module of every component."""
        names: dict[int, tuple[str, str]] = {}
        for component, module in self.components.items():
            names.setdefault(id(module), (component, ""))
            for path, inner in compilation.named_modules(module):
                names.setdefault(id(inner), (component, path))
        return names

    def arguments(self, call: int, *, seed: int | None = None, prompt: str | None = None) -> dict[str, Any]:
        """The keyword arguments of one call; fresh copies, so that a call may change them.

        Args:
            call: from 0. seed, prompt: used instead of the recipe's, where given.
        """
        import torch

        asked = self.recipe.call
        seed = asked.seed if seed is None else seed
        if self.is_model:
            inputs = copy.deepcopy(dict(asked.model_inputs(call)))
            return {name: self._placed(thawed(value)) for name, value in inputs.items()}
        signature = inspect.signature(type(self.pipeline).__call__).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
        size = asked.size(call) or self.default_size or ()
        wanted: dict[str, Any] = {
            "prompt": asked.prompt(call) if prompt is None else prompt,
            "num_inference_steps": asked.num_inference_steps,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": "pt",
            **dict(zip(("height", "width", "num_frames"), size, strict=False)),
            **self.default_kwargs,
        }
        given = {name: value for name, value in wanted.items() if name in signature or open_ended}
        for table, more in (("kwargs", asked.kwargs), ("inputs", asked.model_inputs(call) if asked.inputs else {})):
            if unknown := [name for name in more if name not in signature and not open_ended]:
                raise PreparationError(
                    f"call.{table}: found {unknown[0]!r}; {type(self.pipeline).__name__} takes: "
                    f"{', '.join(name for name in signature if name != 'self')}"
                )
            for name, value in thawed(copy.deepcopy(dict(more))).items():
                found = media.made(f"call.{table}.{name}", name, value, size, call)
                given[name] = value if found is value else self._placed(found)
        return given

    def run(self, arguments: dict[str, Any]) -> Any:
        """One call. The result is what the pipeline or module returns."""
        import torch

        with torch.no_grad():
            result = self.pipeline(**arguments)
            self.offloaded.after_call()
            return result

    def release(self) -> None:
        """Take off what was put on: compiled calls, offloading hooks, switches, caches. A factory may return the same object
        again."""
        for module in self.components.values():
            compilation.uncompile(module, self.compiled_before)
        if self.recipe.offloading is not None:
            offloading.take_off(self.pipeline, self.components)
            self.offloaded.clean_up()
        self._switch_back()

    def switch_on(self) -> None:
        """The VAE's switches, the attention backend and the caches that the recipe says."""
        self.switched.switch_on(self.components, self.recipe)
        self.attended.tell(self.components, self.recipe)
        self.cached.enable(self.pipeline, self.components, self.recipe)

    def _switch_back(self) -> None:
        self.cached.take_off()
        self.attended.put_back()
        self.switched.put_back()

    def detach(self) -> None:
        """Continue on a copy of what a factory returned, so that nothing more happens to the object itself."""
        if not (callable(self.recipe.pipeline) or self.is_model):
            return
        self._switch_back()  # a copied hook of diffusers would run the original's layers
        self.pipeline = copy.deepcopy(self.pipeline)
        self.components = _components(self.pipeline)
        self.switch_on()

    def _placed(self, value: Any) -> Any:
        """Tensors on the device, floating ones in the recipe's dtype where it says one."""
        import torch

        dtype = getattr(torch, self.recipe.dtype) if self.recipe.dtype else None

        def place(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                cast = dtype if dtype is not None and item.is_floating_point() else item.dtype
                return item.to(device=self.accelerator.device, dtype=cast)
            if isinstance(item, dict):
                for key in item:
                    item[key] = place(item[key])
                return item
            if isinstance(item, list):
                item[:] = [place(entry) for entry in item]
                return item
            if isinstance(item, tuple):
                return _like(item, [place(entry) for entry in item])
            return item

        return place(value)


def thawed(value: Any) -> Any:
    """Plain dicts and lists out of a recipe's frozen ones: a model may change what it is given."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [thawed(item) for item in value]
    if isinstance(value, tuple):
        return _like(value, [thawed(item) for item in value])
    if type(value).__name__ == "Generator" and hasattr(value, "clone_state"):
        return value.clone_state()  # every run draws the same, and none advances the recipe's own
    return value


def _like(value: tuple[Any, ...], items: list[Any]) -> Any:
    """The items as a tuple of the same class, a named tuple too."""
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def prepare(
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    allow_hub: bool = False,
    backend: str | None = None,
    fullgraph: bool | None = None,
    on_loaded: Callable[[Prepared], None] | None = None,
) -> Prepared:
    """Make a live pipeline out of a recipe; see :class:`Prepared`.

    Args:
        on_loaded: told once it is built or loaded, before anything is placed.

    Raises:
        PreparationError: with the cause, where a part of the recipe cannot be done.
        ReplicaError: the pipeline's name resolves to nothing.
    """
    quantization.import_backends(recipe.quantizations)
    with no_progress_bars(), in_order():
        prepared = _built(recipe, accelerator, allow_hub=allow_hub)
    for name, module in prepared.components.items():
        prepared.kept_plain[name] = quantization.kept_plain(module, recipe.quantization_for(name))
        prepared.types_of_file[name] = quantization.types_of_file(module)
        prepared.kept_float32[name] = quantization.kept_float32(module)
        module.eval()
    prepared.compiled_before = compilation.compiled_ids(prepared.components)
    if on_loaded is not None:
        on_loaded(prepared)
    try:
        prepared.switch_on()
    except BaseException:
        prepared._switch_back()  # what was switched on before
        raise
    if recipe.order[0] != "quantization":
        _place(prepared)
    for part in recipe.order:
        if part == "quantization":
            _quantize(prepared)
            if part == recipe.order[0]:
                _place(prepared)  # only what is quantized by then: the dense weights need not fit
        elif part == "offloading" and recipe.offloading is not None:
            device = accelerator.device
            prepared.offloaded = offloading.offload(prepared.pipeline, prepared.components, recipe.offloading, device)
        elif part == "compilation":
            compilation.compile_components(
                prepared.components, recipe.compilation, backend=backend, fullgraph=fullgraph
            )
    return prepared


def _place(prepared: Prepared) -> None:
    """On the accelerator, unless offloading places it."""
    if prepared.recipe.offloading is not None or prepared.accelerator.is_host:
        return
    device = prepared.accelerator.device
    if not _is_factory(prepared.recipe):
        prepared.pipeline.to(device)
        return
    for module in prepared.components.values():
        module.to(device)


def _quantize(prepared: Prepared) -> None:
    """In place, where the pipeline was not quantized when it was built or loaded."""
    recipe = prepared.recipe
    meant = recipe.quantizations
    if quantization.has_quantized_layers(prepared.components.values()):
        # A factory that quantized anything itself is judged as it stands; nothing is mended behind its back.
        meant = () if _is_factory(recipe) else tuple(one for one in meant if not BACKENDS[one.backend].while_loading)
    for one in meant:
        quantization.quantize_in_place(prepared.components, one, prepared.accelerator.device)
    quantization.use_default_kernels(prepared.components, prepared.accelerator)


@contextlib.contextmanager
def prepared(recipe: Recipe, accelerator: Accelerator, *, allow_hub: bool = False) -> Iterator[Prepared]:
    """Like :func:`prepare`, with every global given back when the context closes."""
    from pytest_diffopt.preparation.borrowed_state import borrowed_state

    with borrowed_state(), accelerator.in_use(), dynamo.settings(recipe.dynamo):
        yield prepare(recipe, accelerator, allow_hub=allow_hub)


def _built(recipe: Recipe, accelerator: Accelerator, *, allow_hub: bool) -> Prepared:
    _seed(recipe.call.seed)
    if _is_factory(recipe):
        return _from_factory(recipe, accelerator)
    return _from_files(recipe, accelerator, allow_hub=allow_hub)


def _is_factory(recipe: Recipe) -> bool:
    return callable(recipe.pipeline) or (":" in recipe.pipeline and "/" not in recipe.pipeline)


def _seed(seed: int) -> None:
    """So that a factory that draws its weights builds the same model for a recipe and for its reference."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _factory(path: str) -> Callable[..., Any]:
    """The callable that ``"package.module:attribute"`` names. Raises PreparationError that says which part is wrong."""
    try:
        return resolve_callable(path)
    except UnresolvedReference as error:
        raise PreparationError(f"pipeline: found {path!r}; {error}") from error


def _from_factory(recipe: Recipe, accelerator: Accelerator) -> Prepared:
    import torch

    factory = recipe.pipeline if callable(recipe.pipeline) else _factory(recipe.pipeline)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    offered: dict[str, Any] = {
        "recipe": recipe,
        "torch_dtype": dtype,
        "dtype": dtype,
        "device": accelerator.device,
        "quantization_config": quantization.pipeline_config(recipe.quantizations),
    }
    with quantization.quantizers_accept(accelerator):
        # a module's own constructor arguments are not ours to fill
        pipeline = factory(**({} if inspect.isclass(factory) else accepted(factory, offered)))
    if not callable(pipeline):
        raise PreparationError(
            f"pipeline: the factory returned {type(pipeline).__name__}; "
            f"it takes a diffusers pipeline, or a torch.nn.Module"
        )
    components = _components(pipeline)
    if not components:
        raise PreparationError(
            f"pipeline: the factory returned {type(pipeline).__name__}, which holds no torch.nn.Module"
        )
    is_model = isinstance(pipeline, torch.nn.Module)
    if dtype is not None and not quantization.has_quantized_layers(components.values()):
        for module in components.values():
            module.to(dtype)
    _quiet(pipeline)
    return Prepared(recipe, accelerator, pipeline, components, is_model)


def _components(pipeline: Any) -> dict[str, torch.nn.Module]:
    import torch

    if isinstance(pipeline, torch.nn.Module):
        return {MODEL: pipeline}
    held = getattr(pipeline, "components", None)
    if not isinstance(held, Mapping):
        held = vars(pipeline) if hasattr(pipeline, "__dict__") else {}
    return {name: value for name, value in held.items() if isinstance(value, torch.nn.Module)}


def _from_files(recipe: Recipe, accelerator: Accelerator, *, allow_hub: bool) -> Prepared:
    import torch
    from diffusers import DiffusionPipeline

    from pytest_diffopt.replicas.resolution import resolve

    assert isinstance(recipe.pipeline, str)
    resolved = resolve(recipe.pipeline, allow_hub=allow_hub)
    kwargs: dict[str, Any] = {}
    if recipe.dtype:
        kwargs[dtype_argument()] = getattr(torch, recipe.dtype)
    if recipe.order[0] == "quantization":
        if (config := quantization.pipeline_config(recipe.quantizations)) is not None:
            kwargs["quantization_config"] = config
        path = str(resolved.path_or_id)
        kwargs |= quantization.components_out_of_files(
            recipe, path, allow_hub=allow_hub, dtype=kwargs.get(dtype_argument())
        )
    with quantization.quantizers_accept(accelerator):
        pipeline: Any = DiffusionPipeline.from_pretrained(resolved.path_or_id, **kwargs)
    components = _components(pipeline)
    for one in recipe.quantizations:
        for name in one.components or ():
            if name not in components:
                raise PreparationError(
                    f"quantization.components: found {name!r}; the pipeline has: {', '.join(sorted(components))}"
                )
    _quiet(pipeline)
    family = resolved.family
    return Prepared(
        recipe,
        accelerator,
        pipeline,
        components,
        is_model=False,
        default_size=tuple(family.default_size) if family is not None else None,
    )


def _quiet(pipeline: Any) -> None:
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
