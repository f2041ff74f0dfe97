"""attention: every attention layer that ran used the backend that the recipe asked for.

Not fooled by: a processor of the old kind, which diffusers leaves alone in silence and which calls torch itself; a component
that nobody told; a backend that was set and is given back, or exchanged, before the calls or between them. Seen where
diffusers' dispatcher calls a backend's function, in the eager run: of a compiled recipe that is its reference, which keeps
the backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, shortened

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict
    from pytest_diffopt.observation.observation import AttentionUse

NAME = "attention"


def judge(given: Evidence) -> Verdict:
    """See the module."""
    asked = given.recipe.attention
    assert asked is not None
    seen = next((o for o in (given.observation, given.reference) if o is not None and o.attention_uses), None)
    if seen is None:
        reference = given.reference
        why = f": {reference.failure}" if reference is not None and reference.failure is not None else ""
        if given.recipe.compilation and (reference is None or why):
            return given.unverified(NAME, f"nobody saw which backend ran: the eager reference did not run{why}")
        return given.failed(NAME, "no attention layer of any component ran, as far as diffusers knows its attention")
    uses: dict[str, list[AttentionUse]] = {}
    for use in seen.attention_uses:
        if use.call in given.own_calls and use.runs:
            uses.setdefault(use.component, []).append(use)
    after = given.observation.attention_after
    named: Mapping[str, str]
    notes: list[str] = []
    if isinstance(asked, str):
        able = [name for name, those in uses.items() if any(use.told or use.backends for use in those)]
        named = dict.fromkeys(able, asked)
        notes = [f"{name}: {_ignoring(uses[name])}" for name in uses if name not in able]
        if not named:
            return given.failed(NAME, f"no attention layer used {asked}: none that ran can be told", evidence=notes)
    else:
        named = asked
    problems: list[str] = []
    evidence: list[str] = []
    for component, backend in named.items():
        of_component = uses.get(component, [])
        if not of_component:
            problems.append(f"no attention layer of {component} ran")
            continue
        found, lines = _of_component(component, backend, of_component)
        problems += found
        evidence += lines
        left = after.get(component, backend)
        if not found and left != backend:
            problems.append(f"after the calls {component} attends by {left}, not by {backend}")
    layers = {(use.component, use.region) for name in named for use in uses.get(name, ())}
    runs = sum(sum(use.backends.values()) for name in named for use in uses.get(name, ()))
    figures: dict[str, Any] = {"layers": len(layers), "attentions": runs, "backends": dict(named)}
    if problems:
        return given.failed(NAME, "; ".join(problems), evidence=shortened([*evidence, *notes]), **figures)
    spoken = ", ".join(f"{name} by {backend}" for name, backend in named.items())
    where = "" if seen is given.observation else ", in the eager reference"
    return given.passed(
        NAME,
        f"{counted(len(layers), 'layer')} attended {counted(runs, 'time')}, all as asked: {spoken}{where}",
        evidence=notes,
        **figures,
    )


def _of_component(component: str, backend: str, uses: list[AttentionUse]) -> tuple[list[str], list[str]]:
    """(problems, evidence) of one component."""
    problems: list[str] = []
    evidence: list[str] = []
    ignoring = [use for use in uses if not use.backends]
    if ignoring:
        layers = {use.region for use in ignoring}
        everyone = len({use.region for use in uses})
        problems.append(f"{len(layers)} of {counted(everyone, 'attention layer')} of {component} ignored {backend}")
        evidence.append(f"{component}: {_ignoring(ignoring)}")
    others: dict[str, int] = {}
    for use in uses:
        for name, times in use.backends.items():
            if name != backend:
                others[name] = others.get(name, 0) + times
                if others[name] == times:
                    evidence.append(f"{component}.{use.region}: by {name} in call {use.call}")
    if others:
        total = sum(sum(use.backends.values()) for use in uses)
        spoken = ", ".join(f"{times} by {name}" for name, times in others.items())
        problems.append(f"of {counted(total, 'attention')} of {component}, {spoken}, not by {backend}")
    return problems, evidence


def _ignoring(uses: list[AttentionUse]) -> str:
    processors = ", ".join(sorted({use.processor for use in uses}))
    first = uses[0]
    told = "was told, and did not ask" if first.told else "does not ask"
    return f"{processors} {told} diffusers' dispatcher and computes by itself ({first.region}, …)"
