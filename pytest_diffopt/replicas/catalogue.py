"""Which families and full sizes there are: a registry that third parties add to, and the one that recipes use."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas import (
    cogvideox,
    flux,
    hunyuan_video,
    ltx_video,
    qwen_image,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    wan,
)
from pytest_diffopt.replicas.description import Description
from pytest_diffopt.replicas.family import ComponentRepository, Family


class Registry:
    """Families by name, and by every hub id that they stand for; full sizes by name and hub id; in any case."""

    def __init__(self, *families: Family, full_sizes: tuple[Description, ...] = ()) -> None:
        self._families: dict[str, Family] = {}
        self._full_sizes: dict[str, Description] = {}
        for family in families:
            self.register(family)
        for description in full_sizes:
            self.register_full_size(description)

    def register(self, family: Family) -> None:
        """Add ``family`` and its full sizes; the same one again changes nothing.

        Raises:
            ReplicaError: another family has its name or one of its hub ids, or another full size one of its full sizes'.
        """
        if self._families.get(family.name) == family:
            return
        alone = [repository.hub_id for repository in family.component_repositories]
        for known in (family.name, *family.hub_ids, *alone):
            owner = self.find(known) or next((owner for owner, _ in self._alone(known)), None)
            if owner is not None:
                raise ReplicaError(f"{family.name}: {known!r} is taken by the replica family {owner.name}.")
        for description in family.full_sizes:
            self._check_full_size(description)
        self._families[family.name] = family
        for description in family.full_sizes:
            self.register_full_size(description)

    def register_full_size(self, description: Description) -> None:
        """Add a full size whose family has no replica; the same one again changes nothing.

        Raises:
            ReplicaError: another full size has its name or hub id, or its name holds a slash.
        """
        self._check_full_size(description)
        self._full_sizes[description.name] = description

    @property
    def families(self) -> Mapping[str, Family]:
        """The families by name, in the order of registration; cannot be written to."""
        return MappingProxyType(self._families)

    @property
    def full_sizes(self) -> Mapping[str, Description]:
        """The full sizes by name, in the order of registration; cannot be written to."""
        return MappingProxyType(self._full_sizes)

    def find(self, name_or_hub_id: str) -> Family | None:
        """The family of that name or hub id, in any case, or None."""
        families = self._families.values()
        return next((family for family in families if family.canonical(name_or_hub_id) is not None), None)

    def find_component(self, hub_id: str) -> tuple[Family, ComponentRepository] | None:
        """The family that has a repository of a single component under ``hub_id``, in any case, and that; or None."""
        return next(self._alone(hub_id), None)

    def find_full_size(self, name_or_hub_id: str) -> Description | None:
        """The full size of that name or hub id, in any case, or None."""
        wanted = name_or_hub_id.casefold()
        return next((known for known in self._full_sizes.values() if wanted in _names(known)), None)

    def full_size(self, name_or_hub_id: str) -> Description:
        """The full size of that name or hub id, in any case.

        Raises:
            ReplicaError: there is none; the sentence has the nearest name, and all.
        """
        found = self.find_full_size(name_or_hub_id)
        if found is not None:
            return found
        names = {name: known.name for known in self._full_sizes.values() for name in _names(known)}
        near = difflib.get_close_matches(name_or_hub_id.casefold(), names, n=1)
        hint = f" Did you mean {names[near[0]]!r}?" if near else ""
        raise ReplicaError(
            f"No full-size model is called {name_or_hub_id!r}.{hint} There are {', '.join(self._full_sizes)}, "
            f"and their hub ids."
        )

    def _alone(self, hub_id: str) -> Iterator[tuple[Family, ComponentRepository]]:
        for family in self._families.values():
            repository = family.component_repository(hub_id)
            if repository is not None:
                yield family, repository

    def _check_full_size(self, description: Description) -> None:
        if not description.name or "/" in description.name:
            raise ReplicaError(
                f"A full size's name is a word without a slash, such as 'flux.1-dev'; found {description.name!r}."
            )
        for name in _names(description):
            owner = self.find_full_size(name)
            if owner is not None and owner != description:
                raise ReplicaError(f"{description.name}: {name!r} is taken by the full size {owner.name}.")


def _names(description: Description) -> tuple[str, ...]:
    return tuple(name.casefold() for name in (description.name, description.hub_id) if name)


registry = Registry(
    flux.FAMILY,
    stable_diffusion.FAMILY,
    stable_diffusion_xl.FAMILY,
    stable_diffusion_3.FAMILY,
    wan.FAMILY,
    ltx_video.FAMILY,
    cogvideox.FAMILY,
    hunyuan_video.FAMILY,
    qwen_image.FAMILY,
)
"""The families and full sizes that recipes, pages and forecasts resolve to."""
