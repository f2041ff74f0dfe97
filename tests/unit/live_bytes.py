"""The most bytes that tensors had at once, of any device, while something ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made in it and are alive, and the most of it.

    Args:
        costs: operator, ``"aten::convolution"`` → what it takes beside its results, as `forecasting.costs` has it.
    """

    def __init__(self, costs: Mapping[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.peak = 0
        self._costs = costs or {}
        self._storages: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {reference for reference, _ in self._storages}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                self._storages.append((storage._weak_ref(), storage.nbytes()))
                known.add(storage._cdata)
        alive = []
        for reference, count in self._storages:
            if torch.UntypedStorage._expired(reference):
                torch.UntypedStorage._free_weak_ref(reference)
            else:
                alive.append((reference, count))
        self._storages = alive
        cost = self._costs.get(function._schema.name)
        scratch = cost([result], *args, **(kwargs or {})).expected if cost is not None else 0
        self.peak = max(self.peak, sum(count for _, count in alive) + scratch)
        return result
