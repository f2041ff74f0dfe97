"""Recipe files become test items: ``FILE::RECIPE::CHECK``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_diffopt.checks import crashes
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.collection import baselines, left_out
from pytest_diffopt.collection.import_paths import make_importable, mistaken_modules
from pytest_diffopt.collection.known_faults import against_known_faults, known_fault
from pytest_diffopt.collection.session import PROGRESS, SETTINGS, registry_of, session_of
from pytest_diffopt.collection.skipping import skip
from pytest_diffopt.collection.workers import take_share
from pytest_diffopt.documentation.requirements import missing
from pytest_diffopt.errors import DiffoptError, Problem, RecipeError, UnverifiableError
from pytest_diffopt.recipe import DOES_NOT_RUN
from pytest_diffopt.report.combinations import note_left_out
from pytest_diffopt.report.gathering import REPORTED
from pytest_diffopt.report.html import keep_forecast_picture, keep_picture
from pytest_diffopt.report.rows import RECIPE_PROPERTY, RECORD_PROPERTY, ROW_PROPERTY, VERDICT_PROPERTY, row_of

if TYPE_CHECKING:
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.matrix import Matrix
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.part import Mistake
    from pytest_diffopt.recipe import Recipe

    _Node = pytest.Collector | pytest.Item  # whose conftest files' hooks are asked

SUFFIX = ".recipes.toml"
_TOLD: pytest.StashKey[set[str]] = pytest.StashKey()
"""The recipes of which this process has handed a record on."""
_CAUSES: pytest.StashKey[dict[str, str]] = pytest.StashKey()
"""Recipe whose run did not end → the item of it, of this process, that has the cause."""


class VerdictFailure(Exception):
    """Carries a failed verdict from a check to its report; ``whole`` is its text with the traceback that it may have."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.text)
        self.whole = "\n".join([verdict.text, *([""] if verdict.traceback else []), *verdict.traceback])


class RecipeFile(pytest.File):
    """A ``*.recipes.toml`` file."""

    def collect(self) -> Iterator[RecipeNode]:
        text = self.path.read_bytes().decode("utf-8", "replace")
        tables = read_tables(self.path, self)
        more = (baselines.NAME,) if baselines.BASELINES in self.config.stash else ()
        source = baselines.source_name(self.path, self.config)
        left_out.note_read(self.config, self.nodeid, source, [written.recipe for written in tables.values()], more)
        for name, written in tables.items():
            yield RecipeNode.from_parent(self, name=name, recipe=written.recipe, line=line_of(text, written.table))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:  # type: ignore[override]
        if isinstance(excinfo.value, DiffoptError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)


class RecipeNode(pytest.Collector):
    """One recipe of a file: a check is an item of it.

    Args:
        recipe: the recipe.
        line: of its table in the file, from 0.
    """

    def __init__(self, *, recipe: Recipe, line: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.line = line
        self.extra_keyword_matches.update(keywords_of(recipe))
        if self.config.pluginmanager.has_plugin("xdist"):
            # one observation serves all checks: with --dist loadgroup they stay on one worker
            self.add_marker(pytest.mark.xdist_group(self.nodeid))

    def collect(self) -> Iterator[CheckItem]:
        from pytest_diffopt.checks import checks_for

        more = (baselines.NAME,) if baselines.BASELINES in self.config.stash else ()
        for check in (*checks_for(self.recipe), *more):
            yield CheckItem.from_parent(self, name=check, recipe=self.recipe, line=self.line)


class CheckItem(pytest.Item):
    """One check of one recipe."""

    def __init__(self, *, recipe: Recipe, line: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.line = line
        assert self.parent is not None
        self._source = self.parent.nodeid
        about = {"source": self._source, "recipe": recipe.name, "check": self.name, "content": recipe.content_hash}
        self.user_properties.append((RECIPE_PROPERTY, about))

    def runtest(self) -> None:
        if why := missing(self.recipe.requires):
            skip(self, why)
        verdict, observation, forecast = self._judge()
        reason = known_fault(self.recipe, verdict, observation)
        unexpected = verdict.status == "failed" and not reason
        verdict = against_known_faults(self.recipe, verdict, observation)
        verdict = self._with_cause_once(verdict, observation)
        if unexpected and self.recipe.isolate and self.name != baselines.NAME:
            verdict = self._isolated(verdict)
        self._write_down(verdict, observation, forecast)
        self._draw(observation, forecast)
        if observation is not None or forecast is not None:  # there is something to read beside the verdict
            self.ihook.pytest_diffopt_verdict(verdict=verdict, observation=observation, forecast=forecast)
        if reason:
            pytest.xfail(reason)
        if verdict.status == "failed" or (verdict.status == "unverified" and self.config.stash[SETTINGS].strict):
            raise VerdictFailure(verdict)
        if verdict.status == "unverified":
            skip(self, f"unverified: {verdict.sentence}")

    def _judge(self) -> tuple[Verdict, Observation | None, Forecast | None]:
        with self.config.stash[PROGRESS].running():
            try:
                if self.name == baselines.NAME:
                    verdict, observation, record = baselines.judged(self.config, self.recipe, self.path, self._source)
                    self.user_properties.append((RECORD_PROPERTY, record))
                    if observation.failure is not None and DOES_NOT_RUN not in self.recipe.known_faults:
                        verdict = crashes.of_unfinished(verdict, observation.failure)
                    return verdict, observation, None
                session = session_of(self.config)
                verdict = session.judge(self.recipe, self.name)
                if self.name == "forecast":  # the recipe need not run for it
                    return verdict, None, session.forecast_evidence(self.recipe).forecast
                return verdict, session.observe(self.recipe), None
            except UnverifiableError as error:
                return Verdict(self.name, self.recipe.name, "unverified", str(error)), None, None
            except DiffoptError as error:
                return Verdict(self.name, self.recipe.name, "failed", *_told(error)), None, None

    def _with_cause_once(self, verdict: Verdict, observation: Observation | None) -> Verdict:
        """Where the recipe's run did not end, only its first item has the cause; the others refer to it."""
        if observation is None or observation.failure is None or not verdict.traceback:
            return verdict
        causes = self.config.stash.setdefault(_CAUSES, {})
        own = f"{self._source}::{self.name}"
        where = causes.setdefault(self._source, own)
        return verdict if where == own else crashes.referring(verdict, observation.failure, where)

    def _isolated(self, verdict: Verdict) -> Verdict:
        """After the verdict was compared with known faults: nothing added here is to be taken for a cause of theirs."""
        with self.config.stash[PROGRESS].running():
            return session_of(self.config).isolated(self.recipe, verdict)

    def _is_first(self) -> bool:
        """Whether no check of the recipe has handed a record on in this process; that of `baseline` has one of its own."""
        told = self.config.stash.setdefault(_TOLD, set())
        if self.name == baselines.NAME or self._source in told:
            return False
        told.add(self._source)
        return True

    def _write_down(self, verdict: Verdict, observation: Observation | None, forecast: Forecast | None) -> None:
        self.user_properties.append((VERDICT_PROPERTY, verdict.to_dict()))
        if self.config.stash[REPORTED] and observation is not None and self._is_first():
            record = baselines.plain_record_of(self.config, self.recipe, self.path, observation)
            self.user_properties.append((RECORD_PROPERTY, record))
        row = row_of(observation, [verdict], source=self._source, forecast=forecast)
        self.user_properties.append((ROW_PROPERTY, row))

    def _draw(self, observation: Observation | None, forecast: Forecast | None) -> None:
        from pytest_diffopt.checks import checks_for

        if forecast is not None:
            keep_forecast_picture(self, forecast)
            observation = session_of(self.config).observed(self.recipe)  # beside it, where it ran
        elif self.name != ("memory" if "memory" in checks_for(self.recipe) else "parity"):  # once a recipe
            return
        if observation is not None:
            keep_picture(self, observation, self.recipe.name)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, VerdictFailure):
            whole = self.config.get_verbosity() >= 2 or self.config.getoption("tbstyle") == "long"
            return excinfo.value.whole if whole else str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.line, f"{self.recipe.name} · {self.name}"


def _told(error: BaseException) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """An error as a verdict's sentence, figures and evidence; its causes are the evidence."""
    first, *rest = str(error).splitlines() or [""]
    evidence = [line.strip() for line in rest]
    cause = error.__cause__
    while cause is not None:
        evidence.append(f"caused by {type(cause).__name__}: {cause}".splitlines()[0])
        cause = cause.__cause__
    return f"{type(error).__name__}: {first}", {}, tuple(evidence)


@dataclass(frozen=True)
class Written:
    """A recipe and the name of the table that it is written in: its own, or that of a matrix."""

    recipe: Recipe
    table: str


def read_recipes(path: Path, node: _Node) -> dict[str, Recipe]:
    """The recipes of a file, as the hook `pytest_diffopt_modify_recipe` leaves them.

    Raises:
        RecipeError: with every mistake in the file, and all that this installation lacks for it.
    """
    return {name: written.recipe for name, written in read_tables(path, node).items()}


def read_tables(path: Path, node: _Node) -> dict[str, Written]:
    """As `read_recipes`, each with its table. Notes which combinations of a matrix are left out.

    Raises:
        RecipeError: with every mistake in the file, and all that this installation lacks for it.
    """
    take_share(node.config, node.config.stash[SETTINGS].device)  # before torch is imported
    from pytest_diffopt.installation import problems_with_installation
    from pytest_diffopt.matrix import Matrix
    from pytest_diffopt.part import problems_of
    from pytest_diffopt.recipe import Recipe
    from pytest_diffopt.recipe_loading import load_tables

    registry_of(node.config)  # a recipe may name a replica that a conftest file registers
    make_importable(path.parent, node.config)
    hub = node.config.stash[SETTINGS].hub
    found: dict[str, Written] = {}
    problems: list[Problem] = []
    try:
        tables = load_tables(path).tables
    except RecipeError as error:  # go on with the recipes that are right: every mistake of a file is told at once
        problems += error.problems
        tables = error.tables
    for table, loaded in tables.items():
        combined = isinstance(loaded, Matrix)
        recipes: list[Recipe] = []
        if isinstance(loaded, Matrix):
            matrix, wrong = _installed(loaded, path.parent, allow_hub=hub)
            problems += problems_of(wrong, ("recipe", table))
            if not wrong:
                recipes += matrix.recipes.values()
                note_left_out(node.config, _shown_path(path, node.config), matrix)
        else:
            recipes.append(loaded)
        for recipe in recipes:
            recipe = _located(recipe, path.parent)
            changed = node.ihook.pytest_diffopt_modify_recipe(recipe=recipe, config=node.config)
            if changed is not None and not isinstance(changed, Recipe):
                what = f"{type(changed).__name__} from the hook pytest_diffopt_modify_recipe"
                allowed = "it returns a Recipe, or None to leave it as it is"
                problems.append(Problem(f"recipe.{recipe.name}", what, allowed))
                continue
            found[recipe.name] = Written(recipe if changed is None else changed, table)
            if missing(found[recipe.name].recipe.requires):  # it is skipped, with that reason
                continue
            if changed is not None or not combined:  # a combination was looked at
                problems += problems_with_installation(
                    found[recipe.name].recipe, prefix=f"recipe.{recipe.name}", allow_hub=hub
                )
            problems += mistaken_modules(found[recipe.name].recipe, path.parent, f"recipe.{recipe.name}")
    if problems:
        raise RecipeError(_said_once(problems), _shown_path(path, node.config))
    return found


def _said_once(problems: Iterable[Problem]) -> list[Problem]:
    """The problems, those that recipes have in common as one: an unknown pipeline, inherited by each, is one mistake."""
    paths: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        paths.setdefault((problem.found, problem.allowed), []).append(problem.path)
    return [Problem(_first_of(at), found, allowed) for (found, allowed), at in paths.items()]


def _first_of(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more: {', '.join(paths[1:4])})"


def _installed(matrix: Matrix, folder: Path, *, allow_hub: bool) -> tuple[Matrix, list[Mistake]]:
    """The matrix without the combinations that this installation refuses, and what it refuses of all of them."""
    from pytest_diffopt.installation import problems_with_installation

    def refuse(recipe: Recipe) -> list[Problem]:
        if missing(recipe.requires):  # it is skipped, with that reason
            return []
        found = problems_with_installation(_located(recipe, folder), prefix="recipe", allow_hub=allow_hub)
        return [Problem(one.path.removeprefix("recipe."), one.found, one.allowed) for one in found]

    return matrix.refined(refuse)


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """A pipeline in a directory that is named from the recipe file's own folder, wherever pytest was started."""
    from pytest_diffopt.preparation import media

    found: dict[str, Any] = {
        field: str(folder / name)
        for field, name in (("pipeline", recipe.pipeline), ("reference", recipe.reference))
        if isinstance(name, str) and (folder / name / "model_index.json").is_file()
    }
    kwargs, inputs = media.located(recipe.call.kwargs, folder), media.located(recipe.call.inputs, folder)
    if (kwargs, inputs) != (recipe.call.kwargs, recipe.call.inputs):
        found["call"] = dataclasses.replace(recipe.call, kwargs=kwargs, inputs=inputs)
    return recipe.replace(**found) if found else recipe


def _shown_path(path: Path, config: pytest.Config) -> str:
    root = config.rootpath
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def keywords_of(recipe: Recipe) -> set[str]:
    """What ``-k`` selects a recipe by, besides its name: what it is made of."""
    words = {"diffopt", recipe.name}
    if isinstance(recipe.pipeline, str):
        words.add(recipe.pipeline)
    words |= {word for one in recipe.quantizations for word in ("quantization", one.backend)}
    for compilation in recipe.compilation:
        backend = compilation.backend
        words |= {"compilation", compilation.scope, backend if isinstance(backend, str) else ""}
    if recipe.offloading is not None:
        words |= {"offloading", recipe.offloading.strategy}
    words |= {"attention"} if recipe.attention is not None else set()
    words |= {word for one in recipe.caching for word in ("caching", one.kind)}
    if recipe.forecast is not None:
        words |= {recipe.forecast.model or "", recipe.forecast.gpu or ""}  # "forecast" is the check alone
    return words - {""}


def line_of(text: str, name: str) -> int:
    """The line, from 0, of a recipe's table in a file; 0 where it is not written as a table header."""
    quoted = "|".join((re.escape(name), re.escape(f'"{name}"'), re.escape(f"'{name}'")))
    header = re.compile(rf"\s*\[\s*recipe\s*\.\s*(?:{quoted})\s*(?P<part>\.[^\]]*)?\]")
    found = [
        (match["part"] is not None, at) for at, line in enumerate(text.splitlines()) if (match := header.match(line))
    ]
    return min(found, default=(False, 0))[1]


def recipes_named(named: Iterable[Any], node: _Node, beside: Path) -> list[Recipe]:
    """The recipes that the marker `recipes` names: each object itself, each file all in it.

    Raises:
        RecipeError: a file is wrong, or is not there.
    """
    found: list[Recipe] = []
    for one in named:
        if hasattr(one, "content_hash"):
            found.append(one)
            continue
        places = [beside / one, node.config.rootpath / one]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            missing = Problem(
                "recipes", repr(str(one)), f"there is no such file in {places[0].parent} or {places[1].parent}"
            )
            raise RecipeError([missing], "the marker recipes")
        found += read_recipes(path, node).values()
    return found
