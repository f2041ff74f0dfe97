"""quantization: every Linear that was meant is quantized, by class *and* by bytes; nothing else is; the rest keeps its dtype.

Not fooled by: a plain Linear that passes ``isinstance``; a layer of a quantized class whose weight never was; a component
that was silently left out; the wrong format, or one without the double quantization that was asked for.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, shortened
from pytest_diffopt.preparation.quantization import is_named
from pytest_diffopt.quantization_backends import BACKENDS
from pytest_diffopt.quantization_backends.backend import UNQUANTIZED

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import Layer

NAME = "quantization"

_PLAIN_IN_A_FILE = ("float32", "float16", "bf16")
"""Types of tensors in a ``.gguf`` file that are not quantized; diffusers loads BF16 into a layer of gguf's all the same."""


def judge(given: Evidence) -> Verdict:
    """See the module."""
    quantizations = given.recipe.quantizations
    layers = given.observation.layers
    if not quantizations:
        return given.unverified(NAME, "the recipe quantizes nothing")
    if not layers and given.observation.failure is not None:
        return given.unverified(NAME, "the recipe was never loaded")
    present = {layer.component for layer in layers}
    meant = tuple(name for one in quantizations for name in (one.components or sorted(present)))
    problems: list[str] = []
    evidence: list[str] = []
    quantized_layers: list[Layer] = []
    for name in meant:
        own = [layer for layer in layers if layer.component == name and layer.linear and not layer.adapter]
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
        if layer.format and layer.adapter:
            problems.append(f"{layer.component}.{layer.path} is quantized, though it belongs to an adapter")
        elif layer.format and not layer.linear:
            problems.append(f"{layer.component}.{layer.path} is quantized, though no Linear layer")
        elif layer.format and (layer.component not in meant or _is_skipped(given, layer)):
            where = "named in skip_modules" if layer.component in meant else "not among the components meant"
            problems.append(f"{layer.component}.{layer.path} is quantized, though {where}")
            evidence += [hint for hint in _whole_path(given, layer) if hint not in evidence]
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
    plain = [
        layer
        for layer in layers
        if layer.component in meant and layer.linear and not layer.adapter and layer.format in ("", "BF16")
    ]
    if plain:
        figures["left_plain"] = len(plain)
    return given.passed(
        NAME,
        f"{counted(len(quantized_layers), 'layer')} of {', '.join(meant)} in {_formats(quantized_layers)}, "
        f"{figures['bits_per_weight']} bits a weight{_exclusions_lost(given, quantized_layers)}",
        evidence=shortened([f"left plain, as the recipe or the library says: {_where(layer)}" for layer in plain]),
        **figures,
    )


def _exclusions_lost(given: Evidence, quantized: list[Layer]) -> str:
    """What a list of the recipe's own took out of the library's; empty where nothing was lost."""
    lost = [
        f"{layer.component}.{layer.path}"
        for layer in quantized
        if (record := given.component(layer.component)) is not None and layer.path in record.own_exclusions
    ]
    names = ", ".join(lost)
    are = "is" if len(lost) == 1 else "are"
    return f"; the skip list replaces transformers' own, so {names} {are} too" if lost else ""


def _where(layer: Layer) -> str:
    return f"{layer.component}.{layer.path} in {layer.format or layer.dtype}"


def _formats(layers: list[Layer]) -> str:
    """The formats; of a file in which each layer has its own, how many have each."""
    count = Counter(layer.format for layer in layers)
    mixed = len(count) > 1 and any(layer.library == "gguf" for layer in layers)
    return ", ".join(f"{form} ({count[form]})" if mixed else form for form in sorted(count))


def _is_skipped(given: Evidence, layer: Layer) -> bool:
    quantization = given.recipe.quantization_for(layer.component)
    if quantization is None:
        return False
    return any(is_named(layer.path, skip) for skip in BACKENDS[quantization.backend].named_out(quantization))


def _whole_path(given: Evidence, layer: Layer) -> list[str]:
    """What to write in a skip list whose entry transformers takes for the beginning or the end of a path, and is neither."""
    quantization, record = given.recipe.quantization_for(layer.component), given.component(layer.component)
    if quantization is None or record is None or not record.kind.startswith("transformers."):
        return []
    parts = layer.path.split(".")
    return [
        f"transformers compares the beginning of a path: write {'.'.join(parts[: parts.index(skip) + 1])!r}, not {skip!r}"
        for skip in BACKENDS[quantization.backend].named_out(quantization)
        if skip in parts[1:-1]
    ]


def _is_kept_plain(given: Evidence, layer: Layer) -> bool:
    """Whether the recipe, or the library by its own published list, keeps the layer out of quantization."""
    record = given.component(layer.component)
    kept = (*record.kept_plain, *record.kept_float32) if record is not None else ()
    if record is not None and record.types_of_file.get(layer.path, "").casefold() in _PLAIN_IN_A_FILE:
        return True
    return _is_skipped(given, layer) or any(is_named(layer.path, name) for name in kept)


def _wrong(given: Evidence, layer: Layer) -> str:
    """What is wrong with a layer that was meant to be quantized; empty where nothing is."""
    quantization = given.recipe.quantization_for(layer.component)
    assert quantization is not None
    backend = BACKENDS[quantization.backend]
    if layer.format == "":
        return f"a plain {layer.kind.rpartition('.')[2]} in {layer.dtype}"
    if layer.format == UNQUANTIZED:
        return (
            f"a {layer.kind.rpartition('.')[2]} whose weight was never quantized: {layer.weight_bytes} bytes "
            f"of {layer.dtype} for {layer.parameters} weights"
        )
    if layer.library != backend.library:
        return f"in {layer.format}, not {quantization.backend}"
    record = given.component(layer.component)
    in_file = record.types_of_file.get(layer.path) if record is not None else None
    if in_file is not None and in_file != layer.format:
        return f"in {layer.format}, and the file has it in {in_file}"
    return backend.wrong(quantization, layer)


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
