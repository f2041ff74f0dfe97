"""What comes out: of the pipeline, of each component at each step, and what a call left in its inputs.

Tensors are copied the moment they appear, and the originals are kept until the end: an output whose buffer a later call
writes into differs from its copy by then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.byte_sizes import bytes_on
from pytest_diffopt.observation.layers import dtype_name
from pytest_diffopt.observation.observation import Output, encode_values

if TYPE_CHECKING:
    import torch

KEPT_ELEMENTS = 1 << 18
"""Of a larger tensor every n-th element is kept, so that an observation stays a few megabytes."""


SKETCHES, SKETCH_BLOCK = 32, 4096
"""Random sums kept of a larger tensor; their spread estimates a distance to about an eighth."""


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, tensor) of every tensor, array, image or number inside a result, in a fixed order."""
    import numpy as np
    import torch

    if value is None or isinstance(value, str | bytes):
        return
    if isinstance(value, torch.Tensor):
        yield name or "0", value
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "fiub":
            yield name or "0", torch.from_numpy(np.ascontiguousarray(value))
    elif isinstance(value, bool | int | float):
        yield name or "0", torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}.{index}" if name else str(index))
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from leaves(getattr(value, entry.name), f"{name}.{entry.name}" if name else entry.name)
    elif hasattr(value, "getbands") and hasattr(value, "size"):  # a PIL image
        yield name or "0", torch.from_numpy(np.array(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module) and not callable(value):
        for key, item in vars(value).items():
            yield from leaves(item, f"{name}.{key}" if name else key)


@dataclass
class _Kept:
    """A tensor as it was when it came out, and the tensor itself.

    Attributes:
        overwritten: by a later call, found when the tensor itself was let go; or by a later run of the same component.
    """

    call: int
    component: str
    step: int
    leaf: str
    copy: torch.Tensor
    original: torch.Tensor
    overwritten: bool = False


class OutputRecorder:
    """Copies every tensor that comes out and, at the end, says which of them were overwritten since.

    Args:
        keep_originals: hold on to the tensors themselves to see whether a later call writes into them. Only results
            that the caller of the pipeline receives are held: a component may reuse its own buffers.
    """

    def __init__(self) -> None:
        self.call = 0
        self._steps: dict[tuple[int, str], int] = {}
        self._kept: list[_Kept] = []
        self._returned: dict[str, list[tuple[weakref.ref[torch.Tensor], _Kept]]] = {}

    def record(self, component: str, value: Any, *, hold: bool = False) -> None:
        """Write down a result of a component; ``""`` for the pipeline itself."""
        import torch

        key = self.call, component
        step = self._steps.get(key, 0)
        self._steps[key] = step + 1
        with torch.no_grad():
            for leaf, found in leaves(value):
                tensor = _bare(found)
                if tensor.layout != torch.strided:
                    tensor = tensor.to_dense()
                copy = tensor.detach().to("cpu", copy=True)
                kept = _Kept(self.call, component, step, leaf, copy, tensor if hold else copy)
                self._kept.append(kept)
                if not hold:
                    self._note_reuse(tensor, kept)

    def _note_reuse(self, tensor: torch.Tensor, kept: _Kept) -> None:
        """Whether what an earlier run of the component returned, and somebody still holds, lies in the same memory and was
        overwritten by this run, as a replayed CUDA graph does."""
        block = tensor.untyped_storage().data_ptr()
        alive = [(held, earlier) for held, earlier in self._returned.get(kept.component, ()) if held() is not None]
        for held, earlier in alive:
            one = held()
            if one is not None and block and one.untyped_storage().data_ptr() == block and not earlier.overwritten:
                other_run = (earlier.call, earlier.step) != (kept.call, kept.step)
                earlier.overwritten = other_run and _differ(earlier.copy, one)
        self._returned[kept.component] = [*alive, (weakref.ref(tensor), kept)]

    def held_bytes(self, kind: str, also: Any = None) -> int:
        """Bytes of the results that are held on devices of a kind; storages that results share count once.

        Args:
            also: what the observation holds beside them, such as the arguments of a call.
        """
        held = [kept.original for kept in self._kept if kept.original is not kept.copy]
        return bytes_on(kind, [*held, *(tensor for _, tensor in leaves(also))])

    def copied_bytes(self) -> int:
        """Bytes of the host that its copies take."""
        return sum(kept.copy.nbytes for kept in self._kept)

    def let_go(self) -> None:
        """Hold no tensors but copies from here on; what was overwritten by now is written down."""
        for kept in self._kept:
            kept.overwritten = kept.overwritten or _differs(kept)
            kept.original = kept.copy

    def outputs(self) -> tuple[Output, ...]:
        """Everything recorded, as plain data."""
        return tuple(_output(kept) for kept in self._kept)


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a plain tensor, of a class that does its own arithmetic.

    Compiled code with gguf's weights returns activations that are of the weights' class, whose shapes it takes for packed.
    """
    import torch

    if type(tensor) is torch.Tensor or hasattr(type(tensor), "__tensor_flatten__"):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def _differs(kept: _Kept) -> bool:
    """Whether the tensor itself, where it is held, is another by now than when it came out."""
    return kept.original is not kept.copy and _differ(kept.copy, kept.original)


def _differ(copy: torch.Tensor, tensor: torch.Tensor) -> bool:
    import torch

    now = tensor.detach().to("cpu")
    return now.shape != copy.shape or not torch.equal(torch.nan_to_num(now), torch.nan_to_num(copy))


def _output(kept: _Kept) -> Output:
    import torch

    copy = kept.copy
    wide = copy.dtype in (torch.float64, torch.complex128, torch.int64, torch.int32)
    flat = (torch.view_as_real(copy.resolve_conj()) if copy.is_complex() else copy).reshape(-1)
    finite = bool(torch.isfinite(flat.float() if not wide else flat.double()).all())
    stride = max(1, -(-flat.numel() // KEPT_ELEMENTS))
    array = flat[::stride].to(torch.float64 if wide else torch.float32).contiguous().numpy()
    return Output(
        call=kept.call,
        component=kept.component,
        step=kept.step,
        leaf=kept.leaf,
        dtype=dtype_name(copy.dtype),
        shape=tuple(copy.shape),
        finite=finite,
        values=encode_values(array.astype("<f8" if wide else "<f4")),
        width=8 if wide else 4,
        stride=stride,
        sketch=_sketch(flat) if stride > 1 else "",
        overwritten=kept.overwritten or _differs(kept),
    )


def _sketch(flat: torch.Tensor) -> str:
    """Sums of all elements under random signs: they differ where any element does, also one that is not kept."""
    import torch

    generator = torch.Generator("cpu").manual_seed(0)

    def signs(count: int) -> torch.Tensor:
        return torch.randint(0, 2, (count, SKETCHES), generator=generator).double() * 2 - 1

    # one table of signs for every block, and one sign a block on top of it: as good as a sign for each element
    blocks = torch.nn.functional.pad(torch.nan_to_num(flat.double()), (0, -flat.numel() % SKETCH_BLOCK))
    blocks = blocks.reshape(-1, SKETCH_BLOCK)
    sums = ((blocks @ signs(SKETCH_BLOCK)) * signs(len(blocks))).sum(0)
    return encode_values(sums.numpy().astype("<f8"))
