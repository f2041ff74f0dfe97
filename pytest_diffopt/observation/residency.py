"""The residency ledger: whose bytes are on the accelerator, from the first weight that is loaded to the last call.

The device says which blocks came and went and which operation took them; the ledger knows which component ran, and which
block holds a component's weights. A block belongs to one owner for all of its life: it is a component's *weights* if it
was ever found as a parameter, a buffer or a quantization's inner tensor of it, or was copied from one that the host
holds (so are weights recognized that come and go inside one forward); else it is *working* memory of the component that
ran when it was taken; else *other*, such as latents. A weight that something keeps alive after its parameter has left is
still its component's.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_diffopt.observation.layers import weight_tensors
from pytest_diffopt.observation.observation import Owner, PhaseResidency, Residency
from pytest_diffopt.quantization_backends.backend import parts_of

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.accelerators.allocation_events import AllocationEvent

POINTS = 400
"""Of a timeline; more only where its phases alone need more."""

LOADING = "loading"


@dataclass(frozen=True)
class Mark:
    """What holds from a mark to the next one.

    Attributes:
        phase: its name; ``""`` between phases.
        component: that runs, or ``""``.
        weights: block → component whose weight it is, as found at the mark.
        module: that runs, by its path in the component; ``""`` where nobody said so.
    """

    phase: str
    component: str
    weights: Mapping[int, str]
    module: str = ""


class ResidencyLedger:
    """Watches who takes the accelerator's memory; on a device that does not tell, everything here does nothing.

    Attributes:
        record: what was found, once it is closed; None on a device that does not tell.
        events, marks: what that was made of.
        paths: block → the parameter that was found in it last, by its path in its component.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.record: Residency | None = None
        self.events: list[AllocationEvent] = []
        self.marks: list[Mark] = []
        self.paths: dict[int, str] = {}
        self._open = False
        self._before = 0
        self._phase = ""
        self._running: list[str] = []
        self._modules: list[str] = []
        self._components: dict[str, torch.nn.Module] = {}

    def open(self, before_bytes: int) -> None:
        """Begin with the phase of loading; ``before_bytes`` are live and belong to others.

        With 0 nothing that is there already counts, and neither does that it goes.
        """
        self._before = before_bytes
        self._open = self.accelerator.start_allocation_events()
        if self._open:
            self.phase(LOADING)

    def phase(self, name: str) -> None:
        """A phase begins; ``""``: the one that there was ends."""
        self._phase = name
        self._mark()

    def knows(self, components: Mapping[str, torch.nn.Module]) -> None:
        """These are the components from here on."""
        self._components = dict(components)

    def look(self, *components: str) -> None:
        """Find out where the weights of the components are; of all of them where none is named."""
        if not self._open:
            return
        owners, tensors = [], []
        for name in components or self._components:
            for path, tensor in weights_of(self._components[name]) if name in self._components else ():
                owners.append((name, path))
                tensors.append(tensor)
        found: dict[int, str] = {}
        for block, (name, path) in zip(self.accelerator.blocks(tensors), owners, strict=True):
            if block:
                found.setdefault(block, name)  # of two components that share one, the first
                self.paths[block] = path
        self._mark(found)

    @property
    def is_open(self) -> bool:
        """Whether anything is written down."""
        return self._open

    @property
    def running_now(self) -> tuple[str, ...]:
        """The components that run, the outermost first."""
        return tuple(self._running)

    @contextmanager
    def running(self, component: str) -> Iterator[None]:
        """A component runs."""
        self.entered(component)
        try:
            yield
        finally:
            self.left(component)

    def entered(self, component: str) -> None:
        """A component's call begins."""
        if self._open:
            self._running.append(component)
            self._mark()

    def left(self, component: str) -> None:
        """A component's call has ended, or was ended by an exception."""
        if self._open and component in self._running:
            del self._running[len(self._running) - 1 - self._running[::-1].index(component) :]
            self.look(component)

    def module_entered(self, path: str) -> None:
        """A module inside the running component begins."""
        if self._open:
            self._modules.append(path)
            self._mark()

    def module_left(self) -> None:
        """The module that began last has ended."""
        if self._open and self._modules:
            self._modules.pop()
            self._mark()

    def close(self) -> None:
        """Write no more down; :attr:`record` holds what was."""
        if not self._open:
            return
        self._open = False
        self.events = self.accelerator.allocation_events()
        if not self._before:
            self.events = _without_others(self.events)
        self.accelerator.stop_allocation_events()
        self.record = attribute(self.events, self.marks, self._before)
        self._components = {}

    def _mark(self, weights: Mapping[int, str] | None = None) -> None:
        if self._open:
            self.accelerator.mark_allocation_events(len(self.marks))
            component = self._running[-1] if self._running else ""
            self.marks.append(Mark(self._phase, component, weights or {}, self._modules[-1] if self._modules else ""))


def _without_others(events: Sequence[AllocationEvent]) -> list[AllocationEvent]:
    """The events of blocks that came while they were written down; copies stay, since they tell where weights lie."""
    born = {event.block for event in events if event.bytes > 0}
    return [event for event in events if event.bytes >= 0 or event.block in born]


def weights_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module's weights are made of, by name, on any device, and those that offloading keeps for it."""
    for name, tensor in weight_tensors(module):
        for part in _parts(tensor):
            yield name, part
    stores: dict[int, Mapping[str, Any]] = {}
    for inner in module.modules():
        hook = getattr(inner, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            # accelerate's parameters are on no device while they are away: their weights stand in a table of the hook
            store = getattr(one, "weights_map", None)
            store = getattr(store, "dataset", store)
            store = getattr(store, "state_dict", store)
            if isinstance(store, Mapping):
                stores[id(store)] = store
    for store in stores.values():
        for name, tensor in store.items():
            for part in _parts(tensor):
                yield name, part


def mapped_bytes(components: Mapping[str, torch.nn.Module], accelerator: Accelerator) -> int:
    """Bytes of the components' weights that lie in mapped files of the host, which no allocator holds."""
    tensors = [one for module in components.values() for _, one in weights_of(module) if one.device.type == "cpu"]
    blocks = accelerator.blocks(tensors)
    mapped = {one.data_ptr(): one.nbytes for one, block in zip(tensors, blocks, strict=True) if block < 0}
    return sum(mapped.values())


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors with memory that a tensor is made of: itself, or those inside a wrapper."""
    import torch

    for _, part in parts_of(tensor):
        if (
            isinstance(part, torch.Tensor)
            and part.layout == torch.strided
            and not (part.device.type == "meta" or torch.nn.parameter.is_lazy(part))
        ):
            yield part


def attribute(events: Sequence[AllocationEvent], marks: Sequence[Mark], before_bytes: int) -> Residency:
    """Who held what: pure, from what the device and the ledger wrote down.

    Args:
        events: of the device, in order. marks: by the numbers that the events name.
        before_bytes: live when the first event happened.
    """
    owner_of = owners_of(events, marks)
    moves = [(at, event) for at, event in enumerate(events) if event.bytes]  # a position: so many of them are done
    totals = list(itertools.accumulate((event.bytes for _, event in moves), initial=before_bytes))
    spans = _spans([event for _, event in moves], marks)
    peaks = [max(range(first, last + 1), key=totals.__getitem__) for _, first, last in spans]
    kept = _kept_positions(totals, {*peaks, *(at for _, first, last in spans for at in (first, last))})

    columns: dict[Owner, int] = {}
    owners: list[Owner] = []  # of the columns
    rows: list[list[int]] = []
    now: list[int] = []
    loose = 0  # of it, what is no weight
    born: dict[int, int] = {}  # a live block → its owner's column

    def column(owner: Owner) -> int:
        if owner not in columns:
            columns[owner] = len(columns)
            owners.append(owner)
            now.append(0)
        return columns[owner]

    before = column(Owner("", "before"))
    now[before] = before_bytes
    highest: list[dict[int, int]] = [{} for _ in spans]  # a column → its most bytes in the phase
    beside_runs = _BesideRuns([event for _, event in moves], marks)
    begins: dict[int, list[int]] = {}
    for span, (_, first, _) in enumerate(spans):
        begins.setdefault(first, []).append(span)
    open_span = -1
    for position in range(len(moves) + 1):
        if position:
            index, event = moves[position - 1]
            if event.bytes > 0:
                born[event.block] = column(owner_of[index])
            at = born[event.block] if event.bytes > 0 else born.pop(event.block, before)
            now[at] += event.bytes
            loose += event.bytes if owners[at].kind in ("working", "other") else 0
            if open_span >= 0 and position <= spans[open_span][2]:
                highest[open_span][at] = max(highest[open_span].get(at, 0), now[at])
        for open_span in begins.get(position, ()):  # what was there already counts too
            highest[open_span] = dict(enumerate(now))
        beside_runs.at(position, marks[moves[position - 1][1].mark] if position else None, owners, now, loose)
        if position in kept:
            rows.append(list(now))
    rows = [row + [0] * (len(columns) - len(row)) for row in rows]  # who came later held nothing before
    # weights below, what works with them above, and what nobody of the pipeline holds on top
    order = sorted(columns, key=lambda owner: (_ORDER.index(owner.kind), owner.component))
    order = [owner for owner in order if any(row[columns[owner]] for row in rows)]
    phases = []
    for (name, first, last), peak, most in zip(spans, peaks, highest, strict=True):
        by = moves[peak - 1][1] if peak > first else None
        phases.append(
            PhaseResidency(
                phase=name,
                first=first,
                last=last,
                peak_at=peak,
                peak_bytes=totals[peak],
                component=marks[by.mark].component if by else "",
                operation=by.operation if by else "",
                weights=_by_component(columns, most, "weights"),
                working=_by_component(columns, most, "working"),
                at_work=beside_runs.at_work.get(name, {}),
                products=_products(moves[first:last], marks),
                beside={one: others for one, others in beside_runs.weights.get(name, {}).items() if others},
            )
        )
    return Residency(
        owners=tuple(order),
        phases=tuple(phases),
        positions=tuple(sorted(kept)),
        bytes=tuple(tuple(row[columns[owner]] for owner in order) for row in rows),
    )


_PRODUCTS = re.compile(r"mm|conv|linear|attention|einsum|matmul|embedding|_norm")
"""Of an operation's name: it takes a weight, and only one that is on the device."""


def _products(moves: Sequence[tuple[int, AllocationEvent]], marks: Sequence[Mark]) -> dict[str, int]:
    running = (
        marks[event.mark].component for _, event in moves if event.bytes > 0 and _PRODUCTS.search(event.operation)
    )
    return dict(Counter(component for component in running if component))


def _by_component(columns: Mapping[Owner, int], most: Mapping[int, int], kind: str) -> dict[str, int]:
    return {
        owner.component: most[column] for owner, column in columns.items() if owner.kind == kind and most.get(column)
    }


_ORDER = ("weights", "working", "other", "before")


def owners_of(events: Sequence[AllocationEvent], marks: Sequence[Mark]) -> dict[int, Owner]:
    """Index of the event that took a block → who owns the block."""
    owners: dict[int, Owner] = {}
    live: dict[int, int] = {}
    born: dict[int, int] = {}
    weights: dict[int, str] = {}  # blocks of the host as well
    marked = 0

    def look(upto: int) -> None:
        nonlocal marked
        for mark in marks[marked:upto]:
            weights.update(mark.weights)
            for block, component in mark.weights.items():
                if block in live:
                    owners[live[block]] = Owner(component, "weights")
        marked = max(marked, upto)

    for index, event in enumerate(events):
        if event.mark >= marked:
            look(event.mark + 1)
        if event.bytes > 0:
            component = marks[event.mark].component
            owners[index] = Owner(component, "working") if component else Owner("", "other")
            live[event.block] = born[event.block] = index
            weights.pop(event.block, None)  # where addresses are used again, it is another block now
        elif event.bytes < 0:
            live.pop(event.block, None)
        elif event.pinned and event.source not in weights and marks[event.mark].component and event.block in live:
            # offloading that saves memory of the host pins each weight anew; nothing else sends from there meanwhile
            owners[live[event.block]] = Owner(marks[event.mark].component, "weights")
        elif event.source in weights and (event.block in live) != (event.source in live):
            # across; within the device a copy of a weight is one to work with
            weights[event.block] = weights[event.source]
            if event.block in live:
                owners[live[event.block]] = Owner(weights[event.source], "weights")
    look(len(marks))
    # what was copied to the host and is a weight there was one on the device too, e.g. quantized there and taken away
    for event in reversed(events):
        if not event.bytes and event.block in weights and event.block not in born and event.source in born:
            owners[born[event.source]] = Owner(weights[event.block], "weights")
    return owners


def _until(moves: Sequence[AllocationEvent], marks: Sequence[Mark]) -> list[int]:
    """The position at the end of each mark."""
    until = [0] * len(marks)
    for position, event in enumerate(moves, 1):
        until[event.mark] = position
    return list(itertools.accumulate(until, max))


class _BesideRuns:
    """What else is there while each component runs, by phase.

    Attributes:
        at_work: phase → component → the most bytes beside weights.
        weights: phase → component → other component → the bytes of its weights at the end of the last run.
    """

    def __init__(self, moves: Sequence[AllocationEvent], marks: Sequence[Mark]) -> None:
        self.at_work: dict[str, dict[str, int]] = {}
        self.weights: dict[str, dict[str, dict[str, int]]] = {}
        self._ends: dict[int, list[Mark]] = {}
        following = itertools.chain(marks[1:], [None])
        for mark, end, after in zip(marks, _until(moves, marks), following, strict=True):
            if after is None or after.component != mark.component:
                self._ends.setdefault(end, []).append(mark)

    def at(self, position: int, moved: Mark | None, owners: Sequence[Owner], held: Sequence[int], loose: int) -> None:
        """A moment: what moved is of one mark, each owner holds so much, and of it so much is no weight."""
        ended = self._ends.get(position, [])
        for mark in ended if moved is None else [moved, *ended]:
            if mark.component and mark.phase:
                works = self.at_work.setdefault(mark.phase, {})
                works[mark.component] = max(works.get(mark.component, 0), loose)
        for mark in ended:
            if mark.component and mark.phase:
                self.weights.setdefault(mark.phase, {})[mark.component] = {
                    owner.component: size
                    for owner, size in zip(owners, held, strict=True)
                    if size and owner.kind == "weights" and owner.component != mark.component
                }


def _spans(moves: Sequence[AllocationEvent], marks: Sequence[Mark]) -> list[tuple[str, int, int]]:
    """(phase, first position, last position), in order."""
    until = _until(moves, marks)
    spans: list[tuple[str, int, int]] = []
    for at, mark in enumerate(marks):
        if mark.phase and at and marks[at - 1].phase == mark.phase:
            spans[-1] = (mark.phase, spans[-1][1], until[at])
        elif mark.phase:
            spans.append((mark.phase, until[at - 1] if at else 0, until[at]))
    return spans


def _kept_positions(totals: Sequence[int], needed: set[int]) -> set[int]:
    """At most :data:`POINTS` positions: those that are needed, both ends, and of what is between the highs and lows."""
    kept = needed | {0, len(totals) - 1}
    if len(totals) <= POINTS:
        return set(range(len(totals)))
    parts = max(0, POINTS - len(kept)) // 2
    for part in range(parts):
        stretch = range(part * len(totals) // parts, (part + 1) * len(totals) // parts)
        kept |= {max(stretch, key=totals.__getitem__), min(stretch, key=totals.__getitem__)}
    return kept
