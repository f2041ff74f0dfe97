"""quantization: every Linear that was meant is quantized, by class *and* by bytes; nothing else is; the rest keeps its dtype.

Not fooled by: a plain Linear that passes ``isinstance``; a layer of a quantized class whose weight never was; a component
that was silently left out; the wrong format, or one without the double quantization that was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, shortened
from pytest_diffopt.preparation.quantization import is_named

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import Layer

NAME = "quantization"

FORMATS = {"bitsandbytes_4bit": ("nf4", "fp4"), "bitsandbytes_8bit": ("int8",)}


def judge(given: Evidence) -> Verdict:
    """See the module."""
    quantization = given.recipe.quantization
    layers = given.observation.layers
    if quantization is None:
        return given.unverified(NAME, "the recipe quantizes nothing")
    if not layers and (verdict := given.did_not_run(NAME)):
        return verdict
    present = {layer.component for layer in layers}
    meant = quantization.components if quantization.components is not None else tuple(sorted(present))
    problems: list[str] = []
    evidence: list[str] = []
    quantized_layers: list[Layer] = []
    for name in meant:
        own = [layer for layer in layers if layer.component == name and layer.linear]
        expected = [layer for layer in own if not _is_kept_plain(given, layer)]
        wrong = [(layer, reason) for layer in expected if (reason := _wrong(given, layer))]
        quantized_layers += [layer for layer in expected if not _wrong(given, layer)]
        if given.component(name) is None:
            problems.append(f"{name} is no component of the pipeline")
        elif not expected:
            problems.append(f"{name} has no Linear layer to quantize")
        elif len(wrong) == len(expected) and all(layer.format == "" for layer in expected):
            problems.append(f"{name} is not quantized at all ({counted(len(expected), 'Linear layer')} left plain)")
        elif wrong:
            problems.append(f"{len(wrong)} of {counted(len(expected), 'layer')} of {name} are not as promised")
            evidence += [f"{name}.{layer.path}: {reason}" for layer, reason in wrong]
    for layer in layers:
        if layer.format and not layer.linear:
            problems.append(f"{layer.component}.{layer.path} is quantized, though no Linear layer")
        elif layer.format and (layer.component not in meant or _is_skipped(given, layer)):
            where = "named in skip_modules" if layer.component in meant else "not among the components meant"
            problems.append(f"{layer.component}.{layer.path} is quantized, though {where}")
    for layer in given.observation.layers_after:
        if layer.component in meant:
            now = f"in {layer.format}" if layer.format else f"a plain {layer.kind.rpartition('.')[2]} in {layer.dtype}"
            problems.append(f"{layer.component}.{layer.path} was changed by a call: it is {now} after it")
    problems += _wrong_dtypes(given)
    stored = sum(layer.weight_bytes + layer.state_bytes for layer in quantized_layers)
    parameters = sum(layer.parameters for layer in quantized_layers)
    figures: dict[str, Any] = {
        "layers": len(quantized_layers),
        "bytes": stored,
        "bits_per_weight": round(8 * stored / parameters, 3) if parameters else None,
    }
    if problems:
        return given.failed(NAME, "; ".join(problems[:3]), evidence=shortened(evidence + problems[3:]), **figures)
    return given.passed(
        NAME,
        f"{counted(len(quantized_layers), 'layer')} of {', '.join(meant)} in {_formats(quantized_layers)}, "
        f"{figures['bits_per_weight']} bits a weight",
        **figures,
    )


def _formats(layers: list[Layer]) -> str:
    return ", ".join(sorted({layer.format for layer in layers}))


def _is_skipped(given: Evidence, layer: Layer) -> bool:
    quantization = given.recipe.quantization
    assert quantization is not None
    skipped = (*quantization.skip_modules, *quantization.kwargs.get("llm_int8_skip_modules", ()))
    return any(is_named(layer.path, skip) for skip in skipped)


def _is_kept_plain(given: Evidence, layer: Layer) -> bool:
    """Whether the recipe, or the library by its own published list, keeps the layer out of quantization."""
    record = given.component(layer.component)
    kept = (*record.kept_plain, *record.kept_float32) if record is not None else ()
    return _is_skipped(given, layer) or any(is_named(layer.path, name) for name in kept)


def _wrong(given: Evidence, layer: Layer) -> str:
    """What is wrong with a layer that was meant to be quantized; empty where nothing is."""
    quantization = given.recipe.quantization
    assert quantization is not None
    if layer.format == "":
        return f"a plain {layer.kind.rpartition('.')[2]} in {layer.dtype}"
    if layer.format == "unquantized":
        return (
            f"a {layer.kind.rpartition('.')[2]} whose weight was never quantized: {layer.weight_bytes} bytes "
            f"of {layer.dtype} for {layer.parameters} weights"
        )
    if layer.format not in FORMATS[quantization.backend]:
        return f"in {layer.format}, not {quantization.backend}"
    kwargs = quantization.kwargs
    if quantization.backend == "bitsandbytes_4bit":
        wanted = kwargs.get("bnb_4bit_quant_type", "fp4")
        if layer.format != wanted:
            return f"in {layer.format}, not {wanted}"
        if bool(kwargs.get("bnb_4bit_use_double_quant", False)) != layer.double_quantized:
            return "double-quantized, though not asked for" if layer.double_quantized else "not double-quantized"
        compute = kwargs.get("bnb_4bit_compute_dtype")
        if compute is not None and layer.compute_dtype != compute:
            return f"computes in {layer.compute_dtype or 'whatever comes in'}, not {compute}"
    if layer.state_bytes == 0:
        return "its inner tensors (absmax or SCB) are missing"
    return ""


def _wrong_dtypes(given: Evidence) -> list[str]:
    """Parameters that are not in the recipe's dtype, and that no class keeps in float32."""
    if given.recipe.dtype is None:
        return []
    problems = []
    for other in given.observation.other_parameters:
        if other.dtype == given.recipe.dtype:
            continue
        record = given.component(other.component)
        kept = record.kept_float32 if record is not None else ()
        plain = [n for n in other.examples if not any(is_named(n, k) for k in kept)]
        if plain:
            problems.append(
                f"{counted(len(plain), 'parameter')} of {other.component} in {other.dtype}, "
                f"not {given.recipe.dtype} ({plain[0]})"
            )
    return problems
