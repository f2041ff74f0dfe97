"""In the interpreter's place: has a server fork the process that was asked for, and stands in front of it.

``launcher.py INTERPRETER FOLDER OWNER ARGUMENTS…``. The first process with new settings of the libraries is the interpreter's
own; a second one with the same settings is worth a server, and so is a run on workers, which are as many processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib

FOLDER = "DIFFOPT_TEST_WARM_PYTHON"
"""The environment variable with the folder that servers listen in."""

_WORKER = "import sys;exec(eval(sys.stdin.readline()))"  # execnet's
_PAGES = "from pytest_diffopt.documentation.processes import serve; serve()"

# Read when a library is imported or loaded: a process with other values needs a server of its own.
_READ_AT_IMPORT = (
    "TORCH",
    "PYTORCH",
    "OMP_",
    "MKL_",
    "OPENBLAS",
    "KMP_",
    "LD_",
    "MALLOC_",
    "CUDA",
    "NVIDIA",
    "TRITON",
    "HF_",
    "HUGGINGFACE",
    "TOKENIZERS_",
    "TRANSFORMERS_",
    "DIFFUSERS_",
    "ACCELERATE_",
    "BNB_",
    "PYTHON",
)
_READ_LATER = {"TORCHINDUCTOR_CACHE_DIR", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}


def is_worth_it(arguments: list[str]) -> bool:
    """Whether a process with these arguments will import the libraries."""
    given = [one for one in arguments if one not in ("-u", "-B")]
    if given[:1] in (["-mpytest"], ["-mpytest_diffopt"]) or os.path.basename((given or [""])[0]) == "pytest":
        return True
    if given[:1] == ["-m"]:
        return given[1:2] in (["pytest"], ["pytest_diffopt"], ["execnet.script.socketserver"])
    return given[:1] == ["-c"] and given[1] in (_WORKER, _PAGES)


def has_workers(arguments: list[str]) -> bool:
    """Whether these are a run of pytest's that starts processes with its own settings."""
    number = arguments.index("-n") + 1 if "-n" in arguments[:-1] else 0
    return "--tx" in arguments or (number > 0 and arguments[number] != "0")


def settings_of(environment: dict[str, str]) -> dict[str, str]:
    """The variables that decide what an import of the libraries gives."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(_READ_AT_IMPORT) and name not in _READ_LATER
    }


def server_of(interpreter: str, folder: str, owner: str, *, at_once: bool) -> socket.socket | None:
    """A connection to the server for this process's settings; None where there is none yet and none is wanted at once."""
    place = f"{folder}/{zlib.crc32(json.dumps(settings_of(dict(os.environ))).encode()):08x}"
    with open(f"{place}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(f"{place}.socket"):
            lock.seek(0)
            if not at_once and not lock.read():
                lock.write("once")
                return None
            program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "server.py")
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            environment["HOME"] = folder  # tests have one each
            with open(f"{place}.log", "wb") as log:
                subprocess.Popen(
                    [interpreter, program, f"{place}.socket", owner],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd=folder,
                )
    connection = socket.socket(socket.AF_UNIX)
    for _ in range(6000):
        try:
            connection.connect(f"{place}.socket")
            return connection
        except OSError:
            time.sleep(0.01)
    return None


def main() -> None:
    interpreter, folder, owner, *arguments = sys.argv[1:]
    asked = is_worth_it(arguments) and os.path.isdir(folder)
    asked = asked and "DIFFOPT_GPU" not in os.environ  # such a GPU is there from the import of torch on, and not forked
    connection = server_of(interpreter, folder, owner, at_once=has_workers(arguments)) if asked else None
    if connection is None:
        os.execv(interpreter, [interpreter, *arguments])
    order = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    text = json.dumps(order).encode()
    socket.send_fds(connection, [len(text).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(text)
    with connection.makefile("r") as answers:
        process = int(answers.readline() or 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: os.kill(process, number))
        for stream in (0, 1, 2):  # whoever reads of it sees its end when the process itself ends
            os.close(stream)
        status = int(answers.readline() or 70)
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
