"""The compile watch: writes down every frame that Dynamo touches, every graph, and every run of compiled code.

It answers what counters cannot: whether compiled code *ran* for the code that was meant, call by call, and where it did
not, why. It reads only the events of :mod:`pytest_diffopt.observation.private_torch`.
"""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

from pytest_diffopt.observation import private_torch
from pytest_diffopt.observation.observation import (
    CompileRecord,
    FrameAttempt,
    GraphBreak,
    Outcome,
    Place,
    RegionRuns,
)
from pytest_diffopt.source_places import short_path


def place_of(code: CodeType) -> Place:
    """Where a code object stands; a function that Dynamo resumes after a break counts as the function it broke."""
    original = private_torch.original_code(code)
    return Place(short_path(code.co_filename), code.co_firstlineno, getattr(original, "co_qualname", original.co_name))


_CALLS_FORWARD = ("forward", "_call_impl", "_wrapped_call_impl", "call_wrapped", "call")
"""Methods of a module, and our own function for torch's modules, by which its forward is run."""


def meant_codes(function: Any) -> tuple[CodeType, ...]:
    """The code objects that a compiled callable is meant to run, under any decorator, the first of them by preference.

    For a module: its class's ``forward``, and the one that was put on the instance, where there is one.
    """
    import torch

    owner = getattr(function, "__self__", None)
    called = getattr(function, "__name__", "") in _CALLS_FORWARD
    if not isinstance(owner, torch.nn.Module) or not called:
        code = _innermost_code(function)
        # torch's own functions are operations to Dynamo: their code is never traced
        return (code,) if code is not None and "/torch/" not in code.co_filename.replace(os.sep, "/") else ()
    functions = [type(owner).forward]
    if "forward" in vars(owner):
        functions.append(vars(owner)["forward"])
    codes = [code for code in map(_innermost_code, functions) if code is not None]
    unimplemented = _innermost_code(torch.nn.Module.forward)
    return tuple(dict.fromkeys(code for code in codes if code is not unimplemented))


def _owner_of(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, str]:
    """(whose method a compiled callable is, its name); the name is empty where it is the module's call.

    What was compiled in the body of a class is a plain function, and gets its module as the first argument.
    """
    for inner in _unwrapped(function):
        function = inner
        if getattr(inner, "__self__", None) is not None:
            break
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    code = getattr(function, "__code__", None)
    if owner is None and arguments and isinstance(code, CodeType) and code.co_varnames[:1] == ("self",):
        owner = arguments[0]
    return owner, "" if name in _CALLS_FORWARD else name


def _unwrapped(function: Any) -> Iterator[Any]:
    """The function, and what is inside of it, one decorator or partial after the other."""
    seen: set[int] = set()
    while id(function) not in seen:
        yield function
        seen.add(id(function))
        function = getattr(function, "func", getattr(function, "__wrapped__", function))


def _innermost_code(function: Any) -> CodeType | None:
    *_, function = _unwrapped(function)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


@dataclass
class _Entry:
    """One call of a compiled callable, while it is open."""

    owner: Any
    component: str
    region: str
    method: str
    place: Place
    meant: tuple[CodeType, ...]
    active: bool
    runs: int = 0
    operations: int = 0
    engaged: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class _Frame:
    """One frame while Dynamo compiles it."""

    code: CodeType
    owner: Any
    component: str
    region: str
    fullgraph: bool
    self_name: str = ""
    graphs: int = 0
    operations: int = 0
    recompile: bool = False
    guards: tuple[str, ...] = ()
    limit: str = ""
    breaks: int = 0


@dataclass
class _Runs:
    """Counts of one region in one call; frozen into a :class:`RegionRuns`."""

    component: str
    region: str
    place: Place
    entries: int = 0
    engaged: int = 0
    graph_runs: int = 0
    operations: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def renaming(self, method: str) -> Callable[[str, str], None]:
        def rename(component: str, region: str) -> None:
            self.component, self.region = component, f"{region}.{method}".strip(".")

        return rename


def _renaming(found: list[Any]) -> Callable[[str, str], None]:
    """Gives the record that is the last of a list now another name."""
    at = len(found) - 1

    def rename(component: str, region: str) -> None:
        found[at] = replace(found[at], component=component, region=region)

    return rename


_PARTS = re.compile(r"^\s+(Explanation|Hint|Developer debug context):\s*(.*)$")


def explain_break(text: str) -> tuple[str, str, str]:
    """(reason, explanation, hint) out of Dynamo's text of a graph break; each a single line."""
    reason, explanation, hint = "", "", ""
    current = ""
    for line in text.strip().splitlines():
        if line.startswith("***"):
            break
        if match := _PARTS.match(line):
            current = match[1]
            if current == "Explanation" and not explanation:
                explanation = match[2]
            elif current == "Hint" and not hint:
                hint = match[2]
            continue
        if not line.strip():
            continue
        if current == "Explanation" and not hint and explanation:
            explanation += " " + line.strip()
        elif not current and (not reason or reason.endswith((":", "."))):
            reason = line.strip()
    return reason.rstrip(":"), explanation, hint


class CompileWatch:
    """Writes down what torch.compile does while it is open.

    Example::

        with CompileWatch() as watch:
            torch.compile(model)(x)
        watch.record.graphs, watch.record.graph_breaks, watch.record.recompiles

    Args:
        modules: modules that have a name: ``{id(module): (component, path)}``; others are named by their class.
    """

    def __init__(self, modules: Mapping[int, tuple[str, str]] | None = None) -> None:
        self.call = 0
        self._modules = dict(modules or {})
        self._frames: list[_Frame] = []
        self._entries: list[_Entry] = []
        self._attempts: list[FrameAttempt] = []
        self._breaks: list[GraphBreak] = []
        self._runs: dict[tuple[int, str, str, int], _Runs] = {}
        self._unnamed: list[tuple[weakref.ref[Any], Callable[[str, str], None]]] = []
        self._outside_runs = 0
        self._open = False
        self._stack = contextlib.ExitStack()
        self.on_compile: Callable[[str], None] | None = None
        self.roots: dict[CodeType, tuple[str, ...]] = {}
        """The forward of whole components, by which a graph of something else tells that they are in it."""
        self._inlined: dict[str, None] = {}
        self.also_meant: dict[int, tuple[CodeType, ...]] = {}
        """id of a module → code of its parts that is meant as well: a cache's hooks keep the whole out of one graph."""

    def __enter__(self) -> CompileWatch:
        self._stack.enter_context(private_torch.listening(self))
        self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False
        self._stack.close()

    @contextlib.contextmanager
    def naming(self, modules: Mapping[int, tuple[str, str]]) -> Iterator[None]:
        """Use other names for modules while the context is open. What was written down of them before gets these too."""
        before, self._modules = self._modules, dict(modules)
        for owner, rename in self._unnamed:
            if (name := self._modules.get(id(owner()))) is not None:
                rename(*name)
        self._unnamed.clear()
        try:
            yield
        finally:
            self._modules = before

    @property
    def record(self) -> CompileRecord:
        """Everything written down so far, as plain data."""
        return CompileRecord(
            frames=tuple(self._attempts),
            graph_breaks=tuple(self._breaks),
            regions=tuple(
                RegionRuns(
                    call=call,
                    component=runs.component,
                    region=runs.region,
                    place=runs.place,
                    entries=runs.entries,
                    engaged=runs.engaged,
                    graph_runs=runs.graph_runs,
                    operations=runs.operations,
                    reasons=tuple(runs.reasons),
                )
                for (call, *_), runs in self._runs.items()
            ),
            graph_runs_outside=self._outside_runs,
            inlined=tuple(self._inlined),
        )

    # What the adapter tells; see DynamoListener.

    def region_entered(self, function: Any, arguments: tuple[Any, ...], active: bool) -> None:
        owner, method = _owner_of(function, arguments)
        component, region = self._name(owner)
        if component and method:
            region = f"{region}.{method}".lstrip(".")
        codes = meant_codes(function) + self.also_meant.get(id(owner), ())
        place = place_of(codes[0]) if codes else Place("", 0, getattr(function, "__qualname__", repr(function)))
        if not component and not region:
            region = place.function
        entry = _Entry(owner, component, region, method, place, codes, active)
        if not active:
            entry.notes.append("a compiler stance makes Dynamo stand aside")
        self._entries.append(entry)

    def region_left(self) -> None:
        if not self._entries:
            return
        entry = self._entries.pop()
        key = (self.call, entry.component, entry.region, 0 if entry.component else id(entry.owner))
        if key not in self._runs:
            self._runs[key] = _Runs(entry.component, entry.region, entry.place)
            self._named_later(entry.owner, entry.component, self._runs[key].renaming(entry.method))
        runs = self._runs[key]
        runs.entries += 1
        runs.engaged += entry.engaged
        runs.graph_runs += entry.runs
        runs.operations += entry.operations
        if not entry.engaged:
            for note in entry.notes:
                runs.reasons[note] = runs.reasons.get(note, 0) + 1

    def frame_started(self, code: CodeType, frame_locals: dict[str, Any], fullgraph: bool) -> None:
        owner = frame_locals.get("self")
        component, region = self._name(owner)
        if not component and self._entries:
            component, region = self._entries[-1].component, region or self._entries[-1].region
            owner = owner if self._name(owner) != ("", "") else self._entries[-1].owner
        first = code.co_varnames[0] if code.co_varnames else ""
        self_name = first if first and self._name(frame_locals.get(first)) != ("", "") else ""
        self._frames.append(_Frame(code, owner, component, region, fullgraph, self_name))
        if self.on_compile is not None:
            self.on_compile(f"{component or region or 'compiling'} {code.co_name}")

    def recompile_reasons(self, reasons: Sequence[str]) -> None:
        if self._frames:
            self._frames[-1].recompile = True
            name = self._frames[-1].self_name
            self._frames[-1].guards = tuple(dict.fromkeys(_clean_guard(reason, name) for reason in reasons))

    def limit_exhausted(self, limit: str) -> None:
        if self._frames:
            self._frames[-1].limit = limit
            self._note(f"the {limit} is exhausted")

    def graph_broke(self, error: BaseException, reason: str) -> None:
        if self._frames:
            self._frames[-1].breaks += 1
            self._add_break(self._frames[-1], error, reason, skipped_frame=False)

    def graph_compiled(self, operations: int, code: CodeType | None, traced: Sequence[CodeType]) -> Callable[[], None]:
        frame = self._frames[-1] if self._frames else None
        if frame is not None:
            frame.graphs += 1
            frame.operations += operations
        made_from = {private_torch.original_code(c) for c in traced}
        made_from |= {private_torch.original_code(c) for c in (code, frame.code if frame else None) if c is not None}
        entered = {entry.component for entry in self._entries}
        for component in (name for one in made_from for name in self.roots.get(one, ())):
            if entered and component not in entered:
                self._inlined[component] = None

        def ran() -> None:
            if not self._open:
                return
            if not self._entries:
                self._outside_runs += 1
            for entry in self._entries:
                entry.runs += 1
                entry.operations += operations
                if operations and (not entry.meant or made_from.intersection(entry.meant)):
                    entry.engaged = True

        return ran

    def frame_ended(self, compiled: bool, skip_reason: str, error: BaseException | None) -> None:
        if not self._frames:
            return
        frame = self._frames.pop()
        reason = skip_reason
        outcome: Outcome
        if frame.limit:
            outcome = "limit"
            reason = f"{frame.limit} exhausted"
        elif error is not None and private_torch.is_graph_break(error):
            outcome = "skipped"
            if not frame.breaks or not getattr(error, "logged", False):
                self._add_break(frame, error, str(error), skipped_frame=True)
            else:
                self._breaks[-1] = replace(self._breaks[-1], skipped_frame=True)
            reason = explain_break(str(error))[0]
            self._note(f"{place_of(frame.code)} was skipped whole: {reason}")
        elif error is not None:
            outcome = "failed"
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            self._note(reason)
        elif compiled:
            outcome = "compiled" if frame.operations else "empty"
        else:
            outcome = "skipped"
            if frame.breaks:  # before 2.13 a break that cannot be resumed from ends here, and not in an exception
                self._breaks[-1] = replace(self._breaks[-1], skipped_frame=True)
            self._note(f"{place_of(frame.code)} was skipped: {skip_reason.splitlines()[0] if skip_reason else ''}")
        self._attempts.append(
            FrameAttempt(
                call=self.call,
                component=frame.component,
                region=frame.region,
                place=place_of(frame.code),
                resumed=private_torch.original_code(frame.code) is not frame.code,
                outcome=outcome,
                graphs=frame.graphs,
                operations=frame.operations,
                recompile=frame.recompile,
                guards=frame.guards,
                limit=frame.limit,
                reason=reason.splitlines()[0] if reason else "",
            )
        )
        self._named_later(frame.owner, frame.component, _renaming(self._attempts))

    def frame_passed_over(self, reason: str, code: CodeType) -> None:
        if (
            self._entries
            and private_torch.original_code(code) in self._entries[-1].meant
            and not self._entries[-1].notes
        ):
            self._note(f"{place_of(code)} was not traced: {reason}")

    # How it keeps them.

    def _name(self, owner: Any) -> tuple[str, str]:
        """(component, path) of a module; its class where it has no name; empty for anything else."""
        if owner is None:
            return "", ""
        if (named := self._modules.get(id(owner))) is not None:
            return named
        import torch

        return ("", type(owner).__name__) if isinstance(owner, torch.nn.Module) else ("", "")

    def _note(self, text: str) -> None:
        if self._entries:
            self._entries[-1].notes.append(text)

    def _add_break(self, frame: _Frame, error: BaseException, text: str, *, skipped_frame: bool) -> None:
        stack = private_torch.user_stack(error)
        own = place_of(frame.code)
        file, line, function = stack[-1] if stack else (frame.code.co_filename, own.line, own.function)
        reason, explanation, hint = explain_break(str(getattr(error, "msg", None) or error) or text)
        self._breaks.append(
            GraphBreak(
                call=self.call,
                component=frame.component,
                region=frame.region,
                place=Place(short_path(file), line, function),
                frame=own,
                reason=reason,
                explanation=explanation,
                hint=hint,
                skipped_frame=skipped_frame,
                stack=tuple(Place(short_path(f), at, name) for f, at, name in stack),
            )
        )
        self._named_later(frame.owner, frame.component, _renaming(self._breaks))

    def _named_later(self, owner: Any, component: str, rename: Callable[[str, str], None]) -> None:
        """What runs while a pipeline is prepared has no name yet: its modules are no components of anything so far."""
        import torch

        if not component and isinstance(owner, torch.nn.Module):
            self._unnamed.append((weakref.ref(owner), rename))


_GUARD_PREFIX = re.compile(r"^\d+/\d+:\s*")


def _clean_guard(reason: str, self_name: str) -> str:
    """A failed guard as one line, without Dynamo's compile id and source comment; the module itself is called self."""
    line = _GUARD_PREFIX.sub("", reason.strip().splitlines()[0] if reason.strip() else "")
    line = line.split("  # ")[0].strip().replace("L['self']", "self")
    line = re.sub(r"\b\d{9,}\b", "…", line)  # addresses differ from run to run
    return re.sub(rf"\b{re.escape(self_name)}(?=[.\[])", "self", line) if self_name else line
