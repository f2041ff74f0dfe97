"""Which device a recipe runs on, and its memory: one small facade over torch's device modules.

On a machine with no accelerator the host itself stands in (``cpu``): everything is judged there except what only an
accelerator can show, its memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import DiffoptError

if TYPE_CHECKING:
    import torch

KINDS = ("cuda", "xpu", "mps", "cpu")


@dataclass(frozen=True)
class Accelerator:
    """A device that recipes run on.

    Attributes:
        kind: torch's device type, one of :data:`KINDS`.
        name: as the device calls itself.
        total_memory_bytes: None where the device does not say (``cpu``, ``mps``).
        capability: e.g. ``(8, 9)`` on CUDA, else None.
    """

    kind: str
    name: str
    total_memory_bytes: int | None = None
    capability: tuple[int, int] | None = None

    @property
    def is_real(self) -> bool:
        """Whether it is an accelerator of its own, with memory of its own."""
        return self.kind != "cpu"

    @property
    def is_simulated(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.kind)

    @functools.cached_property
    def _module(self) -> Any:
        import torch

        return getattr(torch, self.kind)

    def synchronize(self) -> None:
        """Wait until everything that was queued on the device has run."""
        if self.is_real:
            self._module.synchronize()

    def reset_peak(self) -> None:
        """Begin a new measurement of :meth:`peak_bytes`."""
        if self.is_real and hasattr(self._module, "reset_peak_memory_stats"):
            self._module.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Peak of allocated bytes since :meth:`reset_peak`, or None where the device does not count them."""
        if self.is_real and hasattr(self._module, "max_memory_allocated"):
            return int(self._module.max_memory_allocated())
        return None

    def live_bytes(self) -> int | None:
        """Bytes allocated now, or None where the device does not count them."""
        if self.is_real and hasattr(self._module, "memory_allocated"):
            return int(self._module.memory_allocated())
        return None

    def empty_cache(self) -> None:
        """Give cached blocks back to the device."""
        if self.is_real:
            self._module.empty_cache()


def select(kind: str = "auto") -> Accelerator:
    """The accelerator of that kind; ``auto`` takes the first real one there is, else the host.

    Raises:
        DiffoptError: the kind is unknown, or there is no such device on this machine.
    """
    import torch

    if kind == "auto":
        kind = next((k for k in KINDS if k != "cpu" and _available(k)), "cpu")
    if kind not in KINDS:
        raise DiffoptError(f"device: found {kind!r}; it takes one of: auto, {', '.join(KINDS)}")
    if not _available(kind):
        present = ", ".join(k for k in KINDS if _available(k))
        raise DiffoptError(f"device: found {kind!r}, which this machine does not have; here it takes: auto, {present}")
    if kind == "cpu":
        return Accelerator("cpu", "cpu")
    if kind == "mps":
        return Accelerator("mps", "mps")
    module = getattr(torch, kind)
    properties = module.get_device_properties(module.current_device())
    capability = module.get_device_capability() if kind == "cuda" else None
    return Accelerator(kind, str(properties.name), int(properties.total_memory), capability)


def _available(kind: str) -> bool:
    import torch

    if kind == "cpu":
        return True
    module = getattr(torch, kind, None)
    return bool(module is not None and module.is_available())
