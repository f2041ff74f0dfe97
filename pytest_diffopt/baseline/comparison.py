"""What is different from a baseline, and in which direction.

Structure is compared exactly, peaks by ratio with the measured noise, latency by its confidence intervals, and the
tolerance that parity required may not have grown. What the eager reference returns may not have moved by more than its noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from pytest_diffopt.baseline.outputs import first_moved
from pytest_diffopt.baseline.record import Break, Peaks, QuantizedLayers, Recompile, Record, flat
from pytest_diffopt.byte_sizes import human

_NO_COMPONENT = "no component"
Direction = Literal["worse", "better", "changed"]

PEAK_NOISE = {"sim": 0.001}
"""The least share by which two peaks must differ to be told apart, by kind of device: a block is counted in steps of 512 B."""
PEAK_NOISE_ELSEWHERE = 0.01
"""The same on other devices, whose libraries take workspaces as they please."""
TOLERANCE_NOISE = 1.25
"""How many times the recorded tolerance is no growth, nor what stays below the floor: processors sum in different orders."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as recorded.

    Attributes:
        what: e.g. ``"graph breaks"``. where: which component, place, layer; ``""`` where there is no more to say.
        recorded, now: plain data. unit: of both, e.g. ``"B"``, ``"×"``.
        direction: ``worse`` and ``better`` as for somebody who runs the recipe; ``changed`` where neither can be said.
    """

    what: str
    where: str
    recorded: Any
    now: Any
    direction: Direction
    unit: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def line(self) -> str:
        """One line: ``worse: graph breaks in transformer …: 0 recorded, 2 now``."""
        where = f" {self.where}" if self.where else ""
        recorded, now = _shown(self.recorded, self.unit), _shown(self.now, self.unit)
        if recorded == now:  # what differs is below the last figure shown
            recorded, now = str(self.recorded), f"{self.now} {self.unit}".rstrip()
        return f"{self.direction}: {self.what}{where}: {recorded} recorded, {now} now"


def differences(recorded: Record, now: Record, accelerator: str) -> list[Difference]:
    """Everything that is not as recorded, the worse first.

    Args:
        accelerator: the kind of device that both were observed on.
    """
    found = [
        *_recipe(recorded, now),
        *_failure(recorded, now),
        *_numbers("graphs of", recorded.graphs, now.graphs, more="worse", none="worse"),
        *_breaks(recorded.breaks, now.breaks),
        *_recompiles(recorded.recompiles, now.recompiles),
        *_one("frames at an exhausted recompile limit", "", recorded.limits_exhausted, now.limits_exhausted),
        *_engaged(recorded, now),
        *_layers(recorded, now),
        *_numbers("bytes of", recorded.component_bytes, now.component_bytes, unit="B"),
        *_residency(recorded, now),
        *_peaks(recorded.peaks, now.peaks, accelerator),
        *_latency(recorded, now),
        *_tolerance(recorded, now),
        *_outputs(recorded, now),
    ]
    order = ("worse", "changed", "better")
    return sorted(found, key=lambda one: order.index(one.direction))


def _recipe(recorded: Record, now: Record) -> Iterator[Difference]:
    before, after = flat(recorded.recipe), flat(now.recipe)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            yield Difference("the recipe's", path, before.get(path), after.get(path), "changed")


def _failure(recorded: Record, now: Record) -> Iterator[Difference]:
    if recorded.failure != now.failure:
        direction: Direction = "worse" if not recorded.failure else "better" if not now.failure else "changed"
        yield Difference("the run ends with", "", recorded.failure or "no error", now.failure or "no error", direction)


def _one(
    what: str, where: str, before: float, after: float, *, unit: str = "", more: Direction = "worse"
) -> Iterator[Difference]:
    if before != after:
        less: Direction = "better" if more == "worse" else "worse"
        yield Difference(what, where, before, after, more if after > before else less, unit)


def _numbers(
    what: str,
    before: Mapping[str, int],
    after: Mapping[str, int],
    *,
    unit: str = "",
    more: Direction = "worse",
    none: Direction | None = None,
) -> Iterator[Difference]:
    """A number a component. ``none``: how it is to be called where there is nothing any more; the reverse where there was
    nothing before."""
    for name in sorted(before.keys() | after.keys()):
        first, second = before.get(name, 0), after.get(name, 0)
        if none is not None and not (first and second) and first != second:
            opposite: Direction = "better" if none == "worse" else "worse"
            yield Difference(what, name, first, second, none if not second else opposite, unit)
        elif none is None and (name in before) != (name in after):
            yield Difference(what, name, before.get(name), after.get(name), "changed", unit)
        else:
            yield from _one(what, name, first, second, unit=unit, more=more)


def _breaks(recorded: Iterable[Break], now: Iterable[Break]) -> Iterator[Difference]:
    def told(one: Break) -> str:
        why = f"{one.reason}, the whole frame skipped" if one.skipped_frame else one.reason
        return f"in {one.component or _NO_COMPONENT} at {one.function} {one.file} ({why})"

    before, after = ({told(one): one.count for one in breaks} for breaks in (recorded, now))
    for place in sorted(before.keys() | after.keys()):
        yield from _one("graph breaks", place, before.get(place, 0), after.get(place, 0))


def _recompiles(recorded: Iterable[Recompile], now: Iterable[Recompile]) -> Iterator[Difference]:
    def told(one: Recompile) -> str:
        guards = "; ".join(one.guards) or "not told"
        return f"in {one.component or _NO_COMPONENT} at {one.function} {one.file} (guards: {guards})"

    before, after = ({told(one): one.count for one in recompiles} for recompiles in (recorded, now))
    for place in sorted(before.keys() | after.keys()):
        yield from _one("recompiles", place, before.get(place, 0), after.get(place, 0))


def _engaged(recorded: Record, now: Record) -> Iterator[Difference]:
    for name in sorted(recorded.engaged.keys() | now.engaged.keys()):
        before, after = recorded.engaged.get(name), now.engaged.get(name)
        if before == after:
            continue
        first, second = (f"{one.engaged} of {one.entries}" if one is not None else "none" for one in (before, after))
        shares = [one.engaged / one.entries if one is not None and one.entries else 0.0 for one in (before, after)]
        direction: Direction = "worse" if shares[1] < shares[0] else "better" if shares[1] > shares[0] else "changed"
        yield Difference("calls that ran compiled code in", name or _NO_COMPONENT, first, second, direction)


def _layers(recorded: Record, now: Record) -> Iterator[Difference]:
    for component in sorted(recorded.quantized.keys() | now.quantized.keys()):
        first, second = recorded.quantized.get(component, {}), now.quantized.get(component, {})
        before, after = _formats(first), _formats(second)
        moved: dict[tuple[str, str], list[str]] = {}
        for path in sorted(before.keys() | after.keys()):
            if before.get(path) != after.get(path):
                moved.setdefault((before.get(path, "plain"), after.get(path, "plain")), []).append(path)
        for (old, new), paths in sorted(moved.items()):
            direction: Direction = (
                "worse" if new in _NOT_QUANTIZED else "better" if old in _NOT_QUANTIZED else "changed"
            )
            shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            yield Difference(
                f"format of {len(paths)} layers of" if len(paths) > 1 else "format of a layer of",
                f"{component}: {shown}",
                old,
                new,
                direction,
            )
        for kind in sorted(first.keys() & second.keys()):
            if first[kind].layers == second[kind].layers:
                for name, told in (("weight_bytes", "weights"), ("state_bytes", "scales and other inner tensors")):
                    sizes = getattr(first[kind], name), getattr(second[kind], name)
                    yield from _one(f"bytes of the {kind} {told} of", component, *sizes, unit="B")


_NOT_QUANTIZED = ("plain", "unquantized")


def _formats(kinds: Mapping[str, QuantizedLayers]) -> dict[str, str]:
    return {path: kind for kind, layers in kinds.items() for path in layers.layers}


def _residency(recorded: Record, now: Record) -> Iterator[Difference]:
    first, second = recorded.residency, now.residency
    if first is None or second is None:
        if first is not second:
            known, direction = ("counted", "not counted"), "worse"
            if second is not None:
                known, direction = ("not counted", "counted"), "better"
            yield Difference("residency", "", *known, cast(Direction, direction))
        return
    yield from _numbers("on the accelerator once prepared:", first.loaded, second.loaded, unit="B")
    if len(first.calls) != len(second.calls):
        yield Difference("calls", "", len(first.calls), len(second.calls), "changed")
    told: set[tuple[str, int, int]] = set()
    for place, (before, after) in enumerate(zip(first.calls, second.calls, strict=False)):
        for one in _numbers(f"on the accelerator after call {place}:", before, after, unit="B"):
            if (key := (one.where, one.recorded, one.now)) not in told:  # the same in each call is told once
                told.add(key)
                yield one


def _peaks(recorded: Peaks | None, now: Peaks | None, accelerator: str) -> Iterator[Difference]:
    if recorded is None or now is None:
        return
    least = PEAK_NOISE.get(accelerator, PEAK_NOISE_ELSEWHERE)
    noise = max(least, recorded.noise, now.noise)
    yield from _apart("peak of a call", (recorded.call_bytes,) * 2, (now.call_bytes,) * 2, noise)
    loads = [(min(peaks.load_bytes), max(peaks.load_bytes)) for peaks in (recorded, now)]
    yield from _apart("peak of loading", loads[0], loads[1], least)


def _apart(what: str, recorded: tuple[int, int], now: tuple[int, int], noise: float) -> Iterator[Difference]:
    """Two ranges that do not touch: every peak of now is above, or below, every recorded one by more than the noise."""
    if now[0] > recorded[1] * (1 + noise):
        yield Difference(what, "", recorded[1], now[0], "worse", "B")
    elif now[1] < recorded[0] * (1 - noise):
        yield Difference(what, "", recorded[0], now[1], "better", "B")


def _latency(recorded: Record, now: Record) -> Iterator[Difference]:
    """Only slower is told: faster by chance today is no promise, and the interval of what is recorded stands."""
    if recorded.latency is None or now.latency is None:
        if recorded.latency is not None and not now.failure:
            yield Difference("time against eager", "", "measured", "not measured", "worse")
        return
    for name in ("cold", "warm", "steady"):
        before, after = getattr(recorded.latency, name), getattr(now.latency, name)
        if before is not None and after is not None and after.low > before.high:
            yield Difference("time against eager,", f"{name} call", before.value, after.value, "worse", "×")


def _tolerance(recorded: Record, now: Record) -> Iterator[Difference]:
    before, after = recorded.required_tolerance, now.required_tolerance
    if before is None or after is None:
        if before != after and not now.failure and not recorded.failure:  # which are told, and end parity with them
            yield Difference(
                "tolerance that parity requires", "", before, after, "worse" if after is None else "better"
            )
        return
    if after > max(before * TOLERANCE_NOISE, now.tolerance_floor):
        yield Difference("tolerance that parity requires", "", before, after, "worse")


def _outputs(recorded: Record, now: Record) -> Iterator[Difference]:
    """The first tensor of the eager reference that moved, and not what comes after: that follows. It is never better."""
    if recorded.outputs is None or now.failure or recorded.failure:
        return
    if now.outputs is None:
        yield Difference("outputs of the eager reference", "", len(recorded.outputs), 0, "worse")
        return
    if (moved := first_moved(recorded.outputs, now.outputs)) is not None:
        where = f"{moved.where}, the first to change{moved.how}"
        yield Difference("change of the eager reference's output in", where, moved.recorded, moved.now, "worse")


def _shown(value: Any, unit: str) -> str:
    if value is None:
        return "none"
    if unit == "B":
        return human(value)
    return f"{value:.3g}{unit}" if isinstance(value, float) else f"{value}{unit}"
