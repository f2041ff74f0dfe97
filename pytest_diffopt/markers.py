"""The markers: one frozen dataclass each, whose docstring's first line is what ``pytest --markers`` prints.

``@max_recompiles(3)``, imported from :mod:`pytest_diffopt`, and ``@pytest.mark.diffopt_max_recompiles(3)`` are the same
marker; the imported one checks its arguments where it is written, the other when its test is set up. A mark without the
prefix, ``pytest.mark.max_recompiles``, is another suite's: other suites use such names too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, overload

import pytest

from pytest_diffopt.accelerators import KINDS, Accelerator
from pytest_diffopt.byte_sizes import parse_bytes
from pytest_diffopt.errors import MarkerError

if TYPE_CHECKING:
    from typing_extensions import Self

    from pytest_diffopt.recipe import Recipe

_Marked = TypeVar("_Marked", bound="Callable[..., Any] | type")
MARK_PREFIX = "diffopt_"
_BACKENDS = tuple(kind for kind in KINDS if kind not in ("sim", "cpu"))


class Marker:
    """What the markers share: arguments bound by name, and every mistake named with what is allowed."""

    name: ClassVar[str]
    usable_bare: ClassVar[bool] = False

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """The marker that these arguments make. Raises :class:`MarkerError` where it does not take them."""
        fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
        for name in kwargs:
            if name not in fields:
                raise MarkerError(f"{cls.name} has no argument {name!r}. {cls._takes()}")
        if len(args) > len(fields):
            raise MarkerError(f"{cls.name}: found {len(args)} arguments without a name. {cls._takes()}")
        given = dict(zip(fields, args, strict=False))
        for name in given:
            if name in kwargs:
                raise MarkerError(f"{cls.name}: found {name!r} twice. {cls._takes()}")
        given.update(kwargs)
        for name, one in fields.items():
            if name not in given and one.default is dataclasses.MISSING:
                raise MarkerError(f"{cls.name} needs {name!r}. {cls._takes()}")
        return cls(**given)

    @classmethod
    def mark_name(cls) -> str:
        """The name of its marks in pytest, which no other suite uses."""
        return MARK_PREFIX + cls.name

    @classmethod
    def line(cls) -> str:
        """Its line of ``pytest --markers``."""
        return MARK_PREFIX + (cls.__doc__ or "").splitlines()[0]

    @classmethod
    def _takes(cls) -> str:
        fields = dataclasses.fields(cast(Any, cls))
        if not fields:
            return "It takes no arguments."
        arguments = [f"{one.name} ({one.metadata['takes']})" for one in fields]
        return f"It takes: {', '.join(arguments)}."

    def _reject(self, argument: str, found: object) -> MarkerError:
        return MarkerError(f"{self.name}: {argument}: found {found!r}. {self._takes()}")


def _takes(what: str) -> Mapping[str, str]:
    return {"takes": what}


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**20 else f"{size} bytes"


@dataclass(frozen=True)
class RequiresGpu(Marker):
    """requires_gpu(min_memory=None, capability=None, backends=None, simulated=False): skip unless the accelerator fits.

    Args:
        min_memory: of the device in all.
        capability: lowest CUDA capability.
        backends: kinds of device that will do; None for any.
        simulated: whether a simulated accelerator will do.
    """

    name: ClassVar[str] = "requires_gpu"
    usable_bare: ClassVar[bool] = True

    min_memory: str | int | None = field(default=None, metadata=_takes('"12GiB", or bytes'))
    capability: tuple[int, int] | None = field(default=None, metadata=_takes("(major, minor)"))
    backends: str | tuple[str, ...] | None = field(
        default=None, metadata=_takes(f"some of {', '.join(map(repr, _BACKENDS))}")
    )
    simulated: bool = field(default=False, metadata=_takes("True or False"))

    def __post_init__(self) -> None:
        if self.min_memory is not None:
            try:
                parse_bytes(self.min_memory)
            except ValueError:
                raise self._reject("min_memory", self.min_memory) from None
        if self.capability is not None:
            pair = tuple(self.capability) if isinstance(self.capability, tuple | list) else ()
            if len(pair) != 2 or not all(type(part) is int and part >= 0 for part in pair):
                raise self._reject("capability", self.capability)
            object.__setattr__(self, "capability", pair)
        if self.backends is not None:
            kinds: Any = (self.backends,) if isinstance(self.backends, str) else self.backends
            known = isinstance(kinds, tuple | list | set | frozenset) and all(kind in _BACKENDS for kind in kinds)
            if not kinds or not known:
                raise self._reject("backends", self.backends)
            object.__setattr__(self, "backends", tuple(kinds))
        if not isinstance(self.simulated, bool):
            raise self._reject("simulated", self.simulated)


def unsupported(marker: RequiresGpu, accelerator: Accelerator) -> str | None:
    """Why the accelerator does not fit the marker, or None where it does."""
    kind = accelerator.kind
    if why := not_a_gpu(marker, kind):
        return why
    if not accelerator.is_simulated and marker.backends is not None and kind not in marker.backends:
        return f"requires_gpu: needs {' or '.join(marker.backends)}; the device in use is {kind}"
    if marker.min_memory is not None:
        needed, total = parse_bytes(marker.min_memory), accelerator.total_memory_bytes
        if total is None:
            return f"requires_gpu: needs {_gib(needed)}; {accelerator.name} ({kind}) does not say how much it has"
        if total < needed:
            return f"requires_gpu: needs {_gib(needed)}; {accelerator.name} ({kind}) has {_gib(total)}"
    if marker.capability is not None and not accelerator.is_simulated:
        needed_text = ".".join(map(str, marker.capability))
        if accelerator.capability is None:
            return f"requires_gpu: needs capability {needed_text}; {accelerator.name} ({kind}) has none"
        if accelerator.capability < marker.capability:
            found = ".".join(map(str, accelerator.capability))
            return f"requires_gpu: needs capability {needed_text}; {accelerator.name} ({kind}) has {found}"
    return None


def not_a_gpu(marker: RequiresGpu, kind: str) -> str | None:
    """Why no device of that kind fits the marker, told with no device made; None where one may."""
    if kind == "cpu":
        return f"requires_gpu: no GPU; the device in use is {kind}"
    if kind == "sim" and not marker.simulated:
        return f"requires_gpu: no GPU; the device in use is {kind}, a simulated one (simulated=True accepts it)"
    return None


@dataclass(frozen=True)
class CompileFullgraph(Marker):
    """compile_fullgraph: all that the test compiles is one graph a frame, and runs: no break, no skip, no fall back.

    A test that compiles nothing fails: it would prove nothing.
    """

    name: ClassVar[str] = "compile_fullgraph"
    usable_bare: ClassVar[bool] = True


@dataclass(frozen=True)
class MaxRecompiles(Marker):
    """max_recompiles(limit): at most that many recompiles in the test, and no recompile limit is ever exhausted.

    A test that compiles nothing fails: it would prove nothing. The closest of several markers counts.
    """

    name: ClassVar[str] = "max_recompiles"

    limit: int = field(metadata=_takes("an int, at least 0"))

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        if set(kwargs) == {"n"} and not args:  # documented as another name of `limit`
            kwargs = {"limit": kwargs["n"]}
        return super().of(args, kwargs)

    def __post_init__(self) -> None:
        if type(self.limit) is not int or self.limit < 0:
            raise self._reject("limit", self.limit)


@dataclass(frozen=True)
class MaxMemory(Marker):
    """max_memory(limit, forecast=None): the accelerator holds at most that much in the test; or a full-size model would.

    What fixtures put there before counts too, at any moment, however it came there. A test in which nothing is on the
    accelerator fails: it would prove nothing. On a device that does not count its memory the test is unverified. The
    closest of several markers counts.

    Args:
        limit: the most that the accelerator may hold.
        forecast: a full-size model: the limit then is for the test's recipe with that model, which is forecast, and no
            longer for what the test itself puts on the accelerator. True for the model that the recipe names.
    """

    name: ClassVar[str] = "max_memory"

    limit: str | int = field(metadata=_takes('"12GiB", or bytes'))
    forecast: str | bool | None = field(
        default=None, metadata=_takes("a full-size model's name, or True for the one that the recipe names")
    )

    def __post_init__(self) -> None:
        try:
            parse_bytes(self.limit)
        except ValueError:
            raise self._reject("limit", self.limit) from None
        named = isinstance(self.forecast, str) and self.forecast.strip() != ""
        if not named and self.forecast is not None and self.forecast is not True:
            raise self._reject("forecast", self.forecast)

    @property
    def limit_bytes(self) -> int:
        return parse_bytes(self.limit)


@dataclass(frozen=True, init=False)
class Recipes(Marker):
    """recipes(*recipes): run the test once a recipe; its fixtures `recipe` and `observation` have it and what happened.

    Args:
        recipes: :class:`~pytest_diffopt.Recipe` objects, and paths of ``*.recipes.toml`` files, each meaning all in it;
            relative to the test's file, or else to the root directory.
    """

    name: ClassVar[str] = "recipes"

    recipes: tuple[Recipe | str | os.PathLike[str], ...]

    def __init__(self, *recipes: Recipe | str | os.PathLike[str]) -> None:
        object.__setattr__(self, "recipes", recipes)
        if not recipes:
            raise MarkerError(f"{self.name} needs at least one recipe. {self._takes()}")
        for found in recipes:
            # A recipe is told by its hash: importing its class here would import pydantic into every run.
            if not isinstance(found, str | os.PathLike) and not (
                hasattr(found, "content_hash") and not isinstance(found, type)
            ):
                raise MarkerError(f"{self.name}: found {found!r}. {self._takes()}")

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        for name in kwargs:
            raise MarkerError(f"{cls.name} has no argument {name!r}. {cls._takes()}")
        return cls(*args)

    @classmethod
    def _takes(cls) -> str:
        return "It takes: Recipe objects, and paths of *.recipes.toml files."


@dataclass(frozen=True, init=False)
class QuantizationMarker(Marker):
    """quantization(backend, components=None, pipeline="tiny-flux", **kwargs): configure fixture `quantized_pipeline`.

    Args:
        backend: e.g. ``"bitsandbytes_4bit"``.
        components: names of the components to quantize; None for every one that has Linear layers.
        pipeline: a replica's name, a directory, a hub id, or ``"package.module:factory"``.
        kwargs: of the backend, e.g. ``bnb_4bit_quant_type="nf4"``.
    """

    name: ClassVar[str] = "quantization"

    backend: str
    components: tuple[str, ...] | None
    pipeline: Any
    kwargs: Mapping[str, Any]

    def __init__(self, backend: str, components: Any = None, pipeline: Any = "tiny-flux", **kwargs: Any) -> None:
        names = (components,) if isinstance(components, str) else components
        if not isinstance(backend, str):
            raise self._reject("backend", backend)
        if names is not None and not (
            isinstance(names, tuple | list) and names and all(isinstance(name, str) for name in names)
        ):
            raise self._reject("components", components)
        if not (isinstance(pipeline, str) or callable(pipeline)):
            raise self._reject("pipeline", pipeline)
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "components", None if names is None else tuple(names))
        object.__setattr__(self, "pipeline", pipeline)
        object.__setattr__(self, "kwargs", dict(kwargs))
        self.recipe("checked")

    def __hash__(self) -> int:
        return hash((self.backend, self.components))

    def recipe(self, name: str) -> Recipe:
        """The recipe that the marker asks for. Raises :class:`MarkerError` with every mistake in it."""
        from pytest_diffopt.errors import RecipeError
        from pytest_diffopt.recipe import Quantization, Recipe

        try:
            quantized = Quantization(cast(Any, self.backend), self.components, self.kwargs)
            return Recipe(name=name, pipeline=self.pipeline, quantization=quantized)
        except RecipeError as error:
            mistakes = "; ".join(map(str, error.problems))
            raise MarkerError(f"{self.name}: {mistakes}") from None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        named = ("backend", "components", "pipeline")
        if len(args) > len(named):
            raise MarkerError(f"{cls.name}: found {len(args)} arguments without a name. {cls._takes()}")
        for name in named[: len(args)]:
            if name in kwargs:
                raise MarkerError(f"{cls.name}: found {name!r} twice. {cls._takes()}")
        if not args and "backend" not in kwargs:
            raise MarkerError(f"{cls.name} needs 'backend'. {cls._takes()}")
        return cls(*args, **kwargs)

    @classmethod
    def _takes(cls) -> str:
        return (
            'It takes: backend (e.g. "bitsandbytes_4bit"), components (a name, or a list of names), '
            "pipeline (a replica's name, a path, a hub id or a factory), and what the backend takes."
        )


MARKERS: dict[str, type[Marker]] = {
    marker.mark_name(): marker
    for marker in (RequiresGpu, CompileFullgraph, MaxRecompiles, MaxMemory, Recipes, QuantizationMarker)
}


_M = TypeVar("_M", bound=Marker)


def closest(item: pytest.Item, kind: type[_M]) -> _M | None:
    """The marker of that kind that stands closest to the test, parsed. Raises :class:`MarkerError`."""
    mark = item.get_closest_marker(kind.mark_name())
    return None if mark is None else kind.of(mark.args, mark.kwargs)


class CheckedMarker(pytest.MarkDecorator):
    """``pytest.mark.diffopt_NAME`` that rejects wrong arguments where it is written."""

    def __init__(self, kind: type[Marker]) -> None:
        self._kind = kind
        self.__doc__ = kind.__doc__

    # The mark is looked up at use: before that, the marker is not registered yet.
    @property
    def mark(self) -> pytest.Mark:  # type: ignore[override]
        self._kind.of((), {})
        return self._plain.mark

    @property
    def _plain(self) -> pytest.MarkDecorator:
        return cast(pytest.MarkDecorator, getattr(pytest.mark, self.name))

    @property
    def name(self) -> str:
        return self._kind.mark_name()

    @property
    def __name__(self) -> str:
        return self._kind.name

    def __repr__(self) -> str:
        return f"<marker {self._kind.line()}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckedMarker) and other._kind is self._kind

    def __hash__(self) -> int:
        return hash(self._kind)

    def with_args(self, *args: object, **kwargs: object) -> pytest.MarkDecorator:
        self._kind.of(args, kwargs)
        return self._plain.with_args(*args, **kwargs)

    @overload
    def __call__(self, arg: _Marked, /) -> _Marked: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> pytest.MarkDecorator: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _is_test(args[0]):
            if not self._kind.usable_bare:
                raise MarkerError(f"{self._kind.name} is used with its arguments: @{self._kind.name}(…).")
            return super().__call__(args[0])
        return self.with_args(*args, **kwargs)


def _is_test(value: object) -> bool:
    """Whether a decorator that got this alone decorates it, as :class:`pytest.MarkDecorator` tells it."""
    if isinstance(value, type | staticmethod | classmethod):
        return True
    return callable(value) and getattr(value, "__name__", "<lambda>") != "<lambda>"


requires_gpu = CheckedMarker(RequiresGpu)
compile_fullgraph = CheckedMarker(CompileFullgraph)
max_recompiles = CheckedMarker(MaxRecompiles)
max_memory = CheckedMarker(MaxMemory)
recipes = CheckedMarker(Recipes)
quantization = CheckedMarker(QuantizationMarker)
