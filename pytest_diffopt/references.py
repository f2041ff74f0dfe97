"""Things that a recipe names by ``"package.module:attribute"``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.part import did_you_mean
from pytest_diffopt.source_places import user_frame


class UnresolvedReference(DiffoptError):
    """A name leads to nothing; the message says which part of it, and what is near."""


def resolve(reference: str) -> Any:
    """What ``"package.module:attribute.of.it"`` names; the module is imported.

    Raises:
        UnresolvedReference: there is no such module, importing it raised, or it has no such attribute.
    """
    module, _, attributes = reference.partition(":")
    try:
        thing: Any = importlib.import_module(module)
    except Exception as error:  # the module is the author's: its import may raise anything
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            raise UnresolvedReference(f"there is no module {missing!r} on sys.path") from error
        frame = user_frame(error)
        at = f" ({frame.file}:{frame.line})" if frame is not None else ""
        raise UnresolvedReference(f"importing {module!r} raised {type(error).__name__}: {error}{at}") from error
    holder = module
    for attribute in attributes.split("."):
        if not hasattr(thing, attribute):
            near = did_you_mean(attribute, dir(thing)).strip()
            raise UnresolvedReference(f"{holder!r} has no attribute {attribute!r}{near and '; '}{near}")
        thing, holder = getattr(thing, attribute), f"{holder}.{attribute}"
    return thing


def resolve_callable(reference: str) -> Callable[..., Any]:
    """What :func:`resolve` finds. Raises UnresolvedReference also where it is not callable."""
    found = resolve(reference)
    if not callable(found):
        holder = reference.replace(":", ".", 1)
        raise UnresolvedReference(f"{holder!r} is of type {type(found).__name__}, which is not callable")
    return found  # type: ignore[no-any-return]


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that a function names among its parameters; none of a builtin that has no signature."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: value for name, value in offered.items() if name in parameters and parameters[name].kind in keyword}
