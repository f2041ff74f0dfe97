"""What a recipe's ``pipeline`` means: a replica, a directory, or a repository of the hub."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_diffopt.errors import ReplicaError
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


def resolve(pipeline: str, *, allow_hub: bool = False, registry: Registry = registry) -> Resolved:
    """What ``pipeline`` means; the first that fits counts.

    1. a replica's name; 2. a local directory; 3. a hub id that a replica stands for, in any case;
    4. a hub id whose repository is in the hub's cache on this machine; 5. with ``allow_hub``, a hub id.
    With ``allow_hub`` the third is left out: who allows the hub wants the real thing.
    Nothing is downloaded here; a replica is built if its cache does not hold it.

    Raises:
        ReplicaError: nothing fits, a directory holds no pipeline, or the replica cannot be built.
    """
    family = registry.find(pipeline)
    if family is not None and "/" not in pipeline:
        return Resolved(str(cache.ensure(pipeline, registry=registry)), "replica", family)
    directory = Path(pipeline).expanduser()
    if pipeline and directory.is_dir():
        if not (directory / _INDEX).is_file():
            raise ReplicaError(f"The directory {pipeline!r} holds no diffusers pipeline: it lacks {_INDEX}.")
        return Resolved(str(directory), "directory")
    if family is not None and not allow_hub:
        return Resolved(str(cache.ensure(pipeline, registry=registry)), "replica", family)
    if is_hub_id(pipeline):
        if snapshot := _cached_snapshot(pipeline):
            return Resolved(snapshot, "hub")
        if allow_hub:
            return Resolved(pipeline, "hub")
    raise ReplicaError(_unknown(pipeline, registry))


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
            raise ReplicaError(f"No replica stands for {hub_id!r}. {_known(hub_id, registry)}")
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


def _known(wanted: str, registry: Registry) -> str:
    def likeness(known: str) -> float:
        return difflib.SequenceMatcher(None, wanted.casefold(), known.casefold()).ratio()

    names = sorted(registry.families, key=likeness, reverse=True)
    ids = [hub_id for family in registry.families.values() for hub_id in family.hub_ids]
    ids.sort(key=likeness, reverse=True)
    return f"Replicas: {', '.join(names)}. They stand for the hub ids: {', '.join(ids)}."


def _unknown(pipeline: str, registry: Registry) -> str:
    if alone := registry.find_component(pipeline):
        family, repository = alone
        return f"{pipeline!r} is no pipeline but a component alone, the {repository.component} of {family.name}."
    if is_hub_id(pipeline):
        what = f"{pipeline!r} is no replica, no local directory, and not in the hub's cache on this machine."
        return f"{what} {_known(pipeline, registry)} To download it, run with --diffopt-hub (or pass allow_hub=True)."
    return f"{pipeline!r} is no replica, no local directory, and no hub id ('org/name'). {_known(pipeline, registry)}"
