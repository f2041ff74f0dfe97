"""Quantizes a pipeline the way its users do: through diffusers' own loading, on machines with no GPU too.

The quantizers of diffusers refuse to load where there is no GPU, though the layers themselves run on the host. Their two
gates are opened inside a scope, and given back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError
from pytest_diffopt.preparation.linear_layers import is_quantized_class

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.recipe import Quantization

_DTYPE_KEYS = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def library_kwargs(quantization: Quantization) -> dict[str, Any]:
    """A recipe's quantization in the library's own terms: dtypes as objects, the flag that names the format set."""
    import torch

    kwargs: dict[str, Any] = dict(quantization.kwargs)
    for key in _DTYPE_KEYS:
        if isinstance(kwargs.get(key), str):
            kwargs[key] = getattr(torch, kwargs[key])
    kwargs["load_in_4bit" if quantization.backend == "bitsandbytes_4bit" else "load_in_8bit"] = True
    if quantization.skip_modules:
        kwargs["llm_int8_skip_modules"] = [*kwargs.get("llm_int8_skip_modules", []), *quantization.skip_modules]
    return kwargs


def pipeline_config(quantization: Quantization) -> Any:
    """The ``PipelineQuantizationConfig`` that diffusers loads a pipeline with."""
    from diffusers.quantizers import PipelineQuantizationConfig

    components = quantization.components
    return PipelineQuantizationConfig(
        quant_backend=quantization.backend,
        quant_kwargs=library_kwargs(quantization),
        components_to_quantize=list(components) if components is not None else None,
    )


@contextlib.contextmanager
def quantizers_accept(accelerator: Accelerator) -> Iterator[None]:
    """Let the quantizers load onto the host. On an accelerator nothing is changed: they know the simulated one by then."""
    if not accelerator.is_host:
        yield
        return
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    device_map = {"": accelerator.kind}
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
    import bitsandbytes as bnb
    import torch

    meant = quantization.components if quantization.components is not None else tuple(components)
    kwargs = library_kwargs(quantization)
    skipped = tuple(kwargs.get("llm_int8_skip_modules", ()))
    for name in meant:
        if name not in components:
            raise PreparationError(
                f"quantization.components: found {name!r}; the pipeline has: {', '.join(sorted(components))}"
            )
        kept = kept_float32(components[name])
        for path, layer in list(components[name].named_modules()):
            if not isinstance(layer, torch.nn.Linear) or is_quantized_class(layer):
                continue
            if any(is_named(path, skip) for skip in (*skipped, *kept)):
                continue
            new: Any
            if quantization.backend == "bitsandbytes_4bit":
                new = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    compute_dtype=kwargs.get("bnb_4bit_compute_dtype") or layer.weight.dtype,
                    compress_statistics=bool(kwargs.get("bnb_4bit_use_double_quant", False)),
                    quant_type=kwargs.get("bnb_4bit_quant_type", "fp4"),
                    quant_storage=kwargs.get("bnb_4bit_quant_storage") or torch.uint8,
                    device="meta",
                )
                new.weight = bnb.nn.Params4bit(
                    layer.weight.data,
                    requires_grad=False,
                    compress_statistics=new.weight.compress_statistics,
                    quant_type=new.weight.quant_type,
                    quant_storage=new.weight.quant_storage,
                    module=new,
                )
            else:
                new = bnb.nn.Linear8bitLt(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    has_fp16_weights=bool(kwargs.get("llm_int8_has_fp16_weight", False)),
                    threshold=float(kwargs.get("llm_int8_threshold", 6.0)),
                    device="meta",
                )
                new.weight = bnb.nn.Int8Params(
                    layer.weight.data, requires_grad=False, has_fp16_weights=new.state.has_fp16_weights
                )
            new.bias = layer.bias
            new.train(layer.training)
            _set_module(components[name], path, new.to(device))


def is_named(path: str, skip: str) -> bool:
    """Whether a skip list's entry names a layer: the whole path, its beginning, or one of its parts (as the libraries do)."""
    return path == skip or path.startswith(skip + ".") or skip in path.split(".") or path.endswith("." + skip)


def _set_module(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    if not path:
        raise PreparationError("quantization: the component is itself a Linear layer; put it inside a module")
    parent, _, last = path.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


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


def kept_plain(component: torch.nn.Module) -> tuple[str, ...]:
    """Modules that the library itself keeps out of quantization in this component, by the names in its skip list."""
    quantizer = getattr(component, "hf_quantizer", None)
    names = getattr(quantizer, "modules_to_not_convert", None) or ()
    return tuple(str(name) for name in names)


def kept_float32(component: torch.nn.Module) -> tuple[str, ...]:
    """Modules that the model's class keeps in float32, by the names in its own lists."""
    names: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names += [str(name) for name in getattr(component, attribute, None) or ()]
    return tuple(dict.fromkeys(names))


def quantization_of(module: torch.nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The backend and keyword arguments, in a recipe's words, by which a live component was quantized; None for none."""
    if not has_quantized_layers([module]):
        return None
    config = getattr(getattr(module, "hf_quantizer", None), "quantization_config", None)
    said = config.to_diff_dict() if config is not None else {}
    return "bitsandbytes_4bit" if said.get("load_in_4bit") else "bitsandbytes_8bit", {
        key: value for key, value in said.items() if key.startswith("bnb_4bit") and key != "bnb_4bit_quant_storage"
    }
