"""What a failed guard of Dynamo means, and what to try that the recipe does not do yet.

The texts of guards were read off torch 2.11 to 2.14; `tests/faults/test_guards.py` has each of them from a real recompile.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_diffopt.observation.observation import FrameAttempt
    from pytest_diffopt.recipe import Compilation, Recipe

ATTRIBUTE = re.compile(r"^(?:not )?(?:hasattr\()?self[.\[]")
"""A guard on what a module holds: Dynamo never makes that dynamic."""

_NUMBER = r"(?:==|<=|>=|<|>|!=) -?[\d.]+(?:e-?\d+)?$"
_HELD = r"(?:self[.\[]|G\[')"
_KEPT = re.compile(rf"^tensor '{_HELD}(?P<name>.*)' (?:size|rank) mismatch|{_HELD}(?P<sized>[\w.'\]]+)\.size\(\)")
_DUCK = re.compile(r"^(?P<one>.+\.size\(\)\[\d+\]) == (?P<other>.+\.size\(\)\[\d+\])$")
_ONE = re.compile(
    r"expected [01], actual|actual [01]$|^2 <= .*size\(\)|size\(\)\[\d+\] == [01]$|size\(\)\[\d+\] != [01]$"
)
_SIZE = re.compile(r"size mismatch|size\(\)|\.shape")
_DEVICES = re.compile(r"expected DispatchKeySet\((?P<then>\w+).*actual DispatchKeySet\((?P<now>\w+)")
_MODE = re.compile(r"dispatch key set mismatch|GLOBAL_STATE|check_global_state|requires_grad mismatch|inference")
_ARGUMENTS = re.compile(
    r"^not \w+$|^(?:not )?len\(\w+\)|^list\(dict\.keys\(\w+\)|___dict_contains\(.*, \w+\)$|^\w+ is (?:not )?None$"
)
_FILLED = re.compile(r"___dict_contains\(|^len\((?:self|G\[)|^not (?:self[.\[]|G\[)|^list\(dict\.keys\((?:self|G\[)")


def advice(frames: Iterable[FrameAttempt], recipe: Recipe) -> list[str]:
    """What to try, by the kind of guard that failed; nothing that the recipe does already."""
    tips: dict[str, None] = {}
    for frame in frames:
        if frame.guards and (tip := _of(frame.guards[0], _entry(recipe, frame), dict(recipe.dynamo))):
            tips[tip] = None
    return list(tips)


def _entry(recipe: Recipe, frame: FrameAttempt) -> Compilation | None:
    return next((one for one in recipe.compilation if one.owner == frame.component), None)


def _of(guard: str, entry: Compilation | None, dynamo: dict[str, object]) -> str:
    """The advice for one guard; empty where there is none."""
    regional = entry is not None and entry.scope == "repeated_blocks"
    dynamic = entry.dynamic if entry is not None else None
    devices = _DEVICES.search(guard)
    if devices and devices["then"] != devices["now"]:
        return "the code was compiled on another device: place the pipeline before it is warmed up"
    if _MODE.search(guard):
        return (
            "the code was compiled in another mode (torch.inference_mode, no_grad, autocast): "
            "warm up in the mode in which you call"
        )
    if _ARGUMENTS.search(guard) and not ATTRIBUTE.match(guard):
        return "the calls pass different arguments: pass the same ones in each call, with a value of the same kind"
    if duck := _DUCK.match(guard):
        apart = "make the first call with sizes that differ"
        if dynamo.get("use_duck_shape") is not False:
            apart += ", or set dynamo = { use_duck_shape = false }"
        return f"{duck['one']} and {duck['other']} were equal when it was compiled, and are taken for one size: {apart}"
    if kept := _KEPT.match(guard):
        if regional:
            return "modules of one class hold tensors of other sizes: compile them apart, or make them the same"
        name = (kept["name"] or kept["sized"]).replace("']", "")
        fixed = dynamo.get("force_parameter_static_shapes") is not False
        return (
            f"the guard reads the size of a tensor that is kept ({name}) and replaced by one of another size: "
            "make it once, as large as it is needed, or pass it in"
            + (": what a module holds is never dynamic" if fixed else "")
        )
    if _FILLED.search(guard):
        return (
            "the guard reads an attribute, a list or a dict that the code sets while it runs: "
            "set it before the first call, or keep it out of the compiled code"
        )
    if _SIZE.search(guard):
        return _of_size(guard, dynamic)
    if "stride mismatch" in guard:
        return "the guard reads a stride: make the input contiguous before the compiled code"
    if "dtype mismatch" in guard:
        return "inputs come in several dtypes: cast them before the compiled code"
    if "rank mismatch" in guard:
        return "inputs come with another number of dimensions: give them the same before the compiled code"
    number = re.search(_NUMBER, guard) is not None
    if ATTRIBUTE.match(guard):
        if number:
            return (
                "the guard reads a Python number that the module holds and changes: "
                "pass it as a tensor, or keep it out of forward"
            )
        return (
            "the guard reads an attribute that differs between modules of one class: "
            "compile them apart, or make it the same"
        )
    if number:
        return "the guard reads a Python number that changes: pass it as a tensor" + (
            "" if dynamic else ", or compile with dynamic = true"
        )
    return ""


def _of_size(guard: str, dynamic: bool | None) -> str:
    if _ONE.search(guard):
        return (
            "sizes of 0 and 1 are always compiled apart: make every call with a size of 2 or more, "
            "or count both as warm-up"
        )
    if not dynamic:
        return "the guard reads a size: compile with dynamic = true, or mark the dimension dynamic"
    return (
        "the code makes a constant of this size, though dynamic = true: it is the key of a dict, a Python int, "
        "or meets a parameter or buffer of that size"
    )
