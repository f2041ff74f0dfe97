"""How high the memory goes while a recipe is prepared, measured more than once: libraries load with several threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_diffopt.libraries import import_libraries, quietly
from pytest_diffopt.observation.memory import MemoryWatch
from pytest_diffopt.preparation import dynamo
from pytest_diffopt.preparation.borrowed_state import borrowed_state
from pytest_diffopt.preparation.pipeline import prepare

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.recipe import Recipe


def load_peaks(
    recipe: Recipe, accelerator: Accelerator, times: int, *, allow_hub: bool = False, compile_backend: str | None = None
) -> tuple[int, ...]:
    """Prepare a recipe so many times more, call nothing, and tell each peak in bytes above what was there before.

    Empty on a device that does not count its memory.

    Raises:
        PreparationError, ReplicaError: the recipe cannot be prepared.
    """
    found = []
    import_libraries(recipe)
    with borrowed_state(), accelerator.in_use(), quietly(), dynamo.settings(recipe.dynamo):
        for _ in range(times):
            watch = MemoryWatch(accelerator)
            watch.open()
            try:
                prepared = prepare(recipe, accelerator, allow_hub=allow_hub, backend=compile_backend)
                try:
                    watch.loaded(prepared.components)
                finally:
                    prepared.release()
                    del prepared
            finally:
                watch.close()
            if (record := watch.record) is None:
                return ()
            found.append(record.load_peak_bytes - record.before_bytes)
    return tuple(found)
