"""The sync watch: where the host waits for the accelerator, in which denoising step of which call, and in whose code.

A denoising step ends where the scheduler's ``step`` does. A pipeline without a scheduler begins one with each run of the
component that runs most often, and a model is one step. What comes before the first and after the last is in none.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from pytest_diffopt.observation.observation import HostSyncs, HostWait
from pytest_diffopt.source_places import last_user_frame

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.accelerators.simulated import HostSync
    from pytest_diffopt.preparation.pipeline import Prepared
    from pytest_diffopt.source_places import CodeFrame, RawFrame

OFFLOADING = ("accelerate/", "diffusers/hooks/group_offloading.py", "diffusers/pipelines/pipeline_utils.py")
"""Whose lines move weights: what they wait for is the price of offloading, and no read of the model's."""

Kind = Literal["call begins", "call ends", "entered", "left", "step ends"]

_CALLER = os.path.join("pytest_diffopt", "preparation", "pipeline.py")  # makes the recipe's calls
_OWN = "pytest_diffopt/"  # what the observation itself reads is not the recipe's


@dataclass(frozen=True)
class _Moment:
    """What happened last when a wait says its number."""

    kind: Kind
    call: int
    component: str = ""  # that came or went
    running: tuple[str, ...] = ()  # after it, the outermost first


class SyncWatch:
    """Writes down the waits of the recipe's own calls. On a device that does not tell, nothing."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._recording = accelerator.sync_recording()
        self._moments: list[_Moment] = []
        self._running: list[str] = []
        self._steps: dict[int, int] = {}
        self._call: int | None = None
        self._found: list[tuple[_Moment, HostSync, int]] = []
        self._classes: dict[str, list[tuple[str, str]]] = {}

    @contextlib.contextmanager
    def watching(self, prepared: Prepared) -> Iterator[None]:
        """While the context is open, schedulers say when a step begins and ends."""
        with contextlib.ExitStack() as stack:
            if self._recording is not None and not prepared.is_model:
                for name, scheduler in _schedulers(prepared).items():
                    self._classes[name] = _own_classes(scheduler)
                    before = vars(scheduler).get("step")
                    scheduler.step = _Step(scheduler, functools.partial(self._note, "step ends", name))
                    if before is None:
                        stack.callback(vars(scheduler).pop, "step", None)
                    else:
                        stack.callback(setattr, scheduler, "step", before)
            yield

    @contextlib.contextmanager
    def call(self, call: int) -> Iterator[None]:
        """One of the recipe's own calls runs inside this."""
        if self._recording is None:
            yield
            return
        self._call = call
        self._moments.clear()
        self._running.clear()
        self._recording.start()
        self._note("call begins")
        try:
            yield
        finally:
            self._note("call ends")
            self._recording.stop()
            self._call = None
            self._read(call)

    def entered(self, component: str) -> None:
        """A component's call begins."""
        self._running.append(component)
        self._note("entered", component)

    def left(self, component: str) -> None:
        """A component's call has ended."""
        if component in self._running:
            del self._running[len(self._running) - 1 - self._running[::-1].index(component) :]
        self._note("left", component)

    @contextlib.contextmanager
    def running(self, component: str) -> Iterator[None]:
        """A component runs."""
        self.entered(component)
        try:
            yield
        finally:
            self.left(component)

    def _note(self, kind: Kind, component: str = "") -> None:
        if self._recording is None or self._call is None:
            return
        self._recording.mark = len(self._moments)
        self._moments.append(_Moment(kind, self._call, component, tuple(self._running)))

    def _read(self, call: int) -> None:
        assert self._recording is not None
        steps, count = _steps_of(self._moments)
        self._steps[call] = count
        for sync in self._recording.syncs():
            if sync.place is None or not sync.place.file.startswith(_OWN):
                self._found.append((self._moments[sync.mark], sync, steps[sync.mark]))

    @property
    def record(self) -> HostSyncs | None:
        """What was written down; None on a device that does not tell."""
        if self._recording is None or not self._steps:
            return None
        return HostSyncs(tuple(self._steps[call] for call in sorted(self._steps)), tuple(self._waits()))

    def _waits(self) -> Iterator[HostWait]:
        counts: Counter[HostWait] = Counter()
        for moment, sync, step in self._found:
            file = sync.place.file if sync.place is not None else ""
            wait = HostWait(
                call=moment.call,
                step=step,
                component=self._component(moment, sync),
                operation=sync.operation,
                place=sync.place,
                user=_user(sync),
                offloading=file.startswith(OFFLOADING),
            )
            counts[wait] += sync.count
        for wait, count in counts.items():
            yield replace(wait, count=count)

    def _component(self, moment: _Moment, sync: HostSync) -> str:
        """Whose code waited: a scheduler's, which has no hooks, by its class; a model's by what ran."""
        for file, _, function in sync.frames:
            for name, classes in self._classes.items():
                if any(file == source and function.startswith(f"{owner}.") for source, owner in classes):
                    return name
        return moment.running[-1] if moment.running else ""


def _user(sync: HostSync) -> CodeFrame | None:
    """The innermost line of the user's own code in the pipeline's call, where it is another than the place."""
    within: list[RawFrame] = list(itertools.takewhile(lambda frame: not frame[0].endswith(_CALLER), sync.frames))
    found = last_user_frame(reversed(within))
    return None if found == sync.place else found


class _Step:
    """A scheduler's ``step`` that says when it has ended. A copy of the scheduler has its class's own."""

    def __init__(self, scheduler: Any, ended: Callable[[], None]) -> None:
        self._scheduler, self._original, self._ended = scheduler, scheduler.step, ended
        functools.update_wrapper(self, self._original)  # pipelines look at its parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._original(*args, **kwargs)
        finally:
            self._ended()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._scheduler), self._scheduler)
        return MethodType(type(copied).step, copied)


def _schedulers(prepared: Prepared) -> dict[str, Any]:
    """Components without weights that step."""
    found = getattr(prepared.pipeline, "components", None)
    found = found if isinstance(found, dict) else {}
    return {
        name: component
        for name, component in found.items()
        if name not in prepared.components
        and callable(getattr(component, "step", None))
        and hasattr(component, "__dict__")
    }


def _own_classes(component: object) -> list[tuple[str, str]]:
    """(file, class) of a component and of what it derives from."""
    found = []
    for cls in type(component).__mro__[:-1]:
        with contextlib.suppress(TypeError, OSError):  # a class without a file
            found.append((inspect.getfile(cls), cls.__qualname__))
    return found


def _steps_of(moments: list[_Moment]) -> tuple[list[int], int]:
    """(the denoising step of each moment, -1 for none; how many there were) of one call."""
    ends = [at for at, moment in enumerate(moments) if moment.kind == "step ends"]
    entries = [
        (at, moment.component)
        for at, moment in enumerate(moments)
        if moment.kind == "entered" and len(moment.running) == 1
    ]
    if ends:
        return _by_scheduler(moments, ends, entries)
    if not entries:
        return [-1] * len(moments), 0
    most, times = Counter(component for _, component in entries).most_common(1)[0]
    begins = [at for at, component in entries if component == most]
    # what runs next is no part of the last step
    end = next((at for at, component in entries if at > begins[-1] and component != most), len(moments))
    steps = [-1] * len(moments)
    for step, begin in enumerate(begins):
        until = begins[step + 1] if step + 1 < times else end
        steps[begin:until] = [step] * (until - begin)
    return steps, times


def _by_scheduler(moments: list[_Moment], ends: list[int], entries: list[tuple[int, str]]) -> tuple[list[int], int]:
    """The first step begins with the first run of a component that runs in later steps too; of a single one with the last
    run before its end."""
    later = {component for at, component in entries if ends[0] < at < ends[-1]}
    first = [at for at, component in entries if at < ends[0] and (component in later or not later)]
    begin = (first[0] if later else first[-1]) if first else ends[0] - 1
    steps = [-1] * len(moments)
    for step, end in enumerate(ends):
        steps[begin:end] = [step] * (end - begin)
        begin = end
    return steps, len(ends)
