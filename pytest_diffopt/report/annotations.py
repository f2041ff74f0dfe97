"""GitHub's annotations: what failed or was not verified, as workflow commands, on lines of the user's own repository.

A break or a recompile is told where it is, if that file is in the repository; one in an installed library is told on its
recipe, with the place in the library. GitHub shows ten errors and ten warnings of a step: the worst come first, and the
rest are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_diffopt.checks.crashes import REFERS, is_the_crash

if TYPE_CHECKING:
    from pytest_diffopt.report.run import RecipeRun, Run

MOST = 10
"""So many errors, and so many warnings, GitHub shows of a step."""

_INSTALLED = ("site-packages", "dist-packages")
_PLACED = {"graph_breaks": "graph break", "recompiles": "recompile", "host_syncs": "host sync"}
_KINDS = ("crash", *_PLACED.values())


@dataclass(frozen=True)
class Annotation:
    """One annotation: ``level`` is ``error``, ``warning`` or ``notice``; with no file, and ``line`` None, it is of the run."""

    level: str
    file: str
    line: int | None
    title: str
    message: str

    @property
    def command(self) -> str:
        """The workflow command, one line."""
        properties = {"file": self.file, "line": str(self.line or ""), "title": self.title}
        said = ",".join(f"{name}={_property(value)}" for name, value in properties.items() if value)
        return f"::{self.level} {said}::{_data(self.message)}" if said else f"::{self.level}::{_data(self.message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def annotations_of(run: Run, found: Callable[[str], str | None], shown: Callable[[str], str]) -> list[Annotation]:
    """What is to be annotated of a run, the worst first, at most ten of a level and one that counts the rest.

    Args:
        found: where a file that an observation names is in the repository; None where it is not in it.
        shown: how the repository names a file that is named from the root of the tests.
    """
    errors = _once([*_of_places(run, found, shown), *_of_verdicts(run, shown, "failed")])
    warnings = _once(_of_verdicts(run, shown, "unverified"))
    kept = errors[:MOST] + warnings[:MOST]
    more = [
        f"{len(all_) - MOST} more {name}" for all_, name in ((errors, "errors"), (warnings, "warnings")) if all_[MOST:]
    ]
    if more:
        said = f"{' and '.join(more)} are not annotated: GitHub shows {MOST} of each; the log and the reports have them all"
        kept.append(Annotation("notice", "", None, "pytest-diffopt", said))
    return kept


def _of_places(run: Run, found: Callable[[str], str | None], shown: Callable[[str], str]) -> Iterator[Annotation]:
    for kind in _KINDS:
        outside: list[Annotation] = []
        for recipe in run.recipes:
            for place in recipe.places:
                if place.kind != kind or not place.failed:
                    continue
                times = f" {place.count}×" if place.count > 1 else ""
                inside = f" in {place.component}" if place.component else ""
                message = f"{kind}{times}{inside}: {place.why}"
                if (here := found(place.file)) is not None:
                    yield Annotation("error", here, place.line, f"{recipe.recipe}: {kind}", message)
                else:
                    message = f"{message}\nat {place.function or 'code'} {place.file}:{place.line}"
                    file = shown(recipe.file)
                    outside.append(Annotation("error", file, recipe.line, f"{recipe.recipe}: {kind}", message))
        yield from outside


def _of_verdicts(run: Run, shown: Callable[[str], str], status: str) -> Iterator[Annotation]:
    level = "error" if status == "failed" else "warning"
    for recipe in run.recipes:
        placed = {place.kind for place in recipe.places if place.failed}
        for verdict in recipe.verdicts:
            if is_the_crash(verdict.figures) and (REFERS in verdict.figures or "crash" in placed):
                continue
            if verdict.status == status and _PLACED.get(verdict.check) not in placed:
                title = f"{recipe.recipe} · {verdict.check} {status}"
                message = "\n".join([verdict.sentence or status, *verdict.evidence])
                yield Annotation(level, shown(recipe.file), _line_of(recipe), title, message)


def _line_of(recipe: RecipeRun) -> int | None:
    return recipe.line if recipe.file else None


def _once(found: Iterable[Annotation]) -> list[Annotation]:
    """Equal ones of several recipes once, with the names of all."""
    kept: dict[tuple[str, str, int | None, str, str], Annotation] = {}
    names: dict[tuple[str, str, int | None, str, str], list[str]] = {}
    for one in found:
        name, colon, rest = one.title.partition(": ")
        key = (one.level, one.file, one.line, rest if colon else one.title, one.message)
        kept.setdefault(key, one)
        names.setdefault(key, []).append(name)
    return [
        one
        if len(names[key]) == 1
        else Annotation(one.level, one.file, one.line, _several(names[key], key[3]), one.message)
        for key, one in kept.items()
    ]


def _several(names: Sequence[str], rest: str) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    return f"{', '.join(distinct[:3])}{more}: {rest}"


@dataclass(frozen=True)
class Repository:
    """Where the user's files are, and how GitHub names them.

    Attributes:
        root: of the tests. top: of the repository, as far as it is known; else the root of the tests.
        import_paths: further folders whose modules the user's code imports.
    """

    root: Path
    top: Path
    import_paths: tuple[Path, ...] = ()

    def shown(self, file: str) -> str:
        """A file that is named from the root of the tests, as the repository names it; ``""`` where it is not in it."""
        return self._named(self.root / file) or "" if file else ""

    def found(self, file: str) -> str | None:
        """Where the repository has a file that is named from the import path that holds it; None where it has not."""
        for folder in (self.root, *self.import_paths, self.root / "src", self.top, self.top / "src"):
            if (folder / file).is_file():
                return self._named(folder / file)
        return None

    def _named(self, path: Path) -> str | None:
        resolved, top = path.resolve(), self.top.resolve()
        if not resolved.is_relative_to(top):
            return None
        named = PurePosixPath(resolved.relative_to(top).as_posix())
        return None if set(_INSTALLED) & set(named.parts) else str(named)
