"""The one place that touches torch's private names: it turns Dynamo's inner workings into a few named events.

Public counters cannot carry a verdict: a frame that Dynamo skips whole leaves the graph-break counter at 0, and once the
recompile limit is exhausted nothing is reported at all. So the functions that *make* those decisions are listened to.

Each private name stands in :data:`PRIVATE_NAMES` with what it is needed for. They are probed when the watch starts:
where a needed one is missing, :class:`UnsupportedTorchError` names it, instead of a verdict that saw nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Protocol

from pytest_diffopt.errors import UnsupportedTorchError


@dataclass(frozen=True)
class PrivateName:
    """A private torch name: where it lives, why it is needed, and the versions in which it was seen."""

    module: str
    name: str
    needed_for: str
    seen_in: str
    required: bool = True


_SEEN = "2.11-2.14"
PRIVATE_NAMES: tuple[PrivateName, ...] = (
    PrivateName("torch._dynamo.convert_frame", "_compile", "every frame that Dynamo tries to compile", _SEEN),
    PrivateName(
        "torch._dynamo.convert_frame",
        "get_and_maybe_log_recompilation_reasons",
        "which guards failed at a recompile",
        _SEEN,
    ),
    PrivateName("torch._dynamo.convert_frame", "exceeds_recompile_limit", "that a recompile limit is exhausted", _SEEN),
    PrivateName(
        "torch._dynamo.convert_frame", "add_skip_reason", "why a frame was not traced", "2.13-2.14", required=False
    ),
    PrivateName("torch._dynamo.eval_frame", "_callback_from_stance", "when a compiled region is entered", _SEEN),
    PrivateName("torch._dynamo.eval_frame", "_maybe_set_eval_frame", "when a compiled region is left", _SEEN),
    PrivateName(
        "torch._dynamo.output_graph", "OutputGraph.call_user_compiler", "the graphs, and each of their runs", _SEEN
    ),
    PrivateName(
        "torch._dynamo.symbolic_convert",
        "InstructionTranslatorBase.log_graph_break",
        "graph breaks that Dynamo resumes from",
        _SEEN,
    ),
    PrivateName(
        "torch._dynamo.resume_execution",
        "ContinueExecutionCache.generated_code_metadata",
        "which function a resumed one belongs to",
        _SEEN,
    ),
    PrivateName("torch._dynamo.exc", "Unsupported", "graph breaks that skip a whole frame", _SEEN),
)


class DynamoListener(Protocol):
    """What the adapter tells. All methods are called on the thread that compiles or runs."""

    def region_entered(self, function: Any, arguments: tuple[Any, ...], active: bool) -> None:
        """A compiled callable was called with these positional arguments; ``active`` is False where a stance or setting
        makes Dynamo stand aside."""

    def region_left(self) -> None:
        """The compiled callable of the matching :meth:`region_entered` returned or raised."""

    def frame_started(self, code: CodeType, frame_locals: dict[str, Any], fullgraph: bool) -> None:
        """Dynamo begins to compile a frame."""

    def recompile_reasons(self, reasons: Sequence[str]) -> None:
        """The frame being compiled had been compiled before; these guards failed."""

    def limit_exhausted(self, limit: str) -> None:
        """The frame being compiled is over a recompile limit (the Dynamo setting's name)."""

    def graph_broke(self, error: BaseException, reason: str) -> None:
        """Dynamo broke the graph and will resume after the break."""

    def graph_compiled(self, operations: int, code: CodeType | None, traced: Sequence[CodeType]) -> Callable[[], None]:
        """A backend compiled a graph of the frame being compiled. Returns what to call at each run of that graph."""

    def frame_ended(self, compiled: bool, skip_reason: str, error: BaseException | None) -> None:
        """The frame of the matching :meth:`frame_started` was compiled, skipped or failed."""

    def frame_passed_over(self, reason: str, code: CodeType) -> None:
        """Dynamo did not even try to compile a frame."""


def _resolve(entry: PrivateName) -> tuple[Any, str]:
    """The object that holds the name, and the name's last part. Raises AttributeError or ImportError."""
    holder: Any = importlib.import_module(entry.module)
    *parents, last = entry.name.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    getattr(holder, last)
    return holder, last


def missing_names(names: Sequence[PrivateName] = PRIVATE_NAMES) -> list[PrivateName]:
    """The needed private names that the installed torch does not have."""
    missing = []
    for entry in names:
        try:
            _resolve(entry)
        except (AttributeError, ImportError):
            if entry.required:
                missing.append(entry)
    return missing


def probe() -> None:
    """Raise :class:`UnsupportedTorchError` unless the installed torch has every needed name."""
    import torch

    if missing := missing_names():
        lines = "; ".join(f"{m.module}.{m.name} ({m.needed_for}; seen in torch {m.seen_in})" for m in missing)
        raise UnsupportedTorchError(
            f"torch {torch.__version__} lacks what the compile watch needs: {lines}. "
            f"Use a torch release in which the names were seen, or report the version."
        )


def is_graph_break(error: BaseException) -> bool:
    """Whether an exception out of Dynamo means that the graph broke (and not that a compiler crashed)."""
    from torch._dynamo import exc

    return isinstance(error, exc.Unsupported | exc.UserError)


def user_stack(error: BaseException) -> list[tuple[str, int, str]]:
    """(file, line, function) of the user's code at a break, outermost first; empty where Dynamo kept none."""
    stack = getattr(error, "real_stack", None) or []
    return [(frame.filename, frame.lineno or 0, frame.name) for frame in stack]


def original_code(code: CodeType) -> CodeType:
    """The function that a code object belongs to: itself, or the one that Dynamo resumes by it after a break."""
    from torch._dynamo.resume_execution import ContinueExecutionCache

    seen = 0
    while code in ContinueExecutionCache.generated_code_metadata and seen < 100:
        code = ContinueExecutionCache.generated_code_metadata[code].code
        seen += 1
    return code


class _Broadcast:
    """Installs the wrappers once, however many listeners there are, and passes each event on to all of them."""

    def __init__(self) -> None:
        self.listeners: list[DynamoListener] = []
        self.installed = contextlib.ExitStack()
        # (identity of the wrapper's frame, whether it is past its entry): a region can be entered inside another
        self.open_regions: list[tuple[int, bool]] = []

    def install(self) -> None:
        probe()
        with contextlib.ExitStack() as stack:
            for entry, wrap in _WRAPPERS:
                try:
                    holder, name = _resolve(_NAMED[entry])
                except (AttributeError, ImportError):
                    continue  # only an optional name gets here: probe() has refused the others
                original = getattr(holder, name)
                setattr(holder, name, functools.wraps(original)(wrap(original)))
                stack.callback(setattr, holder, name, original)
            self.installed = stack.pop_all()

    def uninstall(self) -> None:
        self.installed.close()
        self.open_regions.clear()

    def tell(self, event: str, *args: Any) -> None:
        for listener in self.listeners:
            getattr(listener, event)(*args)


_broadcast = _Broadcast()


@contextlib.contextmanager
def listening(listener: DynamoListener) -> Iterator[None]:
    """Tell ``listener`` what Dynamo does while the context is open; every patched name is given back, also on a raise."""
    if not _broadcast.listeners:
        _broadcast.install()
    _broadcast.listeners.append(listener)
    try:
        yield
    finally:
        _broadcast.listeners.remove(listener)
        if not _broadcast.listeners:
            _broadcast.uninstall()


def _wrap_compile(original: Callable[..., Any]) -> Callable[..., Any]:
    import inspect

    signature = inspect.signature(original)

    def _compile(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        _broadcast.tell("frame_started", given["code"], given.get("locals") or {}, bool(given.get("one_graph")))
        try:
            result = original(*args, **kwargs)
        except BaseException as error:
            _broadcast.tell("frame_ended", False, "", error)
            raise
        compiled = getattr(result, "guarded_code", None) is not None
        _broadcast.tell("frame_ended", compiled, str(getattr(result, "skip_reason", None) or ""), None)
        return result

    return _compile


def _wrap_reasons(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_and_maybe_log_recompilation_reasons(*args: Any, **kwargs: Any) -> Any:
        try:
            reasons = original(*args, **kwargs)
        except Exception as error:  # `error_on_recompile` raises here, with the reasons as its text
            lines = [
                line.strip().removeprefix("- ") for line in str(error).splitlines() if line.strip().startswith("- ")
            ]
            _broadcast.tell("recompile_reasons", lines or [str(error)])
            raise
        _broadcast.tell("recompile_reasons", [str(reason) for reason in reasons])
        return reasons

    return get_and_maybe_log_recompilation_reasons


def _wrap_limit(original: Callable[..., Any]) -> Callable[..., Any]:
    def exceeds_recompile_limit(*args: Any, **kwargs: Any) -> Any:
        exceeded, limit = original(*args, **kwargs)
        if exceeded:
            _broadcast.tell("limit_exhausted", str(limit))
        return exceeded, limit

    return exceeds_recompile_limit


def _wrap_skip(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_skip_reason(reason: str, frame: Any, *args: Any, **kwargs: Any) -> Any:
        _broadcast.tell("frame_passed_over", str(reason), frame.f_code)
        return original(reason, frame, *args, **kwargs)

    return add_skip_reason


def _wrap_break(original: Callable[..., Any]) -> Callable[..., Any]:
    def log_graph_break(self: Any, *args: Any, **kwargs: Any) -> Any:
        error = kwargs.get("exc")
        if error is None:
            error = next((a for a in args if isinstance(a, BaseException)), None)
        reason = kwargs.get("reason") or next((a for a in args if isinstance(a, str)), "")
        if not getattr(error, "logged", False):
            if error is None:  # before 2.13 the stack is handed over by itself
                error = RuntimeError(str(reason))
            if not getattr(error, "real_stack", None):
                with contextlib.suppress(AttributeError, RuntimeError):
                    stack = kwargs.get("user_stack") or [self.frame_summary()]
                    setattr(error, "real_stack", list(stack))  # noqa: B010
            _broadcast.tell("graph_broke", error, str(reason))
        return original(self, *args, **kwargs)

    return log_graph_break


def _wrap_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_user_compiler(self: Any, gm: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = original(self, gm, *args, **kwargs)
        operations = sum(node.op in ("call_function", "call_method", "call_module") for node in gm.graph.nodes)
        traced = list(getattr(self.tracing_context, "traced_code", None) or [])
        code = getattr(getattr(self, "root_tx", None), "f_code", None)
        runs = [listener.graph_compiled(operations, code, traced) for listener in _broadcast.listeners]

        @functools.wraps(compiled, updated=())
        def counted(*inputs: Any) -> Any:
            for ran in runs:
                ran()
            return compiled(*inputs)

        return counted

    return call_user_compiler


def _region_frame(frame: FrameType | None) -> FrameType | None:
    """The frame of Dynamo's wrapper around a compiled callable, if that is who calls; else None."""
    if frame is None or not frame.f_code.co_filename.endswith("eval_frame.py"):
        return None
    return frame if {"fn", "callback"} <= set(frame.f_code.co_freevars) else None


def _wrap_enter(original: Callable[..., Any]) -> Callable[..., Any]:
    def _callback_from_stance(callback: Any) -> Any:
        active = original(callback)
        frame = _region_frame(sys._getframe(1))
        if frame is not None and callable(callback):
            _broadcast.open_regions.append((id(frame), False))
            given = frame.f_locals.get("args")
            arguments = given if isinstance(given, tuple) else ()
            _broadcast.tell("region_entered", frame.f_locals.get("fn"), arguments, callable(active))
        return active

    return _callback_from_stance


def _wrap_leave(original: Callable[..., Any]) -> Callable[..., Any]:
    def _maybe_set_eval_frame(callback: Any) -> Any:
        frame = _region_frame(sys._getframe(1))
        if frame is not None and _broadcast.open_regions and _broadcast.open_regions[-1][0] == id(frame):
            # The wrapper calls this twice, once after it entered and once in its `finally`: the second is the leaving.
            if _broadcast.open_regions[-1][1]:
                _broadcast.open_regions.pop()
                _broadcast.tell("region_left")
            else:
                _broadcast.open_regions[-1] = (id(frame), True)
        return original(callback)

    return _maybe_set_eval_frame


_NAMED = {entry.name: entry for entry in PRIVATE_NAMES}
_WRAPPERS: tuple[tuple[str, Callable[[Any], Callable[..., Any]]], ...] = (
    ("_compile", _wrap_compile),
    ("get_and_maybe_log_recompilation_reasons", _wrap_reasons),
    ("exceeds_recompile_limit", _wrap_limit),
    ("add_skip_reason", _wrap_skip),
    ("_callback_from_stance", _wrap_enter),
    ("_maybe_set_eval_frame", _wrap_leave),
    ("OutputGraph.call_user_compiler", _wrap_backend),
    ("InstructionTranslatorBase.log_graph_break", _wrap_break),
)
