"""Where the host waits for the simulated GPU, as it would for a real one: which operation, and from which line.

A wait is counted where CUDA's own kernel or copy makes the host wait: ``.item()``, ``bool()``, ``nonzero``, a mask as an
index, a blocking copy, ``synchronize``. ``torch.cuda.set_sync_debug_mode`` sees those that torch itself makes, as on CUDA.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pytest_diffopt.source_places import CodeFrame, code_frame, whose

_ops = torch.ops.pytest_diffopt_sim

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_GPU = os.path.dirname(os.path.abspath(__file__)) + os.sep

_Raw = tuple[str, int, str]


class HostSync(NamedTuple):
    """A place at which the host waited.

    Attributes:
        operation: that waited: ``"aten::_local_scalar_dense"`` (``.item()``, ``bool()``, …), ``"aten::copy_ to the host"``,
            ``"aten::nonzero"``, ``"cudaStreamSynchronize"``, ….
        device: its index.
        mark: the last one that :func:`mark_syncs` was given before it.
        count: how often, under this mark.
        in_torch: whether ``torch.cuda.set_sync_debug_mode`` sees it; where CUDA's runtime or a library waits, it does not.
        place: the innermost line that is not torch's; None where there is none.
        user: the innermost line of the user's own code; None where there is none.
        frames: every line from the innermost on, each a file, a line and a function.
    """

    operation: str
    device: int
    mark: int
    count: int
    in_torch: bool
    place: CodeFrame | None
    user: CodeFrame | None
    frames: tuple[_Raw, ...]


class _Recording:
    """What was heard, by place and mark, in the order in which it was heard first."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, int, bool, int, tuple[_Raw, ...]], int] = {}
        self.mark = 0
        self.lock = threading.RLock()


_recording = _Recording()


def _heard(operation: bytes, device: int, in_torch: int) -> None:
    frames = []
    frame = sys._getframe().f_back  # a thread of autograd has none
    while frame is not None:
        code = frame.f_code
        frames.append((code.co_filename, frame.f_lineno, getattr(code, "co_qualname", code.co_name)))
        frame = frame.f_back
    with _recording.lock:
        key = (operation.decode(), device, bool(in_torch), _recording.mark, tuple(frames))
        _recording.counts[key] = _recording.counts.get(key, 0) + 1


def _leave_alone(function: Callable[..., object]) -> None:
    """The GPU calls it in the midst of code that Dynamo compiles: Dynamo is to compile neither it nor what it calls."""
    evaluation: Any = torch._C._dynamo.eval_frame
    skip = evaluation._FrameAction.SKIP
    evaluation.set_code_exec_strategy(function.__code__, evaluation._FrameExecStrategy(skip, skip))


_leave_alone(_heard)
_listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)(_heard)


def record_syncs(enabled: bool = True) -> None:
    """Begin (forgetting the last recording) or end to write down where the host waits."""
    if enabled:
        _recording.counts.clear()
        _recording.mark = 0
    _ops.set_sync_listener(ctypes.cast(_listener, ctypes.c_void_p).value if enabled else 0)


def mark_syncs(mark: int) -> None:
    """Let every later wait say ``mark``."""
    _recording.mark = mark


def syncs() -> list[HostSync]:
    """Where the host waited, each place once under each mark, in the order in which it was met."""
    with _recording.lock:
        found = list(_recording.counts.items())
    return [
        HostSync(operation, device, mark, count, in_torch, _place(frames), _user(frames), frames)
        for (operation, device, in_torch, mark, frames), count in found
    ]


def _place(frames: tuple[_Raw, ...]) -> CodeFrame | None:
    return next((code_frame(frame) for frame in frames if not _is_torchs(frame[0])), None)


def _user(frames: tuple[_Raw, ...]) -> CodeFrame | None:
    return next((code_frame(frame) for frame in frames if whose(frame[0]) == "user"), None)


def _is_torchs(file: str) -> bool:
    """Whether a file is torch's, the simulated GPU's, or code that torch wrote."""
    return file.startswith((_TORCH, _GPU, "<eval_with_key>", "<frozen ")) or "torchinductor_" in file
