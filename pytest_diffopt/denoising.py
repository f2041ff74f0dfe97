"""What a recipe says of a denoiser beside its weights: which attention backend it uses, what it keeps from step to step.

Both are diffusers' own: ``set_attention_backend`` and ``enable_cache``. A unit test compares the names here with the
installed version's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PlainValidator, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from pytest_diffopt.part import (
    CONFIG,
    FrozenDict,
    Mistake,
    Mistakes,
    Part,
    Text,
    did_you_mean,
    refused,
    shown,
    unknown_key,
    with_every_mistake,
)

# Attention.

ATTENTION_BACKENDS = (
    *("native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn", "_native_npu", "_native_xla"),
    *("flex", "flash", "flash_hub", "flash_varlen", "flash_varlen_hub", "flash_4_hub"),
    *("_flash_3", "_flash_varlen_3", "_flash_3_hub", "_flash_3_varlen_hub", "aiter_fa2_hub"),
    *("sage", "sage_hub", "sage_blackwell_hub", "sage_varlen"),
    *("_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90"),
    *("_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton", "xformers"),
)
"""diffusers' ``AttentionBackendName``."""


def attention_backends(value: object) -> object:
    """A backend's name, or a table of them by component, each checked.

    Raises:
        Mistakes: with every wrong name.
    """
    named = value if isinstance(value, Mapping) else {"": value}
    mistakes = []
    for component, backend in named.items():
        location = (str(component),) if isinstance(value, Mapping) else ()
        if not isinstance(component, str) or (isinstance(value, Mapping) and not component):
            mistakes.append(Mistake((), f"the key {shown(component)}", "the keys are components"))
        elif backend not in ATTENTION_BACKENDS:
            words = f"allowed: {', '.join(map(repr, ATTENTION_BACKENDS))}"
            mistakes.append(Mistake(location, shown(backend), did_you_mean(backend, ATTENTION_BACKENDS) + words))
    if isinstance(value, Mapping) and not value:
        mistakes.append(Mistake((), "{}", "a backend's name, or a table of at least one component's"))
    if mistakes:
        raise Mistakes(mistakes)
    return FrozenDict(value) if isinstance(value, Mapping) else value


# Caching.

CachingKind = Literal[
    "first_block_cache",
    "pyramid_attention_broadcast",
    "faster_cache",
    "mag_cache",
    "taylorseer_cache",
    "sea_cache",
    "text_kv_cache",
]

_Rule = Callable[[Any], Any]


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refused(value, "a finite number")
    return value


def _count(value: object) -> object:
    if type(value) is not int or value < 0:
        raise refused(value, "an int >= 0")
    return value


def _positive(value: object) -> object:
    if type(value) is not int or value < 1:
        raise refused(value, "an int >= 1")
    return value


def _truth(value: object) -> object:
    if not isinstance(value, bool):
        raise refused(value, "true or false")
    return value


def _range(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise refused(value, "two numbers: the least and the greatest timestep")
    return tuple(_number(side) for side in value)


def _names(value: object) -> object:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) and name for name in value):
        raise refused(value, "a list of strings")
    return list(value)


def _numbers(value: Any) -> object:
    held = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(held, list | tuple) or not held:
        raise refused(value, "a list of numbers")
    return [float(_number(one)) for one in held]  # type: ignore[arg-type]


def _dtype(value: object) -> object:
    text = str(value).removeprefix("torch.")
    if text not in ("float32", "float16", "bfloat16"):
        raise refused(value, "'float32', 'float16' or 'bfloat16'")
    return text


def _format(value: object) -> object:
    if value not in ("BCFHW", "BFCHW", "BCHW"):
        raise refused(value, "'BCFHW', 'BFCHW' or 'BCHW'")
    return value


def _order(value: object) -> object:
    if type(value) is not int or value not in (0, 1):
        raise refused(value, "0 or 1")
    return value


CACHING_KEYS: dict[str, dict[str, _Rule]] = {
    "first_block_cache": {"threshold": _number},
    "pyramid_attention_broadcast": {
        **{f"{what}_attention_block_skip_range": _positive for what in ("spatial", "temporal", "cross")},
        **{f"{what}_attention_timestep_skip_range": _range for what in ("spatial", "temporal", "cross")},
        **{f"{what}_attention_block_identifiers": _names for what in ("spatial", "temporal", "cross")},
    },
    "faster_cache": {
        "spatial_attention_block_skip_range": _positive,
        "temporal_attention_block_skip_range": _positive,
        "spatial_attention_timestep_skip_range": _range,
        "temporal_attention_timestep_skip_range": _range,
        "low_frequency_weight_update_timestep_range": _range,
        "high_frequency_weight_update_timestep_range": _range,
        "alpha_low_frequency": _number,
        "alpha_high_frequency": _number,
        "unconditional_batch_skip_range": _positive,
        "unconditional_batch_timestep_skip_range": _range,
        "spatial_attention_block_identifiers": _names,
        "temporal_attention_block_identifiers": _names,
        "tensor_format": _format,
        "is_guidance_distilled": _truth,
    },
    "mag_cache": {
        "threshold": _number,
        "max_skip_steps": _count,
        "retention_ratio": _number,
        "num_inference_steps": _positive,
        "mag_ratios": _numbers,
        "calibrate": _truth,
    },
    "taylorseer_cache": {
        "cache_interval": _positive,
        "disable_cache_before_step": _count,
        "disable_cache_after_step": _count,
        "max_order": _count,
        "taylor_factors_dtype": _dtype,
        "skip_predict_identifiers": _names,
        "cache_identifiers": _names,
        "use_lite_mode": _truth,
    },
    "sea_cache": {
        "threshold": _number,
        "residual_order": _order,
        "retention_steps": _count,
        "cache_end_steps": _count,
        "max_consecutive_cached": _count,
        "power_exp": _number,
    },
    "text_kv_cache": {},
}
"""What diffusers' config of each kind takes, but for callables: those are filled in, or left as the config has them."""


def _table(value: object) -> FrozenDict:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refused(value, "a table")
    return FrozenDict(value)


@with_every_mistake
@dataclass(frozen=True, eq=False, repr=False, config=CONFIG)
class Caching(Part):
    """What one component keeps from a denoising step for the next, as diffusers' ``enable_cache`` lets it.

    Args:
        component: its name in the pipeline.
        kind: of the cache, as the module of ``diffusers.hooks`` is called: ``"first_block_cache"``, ….
        kwargs: what the kind's config takes, without the callables: the one that tells the timestep is the pipeline's.

    Raises:
        RecipeError: with every wrong field or key.
    """

    component: Text
    kind: CachingKind
    kwargs: Annotated[Mapping[str, Any], PlainValidator(_table)] = dataclasses.field(default_factory=FrozenDict)

    if TYPE_CHECKING:

        def __init__(self, component: str, kind: str, kwargs: Mapping[str, Any] = ...) -> None: ...

    @field_validator("kwargs")
    @classmethod
    def _keys_of_the_kind(cls, kwargs: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        kind = info.data.get("kind")
        if kind is None:
            return kwargs
        rules = CACHING_KEYS[kind]
        kept: dict[str, Any] = {}
        mistakes: list[Mistake] = []
        for key, value in kwargs.items():
            if key not in rules:
                mistakes.append(unknown_key((), key, rules))
                continue
            try:
                kept[key] = rules[key](value)
            except Mistakes as error:
                mistakes += [m._replace(location=(key, *m.location)) for m in error.mistakes]
        if kind == "mag_cache" and not kept.get("calibrate") and "mag_ratios" not in kwargs:
            mistakes.append(Mistake(("mag_ratios",), "nothing", "they must be given: they belong to the model"))
        if mistakes:
            raise Mistakes(mistakes)
        return FrozenDict(kept)


def each_component_once(cachings: tuple[Caching, ...]) -> tuple[Caching, ...]:
    """The same, if no component has two caches, which diffusers refuses."""
    names = [one.component for one in cachings]
    mistakes = [
        Mistake((index, "component"), f"{name!r}, which caching[{names.index(name)}] names already", "one cache each")
        for index, name in enumerate(names)
        if name in names[:index]
    ]
    if mistakes:
        raise Mistakes(mistakes)
    return cachings
