"""A session observes each recipe once, whatever the number of checks that read it, and shares references by content.

Forecasts are made once too, and only for the check that reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks import (
    attention,
    caching,
    crashes,
    engagement,
    forecast,
    graph_breaks,
    host_syncs,
    isolation,
    memory,
    parity,
    quantization,
    recompiles,
    state,
    upcasting,
)
from pytest_diffopt.checks.evidence import Evidence, ForecastEvidence
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.contract import derive
from pytest_diffopt.errors import DiffoptError, ReplicaError, UnverifiableError
from pytest_diffopt.part import content_of

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.contract import Limits
    from pytest_diffopt.forecasting.record import Forecast
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe


_OF_A_RUN: dict[str, Callable[[Evidence], Verdict]] = {
    engagement.NAME: engagement.judge,
    graph_breaks.NAME: graph_breaks.judge,
    recompiles.NAME: recompiles.judge,
    quantization.NAME: quantization.judge,
    attention.NAME: attention.judge,
    caching.NAME: caching.judge,
    memory.NAME: memory.judge,
    host_syncs.NAME: host_syncs.judge,
    parity.NAME: parity.judge,
    state.NAME: state.judge,
}
CHECKS: dict[str, Callable[[Any], Verdict]] = {  # of `Evidence`; forecast of `ForecastEvidence`
    **{name: crashes.guarded(name, judge) for name, judge in _OF_A_RUN.items()},
    forecast.NAME: forecast.judge,
}


PLACES: dict[str, Callable[[Evidence], list[tuple[str, str]]]] = {
    graph_breaks.NAME: graph_breaks.places,
    recompiles.NAME: recompiles.places,
    host_syncs.NAME: host_syncs.places,
}
"""Of the checks that count something at places of the code."""


def limits_of(recipe: Recipe) -> Limits:
    """What a recipe promises: what its contract says, and what its parts imply."""
    return derive(
        recipe.contract,
        compilations=recipe.compilation,
        offloading=recipe.offloading,
        quantization=recipe.quantization,
        caching=recipe.caching,
    )


class Session:
    """Observes recipes and judges them.

    Args:
        accelerator: where recipes run; by default found when the first one does.
        allow_hub: let hub ids that resolve to nothing local go to the hub.
        compile_backend: used instead of the backends that the recipes name.
        progress: called with a few words whenever a frame begins to compile, and as a forecast goes on.
        timed_calls: further calls of each recipe that are made for their time alone.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        *,
        allow_hub: bool = False,
        compile_backend: str | None = None,
        progress: Callable[[str], None] | None = None,
        timed_calls: int = 0,
    ) -> None:
        self._accelerator = accelerator
        self._allow_hub = allow_hub
        self._compile_backend = compile_backend
        self._progress = progress
        self._timed_calls = timed_calls
        self._observations: dict[tuple[str, bool], Observation] = {}
        self._forecasts: dict[tuple[str, str], tuple[str, Forecast | DiffoptError]] = {}

    @property
    def accelerator(self) -> Accelerator:
        if self._accelerator is None:
            from pytest_diffopt.accelerators import select

            self._accelerator = select()
        return self._accelerator

    def observe(self, recipe: Recipe) -> Observation:
        """What happened when the recipe ran; run at the first call, for all recipes of the same content."""
        return self._observe(recipe, force_eager=False)

    def _observe(self, recipe: Recipe, *, force_eager: bool) -> Observation:
        key = recipe.content_hash, force_eager
        found = self._observations.get(key)
        if found is None:
            from pytest_diffopt.accelerators.sharing import held
            from pytest_diffopt.observation.observing import observe

            with held(self.accelerator, alone=recipe.exclusive, waiting=self._progress):
                found = observe(
                    recipe,
                    accelerator=self.accelerator,
                    allow_hub=self._allow_hub,
                    compile_backend=self._compile_backend,
                    progress=self._progress,
                    force_eager=force_eager,
                    timed_calls=self._timed_calls,
                )
            self._observations[key] = found
        if found.name != recipe.name:  # another recipe of the same content ran first
            found = replace(found, recipe={**found.recipe, "name": recipe.name})
        return found

    def load_peaks(self, recipe: Recipe, times: int) -> tuple[int, ...]:
        """Peaks in bytes of so many further preparations of the recipe; empty where memory is not counted."""
        from pytest_diffopt.observation.load_peaks import load_peaks

        return load_peaks(
            recipe, self.accelerator, times, allow_hub=self._allow_hub, compile_backend=self._compile_backend
        )

    @property
    def compile_backend(self) -> str | None:
        """The compile backend that is used instead of the recipes' own."""
        return self._compile_backend

    def _eager(self, recipe: Recipe) -> Observation:
        """What happened when a recipe that compiles nothing ran eager, whatever its factory does. A run of it as it is
        will do where nothing was compiled in that: the recipe itself, or another's reference."""
        found = self._observations.get((recipe.content_hash, False))
        if found is None or found.compiles.frames or found.compiles.regions:
            return self._observe(recipe, force_eager=True)
        return self.observe(recipe)

    def observed(self, recipe: Recipe) -> Observation | None:
        """What happened when the recipe ran, if it did; nothing is run."""
        return self.observe(recipe) if (recipe.content_hash, False) in self._observations else None

    def forecast(self, recipe: Recipe) -> Forecast:
        """What the recipe's ``forecast`` asks for; made at the first call, on the simulated device whatever others run on.

        Raises:
            DiffoptError: it cannot be made, or the recipe asks for none.
        """
        budget = recipe.forecast
        if budget is None:
            raise DiffoptError(f"{recipe.name}: the recipe has no part forecast.")
        asked = {field: value for field, value in budget.given().items() if field != "max_memory"}
        asked["model"] = next(iter(_model_names(recipe)), budget.model)  # one model has several names
        key = recipe.content_hash, content_of(asked)
        if key not in self._forecasts:
            from pytest_diffopt.forecasting import running

            made: Forecast | DiffoptError
            try:
                made = running.forecast(
                    recipe,
                    budget.model,
                    sizes=budget.sizes,
                    steps=budget.num_inference_steps,
                    gpu=budget.gpu,
                    assume=budget.assume,
                    kwargs=budget.kwargs,
                    progress=self._progress,
                )
            except DiffoptError as error:
                made = error
            self._forecasts[key] = recipe.name, made
        name, found = self._forecasts[key]
        if isinstance(found, DiffoptError):
            raise found
        if found.recipe == name != recipe.name:  # another recipe of the same content was forecast first
            found = replace(found, recipe=recipe.name)
        return found

    def forecast_evidence(self, recipe: Recipe) -> ForecastEvidence:
        """Everything that the check `forecast` reads; the recipe itself is not run."""
        from pytest_diffopt.accelerators.gpus import card

        gpu = recipe.forecast.gpu if recipe.forecast is not None else None
        try:
            wanted = card(gpu) if gpu is not None else None
            return ForecastEvidence(recipe, self.forecast(recipe), "", _model_names(recipe), wanted)
        except DiffoptError as error:
            return ForecastEvidence(recipe, error=str(error))

    def _judge(self, check: str, given: Evidence) -> Verdict:
        """The verdict of a check of what was observed; of parity in a wider dtype too, where the contract asks for it."""
        verdict = CHECKS[check](given)
        dtype = given.recipe.contract.parity_dtype
        if check != parity.NAME or dtype is None or verdict.status != "passed":
            return verdict
        try:
            wide = upcasting.upcast(given.recipe, dtype)
            observation, reference = self._pair(wide)
            found: Evidence | UnverifiableError = Evidence(wide, observation, given.limits, reference)
        except UnverifiableError as error:
            found = error
        return parity.sharper(verdict, found, dtype)

    def evidence(self, recipe: Recipe) -> Evidence:
        """Everything that the other checks of a recipe read: its observation, its reference, its limits."""
        observation, reference = self._pair(recipe)
        resident = None
        if recipe.offloading is not None and observation.memory is not None and observation.failure is None:
            resident = self.observe(recipe.without("offloading"))
        return Evidence(recipe, observation, limits_of(recipe), reference, resident)

    def _pair(self, recipe: Recipe) -> tuple[Observation, Observation | None]:
        """What happened when the recipe ran, and when its eager reference did; None where the recipe did not end."""
        observation = self.observe(recipe)
        if observation.failure is not None:
            return observation, None  # there is nothing to compare
        reference = observation
        if recipe.compilation or recipe.offloading is not None or recipe.reference is not None:
            # eager also where the factory compiles by itself; otherwise a wrong compiler would be compared with itself
            eager = recipe.without("compilation", "offloading", "dynamo")
            if recipe.reference is not None:
                eager = eager.replace(name=f"{recipe.name}'s reference", pipeline=recipe.reference, reference=None)
            compiles = bool(recipe.compilation) or recipe.reference is not None
            reference = self._eager(eager) if compiles else self.observe(eager)
        elif any(region.graph_runs for region in observation.compiles.regions):
            reference = self._observe(recipe, force_eager=True)  # the factory compiles by itself
        return observation, reference

    def judge(self, recipe: Recipe, check: str) -> Verdict:
        """The verdict of one check."""
        if check == forecast.NAME:
            return CHECKS[check](self.forecast_evidence(recipe))
        return self._judge(check, self.evidence(recipe))

    def isolated(self, recipe: Recipe, verdict: Verdict) -> Verdict:
        """A failed verdict with the smallest subset of the recipe's parts that fails in the same way, of a recipe with
        ``isolate``; any other verdict as it is. Its status stays. Observes up to `isolation.MOST_RUNS` recipes more."""
        if not recipe.isolate or verdict.status != "failed" or verdict.check in isolation.NOT_SEARCHED:
            return verdict
        if crashes.is_the_crash(verdict.figures) and crashes.REFERS in verdict.figures:
            return verdict  # it is searched for the verdict that has the cause
        try:
            causes = self._judged(recipe, recipe, verdict.check).causes
            return isolation.isolated(
                recipe, verdict, lambda subset: self._judged(recipe, subset, verdict.check), causes
            )
        except Exception as error:  # whatever a subset does, the verdict is that of the whole, and stands
            line = f"smallest failing: the search ended with {type(error).__name__}: {error}".splitlines()[0]
            return replace(verdict, evidence=(*verdict.evidence, line))

    def _judged(self, whole: Recipe, recipe: Recipe, check: str) -> isolation.Judged:
        """What a check says of a subset of a recipe, held to the limits of the whole."""
        from pytest_diffopt.checks import checks_for

        if check not in checks_for(recipe):
            return isolation.Judged(None)
        try:
            own = self.evidence(recipe)
            given = replace(own, limits=limits_of(whole))
            verdict = self._judge(check, given)
        except UnverifiableError:
            return isolation.Judged("unverified")
        except DiffoptError as error:
            told = Verdict(check, recipe.name, "failed", f"{type(error).__name__}: {error}".splitlines()[0])
            return isolation.Judged("failed", isolation.causes_of(told))
        if verdict.status == "failed":
            places = PLACES[check](given) if check in PLACES else ()
            return isolation.Judged("failed", isolation.causes_of(verdict, places))
        if self._judge(check, own).status == "failed":
            return isolation.Judged("failed")  # by limits that only the subset has: no pass, and not the same failure
        return isolation.Judged(verdict.status)

    def judge_all(self, recipe: Recipe) -> list[Verdict]:
        """The verdicts of every check that applies to the recipe; unverified where this machine cannot tell."""
        from pytest_diffopt.checks import checks_for

        names = checks_for(recipe)
        observed = [name for name in names if name != forecast.NAME]
        try:
            evidence = self.evidence(recipe)
            judged = [self._judge(name, evidence) for name in observed]
            verdicts = [
                self.isolated(recipe, one) for one in crashes.with_cause_once(judged, evidence.observation.failure)
            ]
        except UnverifiableError as error:
            verdicts = [Verdict(name, recipe.name, "unverified", str(error)) for name in observed]
        return verdicts + [self.judge(recipe, name) for name in names if name == forecast.NAME]

    def release(self) -> None:
        """Forget every observation and forecast."""
        self._observations.clear()
        self._forecasts.clear()


def _model_names(recipe: Recipe) -> tuple[str, ...]:
    """How the full-size model that a recipe asks for is called; nothing where only the forecast can tell."""
    from pytest_diffopt.replicas.resolution import resolve_full_size

    asked = recipe.forecast.model if recipe.forecast is not None else None
    asked = recipe.pipeline if asked is None and isinstance(recipe.pipeline, str) else asked
    if asked is None:
        return ()
    try:
        found = resolve_full_size(asked)
    except ReplicaError:
        return ()
    return tuple(name for name in (found.name, found.hub_id, asked) if name)
