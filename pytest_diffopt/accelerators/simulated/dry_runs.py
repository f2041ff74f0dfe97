"""``gpu.dry()``: nothing is computed that depends on values nobody knows, and every byte is counted as otherwise.

Inside it a block of the device of more than 64 KiB is *hollow*: it is charged, and there is no memory behind it. An
operation runs for real unless one of its arguments is hollow; then torch's own meta kernel (or what a library registered
with ``register_fake``) says which tensors come out, and they are hollow too. So schedules, time steps, positions and masks
have their true values, weights need not be there, and a pipeline of any size runs in seconds.

Two kinds of rule may be added, for the time of a context or until they are removed:

- a *dry kernel* stands for an operation on hollow tensors: for what has no meta kernel, or whose size depends on values;
- a *cost* says what a real accelerator's kernel takes for itself while it runs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch

Function = Callable[..., Any]
Kind = Literal["kernel", "cost"]

_ops = torch.ops.pytest_diffopt_sim
_LIBRARY = "pytest_diffopt_dry"

REAL_BYTES = 64 * 1024
"""The largest block that is real: large enough for every schedule and mask that a pipeline reads, too small for weights."""


class dry:
    """Context manager: the simulated device is dry; wet again after it, also after a raise. It nests.

    Args:
        real_bytes: blocks of at most so many bytes are computed where nothing hollow is among the arguments.
        kernels: operator → function with its arguments that returns its results, made with ``torch.empty`` and the like on
            the device of the arguments; for this context alone. See :func:`register_dry_kernel`.
        costs: operator → function of the results (a list of tensors) and then the operator's arguments that returns bytes
            of scratch: one number, or three, at the least, as expected, at the most. See :func:`register_cost`.

    Raises:
        ValueError: an operator is unknown, or ``real_bytes`` is negative.
    """

    def __init__(
        self,
        *,
        real_bytes: int = REAL_BYTES,
        kernels: Mapping[str, Function] | None = None,
        costs: Mapping[str, Function] | None = None,
    ) -> None:
        if real_bytes < 0:
            raise ValueError(f"real_bytes: found {real_bytes}; it takes a number of bytes, at least 0")
        self._real_bytes = real_bytes
        self._wanted: list[tuple[Kind, str, Function]] = [
            *(("kernel", name, function) for name, function in {**_OWN, **(kernels or {})}.items()),
            *(("cost", name, function) for name, function in (costs or {}).items()),
        ]
        for kind, name, _function in self._wanted:
            _check_reach(kind, name)
        self._rules: list[Rule] = []
        self._before: tuple[bool, int] = (False, 0)

    def __enter__(self) -> dry:
        try:
            for kind, name, function in self._wanted:
                # what stands until it is removed goes before the device's own
                own = kind == "kernel" and function is _OWN.get(name)
                self._rules.append(_add(kind, name, function, last=own))
        except BaseException:
            self._remove_rules()
            raise
        self._before = (bool(_ops.dry()), int(_ops.real_bytes()))
        _ops.set_dry(True, self._real_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guesses, self._read = self.guesses, self.blocks_read
        _ops.set_dry(*self._before)
        self._remove_rules()

    @property
    def guesses(self) -> tuple[str, ...]:
        """Where a size depended on values that nobody knows, and the most was taken; each in words."""
        return tuple(_ops.guesses()) if _ops.dry() else self._guesses

    @property
    def blocks_read(self) -> tuple[int, ...]:
        """The numbers (see ``memory_blocks``) of hollow blocks that were copied to the host: it got zeros."""
        return tuple(_ops.blocks_read()) if _ops.dry() else self._read

    _guesses: tuple[str, ...] = ()
    _read: tuple[int, ...] = ()

    def _remove_rules(self) -> None:
        while self._rules:
            self._rules.pop().remove()


def is_dry() -> bool:
    """Whether the device is dry now."""
    return bool(_ops.dry())


def is_hollow(tensor: torch.Tensor) -> bool:
    """Whether a tensor of the device has no data, since what it holds was never computed."""
    return bool(_ops.hollow(tensor))


def host_memory_stats() -> dict[str, int]:
    """What torch's allocators hold on the host, in bytes, of what they took while the device was dry or
    :func:`count_host_memory` was on.

    ``allocated``, ``peak_allocated``, and of it pinned: ``pinned``, ``peak_pinned``, each block rounded up to a power of two
    and kept once it is freed, as CUDA's allocator for the host does. Weights in mapped files are no allocator's and not in it.
    """
    return dict(zip(("allocated", "peak_allocated", "pinned", "peak_pinned"), _ops.host_counters(), strict=True))


def count_host_memory(on: bool) -> None:
    """Whether what torch takes of the host is counted though the device is not dry."""
    _ops.count_host_memory(on)


def empty_host_cache() -> None:
    """Give the pinned blocks back that nobody uses."""
    _ops.empty_host_cache()


def reset_peak_host_memory_stats() -> None:
    """Begin the peaks of :func:`host_memory_stats` anew."""
    _ops.reset_host_peaks()


class Rule:
    """A rule that stands until :meth:`remove`; of several for one operator the latest counts."""

    def __init__(self, kind: Kind, name: str, function: Function) -> None:
        self.kind, self.name, self.function = kind, name, function

    def remove(self) -> None:
        """Take it back. Doing so again is free."""
        with _lock:
            _standing.remove(self)


def register_dry_kernel(name: str, function: Function) -> Rule:
    """Let ``function`` stand for an operator on hollow tensors, in every dry context until the rule is removed.

    Args:
        name: ``"library::operator"`` or ``"library::operator.overload"``, e.g. ``"aten::masked_select"``.
        function: takes the operator's arguments as they are and returns its results, tensors on the same device made with
            ``torch.empty`` and the like; or the number that the host asks for. It runs only inside :class:`dry`, and only
            where an argument is hollow.

    Raises:
        ValueError: there is no such operator, or the device runs it itself.
    """
    return _add("kernel", name, function)


def register_cost(name: str, function: Function) -> Rule:
    """Say what an operator's kernel takes on a real accelerator while it runs, in every dry context until it is removed.

    The expected number counts in peaks, for the moment in which arguments, results and scratch are all there.

    Args:
        name: as in :func:`register_dry_kernel`. Convolutions of every kind are ``"aten::convolution"``, attention
            ``"aten::_scaled_dot_product_flash_attention_for_cpu"``: one kernel stands for all fused ones.
        function: takes the list of results and the operator's arguments, returns bytes: a number, or three (least,
            expected, most). Only shapes, strides and dtypes of what it gets mean anything.

    Raises:
        ValueError: there is no such operator, or it is made of others and never runs itself.
    """
    return _add("cost", name, function)


# ------------------------------------------------------------------------------------------- rules in the dispatcher


class _Standing:
    """The rules that count, by operator, and the dispatcher's operators by which the library finds them."""

    def __init__(self) -> None:
        self._rules: dict[tuple[Kind, str], list[Rule]] = {}
        self._defined: dict[tuple[Kind, str], Any] = {}

    def add(self, rule: Rule, *, last: bool) -> None:
        key = (rule.kind, rule.name)
        rules = self._rules.setdefault(key, [])
        rules.insert(0 if last else len(rules), rule)
        if key not in self._defined:
            self._defined[key] = self._define(rule.kind, rule.name, rules)
            _ops.forget_rules()
            if rule.kind == "kernel":
                _ops.intercept(*_parts(rule.name))

    def remove(self, rule: Rule) -> None:
        key = (rule.kind, rule.name)
        rules = self._rules.get(key, [])
        if rule not in rules:
            return
        rules.remove(rule)
        if not rules:
            if rule.kind == "kernel":
                _ops.stop_intercepting(*_parts(rule.name))
            _ops.forget_rules()
            self._defined.pop(key)._destroy()
            _ops.forget_rules()  # another thread may have asked in between
            del self._rules[key]

    @staticmethod
    def _define(kind: Kind, name: str, rules: Sequence[Rule]) -> Any:
        text = str(_schema(name))
        operator, rest = text.split("(", 1)
        base, overload = _parts(operator)
        mangled = f"{kind}__{base.replace('::', '__')}" + (f".{overload}" if overload else "")
        if kind == "cost":
            arguments = re.sub(r"\((?:[a-z*]+!?|[a-z*]+ ?->[^)]*)\)", "", rest.rsplit(") -> ", 1)[0])
            rest = f"Tensor[] results, {arguments}) -> int[]"
        library = torch.library.Library(_LIBRARY, "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define(f"{mangled}({rest}")  # type: ignore[no-untyped-call]
        call: Function = _kernel_of(rules) if kind == "kernel" else _cost_of(rules)
        library.impl(mangled, call, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        return library


def _kernel_of(rules: Sequence[Rule]) -> Function:
    return lambda *args, **kwargs: rules[-1].function(*args, **kwargs)


def _cost_of(rules: Sequence[Rule]) -> Function:
    def three(*args: Any, **kwargs: Any) -> list[int]:
        rule = rules[-1]
        found = rule.function(*args, **kwargs)
        try:
            return [int(found)] * 3 if isinstance(found, int | float) else [int(number) for number in found]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"The cost of {rule.name} is a number of bytes, or three in rising order: at the least, expected, at the "
                f"most; found {found!r}"
            ) from error

    return three


_lock = threading.RLock()
_standing = _Standing()


def _add(kind: Kind, name: str, function: Function, *, last: bool = False) -> Rule:
    rule = Rule(kind, name, function)
    _check_reach(kind, name)
    with _lock:
        _standing.add(rule, last=last)
    return rule


# Without their overloads: csrc/kernels.cpp and csrc/recurrent.cpp have them, and ask for no rule.
_RUN_BY_THE_DEVICE = frozenset(
    [
        "empty",
        "empty_strided",
        "_efficientzerotensor",
        "as_strided",
        "view",
        "_reshape_alias",
        "resize_",
        "set_",
        "copy_",
        "_copy_from",
        "_copy_from_and_resize",
        "_has_compatible_shallow_copy_type",
        "record_stream",
        "convolution",
        "convolution_overrideable",
        "convolution_backward",
        "convolution_backward_overrideable",
        "_fused_sdp_choice",
        "_thnn_fused_lstm_cell",
        "_thnn_fused_lstm_cell_backward_impl",
        "_thnn_fused_gru_cell",
        "_thnn_fused_gru_cell_backward",
    ]
)


def _check_reach(kind: Kind, name: str) -> None:
    """Raise ValueError for an operator that is unknown, or whose rule nobody would ever ask for."""
    _schema(name)
    library, _, operator = _parts(name)[0].partition("::")
    costs_ask = kind == "cost" and operator == "convolution"
    if library == "aten" and operator in _RUN_BY_THE_DEVICE and not costs_ask:
        raise ValueError(f"{name} is run by the device itself, wet and dry: a {kind} for it would never be asked for.")
    if kind == "cost" and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
        raise ValueError(f"{name} is made of other operations, and never runs itself: give those a cost.")


def _parts(name: str) -> tuple[str, str]:
    """The operator without its overload, and that."""
    base, _, overload = name.partition(".")
    return base, overload


def _schema(name: str) -> Any:
    """The schema of an operator. Raises ValueError where there is none, with what there is."""
    base, overload = _parts(name)
    known = torch._C._jit_get_schemas_for_operator(base) if "::" in base else []
    for schema in known:
        if schema.overload_name == overload:
            return schema
    overloads = ", ".join(f"{base}.{schema.overload_name}" if schema.overload_name else base for schema in known)
    raise ValueError(
        f"There is no operator {name!r}. "
        + (f"There are {overloads}." if overloads else "It is written 'library::name'.")
    )


# -------------------------------------------------------------------------------------------- the device's own rules


def _every_element(name: str) -> None:
    _ops.note_guess(f"{name}: how many elements it finds depends on values, and all were taken")


def _nonzero(self: torch.Tensor) -> torch.Tensor:
    _every_element("aten::nonzero")
    return _longs(self, self.numel(), self.dim())


def _masked_select(self: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    _every_element("aten::masked_select")
    size: torch.Size = torch.broadcast_shapes(self.shape, mask.shape)  # type: ignore[no-untyped-call]
    return self.new_empty((size.numel(),))


def _unique(
    self: torch.Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _every_element("aten::_unique2")
    return _uniques(self, return_inverse, return_counts)


def _unique_consecutive(
    self: torch.Tensor, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _every_element("aten::unique_consecutive")
    if dim is None:
        return _uniques(self, return_inverse, return_counts)
    along = self.shape[dim]
    return (
        self.new_empty(self.shape),
        _longs(self, along if return_inverse else 0),
        _longs(self, along if return_counts else 0),
    )


def _uniques(self: torch.Tensor, inverse: bool, counts: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        self.new_empty((self.numel(),)),
        _longs(self, *(self.shape if inverse else (0,))),
        _longs(self, self.numel() if counts else 0),
    )


def _longs(like: torch.Tensor, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.long, device=like.device)


def _native_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # torch's meta kernel foretells statistics in float32, as on CUDA; the host's have the dtype of the parameters
    outer = input.dim() - len(normalized_shape)
    rows = (*input.shape[:outer], *(1 for _ in normalized_shape))
    dtype = weight.dtype if weight is not None else bias.dtype if bias is not None else input.dtype
    result = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    mean, deviation = (torch.empty(rows, dtype=dtype, device=input.device) for _ in range(2))
    return result, mean, deviation


def _unique_dim(
    self: torch.Tensor, dim: int, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _every_element("aten::unique_dim")
    along = self.shape[dim]
    return self.new_empty(self.shape), _longs(self, along), _longs(self, along)


def _only_writes(*arguments: Any, **options: Any) -> None:
    """Its results stand among its arguments already; or it looks for errors, and nobody knows of any."""


def _logcumsumexp(self: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.empty_like(self, memory_format=torch.contiguous_format)


_OWN: dict[str, Function] = {
    "aten::_cummax_helper": _only_writes,
    "aten::_cummin_helper": _only_writes,
    "aten::_linalg_check_errors": _only_writes,
    "aten::_logcumsumexp": _logcumsumexp,
    "aten::native_layer_norm": _native_layer_norm,
    "aten::nonzero": _nonzero,
    "aten::masked_select": _masked_select,
    "aten::_unique2": _unique,
    "aten::unique_consecutive": _unique_consecutive,
    "aten::unique_dim": _unique_dim,
}
