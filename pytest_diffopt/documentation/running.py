"""Judges the blocks of pages: what each needs is made ready, it is run with its references, and the runs are judged."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterable

from pytest_diffopt.documentation import judging
from pytest_diffopt.documentation.judging import BlockVerdict
from pytest_diffopt.documentation.order import Code, Order
from pytest_diffopt.documentation.pages import Block, Page
from pytest_diffopt.documentation.processes import Server
from pytest_diffopt.documentation.record import BlockRun, Variant
from pytest_diffopt.documentation.requirements import missing
from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas import Registry, gguf_files, registry
from pytest_diffopt.replicas.resolution import hub_cache_environment, is_hub_id

BLOCK_SECONDS = 300.0
"""After which a block is stopped, unless another limit is set."""

_QUOTED = re.compile(
    r"""["'](?:https?://(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)(?:/(?:blob|resolve)/[^"']*)?["']"""
)
_GGUF = re.compile(r"""([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/[^/"']+/)?([\w.-]+\.gguf)""")
_COMPARED = re.compile(r"\bcompile|offload")


class PageRuns:
    """Runs and judges blocks; a context manager, which ends the process that runs them.

    Args:
        device: kind of the accelerator, or ``auto``.
        allow_hub: hub ids mean the real repositories, and calls are as large as they are written.
        compile_backend: in place of the backends that blocks name.
        seconds: after which a block is stopped.
        progress: told in a few words what is being run.
    """

    def __init__(
        self,
        device: str = "auto",
        *,
        allow_hub: bool = False,
        compile_backend: str | None = None,
        seconds: float = BLOCK_SECONDS,
        registry: Registry = registry,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.allow_hub = allow_hub
        self.compile_backend = compile_backend
        self.seconds = seconds
        self._registry = registry
        self._progress = progress or (lambda text: None)
        self._server = Server(device, {} if allow_hub else hub_cache_environment((), registry=registry))

    def __enter__(self) -> PageRuns:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that runs blocks."""
        self._server.close()

    def judge(self, page: Page, block: Block) -> BlockVerdict:
        """The verdict of one block of a page.

        Raises:
            DiffoptError: no block can be run: the device is not there.
            UnverifiableError: the simulated device cannot be built here.
        """
        name = recipe_name(page, block)
        if block.problem:
            return judging.is_wrong(block, name, block.problem)
        if why := missing(block.requirements):
            return judging.cannot_run(block, why)
        if why := _is_no_python(block):
            return judging.is_wrong(block, name, why)
        before = page.before(block)
        text = "\n".join(one.source for one in (*before, block))
        ids = _hub_ids(text)
        try:
            sizes = {} if self.allow_hub else self._replicas(ids, text)
        except ReplicaError as error:
            return judging.cannot_run(block, str(error))
        run, references = self._runs(page, block, name, before, sizes)
        needed = page.needed(block)
        if run.raised is not None and 0 < run.raised.line < block.line and needed != before:
            run, references = self._runs(page, block, name, needed, sizes)  # without what it does not need
        return judging.judge_block(
            block, name, run, references, resolves=self._resolves, installed=_is_installed, ids=ids, source=text
        )

    def _runs(
        self, page: Page, block: Block, name: str, before: tuple[Block, ...], sizes: dict[str, tuple[int, ...]]
    ) -> tuple[BlockRun, dict[Variant, BlockRun]]:
        """A block's run as it is written, and those that it is compared with."""

        def order(variant: Variant, first_call: int | None = None) -> Callable[[str], Order]:
            return lambda folder: Order(
                name=name,
                page=str(page.path.absolute()),
                block=Code(block.source, block.code_line),
                before=tuple(Code(one.source, one.code_line) for one in before),
                variant=variant,
                folder=folder,
                small=not self.allow_hub,
                sizes=sizes,
                first_call=first_call,
                compile_backend=self.compile_backend,
            )

        self._progress(f"{page.path.name}:{block.line}")
        text = "\n".join(one.source for one in (*before, block))
        at_once = bool(_COMPARED.search(text)) and _spare_cores()  # most such blocks need it
        variants: tuple[Variant, ...] = ("as written", "eager") if at_once else ("as written",)
        found = self._server.run_all([order(variant) for variant in variants], seconds=self.seconds)
        runs = dict(zip(variants, found, strict=True))
        run = runs.pop("as written")
        wanted = judging.references_for(run)
        references: dict[Variant, BlockRun] = {
            variant: one for variant, one in runs.items() if variant in wanted and one.first_call == run.first_call
        }
        rest: list[Variant] = [variant for variant in wanted if variant not in references]
        if rest:
            self._progress(f"{page.path.name}:{block.line} {', '.join(rest)}")
            found = self._server.run_all([order(one, run.first_call) for one in rest], seconds=self.seconds)
            references |= dict(zip(rest, found, strict=True))
        return run, references

    def _replicas(self, ids: Iterable[str], text: str) -> dict[str, tuple[int, ...]]:
        """Have the replicas of hub ids built, as they are spelled; the size of a call of each."""
        known = [one for one in ids if self._resolves(one)]
        files = [one for one in known if one.casefold() in gguf_files.REPOSITORIES]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that build them
            hub_cache_environment([one for one in known if one not in files], registry=self._registry)
            for hub_id, name in _GGUF.findall(text):
                if hub_id in files:
                    gguf_files.ensure_gguf(hub_id, name)
        families = {one: self._registry.find(one) for one in known}
        return {one: tuple(family.default_size) for one, family in families.items() if family and family.default_size}

    def _resolves(self, hub_id: str) -> bool:
        if self.allow_hub or self._registry.find(hub_id) is not None:
            return True
        return self._registry.find_component(hub_id) is not None or hub_id.casefold() in gguf_files.REPOSITORIES


def recipe_name(page: Page, block: Block) -> str:
    """Of the recipe that is read off a block: it names the page and the line."""
    stem = re.sub(r"[\[\]/:]|[^\x20-\x7e\w]", "-", page.path.stem)
    return f"{stem}-{block.name}"


def _is_no_python(block: Block) -> str:
    """Why a block is no Python, with the page's line; empty where it is."""
    try:
        ast.parse(block.source)
    except SyntaxError as error:
        line = block.code_line + (error.lineno or 1) - 1
        text = (error.text or "").strip()
        return f"line {line}: it is no Python, {error.msg}" + (f": {text}" if text else "")
    except (ValueError, RecursionError, MemoryError) as error:
        return f"it is no Python that can be read: {error or type(error).__name__}"
    return ""


def _hub_ids(text: str) -> tuple[str, ...]:
    """What looks like hub ids among the strings of a block, in order."""
    found = (match[1] for match in _QUOTED.finditer(text))
    return tuple(dict.fromkeys(one for one in found if is_hub_id(one)))


def _is_installed(module: str) -> bool:
    from importlib import metadata

    try:
        if importlib.util.find_spec(module.replace("-", "_")) is not None:
            return True
        metadata.version(module)
    except (ImportError, ValueError):
        return False
    return True


def _spare_cores() -> bool:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return (os.cpu_count() or 1) >= 2 * workers
