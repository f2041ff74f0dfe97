"""Checks: pure functions of what was observed, each with one verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_diffopt.checks.verdict import Verdict

if TYPE_CHECKING:
    from pytest_diffopt.checks.session import Session
    from pytest_diffopt.recipe import Recipe

__all__ = ["RecipeFailed", "Verdict", "assert_recipe", "check", "checks_for"]


class RecipeFailed(AssertionError):
    """A recipe does not hold; the message has every verdict that is not a pass, and :attr:`verdicts` all of them."""

    def __init__(self, verdicts: list[Verdict]) -> None:
        self.verdicts = verdicts
        super().__init__("\n".join(verdict.text for verdict in verdicts if verdict.status != "passed"))


def checks_for(recipe: Recipe) -> tuple[str, ...]:
    """The names of the checks that apply to a recipe, in the order in which they are reported."""
    names: list[str] = []
    if recipe.compilation:
        names += ["engagement", "graph_breaks", "recompiles"]
    if recipe.quantization is not None:
        names.append("quantization")
    if recipe.attention is not None:
        names.append("attention")
    if recipe.caching:
        names.append("caching")
    limits = (recipe.contract.max_memory, recipe.contract.max_memory_ratio, recipe.contract.max_host_memory)
    limited = any(limit is not None for limit in limits)
    if recipe.offloading is not None or recipe.quantization is not None or limited:
        names.append("memory")
    if recipe.contract.max_host_syncs_per_step is not None:
        names.append("host_syncs")
    names += ["parity", "state"]
    if recipe.forecast is not None:
        names.append("forecast")
    return tuple(names)


def check(recipe: Recipe, *, session: Session | None = None) -> list[Verdict]:
    """Observe a recipe and its reference, and judge it: one verdict for each check that applies.

    Args:
        session: shares observations between calls; by default each call observes anew.

    Returns:
        verdicts that are all unverified, with the reason, where this machine has no accelerator that could judge.
    """
    from pytest_diffopt.recipe import Recipe as RecipeClass

    if not isinstance(recipe, RecipeClass):
        raise TypeError(f"check: found {type(recipe).__name__}; it takes a Recipe")
    if session is None:
        from pytest_diffopt.checks.session import Session as NewSession

        session = NewSession()
    return session.judge_all(recipe)


def assert_recipe(recipe: Recipe, *, session: Session | None = None) -> None:
    """Raise :class:`RecipeFailed` with every failed verdict of a recipe at once.

    An unverified verdict is no failure, and no pass: it is raised as a warning.
    """
    import warnings

    verdicts = check(recipe, session=session)
    if any(verdict.status == "failed" for verdict in verdicts):
        raise RecipeFailed(verdicts)
    for verdict in verdicts:
        if verdict.status == "unverified":
            warnings.warn(f"unverified: {verdict.text}", stacklevel=2)
