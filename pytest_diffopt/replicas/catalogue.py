"""Which families there are: a registry that third parties add to, and the one that recipes use."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas import flux, stable_diffusion, wan
from pytest_diffopt.replicas.family import Family


class Registry:
    """Families by name, and by every hub id that they stand for, in any case."""

    def __init__(self, *families: Family) -> None:
        self._families: dict[str, Family] = {}
        for family in families:
            self.register(family)

    def register(self, family: Family) -> None:
        """Add ``family``; the same one again changes nothing.

        Raises:
            ReplicaError: another family has its name or one of its hub ids.
        """
        if self._families.get(family.name) == family:
            return
        for known in (family.name, *family.hub_ids):
            owner = self.find(known)
            if owner is not None:
                raise ReplicaError(f"{family.name}: {known!r} is taken by the replica family {owner.name}.")
        self._families[family.name] = family

    @property
    def families(self) -> Mapping[str, Family]:
        """The families by name, in the order of registration; cannot be written to."""
        return MappingProxyType(self._families)

    def find(self, name_or_hub_id: str) -> Family | None:
        """The family of that name or hub id, in any case, or None."""
        families = self._families.values()
        return next((family for family in families if family.canonical(name_or_hub_id) is not None), None)


registry = Registry(flux.FAMILY, stable_diffusion.FAMILY, wan.FAMILY)
"""The families that recipes and pages resolve to."""
