"""A process for each run of a block: forked from one that has the libraries imported and did nothing else, or started anew.

The server is this module, run as a program: it reads an order a line from its input, and answers each with a line. What a
block wrote down comes back in a file of JSON in the block's own folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_diffopt.documentation.order import ENDED
from pytest_diffopt.documentation.record import BlockRun
from pytest_diffopt.errors import DiffoptError, UnverifiableError
from pytest_diffopt.notices import Show, announced, shown_by
from pytest_diffopt.user_cache import cache_directory

if TYPE_CHECKING:
    from pytest_diffopt.documentation.order import Order

RESULT, OUTPUT, STUCK, FAULT = "result.json", "output.txt", "stuck.txt", "fault.txt"
"""Files beside the block's working directory."""

START_SECONDS = 300.0
"""For the import of the libraries, and the building of the simulated device where it is not built yet."""

OUR_CALLS = 2
"""So many times a block's own limit may the calls take that we make once it has ended."""

_GRACE_SECONDS = 2.0
_LOOK_SECONDS = 0.05
_SHOWN_OUTPUT = 2000
_FORKS = ("sim", "cpu")
"""Devices that a forked process may use; the state of a real one does not outlive a fork."""


class Server:
    """Runs blocks, each in a process of its own; a context manager.

    Args:
        device: kind of the accelerator, or ``auto``.
        environment: set for the blocks, such as where the hub's cache is.
        fork: whether to fork a process for each block from one that has the libraries imported; by default where that is
            safe. Else a new one is started for each.

    Attributes:
        kind: of the accelerator in use, once the server has started.
    """

    def __init__(
        self, device: str = "auto", environment: Mapping[str, str] | None = None, *, fork: bool | None = None
    ) -> None:
        self.device = device
        self._fork = fork
        self.environment = dict(environment or {})
        self.kind = ""
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._lock = threading.Lock()
        self._root = Path(tempfile.mkdtemp(prefix="diffopt-page-"))
        self._count = 0

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, order: Callable[[str], Order], *, seconds: float) -> BlockRun:
        """Run one block, or one variant of it.

        Args:
            order: what to run, given the block's own folder.
            seconds: after which it is stopped.

        Raises:
            DiffoptError: the device is not there, or the server cannot be started.
            UnverifiableError: the simulated device cannot be built here.
        """
        return self.run_all([order], seconds=seconds)[0]

    def run_all(self, orders: Sequence[Callable[[str], Order]], *, seconds: float) -> list[BlockRun]:
        """Run some of them at once."""
        with self._lock:
            process = self._started()
            forks = may_fork(self.kind, self._fork)
            runs = [self._folder() for _ in orders]
            try:
                if forks:
                    return self._forked(process, orders, runs, seconds)
                found = []
                for order, folder in zip(orders, runs, strict=True):
                    found += self._forked(self._started(), [order], [folder], seconds)
                    self._stop()  # the next block gets a process of its own
                return found
            finally:
                for folder in runs:
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End the server, and whatever it runs."""
        self._stop()
        shutil.rmtree(self._root, ignore_errors=True)

    def _folder(self) -> Path:
        self._count += 1
        folder = self._root / str(self._count)
        for name in ("work", "tmp", "home"):
            (folder / name).mkdir(parents=True)
        return folder

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        environment = {**os.environ, **_ENVIRONMENT, **self.environment}
        environment.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # a block and its reference run at once: more threads wait for each other
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "inductor"))
        self._errors = errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the server
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()", self.device, str(self._fork)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=self._root,
        )
        started = time.monotonic()
        with contextlib.ExitStack() as shown:
            while text := (ready := self._answer(process, lambda: time.monotonic() > started + START_SECONDS)).get(
                "doing"
            ):
                shown.enter_context(announced(text))
        if "ready" in ready:
            self.kind = ready["ready"]
            return process
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
        self._stop()
        if "error" in ready:
            raise (UnverifiableError if ready.get("unverifiable") else DiffoptError)(ready["error"])
        raise DiffoptError(f"the process that runs blocks could not be started: {last}")

    def _forked(
        self, process: subprocess.Popen[str], orders: Sequence[Callable[[str], Order]], runs: list[Path], seconds: float
    ) -> list[BlockRun]:
        assert process.stdin is not None
        forks = may_fork(self.kind, self._fork)
        for number, (order, folder) in enumerate(zip(orders, runs, strict=True)):
            asked = {
                "run": number,
                "order": dataclasses.asdict(order(str(folder))),
                "folder": str(folder),
                "seconds": seconds,
            }
            with contextlib.suppress(OSError):  # a server that died is found out below
                process.stdin.write(json.dumps(asked) + "\n")
                process.stdin.flush()
        ended: dict[int, dict[str, Any]] = {}
        running = [_Running(number, str(folder), seconds, time.monotonic()) for number, folder in enumerate(runs)]

        def late() -> bool:  # a server that forks stops its blocks by itself, a little earlier
            return all(one.is_late(_GRACE_SECONDS if forks else 0.0) for one in running if one.number not in ended)

        timed_out = False
        while len(ended) < len(orders):
            answer = self._answer(process, late)
            if "run" not in answer:
                timed_out = late()  # else the server ended by itself
                self._stop(at_once=True)
                break
            ended[answer["run"]] = answer
        lost = {"status": process.poll(), "timed_out": timed_out}
        return [_read(folder, ended.get(number, lost), seconds) for number, folder in enumerate(runs)]

    def _answer(self, process: subprocess.Popen[str], late: Callable[[], bool]) -> dict[str, Any]:
        """The next line of the server; empty where it ended or is silent for too long."""
        found: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: found.append(process.stdout.readline()), daemon=True)  # type: ignore[union-attr]
        reader.start()
        while reader.is_alive() and not late():
            reader.join(_LOOK_SECONDS)
        if not found or not found[0].strip():
            return {}
        answer: dict[str, Any] = json.loads(found[0])
        return answer

    def _stop(self, *, at_once: bool = False) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if at_once:
            process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError):
            process.stdout.close()  # type: ignore[union-attr]
        if self._errors is not None:
            self._errors.close()


_ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of processes would outlive its block
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "MPLBACKEND": "agg",
}


def _read(folder: Path, answer: Mapping[str, Any], seconds: float) -> BlockRun:
    """What a run of a block left in its folder."""
    output = _tail(folder / OUTPUT)
    if answer.get("timed_out"):
        if (folder / ENDED).exists():
            how = f"the block ended, and the calls that are made after it did not end within {OUR_CALLS * seconds:g} s"
            return BlockRun("timed out", how=how, output=output, own_code_ended=True)
        stuck = _stuck_line(folder / STUCK)
        where = f", it was at line {stuck}" if stuck else ""
        return BlockRun("timed out", how=f"it did not end within {seconds:g} s{where}", output=output)
    try:
        run = BlockRun.from_dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        if fault := _tail(folder / FAULT).strip():
            said = f"pytest-diffopt itself failed while it ran the block: {fault.splitlines()[-1]}"
            raise DiffoptError(f"{said}\n{fault}") from None
        return BlockRun("died", how=_how(answer.get("status")), output=output)
    return dataclasses.replace(run, output=output)


def _how(status: int | None) -> str:
    if status is None:
        return "its process was lost"
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    return f"its process ended with exit status {status} before the block was over"


def _tail(path: Path) -> str:
    try:
        return path.read_bytes()[-_SHOWN_OUTPUT:].decode("utf-8", "replace")
    except OSError:
        return ""


def _stuck_line(path: Path) -> int:
    """The line of the page in the traceback that was written when the time was up; 0 where there is none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return int(said["line"])


def may_fork(kind: str, wanted: bool | None) -> bool:
    """Whether blocks are run in forked processes."""
    if wanted is not None:
        return wanted and hasattr(os, "fork")
    return kind in _FORKS and hasattr(os, "fork")


# The server.


def serve() -> None:
    """Read orders from the input until it ends, and answer each. The libraries are imported first."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints must not be taken for an answer
    parent = os.getppid()
    from pytest_diffopt.accelerators import select

    @contextlib.contextmanager
    def announcing(text: str, after_seconds: float) -> Iterator[Show]:
        answers.write(json.dumps({"doing": text}) + "\n")
        yield lambda text: None

    try:
        with shown_by(announcing):
            accelerator = select(sys.argv[1])
        _import_libraries()
    except Exception as error:
        answers.write(json.dumps({"error": str(error), "unverifiable": isinstance(error, UnverifiableError)}) + "\n")
        return
    answers.write(json.dumps({"ready": accelerator.kind}) + "\n")
    forks = may_fork(accelerator.kind, {"True": True, "False": False}.get(sys.argv[2]))
    running: dict[int, _Running] = {}
    try:
        for line in _lines(lambda: _reap(running, answers), parent):
            asked = json.loads(line)
            if not forks:
                answers.write(json.dumps(_in_this_process(asked, accelerator)) + "\n")
                continue
            process = os.fork()
            if process == 0:
                answers.close()
                _child(asked, accelerator)
            running[process] = _Running(asked["run"], asked["folder"], asked["seconds"], time.monotonic())
    finally:
        for process in running:
            _kill(process)


@dataclasses.dataclass
class _Running:
    """A block's process."""

    number: int
    folder: str
    seconds: float
    started: float

    def is_late(self, grace: float = 0.0) -> bool:
        """Whether its time is up: what we call after the block's own code has time of its own."""
        passed = time.monotonic() - self.started - grace
        if passed > self.seconds and os.path.exists(f"{self.folder}/{ENDED}"):
            return passed > (1 + OUR_CALLS) * self.seconds
        return passed > self.seconds


def _import_libraries() -> None:
    """What blocks import, once for all of them."""
    import importlib
    import warnings

    from pytest_diffopt.libraries import quiet_imports, silent_about_being_offline

    warnings.simplefilter("ignore")
    if os.environ.get("HF_HUB_OFFLINE"):  # replicas stand for what blocks name
        silent_about_being_offline()
    for name in (
        *("numpy", "PIL.Image", "torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codecache"),
        *("transformers", "diffusers", "diffusers.hooks", "diffusers.quantizers", "diffusers.quantizers.auto"),
        *("diffusers.pipelines.pipeline_utils", "diffusers.pipelines.auto_pipeline", "diffusers.models"),
        *("accelerate.hooks", "bitsandbytes", "transformers.models.clip.modeling_clip", "transformers.models.t5"),
        *("transformers.models.t5.modeling_t5", "pytest_diffopt.documentation.observing"),
    ):
        with contextlib.suppress(Exception), quiet_imports():
            importlib.import_module(name)
    with contextlib.suppress(Exception):
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    with contextlib.suppress(Exception), quiet_imports():
        from diffusers import StableDiffusionXLPipeline, WanPipeline  # noqa: F401


def _lines(meanwhile: Callable[[], None], parent: int) -> Iterator[str]:
    """Lines of the input, and something to do while there is none."""
    import selectors

    buffered = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while os.getppid() == parent:
            meanwhile()
            if not selector.select(timeout=0.02):
                continue
            data = os.read(0, 1 << 16)
            if not data:
                return
            buffered += data
            while b"\n" in buffered:
                line, _, buffered = buffered.partition(b"\n")
                yield line.decode()


def _reap(running: dict[int, _Running], answers: Any) -> None:
    for process, block in list(running.items()):
        ended, status = os.waitpid(process, os.WNOHANG)
        timed_out = not ended and block.is_late()
        if timed_out:
            _kill(process)
            _, status = os.waitpid(process, 0)
        if ended or timed_out:
            del running[process]
            _kill(process)  # what it started goes with it
            code = os.waitstatus_to_exitcode(status)
            answers.write(json.dumps({"run": block.number, "status": code, "timed_out": timed_out}) + "\n")


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def _child(asked: Mapping[str, Any], accelerator: Any) -> None:
    """In the forked process: run the block, and end."""
    try:
        os.setsid()
        _run_order(asked, accelerator)
    except BaseException:
        import traceback

        with open(f"{asked['folder']}/{FAULT}", "w", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        os._exit(70)
    os._exit(0)


def _in_this_process(asked: Mapping[str, Any], accelerator: Any) -> dict[str, Any]:
    _run_order(asked, accelerator)
    return {"run": asked["run"], "status": 0, "timed_out": False}


def _run_order(asked: Mapping[str, Any], accelerator: Any) -> None:
    from pytest_diffopt.documentation.confinement import confine_writes
    from pytest_diffopt.documentation.observing import run_block
    from pytest_diffopt.documentation.order import Order

    folder = asked["folder"]
    order = Order.from_dict(asked["order"])
    _tell_where_it_is_stuck(order.page, f"{folder}/{STUCK}", asked["seconds"])
    output = os.open(f"{folder}/{OUTPUT}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    shared = _compiler_caches()  # named after the temporary folder of before
    os.environ |= {"HOME": f"{folder}/home", "TMPDIR": f"{folder}/tmp"}
    tempfile.tempdir = None
    os.chdir(f"{folder}/work")
    sys.argv = [order.page]
    confine_writes((folder, "/dev", "/proc/self", *shared))
    run = run_block(order, accelerator)
    sys.stdout.flush()
    draft = f"{folder}/{RESULT}.draft"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(run.to_dict(), file)
    os.replace(draft, f"{folder}/{RESULT}")


def _compiler_caches() -> tuple[str, ...]:
    """The folders of Inductor's caches, which blocks share with everybody."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folders = (os.environ["TORCHINDUCTOR_CACHE_DIR"], default_cache_dir())  # headers go to the second one in any case
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    return folders


def _tell_where_it_is_stuck(page: str, path: str, seconds: float) -> None:
    """Shortly before the time is up, write down which line of the page is running."""
    main = threading.get_ident()

    def tell() -> None:
        frame = sys._current_frames().get(main)
        line = 0
        while frame is not None and not line:
            line = frame.f_lineno if frame.f_code.co_filename == page else 0
            frame = frame.f_back
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"line": line}, file)

    timer = threading.Timer(max(seconds * 0.5, seconds - 1.0), tell)
    timer.daemon = True
    timer.start()
