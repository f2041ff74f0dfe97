"""Quantizes a pipeline the way its users do: through diffusers' own loading, on machines with no GPU too.

bitsandbytes' quantizers in diffusers refuse to load where there is no GPU, though the layers themselves run on the host.
Their two gates are opened inside a scope, and given back. The other backends have none. What belongs to one backend
alone is in `pytest_diffopt.quantization_backends`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError, ReplicaError
from pytest_diffopt.extras import is_installed, needs
from pytest_diffopt.libraries import dtype_argument
from pytest_diffopt.preparation.linear_layers import is_in, is_linear_like, is_quantized_class, of_adapters
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.quantization_backends.backend import UNQUANTIZED

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.quantization_backends.backend import Backend
    from pytest_diffopt.recipe import Quantization, Recipe


def import_backends(quantizations: Iterable[Quantization]) -> None:
    """Import the libraries of a recipe's backends, and no other: some are slow, and imports change globals.

    Raises:
        PreparationError: one is not installed.
    """
    for quantization in quantizations:
        backend = BACKENDS[quantization.backend]
        for name in backend.imports:
            try:
                importlib.import_module(name)
            except ImportError as error:
                if backend.distribution is not None and not is_installed(backend.distribution):
                    raise PreparationError(f"quantization: {backend.name} {needs(backend.distribution)}") from error
                raise PreparationError(
                    f"quantization: {backend.name} needs {backend.distribution}, which cannot be imported: {error}"
                ) from error


def pipeline_config(quantizations: Iterable[Quantization]) -> Any:
    """The ``PipelineQuantizationConfig`` that diffusers loads a pipeline with; None where loading quantizes nothing.

    Args:
        quantizations: a recipe's.
    """
    from diffusers.quantizers import PipelineQuantizationConfig

    loaded = [one for one in quantizations if BACKENDS[one.backend].while_loading and BACKENDS[one.backend].in_place]
    if not loaded:
        return None
    if len(loaded) == 1 and loaded[0].backend.startswith("bitsandbytes_"):
        components = loaded[0].components
        return PipelineQuantizationConfig(
            quant_backend=loaded[0].backend,
            quant_kwargs=BACKENDS[loaded[0].backend].library_kwargs(loaded[0]),
            components_to_quantize=list(components) if components is not None else None,
        )

    class Mapped(PipelineQuantizationConfig):  # type: ignore[misc]
        """As with ``quant_mapping``; which library's config a component needs is known where it is loaded, not before."""

        def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> Any:
            for one in loaded:
                if one.components is None or module_name in one.components:
                    config = BACKENDS[one.backend].config(one, of_diffusers=is_diffusers)
                    self.config_mapping[module_name] = config
                    return config
            return None

    return Mapped(
        quant_mapping={
            name: BACKENDS[one.backend].config(one, of_diffusers=True)
            for one in loaded
            for name in one.components or ("",)
        }
    )


def components_out_of_files(
    recipe: Recipe, pipeline_path: str, *, allow_hub: bool, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Components whose weights are a ``.gguf`` file's, loaded by diffusers' ``from_single_file``, by name.

    Args:
        pipeline_path: the pipeline's directory or hub id, whose config the component has.

    Raises:
        PreparationError: the pipeline has no such component, or its class reads no single files.
    """
    loaded: dict[str, Any] = {}
    for quantization in recipe.quantizations:
        if quantization.backend == "gguf":
            (name,) = quantization.components or ("",)
            loaded[name] = _out_of_a_file(quantization, name, pipeline_path, allow_hub=allow_hub, dtype=dtype)
    return loaded


def _out_of_a_file(
    quantization: Quantization, name: str, pipeline_path: str, *, allow_hub: bool, dtype: torch.dtype | None
) -> Any:
    import diffusers

    from pytest_diffopt.replicas import gguf_files

    index = diffusers.DiffusionPipeline.load_config(pipeline_path)
    parts = {part: of for part, of in index.items() if isinstance(of, list) and of and of[0]}
    if name not in parts:
        raise PreparationError(f"quantization.components: found {name!r}; the pipeline has: {', '.join(sorted(parts))}")
    library, class_name = parts[name]
    component_class: Any = getattr(diffusers, class_name, None) if library == "diffusers" else None
    if not hasattr(component_class, "from_single_file"):
        raise PreparationError(
            f"quantization: {name} is a {class_name} of {library}, and diffusers' from_single_file is what reads .gguf files"
        )
    with gguf_files.loadable():
        file = gguf_files.resolve(quantization.kwargs["file"], allow_hub=allow_hub)
        component = component_class.from_single_file(
            file,
            config=str(pipeline_path),
            subfolder=name,
            quantization_config=BACKENDS["gguf"].config(quantization, of_diffusers=True),
            **{dtype_argument(): dtype},
        )
        note_types_of_file(component, file)
    return component


@contextlib.contextmanager
def quantizers_accept(accelerator: Accelerator) -> Iterator[None]:
    """Let the quantizers load onto the host. On an accelerator nothing is changed: they know the simulated one by then."""
    if not accelerator.is_host:
        yield
        return
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    device_map = {"": accelerator.device_type}
    with contextlib.ExitStack() as stack:
        for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            # raises "No GPU found", though the layers run on the host
            _replace(stack, quantizer, "validate_environment", lambda self, *args, **kwargs: None)
            # asks torch.cuda for the current device
            _replace(stack, quantizer, "update_device_map", lambda self, given: given or dict(device_map))
        yield


def _replace(stack: contextlib.ExitStack, holder: Any, name: str, value: Any) -> None:
    stack.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, value)


def has_quantized_layers(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether any layer is of a quantization library's class."""
    return any(is_quantized_class(layer) for module in modules for layer in module.modules())


def quantize_in_place(
    components: Mapping[str, torch.nn.Module], quantization: Quantization, device: torch.device
) -> None:
    """Quantize the Linear layers of live modules: what a factory returned has no files to load through a quantizer.

    Layers that a model's class keeps in float32 stay plain, as the libraries' own loading leaves them.

    Raises:
        PreparationError: a component is not there.
    """
    import torch

    backend = BACKENDS[quantization.backend]
    meant = quantization.components if quantization.components is not None else tuple(components)
    skipped = backend.named_out(quantization)
    for name in meant:
        if name not in components:
            raise PreparationError(
                f"quantization.components: found {name!r}; the pipeline has: {', '.join(sorted(components))}"
            )
        kept = kept_float32(components[name])
        adapters = of_adapters(components[name])
        paths = [
            path
            for path, layer in components[name].named_modules()
            if isinstance(layer, torch.nn.Linear)
            and not is_quantized_class(layer)
            and not is_in(path, adapters)
            and not any(is_named(path, skip) for skip in (*skipped, *kept))
        ]
        backend.quantize(components[name], paths, quantization, device)


def is_named(path: str, skip: str) -> bool:
    """Whether a skip list's entry names a layer: the whole path, its beginning, or one of its parts (as the libraries do)."""
    return path == skip or path.startswith(skip + ".") or skip in path.split(".") or path.endswith("." + skip)


def use_default_kernels(components: Mapping[str, torch.nn.Module], accelerator: Accelerator) -> None:
    """Keep 4-bit layers on the host to bitsandbytes' default kernels.

    On processors with AVX512-BF16 their first forward repacks the weight instead: other numbers than any GPU's, a weight
    that changes shape between the first call and the second (a recompile), and a verdict that depends on the processor.
    """
    if accelerator.kind != "cpu":
        return
    for module in components.values():
        for layer in module.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def kept_plain(component: torch.nn.Module, quantization: Quantization | None = None) -> tuple[str, ...]:
    """Modules that the library itself keeps out of quantization in this component.

    By the names in its skip list, and where a backend has rules instead, by the paths of the layers that these leave.
    """
    quantizer = getattr(component, "hf_quantizer", None)
    names = [str(name) for name in getattr(quantizer, "modules_to_not_convert", None) or () if name is not None]
    if quantization is not None:
        names += BACKENDS[quantization.backend].kept_plain(component, quantization)
    return tuple(names)


def own_exclusions(component: Any) -> tuple[str, ...]:
    """Modules that transformers keeps out of quantization in this model, unless it is given a list of its own."""
    if getattr(component, "hf_quantizer", None) is None or not hasattr(component, "get_output_embeddings"):
        return ()
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:  # before transformers 5 it stood with each library
        return ()
    return tuple(sorted(get_keys_to_not_convert(component)))


def note_types_of_file(component: Any, file: str) -> None:
    """Keep with a component which types the ``.gguf`` file, on this machine, that it was loaded from has for its layers."""
    from pytest_diffopt.quantization_backends import gguf
    from pytest_diffopt.replicas import gguf_files

    if file.endswith(".gguf"):
        with contextlib.suppress(ReplicaError):  # of the hub itself, whose file is not looked at here
            component._diffopt_types_of_file = gguf.types_of_file(gguf_files.resolve(file), component)


def types_of_file(component: torch.nn.Module) -> dict[str, str]:
    """Path of a Linear layer → the type that the file it was loaded from has for its weight; empty of any other component."""
    types = getattr(component, "_diffopt_types_of_file", None) or {}
    return {name.removesuffix(".weight"): kind for name, kind in types.items() if name.endswith(".weight")}


def kept_float32(component: torch.nn.Module) -> tuple[str, ...]:
    """Modules that the model's class keeps in float32, by the names in its own lists."""
    names: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names += [str(name) for name in getattr(component, attribute, None) or ()]
    return tuple(dict.fromkeys(names))


def quantization_of(module: torch.nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The backend and the recipe's kwargs that would quantize a live module as it is; None where no layer is quantized.

    Read off its layers' tensors and hooks, not off its config, which says so after ``dequantize()`` too. The kwargs are
    what a recipe takes and TOML holds, but for gguf's ``file``, which nothing in a module remembers. Of several backends
    in one module it is the one with most layers.
    """
    found: dict[str, list[Any]] = {}
    for layer in module.modules():
        if not is_linear_like(layer):
            continue
        for name, backend in BACKENDS.items():
            if backend.is_layer(layer) and _is_quantized(backend, layer):
                found.setdefault(name, []).append(layer)
    best: tuple[int, str, dict[str, Any]] | None = None
    for name, layers in found.items():
        kwargs = BACKENDS[name].kwargs_of(module, layers)
        if kwargs is not None and (best is None or len(layers) > best[0]):
            best = (len(layers), name, kwargs)
    return None if best is None else best[1:]


def _is_quantized(backend: Backend, layer: Any) -> bool:
    held = backend.read(layer, layer.in_features * layer.out_features)
    return held is not None and held.format != UNQUANTIZED
