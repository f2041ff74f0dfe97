"""caching: the cache engaged, in each call anew.

Not fooled by: a cache whose hooks fit no module of the component, so that nothing carries them; a threshold, or a range of
timesteps, under which every step computes; hooks that were taken off; something kept from one call for the next, which the
first step of a call then reuses, or which changes the output of the same inputs. That a cache changes numbers is its
purpose: the reference of `parity` has it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks import parity
from pytest_diffopt.checks.evidence import Evidence, counted, shortened
from pytest_diffopt.preparation.borrowed_state import RNG_NAMES

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.denoising import Caching
    from pytest_diffopt.observation.observation import CacheUse, Observation

NAME = "caching"

UNSEEN = {"text_kv_cache"}
"""Kinds that keep what is inside a module, whose every run looks the same from outside."""


def judge(given: Evidence) -> Verdict:
    """See the module."""
    seen = next((o for o in (given.observation, given.reference) if o is not None and o.cache_uses), None)
    problems: list[str] = []
    evidence: list[str] = []
    unseen: list[str] = []
    entered = computed = 0
    for caching in given.recipe.caching:
        found = _as_it_stood(given.observation, caching)
        uses = [
            use
            for use in (seen.cache_uses if seen is not None else ())
            if use.component == caching.component and use.call in given.own_calls
        ]
        if not found and seen is None and given.recipe.compilation and _did_not_run(given.reference):
            unseen.append(f"{caching.component}: the eager reference did not run, in which reuse is seen")
        elif not found and caching.kind in UNSEEN:
            unseen.append(f"{caching.component}: whether a {caching.kind} reuses anything cannot be seen from outside")
        elif not found:
            assert seen is None or seen.caches
            found, lines = _engagement(caching, uses, seen or given.observation)
            evidence += lines
        entered += sum(use.entered for use in uses)
        computed += sum(use.computed for use in uses)
        problems += found
    problems += _outputs_that_do_not_repeat(given.observation)
    figures: dict[str, Any] = {"entered": entered, "computed": computed, "reused": entered - computed}
    if problems:
        return given.failed(NAME, "; ".join(problems), evidence=shortened(evidence), **figures)
    if unseen:
        return given.unverified(NAME, "; ".join(unseen), **figures)
    kinds = ", ".join(f"{one.component}'s {one.kind}" for one in given.recipe.caching)
    where = "" if seen is given.observation else ", in the eager reference"
    return given.passed(
        NAME,
        f"{kinds} reused {entered - computed} of {counted(entered, 'run')} under hooks, and began each call anew{where}",
        **figures,
    )


def _did_not_run(reference: Observation | None) -> bool:
    return reference is None or reference.failure is not None


def _as_it_stood(own: Observation, caching: Caching) -> list[str]:
    """What is wrong with the hooks themselves, before the calls and after."""
    name = caching.component
    state = next((state for state in own.caches if state.component == name), None)
    if state is None:
        return [f"nobody looked for the cache of {name}"]
    if state.hooks == 0 and state.kind not in ("", caching.kind):
        return [f"{name} has a {state.kind}, not the {caching.kind} that was asked for"]
    if state.hooks == 0:
        return [f"nothing in {name} carries the hooks of its {caching.kind}: no module is one that it knows"]
    if state.hooks_after < state.hooks:
        gone = state.hooks - state.hooks_after
        return [f"{gone} of {counted(state.hooks, 'hook')} of {name}'s {caching.kind} were gone after the calls"]
    return []


def _engagement(caching: Caching, uses: list[CacheUse], seen: Observation) -> tuple[list[str], list[str]]:
    """(problems, evidence): whether anything was reused, and whether each call began anew."""
    name = caching.component
    entered, computed = sum(use.entered for use in uses), sum(use.computed for use in uses)
    if entered == 0:
        return [f"no hook of {name}'s {caching.kind} was entered: what runs goes past them"], []
    problems: list[str] = []
    evidence: list[str] = []
    if computed == entered:
        problems.append(
            f"{name}'s {caching.kind} never engaged: all {counted(entered, 'run')} under its hooks computed"
        )
        kwargs = ", ".join(f"{key} = {value!r}" for key, value in caching.kwargs.items()) or "its defaults"
        steps = seen.calls[0].steps if seen.calls else 0
        evidence.append(f"{name}: with {kwargs} and {counted(steps, 'step')} a call no step is reused")
    for use in uses:
        if use.stale:
            problems.append(f"call {use.call} began with what another call had left in the {caching.kind} of {name}")
            evidence.append(f"{use.stale} of {counted(use.hooks, 'hook')} reused something in their first run")
            break
    counts: dict[str, CacheUse] = {}
    inputs = {call.index: call.inputs for call in seen.calls}
    for use in uses:
        first = counts.setdefault(inputs.get(use.call, ""), use)
        if (first.entered, first.computed) != (use.entered, use.computed) and not any(u.stale for u in uses):
            problems.append(
                f"with the same inputs the {caching.kind} of {name} computed {counted(first.computed, 'time')} in call "
                f"{first.call} and {counted(use.computed, 'time')} in call {use.call}"
            )
            break
    return problems, evidence


def _outputs_that_do_not_repeat(own: Observation) -> list[str]:
    """A call whose output is not that of an earlier call with the same inputs, by more than rounding."""
    if any(change.name in RNG_NAMES for change in own.state_changes):
        return []  # it draws what differs
    inputs = {call.index: call.inputs for call in own.calls if call.kind == "call"}
    first: dict[tuple[str, str], Any] = {}
    for output in own.outputs:
        if output.component or output.call not in inputs:
            continue
        other = first.setdefault((inputs[output.call], output.leaf), output)
        if other is output or other.shape != output.shape:
            continue
        apart = parity.distance(output, other).rms
        allowed = parity.STACKED_ROUNDINGS * parity.ROUNDINGS * parity.epsilon(output, own)
        if apart > allowed:
            sentence = f"call {output.call} gave another output than call {other.call} with the same inputs, "
            return [sentence + f"by {apart:.2g} of its size ({allowed:.2g} allowed)"]
    return []
