"""Where baselines lie: one JSON file a recipe, with an entry for each device and set of versions that it was recorded on.

A file is read whole or refused with a reason, and written whole or not at all: whenever a run is killed, what was recorded
before stands. Between processes baselines go as the texts of their files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from pytest_diffopt.baseline.comparison import differences
from pytest_diffopt.baseline.key import Key
from pytest_diffopt.baseline.record import Record
from pytest_diffopt.errors import BaselineError
from pytest_diffopt.whole_files import write_whole

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA_VERSION = 1
SUFFIX = ".recipes.toml"


@dataclass(frozen=True)
class Entry:
    """What was recorded on one device with one set of versions. ``digest`` is of both: a change by hand is found."""

    key: Key
    record: Record
    digest: str


@dataclass(frozen=True)
class BaselineFile:
    """The baseline of one recipe.

    Attributes:
        source: the recipe file, from the root of the tests.
    """

    source: str
    recipe: str
    entries: tuple[Entry, ...]
    schema_version: int = SCHEMA_VERSION

    def entry(self, key: Key) -> Entry | None:
        """The entry recorded under exactly this key."""
        return next((one for one in self.entries if one.key == key), None)

    def with_entry(self, key: Key, record: Record) -> BaselineFile:
        """The same with this entry in the place of that of an equal key."""
        others = [made_entry(one.key, one.record) for one in self.entries if one.key != key]
        entries = sorted([*others, made_entry(key, record)], key=lambda one: str(one.key))
        return BaselineFile(self.source, self.recipe, tuple(entries))


@dataclass(frozen=True)
class Found:
    """A baseline's file as it lies there: its text, or why there is none."""

    text: str = ""
    problem: str = ""


def made_entry(key: Key, record: Record) -> Entry:
    """An entry with its digest."""
    return Entry(key, record, _digest(_entry_adapter().dump_python(Entry(key, record, ""), mode="json")))


def name_of(source: str, recipe: str) -> str:
    """The path of a recipe's baseline in the folder of baselines: ``examples/flux/flux-nf4.json``."""
    folder = source.removesuffix(SUFFIX)
    return "/".join([*(quote(step, safe=_SAFE) for step in folder.split("/")), f"{quote(recipe, safe=_SAFE)}.json"])


def source_of(name: str) -> str:
    """The recipe file that a path in the folder of baselines belongs to, the inverse of :func:`name_of`."""
    return unquote(name.rpartition("/")[0]) + SUFFIX


_SAFE = "[]()+=,@ "


def read_all(directory: Path) -> dict[str, Found]:
    """Every baseline of a folder by its path there; what cannot be read says why."""
    found = {}
    for path in sorted(directory.rglob("*.json")):
        name = path.relative_to(directory).as_posix()
        try:
            found[name] = Found(path.read_bytes().decode("utf-8"))
        except OSError as error:
            found[name] = Found(problem=f"it cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            found[name] = Found(problem="it is damaged: it is not UTF-8 text")
    return found


def parsed(found: Found) -> BaselineFile:
    """A baseline out of its text.

    Raises:
        BaselineError: the file could not be read, is damaged, was changed by hand, or is of a newer release.
    """
    if found.problem:
        raise BaselineError(found.problem)
    try:
        data = json.loads(found.text)
    except ValueError as error:
        raise BaselineError(f"it is damaged: no JSON ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("schema_version"), int):
        raise BaselineError("it is no baseline, or damaged: it has no schema_version")
    version = data["schema_version"]
    if version != SCHEMA_VERSION:
        newer = "of a newer release: update pytest-diffopt" if version > SCHEMA_VERSION else "of an unknown release"
        raise BaselineError(f"it has schema version {version}, {newer}; this one reads {SCHEMA_VERSION}")
    from pydantic import ValidationError

    try:
        file = _adapter().validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise BaselineError(f"it is damaged: {place}: {first['msg']}{more}") from None
    for number, (entry, written) in enumerate(zip(file.entries, data["entries"], strict=True)):
        if entry.digest != _digest(written):  # of what is written: a later release may read more into it
            raise BaselineError(
                f"entry {number} ({entry.key.place}) was changed by hand, or merged wrongly: its digest differs"
            )
    keys = [str(entry.key) for entry in file.entries]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise BaselineError(f"it has two entries for {twice}")
    return file


def text_of(file: BaselineFile) -> str:
    """A baseline as the text of its file."""
    return json.dumps(_adapter().dump_python(file, mode="json"), indent=1, ensure_ascii=False) + "\n"


def plain_record(key: Key, record: Record) -> dict[str, Any]:
    """A key and a record as plain JSON data, for reports and other processes."""
    entry = _entry_adapter().dump_python(made_entry(key, record), mode="json")
    return {"key": entry["key"], "record": entry["record"]}


def entry_of(plain: Mapping[str, Any]) -> Entry:
    """The inverse of :func:`plain_record`."""
    return _entry_adapter().validate_python({**plain, "digest": ""})


@dataclass(frozen=True)
class Recorded:
    """What :meth:`Store.record` did: ``new`` (file or entry), ``changed``, ``as before``, or ``moved`` from another name."""

    name: str
    how: str
    was: str = ""


class Store:
    """A folder of baselines.

    Args:
        directory: the folder; made when something is recorded.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextlib.contextmanager
    def locked(self) -> Iterator[Store]:
        """Inside this no other process on this machine writes to the folder."""
        from filelock import FileLock

        name = hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()[:16]
        with FileLock(Path(tempfile.gettempdir()) / f"pytest-diffopt-{name}.lock"):
            yield self

    def record(self, source: str, recipe: str, entry: Entry, *, moved_from: str = "") -> Recorded:
        """Write what was observed of a recipe; entries under other keys stay.

        Args:
            moved_from: the path of the baseline of a recipe that has got this name; its entries are kept.

        Raises:
            BaselineError: what is there is damaged or newer, and stays as it is.
            OSError: it could not be written, and what was there stands.
        """
        name = name_of(source, recipe)
        path = self.directory / name
        old = self._read(name) or (self._read(moved_from) if moved_from else None)
        before = old.entry(entry.key) if old is not None else None
        how = "new" if before is None else "changed"
        same = (
            before is not None
            and (before.record.outputs is None) == (entry.record.outputs is None)  # an earlier release kept none
            and not differences(before.record, entry.record, entry.key.accelerator)
        )
        if same and path.exists() and not moved_from:
            return Recorded(name, "as before")
        kept = BaselineFile(source, recipe, old.entries if old is not None else ())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text_of(kept if same else kept.with_entry(entry.key, entry.record)))
        if moved_from and moved_from != name:
            (self.directory / moved_from).unlink(missing_ok=True)
            return Recorded(name, "moved", moved_from)
        return Recorded(name, how)

    def _read(self, name: str) -> BaselineFile | None:
        path = self.directory / name
        try:
            return parsed(Found(path.read_bytes().decode("utf-8", "replace")))
        except FileNotFoundError:
            return None
        except BaselineError as error:
            raise BaselineError(f"{path}: {error}") from None


def _digest(entry: Mapping[str, Any]) -> str:
    content = {name: value for name, value in entry.items() if name != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[BaselineFile]:
    from pydantic import TypeAdapter

    return TypeAdapter(BaselineFile)


@functools.lru_cache(maxsize=1)
def _entry_adapter() -> TypeAdapter[Entry]:
    from pydantic import TypeAdapter

    return TypeAdapter(Entry)
