"""Every command-line and ini option, one row each, and the frozen :class:`Settings` that they become.

The command line's default is None, so that the ini option of the same name, with underscores, holds the default.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_diffopt.errors import DiffoptError


@dataclass(frozen=True)
class Settings:
    """What the options say, parsed once; a field a row of :data:`OPTIONS`.

    Attributes:
        gpu: the simulated GPU of the whole session, by the name of its card; None for none.
        gpu_devices: how many of them.
        gpu_memory: of each, in bytes; None for the card's own.
        device: kind of the accelerator, or ``auto``: the first real one there is, else the simulated one.
        compile_backend: overrides the compile backend of every recipe; None leaves it to the recipe.
        hub: whether pipelines may be downloaded from the hub.
        strict: whether unverified verdicts and skipped recipes fail the run.
        baseline: the folder of baselines that recipes are held against; None for none.
        update_baseline: whether what recipes do is recorded there instead.
        report: where reports of the run are written; the suffix says which kind.
        docs: whether documentation pages are collected.
        docs_timeout: seconds after which a block of a page is stopped.
        docs_extract: where the recipes of pages are written; None for nowhere.
        docs_report: where the report of pages is written, as Markdown; None for nowhere.
    """

    gpu: str | None = None
    gpu_devices: int = 1
    gpu_memory: int | None = None
    device: str = "auto"
    compile_backend: str | None = None
    hub: bool = False
    strict: bool = False
    baseline: str | None = None
    update_baseline: bool = False
    report: tuple[str, ...] = ()
    docs: bool = False
    docs_timeout: float = 300.0
    docs_extract: str | None = None
    docs_report: str | None = None

    @property
    def header(self) -> str:
        """The settings in the line that pytest prints at the start."""
        backend = self.compile_backend or "as the recipe says"
        parts = [f"device {self.device}", f"compile backend {backend}"]
        parts += ["hub allowed"] if self.hub else []
        parts += ["strict"] if self.strict else []
        parts += (
            [f"baseline {self.baseline}{', recorded anew' if self.update_baseline else ''}"] if self.baseline else []
        )
        parts += ["documentation pages"] if self.docs else []
        return f"diffopt: {', '.join(parts)}"


@dataclass(frozen=True, eq=False, repr=False)
class Option:
    """One option.

    Args:
        name: of the field in :class:`Settings`.
        help: one line for ``--help``.
        default: held by the ini option.
        takes: what a value may be, for the error that rejects another one.
        parse: text to value; raises ValueError where the text is wrong. None makes the option a flag.
        metavar: how the value is called in ``--help``.
        in_workers: whether pytest-xdist's workers read it as well. A file that the controller writes they need not have:
            they may be on another machine.
        repeatable: it may be given several times, and the ini option a line each; its field is a tuple.
        variable: of the environment, read where the command line does not say it.
    """

    name: str
    help: str
    default: Any
    takes: str = "true or false"
    parse: Callable[[str], Any] | None = None
    metavar: str = ""
    in_workers: bool = True
    repeatable: bool = False
    variable: str = ""

    @property
    def flag(self) -> str:
        return f"--diffopt-{self.name.replace('_', '-')}"

    @property
    def ini(self) -> str:
        return f"diffopt_{self.name}"


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(text)
        return text

    return parse


def _backend(text: str) -> str | None:
    if text != text.strip() or any(character.isspace() for character in text):
        raise ValueError(text)
    return text or None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


def _gpu(text: str) -> str | None:
    if not text.strip():
        return None
    from pytest_diffopt.accelerators.gpus import card

    return card(text).name


def _devices(text: str) -> int:
    devices = int(text)
    if not 1 <= devices <= _MOST_GPUS:
        raise ValueError(text)
    return devices


def _memory(text: str) -> int | None:
    from pytest_diffopt.byte_sizes import parse_bytes

    return parse_bytes(int(text) if text.isdecimal() else text) if text.strip() else None


def _folder(text: str) -> str | None:
    return text.rstrip("/") or text or None  # whether it is there is asked where it is read


def _file(text: str) -> str | None:
    if not text:
        return None
    from pathlib import Path

    from pytest_diffopt.whole_files import why_not_writable

    if why := why_not_writable(Path(text)):
        raise ValueError(why)
    return text


REPORT_SUFFIXES = (".json", ".md", ".html", ".xml")


def _report(text: str) -> str:
    if not text.endswith(REPORT_SUFFIXES):
        raise ValueError(text)
    return text  # whether it can be written is asked where it is known from which folder it is named


# accelerators.KINDS, written again (a test compares them): importing it would slow every start of pytest
_DEVICES = ("auto", "cuda", "xpu", "mps", "sim", "cpu")

_MOST_GPUS = 16  # simulated.gpu.MOST_DEVICES, for the same reason

OPTIONS: tuple[Option, ...] = (
    Option(
        "gpu",
        "run the whole session on this GPU, simulated: torch.device('cuda') is that card, and no GPU is used",
        default="",
        takes="a card that the command `diffopt cards` lists, e.g. rtx-4090",
        parse=_gpu,
        metavar="CARD",
        variable="DIFFOPT_GPU",
    ),
    Option(
        "gpu_devices",
        "how many of the GPU of --diffopt-gpu there are",
        default=1,
        takes=f"a whole number from 1 to {_MOST_GPUS}",
        parse=_devices,
        metavar="N",
        variable="DIFFOPT_GPU_DEVICES",
    ),
    Option(
        "gpu_memory",
        "memory of each GPU of --diffopt-gpu; by default what CUDA reports on that card",
        default="",
        takes="a size, e.g. 12GiB, or bytes",
        parse=_memory,
        metavar="SIZE",
        variable="DIFFOPT_GPU_MEMORY",
    ),
    Option(
        "device",
        "the device that recipes run on; auto takes the first real one there is, else the simulated one",
        default="auto",
        takes=f"one of: {', '.join(_DEVICES)}",
        parse=_one_of(*_DEVICES),
        metavar="|".join(_DEVICES),
    ),
    Option(
        "compile_backend",
        "the torch.compile backend of every recipe, whatever the recipe says; by default what the recipe says",
        default="",
        takes='a torch.compile backend, e.g. "inductor", "aot_eager", "eager"',
        parse=_backend,
        metavar="NAME",
    ),
    Option("hub", "allow downloads from the hub; by default a pipeline must be local or a replica", default=False),
    Option(
        "strict",
        "a release gate: unverified verdicts, skipped recipes, missing baselines and checks left out fail the run",
        default=False,
    ),
    Option(
        "baseline",
        "hold every recipe against what this folder has recorded of it",
        default="",
        takes="a folder of baselines",
        parse=_folder,
        metavar="DIR",
    ),
    Option("update_baseline", "record what recipes do into the folder of --diffopt-baseline", default=False),
    Option(
        "report",
        f"write a report of the run into this file; {', '.join(REPORT_SUFFIXES)} says which kind; repeatable",
        default=(),
        takes=f"a file that ends in one of: {', '.join(REPORT_SUFFIXES)}",
        parse=_report,
        metavar="PATH",
        in_workers=False,
        repeatable=True,
    ),
    Option(
        "docs",
        "run the Python blocks of the documentation pages (*.md, *.mdx) that are named, or are in folders that are; "
        "a page's code runs with your rights",
        default=False,
    ),
    Option(
        "docs_timeout",
        "seconds after which a block of a page is stopped",
        default=300.0,
        takes="a number of seconds greater than 0",
        parse=_seconds,
        metavar="SECONDS",
    ),
    Option(
        "docs_extract",
        "write the recipes that are read off the blocks of pages into this recipe file",
        default="",
        takes="a file that can be written, e.g. page.recipes.toml",
        parse=_file,
        metavar="FILE",
        in_workers=False,
    ),
    Option(
        "docs_report",
        "write what pages say and what happens into this Markdown file",
        default="",
        takes="a file that can be written, e.g. pages-report.md",
        parse=_file,
        metavar="FILE",
        in_workers=False,
    ),
)


def add_options(parser: pytest.Parser) -> None:
    """Declare every row of :data:`OPTIONS`, on the command line and in the ini file."""
    group = parser.getgroup("diffopt", "optimization recipes of diffusion pipelines")
    for option in OPTIONS:
        shown = "false" if option.default is False else option.default
        variable = f", environment: {option.variable}" if option.variable else ""
        default = f" (ini: {option.ini}{variable}{f', default: {shown}' if shown else ''})"
        if option.parse is None:
            group.addoption(option.flag, dest=option.ini, action="store_true", default=None, help=option.help + default)
            parser.addini(option.ini, option.help, type="bool", default=option.default)
        elif option.repeatable:
            group.addoption(
                option.flag,
                dest=option.ini,
                action="append",
                default=None,
                metavar=option.metavar,
                help=option.help + default,
            )
            parser.addini(option.ini, option.help, type="linelist", default=list(option.default))
        else:
            group.addoption(
                option.flag, dest=option.ini, default=None, metavar=option.metavar, help=option.help + default
            )
            parser.addini(option.ini, option.help, type="string", default=option.default)


def read_settings(config: pytest.Config) -> Settings:
    """The options of a run. Raises :class:`pytest.UsageError` naming a wrong one, what was found and what may be."""
    return _settings(config, config.option, OPTIONS)


def read_gpu_settings(early_config: pytest.Config) -> Settings:
    """Those about the session's GPU alone, before conftest files are imported. Raises :class:`pytest.UsageError`."""
    given = early_config.known_args_namespace
    options = [option for option in OPTIONS if option.name == "gpu" or option.name.startswith("gpu_")]
    settings = _settings(early_config, given, options)
    for option in options:
        if settings.gpu is None and option.name != "gpu" and getattr(given, option.ini, None) is not None:
            raise pytest.UsageError(f"{option.flag} needs a GPU; name one, e.g. --diffopt-gpu=rtx-4090")
    return settings


def _settings(config: pytest.Config, given: argparse.Namespace, options: Iterable[Option]) -> Settings:
    return Settings(**{option.name: _read(option, config, given) for option in options})


def _read(option: Option, config: pytest.Config, namespace: argparse.Namespace) -> Any:
    if hasattr(config, "workerinput") and not option.in_workers:
        return option.default if option.parse is None or option.repeatable else option.parse(option.default)
    given = getattr(namespace, option.ini, None)
    where = option.flag
    if given is None and (inherited := os.environ.get(option.variable, "")):
        where, given = option.variable, inherited
    if given is None:
        where = option.ini
        try:
            given = config.getini(option.ini)
        except (TypeError, ValueError, pytest.UsageError) as error:  # pytest's own words may not name the option
            raise pytest.UsageError(f"{where}: {error}; it takes {option.takes}") from None
    if option.parse is None:
        return bool(given)
    if option.repeatable:
        return tuple(_parsed(option, where, one) for one in given)
    return _parsed(option, where, given)


def _parsed(option: Option, where: str, given: str) -> Any:
    assert option.parse is not None
    try:
        return option.parse(given)
    except DiffoptError as error:
        raise pytest.UsageError(f"{where}: {error}") from None
    except ValueError:
        raise _rejected(option, where, given) from None


def _rejected(option: Option, where: str, found: object) -> pytest.UsageError:
    return pytest.UsageError(f"{where}: found {found!r}; it takes {option.takes}")
