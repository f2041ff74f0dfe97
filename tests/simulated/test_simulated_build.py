"""The library is built once, whole or not at all, and says what it lacks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pytest_diffopt.accelerators.simulated import build
from pytest_diffopt.documentation.processes import Server
from pytest_diffopt.errors import DiffoptError, UnverifiableError
from pytest_diffopt.notices import Show, shown_by

ENTER = "from pytest_diffopt.accelerators.simulated import simulated_cuda; simulated_cuda().__enter__()"

# A compiler that is quick: it notes each call and makes what it was told to make.
COMPILER = """#!{python}
import sys, time, pathlib

ENTERS = False  # see conftest.py
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("quick 1.0")
    raise SystemExit
with open({log!r}, "a") as log:
    print(arguments[arguments.index("-o") + 1], *(a for a in arguments if a.startswith("-further")), file=log)
time.sleep(0.05)
pathlib.Path(arguments[arguments.index("-o") + 1]).write_text("made")
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announced: list[str]) -> Path:
    """What the quick compiler made, a line each; the cache is empty."""
    log, compiler = tmp_path / "log", tmp_path / "quick-c++"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(log)))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(tmp_path / "cache"))
    return log


@pytest.fixture
def announced() -> Iterator[list[str]]:
    """What was announced."""
    texts: list[str] = []

    @contextlib.contextmanager
    def listen(text: str, after_seconds: float) -> Iterator[Show]:
        texts.append(text)
        yield texts.append

    with shown_by(listen):
        yield texts


def made(log: Path) -> list[str]:
    return [Path(line).name for line in log.read_text().splitlines()]


def test_it_is_built_once_and_then_found(log: Path) -> None:
    first = build.ensure_library()
    count = len(list(build.SOURCES.glob("*.cpp")))
    assert len(made(log)) == count + 1
    assert made(log)[-1] == "device.so"
    assert build.ensure_library() == first
    assert len(made(log)) == count + 1
    assert sorted(path.name for path in first.parent.iterdir()) == ["device.so", "device.so.sha256", "lock"]


def test_it_is_announced_with_how_far_it_is_and_only_where_it_is_built(log: Path, announced: list[str]) -> None:
    build.ensure_library()
    count = len(list(build.SOURCES.glob("*.cpp")))
    what = f"building the simulated accelerator (once for torch {torch.__version__}, in about a minute)"
    assert announced == [what, *(f"{what}: {done} of {count} files" for done in range(1, count + 1))]
    build.ensure_library()
    assert len(announced) == count + 1


def test_the_process_that_runs_pages_lets_its_parent_announce_it(log: Path, announced: list[str]) -> None:
    with Server("sim") as server, pytest.raises(DiffoptError):  # what the quick compiler made is no library
        server.run(lambda folder: pytest.fail("nothing can be run"), seconds=60)
    assert made(log)[-1] == "device.so"
    assert [text.partition(" (")[0] for text in announced] == ["building the simulated accelerator"]


@pytest.mark.parametrize("damage", ["truncated", "of another", "gone", "no checksum"])
def test_a_damaged_library_is_built_again(log: Path, damage: str) -> None:
    library = build.ensure_library()
    if damage == "truncated":
        library.write_bytes(b"ma")
    elif damage == "of another":
        library.write_bytes(b"other")
    elif damage == "gone":
        library.unlink()
    else:
        library.with_name("device.so.sha256").unlink()
    before = len(made(log))
    assert build.ensure_library().read_text() == "made"
    assert len(made(log)) == 2 * before


def test_processes_at_once_build_it_once(log: Path) -> None:
    # the package's own import would build with the quick compiler: the module alone is what is tested
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('build', {build.__file__!r}); "
        "build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build); build.ensure_library()"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [one.wait() for one in running] == [0] * 4
    assert made(log).count("device.so") == 1


def test_another_torch_compiler_or_source_is_another_library(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = build.find_compiler()
    keys = {build.cache_key(compiler)}
    keys.add(build.cache_key((*compiler, "-m64")))
    with monkeypatch.context() as changed:
        changed.setattr("torch.__version__", "9.9.9")
        keys.add(build.cache_key(compiler))
    copied = tmp_path / "csrc"
    copied.mkdir()
    for source in build.SOURCES.iterdir():
        (copied / source.name).write_text(source.read_text() + "// changed\n")
    monkeypatch.setattr(build, "SOURCES", copied)
    keys.add(build.cache_key(compiler))
    assert len(keys) == 4


def test_further_flags_make_another_library_and_reach_the_compiler_and_the_linker(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build.ensure_library()
    before = len(made(log))
    monkeypatch.setenv("DIFFOPT_SIM_CXXFLAGS", "-further-one '-further two'")
    assert build.ensure_library() != plain
    lines = log.read_text().splitlines()
    assert not any("-further" in line for line in lines[:before])
    assert all(line.endswith(".o -further-one -further two") for line in lines[before:-1])
    assert lines[-1].endswith("device.so -further-one -further two")


def test_a_compiler_that_fails_leaves_nothing_and_is_quoted(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Path(os.environ["CXX"])
    text = compiler.read_text()
    compiler.write_text(text.replace("time.sleep(0.05)", 'raise SystemExit("device.cpp:3: error: no such thing")'))
    with pytest.raises(
        UnverifiableError, match=r"was not built: quick-c\+\+ failed with device\.cpp:3: error: no such"
    ):
        build.ensure_library()
    folder = build.cache_directory() / "simulated" / build.cache_key(build.find_compiler())
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_no_compiler_is_one_sentence_that_says_what_to_install(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "DIFFOPT_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    ran = subprocess.run(
        [sys.executable, "-c", ENTER],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        "pytest_diffopt.errors.UnverifiableError: The simulated accelerator is built on first use and needs a C++20 "
        "compiler; there is no g++, clang++ or c++ on PATH. Install one (Debian and Ubuntu: apt-get install g++; "
        "Fedora: dnf install gcc-c++; conda: conda install gxx; macOS: xcode-select --install)."
    )


def test_a_compiler_that_was_named_and_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(UnverifiableError, match="CXX is 'no-such-compiler -O2', which is not there"):
        build.find_compiler()


def test_a_cache_that_cannot_be_written_is_said(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(blocked))
    with pytest.raises(UnverifiableError, match=r"cannot be built below .* set DIFFOPT_CACHE_DIR to a directory"):
        build.ensure_library()


def test_flags_that_no_shell_could_split_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFOPT_SIM_CXXFLAGS", "-O0 '")
    with pytest.raises(ValueError, match=r"DIFFOPT_SIM_CXXFLAGS: found \"-O0 '\" \(No closing quotation\)"):
        build.further_flags()


def test_a_whole_library_that_cannot_be_loaded_says_what_to_remove(log: Path) -> None:
    library = build.ensure_library()  # the quick compiler's, which is text
    ran = subprocess.run([sys.executable, "-c", ENTER], capture_output=True, text=True, check=False)
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("pytest_diffopt.errors.UnverifiableError: The simulated GPU was built and cannot be loaded")
    assert last.endswith(f"remove {library.parent}, and it is built again.")


def test_torchs_compiler_is_not_imported_for_it() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import pytest_diffopt.accelerators.simulated; "
        "print([m for m in set(sys.modules) - before if m.startswith(('torch._inductor', 'torch._dynamo'))])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
