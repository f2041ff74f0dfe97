"""The verdict ``baseline``: nothing that a recipe does is other than recorded, for better or worse."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_diffopt.baseline.comparison import Difference, differences
from pytest_diffopt.baseline.key import Key, nearest
from pytest_diffopt.baseline.record import Record
from pytest_diffopt.baseline.store import BaselineFile, Found, name_of, parsed, source_of
from pytest_diffopt.checks.parity import percent
from pytest_diffopt.checks.verdict import Status, Verdict
from pytest_diffopt.errors import BaselineError

NAME = "baseline"
SHOWN = 12
"""Differences that are shown; the rest is counted."""
MEND = "restore it from version control, or delete it and record it again"
DELETE = "delete the file if that is meant"


@dataclass(frozen=True)
class Baselines:
    """The baselines that a run is held against.

    Attributes:
        directory: as the user wrote it, for messages. found: path there → the file as it lies there.
        update: the run records; nothing is held against what is there.
    """

    directory: str
    found: dict[str, Found]
    update: bool = False

    @functools.cached_property
    def _files(self) -> dict[str, BaselineFile | BaselineError]:
        """Each file once, or what is wrong with it."""
        files: dict[str, BaselineFile | BaselineError] = {}
        for name, found in self.found.items():
            try:
                files[name] = parsed(found)
            except BaselineError as error:
                files[name] = error
        return files

    @functools.cached_property
    def _by_content(self) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """(recipe file, a recipe's content) → (recipe, path) of the baselines that were recorded of it."""
        found: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for name, file in self._files.items():
            if isinstance(file, BaselineFile):
                for content in {_plain(entry.record.recipe) for entry in file.entries}:
                    found.setdefault((file.source, content), []).append((file.recipe, name))
        return found

    def to_plain(self) -> dict[str, Any]:
        """Plain data, for other processes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Baselines:
        """The inverse of :meth:`to_plain`."""
        found = {name: Found(**one) for name, one in data["found"].items()}
        return cls(data["directory"], found, data["update"])

    def judge(
        self, source: str, recipe: str, key: Key, record: Record, present: Collection[str] = (), node_id: str = ""
    ) -> Verdict:
        """The verdict of a recipe.

        Args:
            source: its file, as baselines name it.
            node_id: the recipe as pytest names it, for the command that records it.
            present: the names of all recipes of that file, to tell a recipe that was renamed.
        """
        name = name_of(source, recipe)
        path = f"{self.directory}/{name}"
        command = self._command(node_id or f"{source}::{recipe}")
        if self.update:
            return self._observed(recipe, key, record, name)
        if name not in self.found:
            evidence = [command]
            if old := self.renamed_from(source, record, present):
                evidence.insert(
                    0, f"{self.directory}/{old} is of an equal recipe that is gone: recording moves it here"
                )
            return _verdict(recipe, "unverified", f"there is no baseline {path}", key, evidence=evidence)
        file = self._files[name]
        if isinstance(file, BaselineFile) and (file.source, file.recipe) != (source, recipe):
            file = BaselineError(f"it is of the recipe {file.recipe} in {file.source}")
        if isinstance(file, BaselineError):
            return _verdict(recipe, "failed", f"{path}: {file}", key, evidence=[MEND, command])
        against = nearest(key, [entry.key for entry in file.entries])
        if against is None:
            there = "; ".join(dict.fromkeys(entry.key.place for entry in file.entries)) or "nothing"
            return _verdict(
                recipe,
                "unverified",
                f"{path} has nothing for {key.place}; it was recorded on {there}, which is not compared",
                key,
                evidence=[command],
            )
        return self._compared(recipe, key, record, file, against, command)

    def _observed(self, recipe: str, key: Key, record: Record, name: str) -> Verdict:
        file = self._files.get(name)
        path = f"{self.directory}/{name}"
        if isinstance(file, BaselineError):
            return _verdict(recipe, "failed", f"{path}: {file}", key, evidence=[MEND])
        before = file.entry(key) if file is not None else None
        found = differences(before.record, record, key.accelerator) if before is not None else []
        lines = [one.line for one in found[:SHOWN]] + (
            [f"… and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        )
        return _verdict(recipe, "passed", f"observed; {path} is written when the run ends", key, evidence=lines)

    def _compared(
        self, recipe: str, key: Key, record: Record, file: BaselineFile, against: Key, command: str
    ) -> Verdict:
        entry = file.entry(against)
        assert entry is not None
        found = differences(entry.record, record, key.accelerator)
        versions = key.differing(against)
        beside = f" (recorded with {', '.join(versions)})" if versions else ""
        if not found:
            sentence, evidence = f"everything is as recorded{beside}", []
            if record.outputs and entry.record.outputs is None:
                sentence += "; outputs were not recorded, so they are not compared"
                evidence = [command]
            elif record.outputs and entry.record.outputs:
                least = max(entry.record.outputs, key=lambda one: one.allowed)
                found_equal = (
                    f"{len(record.outputs)} outputs of the eager reference are as recorded: none moved by more than "
                )
                evidence = [f"{found_equal}{percent(least.allowed)} of its size ({least.where}, in {least.dtype})"]
            return _verdict(recipe, "passed", sentence, key, against, entry.record, evidence=evidence)
        counts = {d: sum(one.direction == d for one in found) for d in ("worse", "changed", "better")}
        told = ", ".join(f"{count} {direction}" for direction, count in counts.items() if count)
        lines = [one.line for one in found[:SHOWN]]
        lines += [f"… and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        lines.append(f"if this is meant, {command}")
        return _verdict(
            recipe,
            "failed",
            f"{len(found)} thing{'s' if len(found) > 1 else ''} not as recorded: {told}{beside}",
            key,
            against,
            entry.record,
            found,
            lines,
        )

    def renamed_from(self, source: str, record: Record, present: Collection[str]) -> str:
        """The path of a baseline of the same recipe file and an equal recipe, whose own name is gone; else empty."""
        candidates = self._by_content.get((source, _plain(record.recipe)), [])
        return next((name for recipe, name in candidates if recipe not in present), "")

    def strays(
        self, sources: Mapping[str, Collection[str]], is_there: Callable[[str], bool], *, all_wanted: bool = False
    ) -> dict[str, str]:
        """The baselines that no recipe of the run was held against, and should have been: path → the sentence that says so.

        Args:
            sources: recipe file → the names of its recipes, of the files that the run read.
            is_there: whether there is a recipe file of that name.
            all_wanted: whether a baseline is one too whose recipe file is there, and was no part of the run.
        """
        judged = {name_of(source, recipe) for source, recipes in sources.items() for recipe in recipes}
        sentences = {}
        for name, file in self._files.items():
            if name not in judged and (why := self._why_stray(name, file, sources, is_there, all_wanted=all_wanted)):
                sentences[name] = f"{self.directory}/{name}: {why}"
        return sentences

    def _why_stray(
        self,
        name: str,
        file: BaselineFile | BaselineError,
        sources: Mapping[str, Collection[str]],
        is_there: Callable[[str], bool],
        *,
        all_wanted: bool,
    ) -> str:
        if isinstance(file, BaselineError):
            source = source_of(name)
            ours = source in sources or source in self.sources() or is_there(source)
            return f"{file}; {MEND}" if ours else ""  # else it is no file of ours
        if name != (proper := name_of(file.source, file.recipe)):
            return f"it is of {file.recipe} in {file.source}, whose baseline is {self.directory}/{proper}; {DELETE}"
        if file.source in sources:
            return f"{file.source} has no recipe {file.recipe} any more; {DELETE}"
        if not is_there(file.source):
            return f"its recipe file {file.source} is gone; {DELETE}"
        return f"its recipe file {file.source} was no part of the run" if all_wanted else ""

    def sources(self) -> set[str]:
        """The recipe files that the baselines are of."""
        return {file.source for file in self._files.values() if isinstance(file, BaselineFile)}

    def _command(self, node_id: str) -> str:
        quoted, directory = shlex.quote(node_id), shlex.quote(self.directory)
        return f"record it: pytest {quoted} --diffopt-baseline={directory} --diffopt-update-baseline"


def _plain(data: object) -> str:
    return json.dumps(data, sort_keys=True)


def _verdict(
    recipe: str,
    status: Status,
    sentence: str,
    key: Key,
    against: Key | None = None,
    recorded: Record | None = None,
    found: Collection[Difference] = (),
    evidence: Collection[str] = (),
) -> Verdict:
    kept: dict[str, Any] = {}
    if recorded is not None:
        plain = dataclasses.asdict(recorded)
        kept = {name: plain[name] for name in ("peaks", "latency", "required_tolerance")}
    figures = {
        "against": dataclasses.asdict(against) if against is not None else None,
        "exact_key": against == key,
        "differences": [one.to_dict() for one in found],
        "recorded": kept,
    }
    return Verdict(NAME, recipe, status, sentence, figures, tuple(evidence))
