"""Which worker of pytest-xdist runs what: a recipe's checks, and the tests over it, stay together, so that one observation
serves all of them.

`--dist load`, which `-n` alone means, and `--dist loadgroup` are scheduled here; every other distribution is xdist's own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from xdist.scheduler import LoadScheduling

from pytest_diffopt.collection.workers import RECIPES
from pytest_diffopt.report.lost_workers import TRIES
from pytest_diffopt.report.rows import KnownRecipes, recipe_of

_AT_LEAST = 2
"""Items that a worker must hold: it runs one only when it knows the next, or that there is none."""


class RecipeScheduling(LoadScheduling):  # type: ignore[misc, unused-ignore]
    """xdist's `load`, but for units that are never split: recipes, and with `loadgroup` the groups of the marker xdist_group.

    Other tests are sent in the chunks in which xdist sends them. A unit is sent when a worker has less than two items left:
    what a recipe takes lies in its first check, so a worker that held a second recipe would keep it from an idle one.
    A worker goes on with the recipe that follows, since neighbours in a file share references, which a worker observes once;
    where that is taken it begins in the middle of the longest stretch that is left.

    Args:
        recipes: what is known of the recipes of items.

    Attributes:
        given_up: node ids of checks that are not tried any more, since their recipe ended several workers.
    """

    def __init__(
        self, config: pytest.Config, log: Any = None, *, groups: bool = False, recipes: KnownRecipes | None = None
    ) -> None:
        super().__init__(config, log)
        self._recipes = recipes if recipes is not None else KnownRecipes()
        self.given_up: list[str] = []
        self._groups = groups
        self._largest_first = groups and bool(config.getoption("loadscopereorder", True))
        self._units: list[str | None] = []
        self._sizes: Counter[str | None] = Counter()
        self._order: list[str] = []
        self._last: dict[str, Any] = {}
        self._begun: set[str] = set()
        self._ended: Counter[str] = Counter()

    # pytest's hook: the scheduler is registered as a plugin

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if (unit := self._unit_of(nodeid)) is not None:
            self._begun.add(unit)

    # what xdist calls

    def schedule(self) -> None:
        """Give every worker its first items; called again when a worker joins later."""
        if self.collection is None and self.node2collection:
            self._units = [self._unit_of(nodeid) for nodeid in next(iter(self.node2collection.values()))]
            self._sizes = Counter(self._units)
            self._sizes[None] = 1  # a test by itself
            self._order = [unit for unit in dict.fromkeys(self._units) if unit is not None]
        super().schedule()

    def check_schedule(self, node: Any, duration: float = 0) -> None:
        """Send more, where the worker needs it."""
        if node not in self.node2collection:  # it took the place of another, and is collecting yet
            return
        if self.pending and len(self.node2pending[node]) >= _AT_LEAST and self._units[self.pending[0]] is not None:
            return
        super().check_schedule(node, duration)

    def remove_node(self, node: Any) -> str | None:
        """Take what a worker held away from it.

        Returns:
            the item in which it ended; None where it ended in none.
        """
        held = self.node2pending[node]
        unit = self._units[held[0]] if held else None
        if unit is None or self._recipes.of(self.collection[held[0]]) is None:
            lost: str | None = super().remove_node(node)
            return lost
        if unit not in self._begun:  # the recipe lost nothing: another worker runs it
            self.pending[:0] = self.node2pending.pop(node)
            for other in self.node2pending:
                self.check_schedule(other)
            return None
        self._begun.discard(unit)
        self._ended[unit] += 1
        if self._ended[unit] >= TRIES:
            left = [index for index in held[1:] if self._units[index] == unit]
            self.given_up += [self.collection[index] for index in left]
            self.node2pending[node] = [index for index in held if index not in left]
        crashed: str | None = super().remove_node(node)
        return crashed

    def _send_tests(self, node: Any, num: int) -> None:
        if self._largest_first:  # as xdist orders groups
            self.pending.sort(key=lambda index: (-self._sizes[self._units[index]], index))
        sent: list[int] = []
        while self.pending and (not sent or (len(sent) < num and len(self.node2pending[node]) < _AT_LEAST)):
            taken = self._take(node, num - len(sent))
            self.node2pending[node].extend(taken)
            sent += taken
        if sent:
            node.send_runtest_some(sent)

    def _take(self, node: Any, num: int) -> list[int]:
        """A unit off what is pending, or at most so many other tests where they stand first."""
        if self._units[self.pending[0]] is None:
            end = next((at for at, index in enumerate(self.pending) if self._units[index] is not None), num)
            taken: list[int] = self.pending[: min(end, num)]
            del self.pending[: len(taken)]
            return taken
        unit = self._next_for(node)
        self._last.pop(unit, None)
        self._last[unit] = node  # the newest stands last
        taken = [index for index in self.pending if self._units[index] == unit]
        self.pending[:] = [index for index in self.pending if self._units[index] != unit]
        return taken

    def _next_for(self, node: Any) -> str:
        """The unit that a worker begins next, of those pending."""
        pending = {unit for index in self.pending if (unit := self._units[index]) is not None}
        pending = {unit for unit in pending if not self._ended[unit]} or pending  # what ended a worker comes last
        stretches: list[list[str]] = [[]]
        for before, unit in zip([None, *self._order], self._order, strict=False):
            if unit not in pending:
                stretches.append([])
                continue
            if before is not None and self._last.get(before) is node and self._current(node) == before:
                return unit
            stretches[-1].append(unit)
        longest = max(stretches, key=len)
        first = self._order.index(longest[0])
        comes = self._last.get(self._order[first - 1]) if first else None  # whoever has the one before goes on there
        return longest[len(longest) // 2] if comes in self.node2pending and comes is not node else longest[0]

    def _current(self, node: Any) -> str | None:
        """The unit that was sent to a worker last."""
        return next((unit for unit, sent_to in reversed(self._last.items()) if sent_to is node), None)

    def _unit_of(self, nodeid: str) -> str | None:
        """What must stay on one worker with this item; None for a test that may go anywhere."""
        recipe = self._recipes.of(nodeid)
        # xdist writes the group behind an "@"; one inside a parameter's brackets is none
        if self._groups and recipe_of(nodeid) is None and nodeid.rfind("@") > nodeid.rfind("]"):
            return nodeid.rpartition("@")[2]
        return (recipe.get("content") or recipe["source"]) if recipe is not None else None


def scheduler(config: pytest.Config, log: Any) -> RecipeScheduling | None:
    """The scheduler of a run with ``--dist load`` or ``loadgroup``; None leaves it to xdist."""
    how = config.getoption("dist", "no")
    if how not in ("load", "loadgroup"):
        return None
    made = RecipeScheduling(config, log, groups=how == "loadgroup", recipes=config.stash[RECIPES])
    config.pluginmanager.register(made, "diffopt-scheduling")
    return made
