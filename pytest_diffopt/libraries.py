"""The libraries that recipes run on: which versions are installed, importing them, and keeping them quiet meanwhile."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import platform
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pytest_diffopt.quantization_backends import BACKENDS, DISTRIBUTIONS

if TYPE_CHECKING:
    from pytest_diffopt.recipe import Recipe

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", *DISTRIBUTIONS)
"""Whose versions decide what a recipe does. Those of quantization backends may be absent."""

_QUIET_LOGGERS = (
    "diffusers",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "torchao",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils._pytree",
)
_LOGGERS_OF_WHAT_IS_RAISED = ("torch._subclasses.fake_tensor",)
"""They log the traceback of each exception that they raise, which is written down where it ends the run."""

_IMPORTED_FIRST = (
    "torch._inductor.config",
    "transformers",
    "diffusers.models.attention_dispatch",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.hooks",
    "accelerate.hooks",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Versions of python, this package and those of :data:`LIBRARIES` that are installed, by distribution."""
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, "pytest-diffopt"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hold back what libraries log and warn about while we import them: kernels for other machines, optional packages.

    Errors, logged or raised, are not held back. Only around imports: a user's own code logs as it likes. Nor is garbage
    looked for: an import leaves little, and to look through all that is imported by then takes a quarter of its time.
    """
    collects = gc.isenabled()
    gc.disable()
    before = logging.root.manager.disable  # levels of loggers would not do: libraries set their own while imported
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if collects:
            gc.enable()


def found_in(library: str, name: str) -> Any:
    """An attribute of a library, or None where the installed one has no such name; diffusers imports it only now."""
    with quiet_imports():
        return getattr(importlib.import_module(library), name, None)


def dtype_argument() -> str:
    """What the installed diffusers calls the dtype that it loads in: ``torch_dtype`` before 0.42, which deprecates that."""
    from packaging.version import Version

    return "dtype" if Version(metadata.version("diffusers")) >= Version("0.42") else "torch_dtype"


def import_libraries(recipe: Recipe | None = None) -> None:
    """Import what a recipe may need before anything is written down: imports change globals too."""
    quantizations = recipe.quantizations if recipe is not None else ()
    own = [name for one in quantizations for name in BACKENDS[one.backend].imports]
    with quiet_imports():
        for name in (*_IMPORTED_FIRST, *own):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


@contextlib.contextmanager
def quietly() -> Iterator[list[warnings.WarningMessage]]:
    """Libraries' log lines are held back, and their warnings are written down instead of shown or, by -W, raised."""
    levels = {name: logging.getLogger(name).level for name in (*_QUIET_LOGGERS, *_LOGGERS_OF_WHAT_IS_RAISED)}
    # Whoever collects every log line makes torch render every graph for it; its own trace files stay as they were asked
    trace = logging.getLogger("torch.__trace")
    foreign = [handler for handler in trace.handlers if not type(handler).__module__.startswith("torch.")]
    try:
        for handler in foreign:
            trace.removeHandler(handler)
        for name in _QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        for name in _LOGGERS_OF_WHAT_IS_RAISED:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield caught
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for handler in foreign:
            trace.addHandler(handler)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """No progress bars of the libraries while the context is open: a test's output is for verdicts."""
    with quiet_imports():
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    with contextlib.ExitStack() as stack:
        for library in (diffusers_logging, transformers_logging):
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                stack.callback(library.enable_progress_bar)
        yield


class _NotThatItIsOffline(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("Could not reach the Hub", "Couldn't connect to the Hub"))


def silent_about_being_offline() -> None:
    """Until the process ends, libraries no longer log that the hub cannot be reached: for one that is offline on purpose."""
    for name in ("huggingface_hub.hf_api", "diffusers.pipelines.pipeline_utils"):
        logging.getLogger(name).addFilter(_NotThatItIsOffline())


def exchange_everywhere(name: str, old: Any, new: Any) -> None:
    """Whoever imported ``old`` by its name holds ``new`` instead, and whoever is imported from now on will."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)
