"""Replicas: tiny pipelines of the same classes as public ones, built from configs, seeded, with no download.

A family's full-size models are described beside its replica: shapes with no weights, and checkpoints of holes.

Importing this imports neither torch nor diffusers nor transformers; building does.
"""

from __future__ import annotations

from collections.abc import Mapping

from pytest_diffopt.replicas.cache import ensure
from pytest_diffopt.replicas.catalogue import Registry, registry
from pytest_diffopt.replicas.checkpoint import write_checkpoint
from pytest_diffopt.replicas.description import Architecture, Description, Published
from pytest_diffopt.replicas.family import ComponentRepository, Family, Variant
from pytest_diffopt.replicas.resolution import (
    Resolved,
    hub_cache_environment,
    resolve,
    resolve_full_size,
    unresolved,
)
from pytest_diffopt.user_cache import cache_directory

__all__ = [
    "Architecture",
    "ComponentRepository",
    "Description",
    "Family",
    "Published",
    "Registry",
    "Resolved",
    "Variant",
    "cache_directory",
    "ensure",
    "families",
    "hub_cache_environment",
    "known",
    "register",
    "registry",
    "resolve",
    "resolve_full_size",
    "unresolved",
    "write_checkpoint",
]


def register(family: Family) -> None:
    """Add ``family`` to the families that recipes use; raises ``ReplicaError`` if its name or a hub id is taken."""
    registry.register(family)


def families() -> Mapping[str, Family]:
    """The families that recipes use, by name."""
    return registry.families


def known(name: str) -> bool:
    """Whether a replica has that name, or stands for that hub id, of a pipeline or of a component alone; in any case."""
    return registry.find(name) is not None or registry.find_component(name) is not None
