"""Builds the device's library out of ``csrc/``, once for each torch and compiler, into the user's cache.

Below :func:`pytest_diffopt.user_cache.cache_directory`::

    simulated/<key>/device.so           whole, or not there: it is built aside and moved in one step
    simulated/<key>/device.so.sha256    what it must hold; another content is built again
    simulated/<key>/lock                held while it is built, so that processes that need it at once build it once
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pytest_diffopt.errors import UnverifiableError
from pytest_diffopt.notices import announced
from pytest_diffopt.user_cache import cache_directory

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "device.so"
# -O1: the arithmetic is torch's own, and -O2 takes a third longer to build for no call that is faster.
FLAGS = ("-std=c++20", "-fPIC", "-O1", "-w", "-fvisibility=hidden", "-DAT_PER_OPERATOR_HEADERS")
# More of them, for compiling and linking; each set is a library of its own in the cache.
FLAGS_VARIABLE = "DIFFOPT_SIM_CXXFLAGS"

_LOCK_SECONDS = 600.0
# The longest first: with two processors they make the build's time.
_ORDER = ("attention", "kernels", "device", "python", "fallback", "recurrent", "shapes", "rules")


def ensure_library() -> Path:
    """The built library, from the cache or built now.

    Raises:
        UnverifiableError: there is no C++ compiler, it failed, or the cache cannot be written.
    """
    compiler = find_compiler()
    try:
        directory = cache_directory() / "simulated" / cache_key(compiler)
        library = directory / LIBRARY
        if _is_whole(library):
            return library
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / "lock"):
            if not _is_whole(library):
                _build(compiler, library)
    except OSError as error:
        raise UnverifiableError(
            f"The simulated accelerator cannot be built below {cache_directory()} ({error}); "
            f"set DIFFOPT_CACHE_DIR to a directory that can be written."
        ) from error
    return library


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler as a command: ``$CXX``, else the first of g++, clang++, c++.

    Raises:
        UnverifiableError: there is none.
    """
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if command and (path := shutil.which(command[0])):
            return (path, *command[1:])
    else:
        for name in ("g++", "clang++", "c++"):
            if path := shutil.which(name):
                return (path,)
    looked_for = f"CXX is {chosen!r}, which is not there" if chosen else "there is no g++, clang++ or c++ on PATH"
    raise UnverifiableError(
        f"The simulated accelerator is built on first use and needs a C++20 compiler; {looked_for}. "
        f"Install one (Debian and Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
        f"conda: conda install gxx; macOS: xcode-select --install)."
    )


def further_flags() -> tuple[str, ...]:
    """``$DIFFOPT_SIM_CXXFLAGS``, as a shell would split it.

    Raises:
        ValueError: a shell could not split it.
    """
    text = os.environ.get(FLAGS_VARIABLE, "")
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(
            f"{FLAGS_VARIABLE}: found {text!r} ({error}); it takes flags as a shell splits them"
        ) from error


def cache_key(compiler: tuple[str, ...]) -> str:
    """Of everything that a built library depends on."""
    said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for part in (
        torch.__version__,
        f"cxx11-abi={torch._C._GLIBCXX_USE_CXX11_ABI}",
        f"python={sys.implementation.cache_tag}",
        f"platform={sysconfig.get_platform()}",
        f"compiler={shlex.join(compiler)} {said.splitlines()[:1]}",
        f"flags={FLAGS + further_flags()}",
        *(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sorted(SOURCES.iterdir()) if path.is_file()),
    ):
        digest.update(part.encode() + b"\0")
    return f"torch{torch.__version__.split('+')[0]}-{digest.hexdigest()[:16]}"


def _is_whole(library: Path) -> bool:
    try:
        expected = library.with_name(f"{library.name}.sha256").read_text(encoding="utf-8").strip()
        return hashlib.sha256(library.read_bytes()).hexdigest() == expected
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An advisory lock of the operating system: it is free again when its holder is killed."""
    with path.open("w") as file:
        if sys.platform == "win32":  # pragma: no cover
            import msvcrt

            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: tuple[str, ...], library: Path) -> None:
    what = f"building the simulated accelerator (once for torch {torch.__version__}, in about a minute)"
    with announced(what) as show, tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as folder:
        workplace = Path(folder)
        sources = sorted(
            SOURCES.glob("*.cpp"), key=lambda path: _ORDER.index(path.stem) if path.stem in _ORDER else len(_ORDER)
        )
        objects = [workplace / f"{source.stem}.o" for source in sources]
        include = Path(torch.__file__).parent / "include"
        options = [
            *FLAGS,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-I{include}",
            f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
            *further_flags(),
        ]
        done = 0
        with ThreadPoolExecutor(max(os.cpu_count() or 1, 1)) as pool:
            commands = [
                [*compiler, *options, "-c", str(source), "-o", str(target)]
                for source, target in zip(sources, objects, strict=True)
            ]
            for _ in pool.map(_run, commands):
                done += 1
                show(f"{what}: {done} of {len(sources)} files")
        made = workplace / LIBRARY
        libraries = Path(torch.__file__).parent / "lib"
        linking = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-ltorch", "-lc10"]
        _run([*compiler, "-shared", *further_flags(), *map(str, objects), "-o", str(made), *linking])
        checksum = workplace / f"{LIBRARY}.sha256"
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest() + "\n", encoding="utf-8")
        os.replace(made, library)
        os.replace(checksum, library.with_name(checksum.name))


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        lines = (ran.stderr or ran.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it said nothing")
        raise UnverifiableError(
            f"The simulated accelerator was not built: {Path(command[0]).name} failed with {first.strip()} "
            f"(status {ran.returncode}). The command was: {shlex.join(command)}"
        )
