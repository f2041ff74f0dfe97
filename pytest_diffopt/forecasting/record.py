"""Forecast: what a full-size recipe takes on an accelerator, as plain data that goes to JSON and back.

Bytes are bytes. Where the truth depends on what was not run, a GPU's own kernels above all, a number is an
:class:`Estimate`: the least, what is expected, and the most.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pytest_diffopt.observation.observation import Residency

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from pytest_diffopt.accelerators.gpus import Card

SCHEMA_VERSION = 1

Fit = Literal["fits", "may fit", "does not fit"]
Phase = Literal["load", "place", "call"]

CONTEXT_BYTES = (256 * 2**20, 640 * 2**20)
"""What a process that uses CUDA takes beside torch's allocator, the least and the most: the driver's context, and the
kernels of the libraries, which are loaded when they are first used. Public reports with CUDA 11.7 or later: 256 MiB on
an RTX 3090 (invoke-ai/InvokeAI#9413), about 300 (pytorch/pytorch#107667), about 400 (pytorch/pytorch#109888), 426 on an
RTX 6000 Ada (unslothai/unsloth-zoo#1053) and 616 (LMCache/LMCache#4019). Before, when all kernels were loaded at once,
it was 1 GiB and more (pytorch/pytorch#28394). No number is ours."""


@dataclass(frozen=True)
class Estimate:
    """A number of bytes: at the least, as expected, at the most."""

    low: int
    expected: int
    high: int

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.expected / 2**30:.2f} GiB"
        return f"{self.expected / 2**30:.2f} GiB ({self.low / 2**30:.2f} to {self.high / 2**30:.2f})"

    @property
    def width(self) -> float:
        """How far the range reaches from its middle, as a part of the middle: 0.2 is ±20%."""
        middle = (self.low + self.high) / 2
        return (self.high - self.low) / 2 / middle if middle else 0.0


@dataclass(frozen=True)
class PhaseForecast:
    """The peak of a phase while one component loads, is placed, or runs.

    Attributes:
        phase: ``"load"`` (``from_pretrained`` and quantizing), ``"place"`` (moved, or hooks put on), ``"call"``.
        component: its name; ``""`` for what the pipeline does between its components.
        call: which call, from 0; 0 in the other phases.
        peak: allocated by torch at once, everything that was there before counted in.
        operation: that took the last of it, e.g. ``"aten::convolution"``.
    """

    phase: Phase
    component: str
    peak: Estimate
    call: int = 0
    operation: str = ""


@dataclass(frozen=True)
class LiveTensors:
    """Tensors that are alive at the peak, of one module and of one kind.

    Attributes:
        component: ``""`` for what the pipeline itself holds, latents for example.
        module: its path in the component; the numbers of repeated blocks are ``*``, so that all of them are one.
        kind: ``"weights"``, ``"working"`` memory, or a kernel's ``"workspace"``.
        operation: that made them; ``""`` for weights, and where several did.
        bytes: of all together. count: how many.
    """

    component: str
    module: str
    kind: Literal["weights", "working", "workspace"]
    operation: str
    bytes: int
    count: int


@dataclass(frozen=True)
class Forecast:
    """What a full-size recipe takes. Every peak is of memory that torch allocates, as ``torch.cuda.max_memory_allocated``.

    Attributes:
        recipe: its name. model: the full-size model's. pipeline: its class.
        sizes: ``(height, width)`` or ``(height, width, frames)`` of each call. steps: denoising steps a call.
        peak: over loading, placing and all calls.
        peak_phase, peak_component, peak_operation: where that is; the component and operation may be ``""``.
        phases: the peaks, in order.
        live_at_peak: what is alive at the peak as expected, the largest first; their bytes add up to it.
        reserved: the highest that the caching allocator takes from the device, as ``torch.cuda.max_memory_reserved``.
        floor_bytes: the peak if no kernel took any memory for itself, which torch falls back to where memory is short:
            below it the recipe cannot run.
        weights_bytes: component → bytes of its weights, wherever they are once loaded.
        parameters: component → number of its parameters before quantization.
        host_bytes: the highest on the host: weights that wait there, pinned or in mapped files, and working memory.
        pinned_bytes: of it, pinned, at the highest.
        h2d_bytes, d2h_bytes: that the last call moves to the accelerator, and back.
        step_h2d_bytes, step_d2h_bytes: of it, what its last denoising step moves, as each further step would.
        assumptions: what was taken for granted: versions, kernels, the order of loading.
        wide: what makes a range wide, each in a sentence.
        unknown: what could not be known, each in a sentence; where there is any, nothing is ever said to fit.
        generation: of the GPU whose kernels' costs were assumed, e.g. ``"ada"``.
        libraries: name → version with which it was made.
        seconds: that it took; no figure of any GPU.
        residency: whose bytes were on the accelerator over time, as expected.
    """

    recipe: str
    model: str
    pipeline: str
    dtype: str
    sizes: tuple[tuple[int, ...], ...]
    steps: int
    peak: Estimate
    peak_phase: Phase
    peak_component: str
    peak_operation: str
    phases: tuple[PhaseForecast, ...]
    live_at_peak: tuple[LiveTensors, ...]
    reserved: Estimate
    floor_bytes: int = 0
    weights_bytes: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    pinned_bytes: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    step_h2d_bytes: int = 0
    step_d2h_bytes: int = 0
    assumptions: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    generation: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    residency: Residency | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def peak_bytes(self) -> int:
        """The peak as expected."""
        return self.peak.expected

    @property
    def low_bytes(self) -> int:
        """The least that the peak may be."""
        return self.peak.low

    @property
    def high_bytes(self) -> int:
        """The most that the peak may be."""
        return self.peak.high

    @property
    def reserved_bytes(self) -> int:
        """What the caching allocator takes at its highest, as expected."""
        return self.reserved.expected

    @property
    def load_peak_bytes(self) -> int:
        """The peak while loading, as expected."""
        return self.phase_peak("load").expected

    @property
    def placement_peak_bytes(self) -> int:
        """The peak while the components are placed, as expected."""
        return self.phase_peak("place").expected

    @property
    def call_peak_bytes(self) -> int:
        """The peak of the calls, as expected."""
        return self.phase_peak("call").expected

    def phase_peak(self, phase: Phase, component: str | None = None) -> Estimate:
        """The peak of a phase, or of a component in it; noughts where there is none."""
        peaks = [
            one.peak for one in self.phases if one.phase == phase and (component is None or one.component == component)
        ]
        return Estimate(
            max((peak.low for peak in peaks), default=0),
            max((peak.expected for peak in peaks), default=0),
            max((peak.high for peak in peaks), default=0),
        )

    def fit(self, card: Card) -> Fit:
        """Whether it fits a card; ``"fits"`` only where the most that it may take does, and nothing is unknown."""
        return self.fit_bytes(card.total_bytes)

    def fit_bytes(self, total_bytes: int) -> Fit:
        """The same for a card on which CUDA reports so many bytes in all."""
        least, most = CONTEXT_BYTES
        if self.floor_bytes + least > total_bytes:
            return "does not fit"
        return "fits" if self.reserved.high + most <= total_bytes and not self.unknown else "may fit"

    def within(self, limit_bytes: int) -> Fit:
        """Whether torch's peak stays within a budget; as :meth:`fit`, without what CUDA itself takes."""
        if self.peak.low > limit_bytes:
            return "does not fit"
        return "fits" if self.peak.high <= limit_bytes and not self.unknown else "may fit"

    def to_json(self) -> str:
        """The whole forecast as JSON text."""
        return _adapter().dump_json(self).decode("utf-8")

    @classmethod
    def from_json(cls, text: str) -> Forecast:
        """The inverse of :meth:`to_json`. Raises ValueError where the text is of another schema version, or damaged."""
        found = json.loads(text).get("schema_version")
        if found != SCHEMA_VERSION:
            raise ValueError(f"forecast: found schema version {found!r}; this release reads {SCHEMA_VERSION}")
        return _adapter().validate_json(text)


@functools.lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[Forecast]:
    from pydantic import TypeAdapter

    return TypeAdapter(Forecast)
