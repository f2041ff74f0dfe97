"""A session observes each recipe once, whatever the number of checks that read it, and shares references by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_diffopt.checks import engagement, graph_breaks, memory, parity, quantization, recompiles, state
from pytest_diffopt.checks.evidence import Evidence
from pytest_diffopt.contract import derive

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe


CHECKS: dict[str, Callable[[Evidence], Verdict]] = {
    engagement.NAME: engagement.judge,
    graph_breaks.NAME: graph_breaks.judge,
    recompiles.NAME: recompiles.judge,
    quantization.NAME: quantization.judge,
    memory.NAME: memory.judge,
    parity.NAME: parity.judge,
    state.NAME: state.judge,
}


class Session:
    """Observes recipes and judges them.

    Args:
        accelerator: where recipes run; by default found when the first one does.
        allow_hub: let hub ids that resolve to nothing local go to the hub.
        compile_backend: used instead of the backends that the recipes name.
        progress: called with a few words whenever a frame begins to compile.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        *,
        allow_hub: bool = False,
        compile_backend: str | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._allow_hub = allow_hub
        self._compile_backend = compile_backend
        self._progress = progress
        self._observations: dict[tuple[str, bool], Observation] = {}

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
            from pytest_diffopt.observation.observing import observe

            found = observe(
                recipe,
                accelerator=self.accelerator,
                allow_hub=self._allow_hub,
                compile_backend=self._compile_backend,
                progress=self._progress,
                force_eager=force_eager,
            )
            self._observations[key] = found
        if found.name != recipe.name:  # another recipe of the same content ran first
            found = replace(found, recipe={**found.recipe, "name": recipe.name})
        return found

    def evidence(self, recipe: Recipe) -> Evidence:
        """Everything that the checks of a recipe read: its observation, its reference, its limits."""
        observation = self.observe(recipe)
        reference = observation
        if recipe.compilation or recipe.offloading is not None:
            # eager also where the factory compiles by itself; otherwise a wrong compiler would be compared with itself
            eager = recipe.without("compilation", "offloading", "dynamo")
            reference = self._observe(eager, force_eager=bool(recipe.compilation))
        elif any(region.graph_runs for region in observation.compiles.regions):
            reference = self._observe(recipe, force_eager=True)  # the factory compiles by itself
        resident = None
        if recipe.offloading is not None and observation.memory is not None:
            resident = self.observe(recipe.without("offloading"))
        limits = derive(
            recipe.contract,
            compilations=recipe.compilation,
            offloading=recipe.offloading,
            quantization=recipe.quantization,
        )
        return Evidence(recipe, observation, limits, reference, resident)

    def judge(self, recipe: Recipe, check: str) -> Verdict:
        """The verdict of one check."""
        return CHECKS[check](self.evidence(recipe))

    def judge_all(self, recipe: Recipe) -> list[Verdict]:
        """The verdicts of every check that applies to the recipe."""
        from pytest_diffopt.checks import checks_for

        evidence = self.evidence(recipe)
        return [CHECKS[name](evidence) for name in checks_for(recipe)]

    def release(self) -> None:
        """Forget every observation."""
        self._observations.clear()
