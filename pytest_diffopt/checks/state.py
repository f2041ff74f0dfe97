"""state: every global is as before: the settings of Dynamo, Inductor and fx, precision flags, default dtype, RNG, …

What the recipe itself declares (its Dynamo settings) is set and given back around the run and does not count. An alias
does not hide a change: ``cache_size_limit`` writes ``recompile_limit``, and that is what is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_diffopt.checks.evidence import Evidence, counted, shortened
from pytest_diffopt.preparation.borrowed_state import RNG_NAMES

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict

NAME = "state"


def judge(given: Evidence) -> Verdict:
    """See the module. Randomness that the eager reference draws too is the pipeline's own, not the recipe's."""
    drawn = {c.name for c in given.reference.state_changes if c.name in RNG_NAMES} if given.reference else set()
    alone = given.reference is None or given.reference.content_hash == given.observation.content_hash
    changes = [
        change
        for change in given.observation.state_changes
        if change.name not in RNG_NAMES or not (alone or change.name in drawn)
    ]
    figures: dict[str, Any] = {"changed": [change.name for change in changes]}
    if changes:
        first = changes[0]
        rest = f" and {counted(len(changes) - 1, 'other global')}" if len(changes) > 1 else ""
        return given.failed(
            NAME,
            f"{first.name} was left changed, from {first.before} to {first.after}{rest}",
            evidence=[
                *shortened([f"{c.name}: {c.before} → {c.after}, while {c.phase}" for c in changes]),
                "set it inside a context manager that gives it back, or declare it in the recipe (dynamo = { … })",
            ],
            **figures,
        )
    return given.passed(NAME, "every global is as before", **figures)
