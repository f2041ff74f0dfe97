"""What every part of a recipe is made of.

`Part` gives the parts their behaviour: frozen, validated with every mistake at once, equal and hashed by content. A new
part is a dataclass with the decorators of `pytest_diffopt.contract.Contract`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import re
import reprlib
import sys
import types
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, Strict, StringConstraints, ValidationError

from pytest_diffopt.errors import Problem, RecipeError

Location = tuple[str | int, ...]


# Mistakes: what validators raise, and what pydantic's errors are translated into.


class Mistake(NamedTuple):
    """One mistake, located by the steps that lead to it. A leading ``".."`` steps from a field to its neighbours."""

    location: Location
    found: str
    allowed: str


class Mistakes(ValueError):
    """Raised by a validator with every mistake in the value it was given."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = list(mistakes)
        super().__init__("; ".join(f"{path_of(m.location)}: found {m.found}; {m.allowed}" for m in self.mistakes))


def refused(found: object, allowed: str) -> Mistakes:
    """The error of a validator whose whole value is wrong; ``found`` is shown as its repr."""
    return Mistakes([Mistake((), shown(found), allowed)])


def path_of(location: Location) -> str:
    """``("recipe", "flux", "compilation", 1, "mode")`` as ``recipe.flux.compilation[1].mode``."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            word = step if re.fullmatch(r"[A-Za-z0-9_-]+", step) else json.dumps(step, ensure_ascii=False)
            path += f".{word}" if path else word
    return path


_repr = reprlib.Repr()  # survives a repr that raises
_repr.maxlevel, _repr.maxother, _repr.maxstring, _repr.maxlong = 4, 160, 160, 160
_repr.maxdict = _repr.maxlist = _repr.maxtuple = 8


def shown(value: object) -> str:
    """``repr(value)`` on one line of at most 80 characters; a callable by its name."""
    if callable(value):
        return name_of(value)
    text = " ".join(_repr.repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def did_you_mean(word: object, words: Iterable[str], count: int = 1) -> str:
    """``"did you mean 'mode'? "``, or nothing when no word is near."""
    near = difflib.get_close_matches(word, list(words), n=count, cutoff=0.65) if isinstance(word, str) else []
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def problems_of(mistakes: Iterable[Mistake], prefix: Location = ()) -> list[Problem]:
    """The mistakes as `RecipeError` takes them, each path beginning with ``prefix``."""
    return [Problem(path_of((*prefix, *m.location)), m.found, m.allowed) for m in mistakes]


def unknown_key(location: Location, key: str, allowed: Iterable[str]) -> Mistake:
    """The mistake of a key that a table does not take."""
    words = list(allowed)
    return Mistake(
        (*location, key), "an unknown key", f"{did_you_mean(key, words)}allowed keys: {', '.join(words) or 'none'}"
    )


def _translated(error: ValidationError, part: type[Part], data: Mapping[str, Any]) -> Iterator[Mistake]:
    for line in error.errors(include_url=False):
        location = line["loc"]
        cause = line.get("ctx", {}).get("error")
        if isinstance(cause, Mistakes):
            for mistake in cause.mistakes:
                yield mistake._replace(location=_as_written(_joined(location, mistake.location), data))
            continue
        if line["type"] == "unexpected_keyword_argument":
            fields = _field_names(_part_at(part, location[:-1]))
            yield unknown_key(_as_written(location[:-1], data), str(location[-1]), fields)
            continue
        found = "nothing" if line["type"] == "missing" else shown(line["input"])
        yield Mistake(_as_written(location, data), found, _allowed(line, part))


def _allowed(line: Any, part: type[Part]) -> str:
    context, location = line.get("ctx", {}), line["loc"]
    match line["type"]:
        case "missing":
            return "it must be given"
        case "literal_error":
            near = did_you_mean(line["input"], re.findall(r"'([^']*)'", context["expected"]))
            return f"{near}allowed: {context['expected']}"
        case "dataclass_type":
            return f"a table of: {', '.join(_field_names(_part_at(part, location)))}"
        case "bool_type":
            return "true or false"
        case "int_type":
            least = _least(get_type_hints(_part_at(part, location[:-1]), include_extras=True)[str(location[-1])])
            return "an int" if least is None else f"an int >= {least}"
        case "greater_than_equal":
            return f"an int >= {context['ge']}"
        case "greater_than":
            return f"a number > {context['gt']:g}"
        case "float_type" | "finite_number":
            return "a finite number"
        case "string_type":
            return "a string"
        case "string_too_short":
            return "a string that is not empty"
        case _:
            return str(line["msg"])


def _least(hint: Any) -> int | None:
    for constraint in getattr(hint, "__metadata__", ()):
        for bound in getattr(constraint, "metadata", ()):
            if hasattr(bound, "ge"):
                return cast(int, bound.ge)
    found = (_least(argument) for argument in get_args(hint))
    return next((least for least in found if least is not None), None)


def _joined(outer: Location, inner: Location) -> Location:
    return (*outer[:-1], *inner[1:]) if inner[:1] == ("..",) else (*outer, *inner)


def _as_written(location: Location, data: object) -> Location:
    """Drops the index of what was written alone where a list may stand."""
    written: list[str | int] = []
    for step in location:
        if isinstance(step, int):
            if not isinstance(data, list | tuple):
                continue
            data = data[step] if step < len(data) else None
        else:
            data = data.get(step) if isinstance(data, Mapping) else getattr(data, step, None)
        written.append(step)
    return tuple(written)


def _part_at(part: type[Part], location: Location) -> type[Part]:
    for step in location:
        if isinstance(step, str):
            part = next(_parts_in(get_type_hints(part)[step]))
    return part


def _parts_in(hint: Any) -> Iterator[type[Part]]:
    # On Python 3.10 tuple[str, ...] is an instance of type, but no class.
    if get_origin(hint) is None and isinstance(hint, type) and issubclass(hint, Part):
        yield hint
    for argument in get_args(hint):
        yield from _parts_in(argument)


def _field_names(part: type[Part]) -> list[str]:
    return [field.name for field in dataclasses.fields(cast(Any, part))]


# Content: what two parts are compared by.


class FrozenDict(dict[str, Any]):
    """A dict that refuses to change, so that what holds it stays what it was; ``**`` and ``json.dumps`` work."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a recipe is frozen: make another one with recipe.replace(...)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)  # the default way to copy would set item after item


_process = uuid.uuid4().hex[:8]  # tokens of two processes must differ, since each counts from nought
_count = itertools.count()
_tokens: dict[int, tuple[Callable[[], object], str]] = {}
_names_taken: set[str] = set()


def _token(thing: object) -> str:
    """What tells a live object from every other; empty if its name alone does, in any process."""
    kept, token = _tokens.get(id(thing), (None, ""))
    if kept is not None and kept() is thing:
        return token
    name = name_of(thing)
    if name not in _names_taken and imported(name) is thing:
        token = ""
        _names_taken.add(name)  # after a reload another object has this name, and needs a token
    else:
        token = f"{_process}-{next(_count)}"
    try:
        _tokens[id(thing)] = (weakref.ref(thing), token)
    except TypeError:
        _tokens[id(thing)] = (lambda: thing, token)  # kept alive, so that its id is never given to another
    return token


def imported(name: str) -> object:
    """What ``"module:qualname"`` is in a module that is imported already, or None."""
    module, _, attributes = name.partition(":")
    thing: object = sys.modules.get(module)
    for attribute in attributes.split("."):
        thing = getattr(thing, attribute, None)
    return thing


def name_of(thing: object) -> str:
    """``"module:qualname"`` of a function or class; of another object, that of its class."""
    named: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(named, '__module__', None) or 'builtins'}:{named.__qualname__}"


def is_torch(value: object, name: str) -> bool:
    """Whether it is a ``torch.<name>`` object (``dtype``, ``device``, …); never imports torch."""
    return type(value).__module__ == "torch" and type(value).__name__ == name


def array_bytes(value: Any) -> bytes | None:
    """The elements of a dense tensor or a numpy array, in C order; None of anything else. Never imports torch."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and type(value) in (torch.Tensor, torch.nn.Parameter):
            dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            return cast(bytes, dense.reshape(-1).view(torch.uint8).numpy().tobytes())
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            return cast(bytes, value.tobytes())
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None  # sparse, quantized, meta, … : told apart by identity
    return None


def plain(value: object, leaf: Callable[[object, Location], Any], location: Location = ()) -> Any:
    """The value as JSON data: parts without defaults, tuples as lists, and ``leaf(value, location)`` of the rest."""
    if isinstance(value, Part):
        value = value.given()
    if isinstance(value, Mapping):
        return {str(key): plain(held, leaf, (*location, str(key))) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [plain(held, leaf, (*location, index)) for index, held in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return leaf(value, location)


def content_of(value: object) -> str:
    """Canonical JSON: equal for equal content; callables and opaque objects count by identity."""
    return json.dumps(plain(value, _identified), sort_keys=True, separators=(",", ":"))


def _identified(value: object, _: Location = ()) -> Any:
    elements = array_bytes(value)
    if elements is not None:
        array = cast(Any, value)
        return {"$array": [str(array.dtype), list(array.shape), hashlib.sha256(elements).hexdigest()]}
    if is_torch(value, "dtype") or is_torch(value, "device"):
        return {"$torch": str(value)}
    if isinstance(value, bytes):
        return {"$bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, types.MethodType):  # each access makes a new bound method
        return {"$method": [_identified(value.__func__), _identified(value.__self__)]}
    return {"$object": name_of(value), "token": _token(value)}


def _described(value: object, _: Location) -> str:
    if array_bytes(value) is not None:
        array = cast(Any, value)
        return f"{type(array).__name__}({array.dtype}, {list(array.shape)})"
    return name_of(value) if callable(value) else shown(value)


class Part:
    """Base of a recipe and its parts: equal and hashed by content, printed without defaults, checked as a whole.

    A wrong construction raises `RecipeError` with every mistake at once.
    """

    def given(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in order."""
        differing = {}
        for field in dataclasses.fields(cast(Any, self)):
            value = getattr(self, field.name)
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if value is default:
                continue
            # No value but None has None's content: no need to read the bytes of tensors for that.
            if default in (None, dataclasses.MISSING) or content_of(value) != content_of(default):
                differing[field.name] = value
        return differing

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data without the defaults; callables as ``"module:qualname"``, tensors as dtype and shape."""
        return cast("dict[str, Any]", plain(self, _described))

    @functools.cached_property
    def _content(self) -> str:
        return content_of(self)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._content == other._content

    def __hash__(self) -> int:
        return hash((type(self), self._content))

    def __repr__(self) -> str:
        required = {
            field.name
            for field in dataclasses.fields(cast(Any, self))
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        words = []
        for name, value in self.given().items():
            parts = isinstance(value, Part) or (isinstance(value, tuple) and any(isinstance(v, Part) for v in value))
            text = repr(value) if parts else shown(value)
            words.append(text if name in required else f"{name}={text}")
        return f"{type(self).__name__}({', '.join(words)})"


PartType = TypeVar("PartType")

CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=False)


def with_every_mistake(decorated: type[PartType]) -> type[PartType]:
    """Makes a part's constructor raise `RecipeError`, in our words, instead of pydantic's error."""
    part: Any = decorated  # mypy takes pydantic's decorator to return a protocol, not the class
    names = _field_names(part)

    def __init__(self: Part, *args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        source = f"{part.__name__}(...)"
        if len(args) > len(names):
            given, takes = f"{len(args)} positional arguments", f"it takes {len(names)}: {', '.join(names)}"
            raise RecipeError([Problem(part.__name__, given, takes)], source)
        data = dict(zip(names, args, strict=False))
        if twice := [name for name in kwargs if name in data]:
            raise RecipeError([Problem(name, "two values", "by position or by name") for name in twice], source)
        try:
            fill(self, {**data, **kwargs})
        except Mistakes as error:
            raise RecipeError(problems_of(error.mistakes), source) from None

    part._validate, part.__init__ = part.__init__, __init__
    return decorated


def fill(part: Part, data: Mapping[str, Any]) -> None:
    """Sets the fields of an empty part. Raises `Mistakes`."""
    try:
        type(part)._validate(part, **data)  # type: ignore[attr-defined]
    except ValidationError as error:
        raise Mistakes(_translated(error, type(part), data)) from None


# Types that fields share.


def one_or_many(allowed: str, single: type | tuple[type, ...], at_least: int = 0) -> BeforeValidator:
    """Accepts a ``single`` alone where a list may stand; refuses sets, whose order is chance."""

    def as_tuple(value: object) -> object:
        if isinstance(value, single):
            return (value,)
        if not isinstance(value, list | tuple) or len(value) < at_least:
            raise refused(value, allowed)
        return tuple(value)

    return BeforeValidator(as_tuple)


Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), StringConstraints(min_length=1)]
Natural = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[int, Strict(), Field(ge=1)]
PositiveNumber = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Names = Annotated[tuple[Text, ...], one_or_many("a string, or a list of strings", str)]
