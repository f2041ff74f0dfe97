"""Acts on modules as soon as they are imported, whoever imports them: nothing is imported for the sake of an adaptation."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence

Action = Callable[[types.ModuleType], None]
Surroundings = Callable[[], contextlib.AbstractContextManager[None]]


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs an action after a module's own code, for each module that it names.

    Active from :meth:`start` to :meth:`stop`; modules that are imported by :meth:`start` are acted on there.

    Args:
        actions: what is done to a module, by its name.
        around: the context in which a module's own code runs, by its name.
    """

    def __init__(self, actions: Mapping[str, Action], around: Mapping[str, Surroundings] | None = None) -> None:
        self.actions = dict(actions)
        self.around = dict(around or {})
        self._looking_for: set[str] = set()

    def start(self) -> None:
        sys.meta_path.insert(0, self)
        for name, action in self.actions.items():
            if (module := sys.modules.get(name)) is not None:
                action(module)

    def stop(self) -> None:
        sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in {*self.actions, *self.around} or fullname in self._looking_for:
            return None
        self._looking_for.add(fullname)  # the next finder is asked, and it is not this one
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking_for.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader
        run = loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            active = self in sys.meta_path
            with self.around.get(fullname, contextlib.nullcontext)() if active else contextlib.nullcontext():
                run(module)
            if active and fullname in self.actions:
                self.actions[fullname](module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
