"""Imports torch and the libraries once, then forks a process for each order that comes: ``server.py SOCKET OWNER``."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
import warnings
from importlib.metadata import entry_points
from typing import Any, NoReturn

LIBRARIES = (
    *("pydantic", "rich.console", "numpy", "sybil", "PIL.Image"),
    *("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codecache", "torch._dynamo.eval_frame"),
    *("transformers", "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5"),
    *("diffusers", "diffusers.hooks", "diffusers.quantizers.auto", "diffusers.pipelines.pipeline_utils"),
    *("diffusers.pipelines.flux.pipeline_flux", "diffusers.pipelines.wan.pipeline_wan"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "diffusers.pipelines.auto_pipeline"),
    *("accelerate", "accelerate.hooks", "bitsandbytes"),
)


def main() -> None:
    place, owner = sys.argv[1], int(sys.argv[2])
    base = sys.path[1:]  # without this program's folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            importlib.import_module(name)
    plugins = {entry.module.split(".")[0] for entry in entry_points(group="pytest11")}
    for name in [one for one in sys.modules if one.split(".")[0] in plugins]:
        del sys.modules[name]  # pytest rewrites the assertions in plugins when it imports them itself
    gc.collect()
    gc.freeze()  # what is imported need not be looked at, nor copied, in the processes that are forked
    sys.executable = f"{os.path.dirname(place)}/python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}.new")
    listener.listen(64)
    os.rename(f"{place}.new", place)
    Server(listener, base).serve(place, owner)


class Server:
    """Forks, and tells each launcher how its process ended."""

    def __init__(self, listener: socket.socket, base: list[str]) -> None:
        self.listener = listener
        self.base = base
        self.selector = selectors.DefaultSelector()

    def serve(self, place: str, owner: int) -> None:
        """Until the owner ends, or its folder is gone."""
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.selector.register(os.pidfd_open(owner), selectors.EVENT_READ, lambda: os._exit(0))
        while os.path.exists(place):
            for key, _ in self.selector.select(timeout=1.0):
                key.data()

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        head, streams, _, _ = socket.recv_fds(connection, 4, 3)
        if len(head) < 4:
            connection.close()
            return
        length, text = int.from_bytes(head, "big"), b""
        while len(text) < length:
            text += connection.recv(length - len(text))
        process = os.fork()
        if process == 0:
            self.become(json.loads(text), streams, connection)
        for stream in streams:
            os.close(stream)
        connection.sendall(f"{process}\n".encode())
        ended = os.pidfd_open(process)

        def reap() -> None:
            _, status = os.waitpid(process, 0)
            self.selector.unregister(ended)
            self.selector.unregister(connection)
            os.close(ended)
            with contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()

        def abandoned() -> None:  # the launcher was killed
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
            reap()

        self.selector.register(ended, selectors.EVENT_READ, reap)
        self.selector.register(connection, selectors.EVENT_READ, abandoned)

    def become(self, order: dict[str, Any], streams: list[int], connection: socket.socket) -> NoReturn:
        """In the forked process: run what was asked for as the interpreter would, and end."""
        status = 70
        try:
            os.setsid()
            for key in list(self.selector.get_map().values()):
                os.close(key.fd)
            self.selector.close()
            connection.detach()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.sched_setaffinity(0, order["cores"])
            os.environ.clear()
            os.environ.update(order["environment"])
            os.chdir(order["folder"])
            tempfile.tempdir = None  # that of the environment which the server started with
            cache_dir_utils = sys.modules["torch._inductor.runtime.cache_dir_utils"]
            cache_dir_utils.cache_dir()  # sets a variable where it is not set, as torch does when it is imported
            status = run(order["arguments"], self.base)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    status = status or 120  # as the interpreter ends where its output cannot be written
            os._exit(status)


def run(arguments: list[str], base: list[str]) -> int:
    """What the interpreter does with these arguments; returns its exit status."""
    while arguments[0] in ("-u", "-B"):
        if arguments.pop(0) == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        else:
            sys.dont_write_bytecode = True
    if arguments[0].startswith("-m") and len(arguments[0]) > 2:
        arguments[:1] = ["-m", arguments[0][2:]]
    script = "" if arguments[0].startswith("-") else arguments[0]
    how, what, *rest = ["script", *arguments] if script else arguments
    path = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    first = {"-m": os.getcwd(), "-c": "", "script": os.path.dirname(os.path.realpath(script))}[how]
    sys.path[:] = [first, *path, *base]
    importlib.invalidate_caches()
    sys.argv = [script or how, *rest]
    status = 0
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif how == "script":
            runpy.run_path(what, run_name="__main__")
        else:
            main = types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return status


if __name__ == "__main__":
    main()
