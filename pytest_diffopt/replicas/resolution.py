"""What a recipe's ``pipeline`` means: a replica, a directory, or a repository of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.part import did_you_mean
from pytest_diffopt.replicas import cache
from pytest_diffopt.replicas.catalogue import Registry, registry
from pytest_diffopt.replicas.description import INDEX as _INDEX
from pytest_diffopt.replicas.description import Description, read_description
from pytest_diffopt.replicas.family import Family

_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.)){_WORD}/{_WORD}")


@dataclass(frozen=True)
class Resolved:
    """Where a pipeline comes from.

    Args:
        path_or_id: what ``DiffusionPipeline.from_pretrained`` takes.
        kind: ``"replica"``, ``"directory"`` or ``"hub"`` (cached, or to be downloaded).
        family: the replica's family; None for the other kinds.
    """

    path_or_id: str
    kind: Literal["replica", "directory", "hub"]
    family: Family | None = None


@dataclass(frozen=True)
class Unresolved:
    """Why a pipeline comes from nowhere.

    Args:
        allowed: what may stand in its place.
    """

    allowed: str


def resolve(pipeline: str, *, allow_hub: bool = False, registry: Registry = registry) -> Resolved:
    """What ``pipeline`` means; the first that fits counts.

    1. a replica's name; 2. a local directory; 3. a hub id that a replica stands for, in any case;
    4. a hub id whose repository is in the hub's cache on this machine; 5. with ``allow_hub``, a hub id.
    With ``allow_hub`` the third is left out: who allows the hub wants the real thing.
    Nothing is downloaded here; a replica is built if its cache does not hold it.

    Raises:
        ReplicaError: nothing fits, a directory holds no pipeline, or the replica cannot be built.
    """
    found = _located(pipeline, allow_hub, registry)
    if isinstance(found, Unresolved):
        raise ReplicaError(f"pipeline: found {pipeline!r}; {found.allowed}")
    if isinstance(found, Family):
        return Resolved(str(cache.ensure(pipeline, registry=registry)), "replica", found)
    return found


def unresolved(pipeline: str, *, allow_hub: bool = False, registry: Registry = registry) -> str | None:
    """What :func:`resolve` would take in place of ``pipeline``, where nothing fits it; else None. Builds nothing."""
    found = _located(pipeline, allow_hub, registry)
    return found.allowed if isinstance(found, Unresolved) else None


def _located(pipeline: str, allow_hub: bool, registry: Registry) -> Family | Resolved | Unresolved:
    """By the order that :func:`resolve` states: a family whose replica is meant, what lies in files, or what is wrong."""
    family = registry.find(pipeline)
    if family is not None and "/" not in pipeline:
        return family
    directory = Path(pipeline).expanduser()
    if pipeline and directory.is_dir():
        if not (directory / _INDEX).is_file():
            return Unresolved(f"the directory holds no diffusers pipeline: it lacks {_INDEX}")
        return Resolved(str(directory), "directory")
    if family is not None and not allow_hub:
        return family
    if is_hub_id(pipeline):
        if snapshot := _cached_snapshot(pipeline):
            return Resolved(snapshot, "hub")
        if allow_hub:
            return Resolved(pipeline, "hub")
    return Unresolved(_allowed(pipeline, registry))


def resolve_full_size(model: str, *, registry: Registry = registry) -> Description:
    """What ``model`` is made of in its full size; the first that fits counts.

    1. a full size's name, ``"flux.1-dev"``; 2. a local directory that holds a pipeline's config files; 3. the hub id of a
    full size, in any case; 4. a hub id whose config files are in the hub's cache on this machine. Nothing is downloaded,
    and no weights are looked at.

    Raises:
        ReplicaError: nothing fits, or a directory lacks a config file.
    """
    known = registry.find_full_size(model)
    if known is not None and "/" not in model:
        return known
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        return read_description(directory)
    if known is not None:
        return known
    if is_hub_id(model) and (snapshot := _cached_snapshot(model)):
        return read_description(snapshot, model)
    return registry.full_size(model)


def hub_cache_environment(ids: Iterable[str], *, registry: Registry = registry) -> dict[str, str]:
    """The environment in which a fresh process finds replicas under these hub ids, spelled as they are here.

    ``DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")`` then loads the replica, with no patch and no
    network, ``AutoencoderKL.from_pretrained("madebyollin/sdxl-vae-fp16-fix")`` a component; any other id raises. Set it
    before huggingface_hub is imported; it hides the machine's own hub cache.

    Raises:
        ReplicaError: no replica stands for one of the ids, or it cannot be built.
    """
    for hub_id in ids:
        family = registry.find(hub_id)
        if family is None and (alone := registry.find_component(hub_id)):
            cache.ensure_component(*alone, spelling=hub_id)
            continue
        if family is None:
            near = did_you_mean(hub_id, _hub_ids(registry), 2)
            raise ReplicaError(
                f"No replica stands for {hub_id!r}; {near}hub ids with a replica: {', '.join(_hub_ids(registry))}"
            )
        canonical = family.canonical(hub_id) or family.repository
        cache.ensure_family(family, canonical, spelling=hub_id if "/" in hub_id else canonical)
    return {"HF_HUB_CACHE": str(cache.hub_directory()), "HF_HUB_OFFLINE": "1"}


def is_hub_id(text: str) -> bool:
    """Whether it has the form of a hub id, ``org/name``."""
    return bool(_HUB_ID.fullmatch(text)) and len(text) <= 96


def _cached_snapshot(hub_id: str) -> str | None:
    from huggingface_hub import constants, try_to_load_from_cache

    index = try_to_load_from_cache(hub_id, _INDEX, cache_dir=constants.HF_HUB_CACHE)
    if not isinstance(index, str):
        return None
    parts = json.loads(Path(index).read_text(encoding="utf-8"))
    snapshot = Path(index).parent
    # An interrupted download leaves the index without the weights.
    folders = [name for name, part in parts.items() if isinstance(part, list) and part and part[0] is not None]
    return str(snapshot) if all((snapshot / name).is_dir() for name in folders) else None


def _allowed(wanted: str, registry: Registry) -> str:
    """What may stand in place of a pipeline that is unknown, the nearest names first, and the ways to have another one."""
    if alone := registry.find_component(wanted):
        family, repository = alone
        return f"it is a component alone, the {repository.component} of {family.name}: name a pipeline"
    names = sorted(registry.families)
    hint = did_you_mean(wanted, [*names, *_hub_ids(registry)], 2)
    if (full := registry.find_full_size(wanted)) is not None:
        alike = [one.name for one in registry.families.values() if one.pipeline_class == full.pipeline_class]
        known = f"it is a full-size model, for forecast.model, and to run it a replica is needed: {', '.join(alike or names)}"
    elif is_hub_id(wanted):
        known = f"{hint}hub ids with a replica: {', '.join(_hub_ids(registry))}"
    else:
        known = f"{hint}replicas: {', '.join(names)}"
    if is_hub_id(wanted):
        known += "; it is not in the hub's cache on this machine, to download it: --diffopt-hub (allow_hub=True)"
    return (
        f"{known}. Or give a directory with a {_INDEX}, a factory ('package.module:function'), or register a replica "
        "(the hook pytest_diffopt_register_replicas)"
    )


def _hub_ids(registry: Registry) -> list[str]:
    return sorted((one for family in registry.families.values() for one in family.hub_ids), key=str.casefold)
