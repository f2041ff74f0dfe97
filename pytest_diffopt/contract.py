"""The limits that a recipe promises, derived from its parts and overridable."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import PlainValidator
from pydantic.dataclasses import dataclass

from pytest_diffopt.byte_sizes import SIZES_ALLOWED, parse_bytes
from pytest_diffopt.part import (
    CONFIG,
    Names,
    Natural,
    Part,
    PositiveNumber,
    refused,
    with_every_mistake,
)

__all__ = ["Contract", "Limits", "Memory", "derive", "parse_bytes"]


def _memory(value: Any) -> Any:
    try:
        parse_bytes(value)
    except ValueError:
        raise refused(value, SIZES_ALLOWED) from None
    return value


Memory = Annotated[str | int, PlainValidator(_memory)]
"""Bytes as an int, or like ``"12GiB"``."""


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class Contract(Part):
    """The limits that a recipe promises. None means: derived from the recipe's parts (see `derive`).

    Args:
        max_graph_breaks: breaks allowed outside ``allowed_break_files``.
        allowed_break_files: path suffixes or file names where breaks are allowed, e.g. ``"accelerate/hooks.py"``.
        max_recompiles: total over all calls, beyond the first compile of each code object.
        max_recompiles_after_warmup: total over the calls that follow the warm-up.
        warmup_calls: how many calls are the warm-up; 0 where all that is compiled must be ready once it is prepared.
        parity_multiple: how many times the measured floor the output may differ from the reference's.
        max_memory_ratio: peak bytes of the warm calls, against the reference without offloading.
        max_memory: peak bytes of loading and of any call, the first one too, as an int or like ``"12GiB"``.
        max_host_syncs_per_step: how often the host may wait for the accelerator in a denoising step of a warm call, e.g.
            for ``.item()``; what offloading waits for is apart.
        max_host_memory: what torch may take of the host at once, from loading to the last call: weights that wait there,
            pinned memory, working memory. Known on a simulated GPU.
        parity_dtype: ``"float32"`` or ``"float64"``: the check parity judges the recipe and its reference in that dtype
            too, where rounding hides less. Both run once more for it.

    Raises:
        RecipeError: with every wrong field.
    """

    max_graph_breaks: Natural | None = None
    allowed_break_files: Names | None = None
    max_recompiles: Natural | None = None
    max_recompiles_after_warmup: Natural | None = None
    warmup_calls: Natural | None = None
    parity_multiple: PositiveNumber | None = None
    max_memory_ratio: PositiveNumber | None = None
    max_memory: Memory | None = None
    max_host_memory: Memory | None = None
    max_host_syncs_per_step: Natural | None = None
    parity_dtype: Literal["float32", "float64"] | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """A contract with everything resolved.

    Args:
        max_graph_breaks: breaks allowed outside ``allowed_break_files``.
        allowed_break_files: path suffixes or file names where breaks are not counted.
        warmup_calls: how many calls are the warm-up.
        max_recompiles: total allowed beyond the first compile of each code object; None: no limit on the total.
        max_recompiles_after_warmup: total allowed after the warm-up.
        recompiles_per_code: allowed for each code object during warm-up; None: only Dynamo's recompile limit bounds it.
        parity_multiple: how many times the measured floor the output may differ from the reference's.
        max_memory_ratio: peak against the reference without offloading; None: no promise.
        max_memory_bytes: peak in bytes; None: no promise.
        max_host_memory_bytes: of the host, in bytes; None: no promise.
        max_host_syncs_per_step: waits of the host in a denoising step of a warm call; None: no promise.
    """

    max_graph_breaks: int
    allowed_break_files: tuple[str, ...]
    warmup_calls: int
    max_recompiles: int | None
    max_recompiles_after_warmup: int
    recompiles_per_code: int | None
    parity_multiple: float
    max_memory_ratio: float | None
    max_memory_bytes: int | None
    max_host_syncs_per_step: int | None = None
    max_host_memory_bytes: int | None = None


class CompiledPart(Protocol):
    """What `derive` needs of a compilation."""

    @property
    def component(self) -> str: ...


# Where accelerate's and diffusers' offloading hooks break the graph on purpose.
OFFLOADING_HOOK_FILES = ("accelerate/hooks.py", "diffusers/hooks/hooks.py", "diffusers/hooks/group_offloading.py")

# Where diffusers' caches decide, outside the graph, whether a step computes.
CACHING_HOOK_FILES = (
    "diffusers/hooks/hooks.py",
    "diffusers/hooks/first_block_cache.py",
    "diffusers/hooks/mag_cache.py",
    "diffusers/hooks/taylorseer_cache.py",
    "diffusers/hooks/sea_cache.py",
    "diffusers/hooks/pyramid_attention_broadcast.py",
    "diffusers/hooks/faster_cache.py",
)


def derive(
    contract: Contract,
    *,
    compilations: Sequence[CompiledPart],
    offloading: object | None,
    quantization: object | None = None,
    caching: Sequence[object] = (),
) -> Limits:
    """The limits of a recipe with these parts; what the contract's author gave wins.

    Args:
        contract: the author's own limits.
        compilations: the recipe's; empty when nothing is compiled.
        offloading: the recipe's, or None. Hooks specialize the code that they wrap, so they need a longer warm-up.
        quantization: the recipe's, or None. Quantized layers set up their state in their first forward: the same.
        caching: the recipe's. Hooks too, and code that is first run where a step is reused.
    """
    offloaded = offloading is not None
    hooked = offloaded or bool(caching)
    hooks = (OFFLOADING_HOOK_FILES if offloaded else ()) + (CACHING_HOOK_FILES if caching else ())
    per_code: int | None = None
    if contract.max_recompiles is None and not hooked:
        per_code = 1 if compilations else 0  # Dynamo recompiles once to make a shape dynamic
    return Limits(
        max_graph_breaks=_given(contract.max_graph_breaks, 0),
        allowed_break_files=_given(contract.allowed_break_files, tuple(dict.fromkeys(hooks))),
        warmup_calls=_given(contract.warmup_calls, 2 if hooked or quantization is not None else 1),
        max_recompiles=contract.max_recompiles,
        max_recompiles_after_warmup=_given(contract.max_recompiles_after_warmup, _given(contract.max_recompiles, 0)),
        recompiles_per_code=per_code,
        parity_multiple=_given(contract.parity_multiple, 3.0),
        max_memory_ratio=contract.max_memory_ratio,
        max_memory_bytes=None if contract.max_memory is None else parse_bytes(contract.max_memory),
        max_host_syncs_per_step=contract.max_host_syncs_per_step,
        max_host_memory_bytes=None
        if contract.max_host_memory is None
        else parse_bytes(contract.max_host_memory, "max_host_memory"),
    )


Value = TypeVar("Value")


def _given(value: Value | None, otherwise: Value) -> Value:
    return otherwise if value is None else value
