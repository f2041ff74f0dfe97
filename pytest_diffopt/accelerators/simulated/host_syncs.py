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
from dataclasses import dataclass
from typing import Any

import torch

from pytest_diffopt.source_places import CodeFrame, RawFrame, code_frame, whose

_ops = torch.ops.pytest_diffopt_sim

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_GPU = os.path.dirname(os.path.abspath(__file__)) + os.sep


@dataclass(frozen=True)
class HostSync:
    """A place at which the host waited.

    Attributes:
        operation: that waited: ``"aten::_local_scalar_dense"`` (``.item()``, ``bool()``, …), ``"aten::copy_ to the host"``,
            ``"aten::nonzero"``, ``"cudaStreamSynchronize"``, ….
        device: its index.
        mark: the last one that :func:`mark_syncs` was given before it.
        count: how often, under this mark.
        in_torch: whether ``torch.cuda.set_sync_debug_mode`` sees it; where CUDA's runtime or a library waits, it does not.
        place: the innermost line that is not torch's, nor a library's own ``Module.to`` or tensor class; None for none.
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
    frames: tuple[RawFrame, ...]


class SyncRecording:
    """Where the host waits, from :meth:`start` to :meth:`stop`. There may be several at once.

    Attributes:
        mark: that every later wait says.
    """

    def __init__(self) -> None:
        self.mark = 0
        self._counts: dict[tuple[str, int, int, bool, tuple[RawFrame, ...]], int] = {}

    def start(self) -> None:
        """Begin, and forget what was written down before."""
        self.mark = 0
        self._counts.clear()
        with _lock:
            if self not in _open:
                _open.append(self)
            _ops.set_sync_listener(_address)

    def stop(self) -> None:
        """End. What was written down stays."""
        with _lock:
            if self in _open:
                _open.remove(self)
            if not _open:
                _ops.set_sync_listener(0)

    def add(self, operation: str, device: int, in_torch: bool, frames: tuple[RawFrame, ...]) -> None:
        """The host waited."""
        key = (operation, device, self.mark, in_torch, frames)
        self._counts[key] = self._counts.get(key, 0) + 1

    def syncs(self) -> list[HostSync]:
        """Where the host waited, each place once under each mark, in the order in which it was met."""
        with _lock:
            found = list(self._counts.items())
        return [
            HostSync(operation, device, mark, count, in_torch, _place(frames), _user(frames), frames)
            for (operation, device, mark, in_torch, frames), count in found
        ]


_lock = threading.RLock()  # a wait inside of a wait: garbage is collected anywhere
_open: list[SyncRecording] = []


def stop_recordings() -> None:
    """The GPU is given back: whoever still recorded its waits has ended."""
    for recording in list(_open):
        recording.stop()


def _heard(operation: bytes, device: int, in_torch: int) -> None:
    frames = []
    frame = sys._getframe().f_back  # a thread of autograd has none
    while frame is not None:
        code = frame.f_code
        frames.append((code.co_filename, frame.f_lineno, getattr(code, "co_qualname", code.co_name)))
        frame = frame.f_back
    with _lock:
        for recording in _open:
            recording.add(operation.decode(), device, bool(in_torch), tuple(frames))


def leave_alone(function: Callable[..., object]) -> None:
    """The GPU calls it in the midst of code that Dynamo compiles: Dynamo is to compile neither it nor what it calls."""
    evaluation: Any = torch._C._dynamo.eval_frame
    skip = evaluation._FrameAction.SKIP
    evaluation.set_code_exec_strategy(function.__code__, evaluation._FrameExecStrategy(skip, skip))


leave_alone(_heard)
_listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)(_heard)
_address = ctypes.cast(_listener, ctypes.c_void_p).value

_recording = SyncRecording()


def record_syncs(enabled: bool = True) -> None:
    """Begin (forgetting the last recording) or end to write down where the host waits."""
    if enabled:
        _recording.start()
    else:
        _recording.stop()


def mark_syncs(mark: int) -> None:
    """Let every later wait say ``mark``."""
    _recording.mark = mark


def syncs() -> list[HostSync]:
    """Where the host waited since :func:`record_syncs`, each place once under each mark, in the order in which it was met."""
    return _recording.syncs()


def _place(frames: tuple[RawFrame, ...]) -> CodeFrame | None:
    return next((code_frame(frame) for frame in frames if not _is_torchs(frame[0]) and not _moves(frame)), None)


def _moves(frame: RawFrame) -> bool:
    """Whether it is a library's own ``Module.to``, or what a tensor of its own class does with each operation: who moves the
    module, or computes, is the place."""
    file, _, function = frame
    names = ("to", "cuda", "cpu", "__torch_function__", "__torch_dispatch__")
    return function.rpartition(".")[2] in names and whose(file) == "library"


def _user(frames: tuple[RawFrame, ...]) -> CodeFrame | None:
    return next((code_frame(frame) for frame in frames if whose(frame[0]) == "user"), None)


def _is_torchs(file: str) -> bool:
    """Whether a file is torch's, the simulated GPU's, or code that torch wrote."""
    return file.startswith((_TORCH, _GPU, "<eval_with_key>", "<frozen ")) or "torchinductor_" in file
