"""Replicas on disk, in the layout of the hub's own cache, each built once.

Below the user's cache directory (``DIFFOPT_CACHE_DIR``, else ``$XDG_CACHE_HOME/pytest-diffopt``, else
``~/.cache/pytest-diffopt``)::

    replicas/<key>/hub/models--org--name/refs/main            holds the commit
    replicas/<key>/hub/models--org--name/snapshots/<commit>/  the pipeline or the component, and a manifest of its files
    replicas/<key>/building/                                  what is not whole yet

The key is a hash of the versions of the libraries that build and load a replica; the commit is a hash of the family's
sources. An edited family is thus a new commit, and one folder serves as ``HF_HUB_CACHE`` for replicas of any families.
The directory may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.libraries import import_libraries, no_progress_bars, quietly
from pytest_diffopt.notices import announced
from pytest_diffopt.replicas.catalogue import Registry, registry
from pytest_diffopt.replicas.family import ComponentRepository, Family
from pytest_diffopt.replicas.initialization import reproducible
from pytest_diffopt.user_cache import cache_directory

SCHEMA = 2
MANIFEST = "diffopt-manifest.json"

# Of a pipeline, and of a component alone: what their folder cannot be without.
_ROOTS = ("model_index.json", "config.json")

_LIBRARIES = ("torch", "diffusers", "transformers", "huggingface_hub")
_ABANDONED_SECONDS = 3600.0
_WORTH_A_LINE_SECONDS = 3.0


def hub_directory() -> Path:
    """The folder that stands for ``HF_HUB_CACHE``: replicas built with the installed libraries."""
    return _version_directory() / "hub"


def ensure(name_or_hub_id: str, *, registry: Registry = registry) -> Path:
    """The snapshot directory of a replica, built if the cache does not hold it whole.

    Processes may call it at once. The random state, default dtype and default device are left as they are.

    Args:
        name_or_hub_id: a family's name (``"tiny-flux"``) or a public id that it stands for, of a pipeline or of a
            component alone, in any case.
        registry: where to look the family up.

    Raises:
        ReplicaError: no family is called so, its builder failed, or the cache cannot be written.
    """
    family = registry.find(name_or_hub_id)
    if family is not None:
        return ensure_family(family, family.canonical(name_or_hub_id) or family.repository)
    if alone := registry.find_component(name_or_hub_id):
        return ensure_component(*alone)
    raise ReplicaError(f"No replica stands for {name_or_hub_id!r}; there are {', '.join(registry.families)}.")


def ensure_family(family: Family, hub_id: str, *, spelling: str | None = None) -> Path:
    """The snapshot directory of ``family`` built for ``hub_id``, under the folder of ``spelling`` (else of ``hub_id``).

    The hub's cache is case-sensitive where the file system is: a public id in another case needs a folder of its own.

    Raises:
        ReplicaError: as :func:`ensure`.
    """
    return _ensure(family, hub_id, spelling or hub_id, partial(_save, family, hub_id))


def ensure_component(family: Family, alone: ComponentRepository, *, spelling: str | None = None) -> Path:
    """As :func:`ensure_family`, of a repository that holds one component of the family at its root."""
    return _ensure(family, alone.hub_id, spelling or alone.hub_id, partial(_save_component, family, alone))


def _ensure(family: Family, hub_id: str, spelling: str, save: Callable[[Path], None]) -> Path:
    repository = hub_directory() / f"models--{spelling.replace('/', '--')}"
    commit = family.source_hash()
    snapshot = repository / "snapshots" / commit
    try:
        if not is_whole(snapshot):
            _build(family, hub_id, snapshot, save)
        point_main_at(repository, commit)
    except OSError as error:
        raise ReplicaError(
            f"{family.name}: the replica cannot be written below {cache_directory()} ({error}); "
            f"set DIFFOPT_CACHE_DIR to a directory that can."
        ) from error
    return snapshot


def is_whole(snapshot: Path) -> bool:
    """Whether ``snapshot`` holds every file of its manifest, in the size written there."""
    try:
        files = json.loads((snapshot / MANIFEST).read_text(encoding="utf-8"))["files"]
        return any(root in files for root in _ROOTS) and all(
            (snapshot / n).stat().st_size == size for n, size in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _version_directory() -> Path:
    def installed(library: str) -> str:
        try:
            return version(library)
        except PackageNotFoundError:
            return "absent"

    text = "\n".join([f"schema={SCHEMA}", *(f"{library}={installed(library)}" for library in _LIBRARIES)])
    return cache_directory() / "replicas" / hashlib.sha256(text.encode()).hexdigest()[:12]


def _build(family: Family, hub_id: str, snapshot: Path, save: Callable[[Path], None]) -> None:
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and moved in one step: whoever is killed, or comes second, leaves no half of a snapshot.
    aside = workplace(family.name)
    try:
        import_libraries()  # before they are quiet: each sets its own level of logging when it is imported
        building = announced(f"building {family.name} (once)", after_seconds=_WORTH_A_LINE_SECONDS)
        with building, no_progress_bars(), quietly():
            save(aside)
        _write_manifest(family, hub_id, aside)
        _move_in(aside, snapshot)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def workplace(stem: str) -> Path:
    """A new directory beside the hub's, for what is not whole yet; whoever asks for it removes it."""
    building = _version_directory() / "building"
    building.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(building)
    made = building / _unique(stem)
    made.mkdir()
    return made


def _built(family: Family, hub_id: str | None) -> Any:
    try:
        with reproducible():
            return family.build(hub_id)
    except Exception as error:
        raise ReplicaError(f"{family.name}: its builder raised {type(error).__name__}: {error}") from error


def _save(family: Family, hub_id: str, directory: Path) -> None:
    import torch

    own = hub_id == family.repository
    pipeline = _built(family, None if own else hub_id)
    modules = {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    if modules != set(family.components):
        raise ReplicaError(
            f"{family.name}: the components that are modules are {', '.join(sorted(modules))}; "
            f"the family names {', '.join(sorted(family.components))}."
        )
    if type(pipeline).__name__ != family.pipeline_class:
        raise ReplicaError(
            f"{family.name}: built a {type(pipeline).__name__}; the family names {family.pipeline_class}."
        )
    pipeline.save_pretrained(directory, safe_serialization=True)
    for variant in family.variants:
        if own or hub_id in variant.hub_ids:
            for component in variant.components:
                _name_again(directory / component, variant.name)


def _save_component(family: Family, alone: ComponentRepository, directory: Path) -> None:
    component = _built(family, None).components[alone.component]
    if alone.config:
        component.register_to_config(**alone.config)
    component.save_pretrained(directory, safe_serialization=True)


def _name_again(folder: Path, variant: str) -> None:
    for weights in sorted(folder.glob("*.safetensors")):
        second = weights.with_suffix(f".{variant}.safetensors")
        try:
            os.link(weights, second)
        except OSError:  # a file system without links
            shutil.copyfile(weights, second)


def _write_manifest(family: Family, hub_id: str, directory: Path) -> None:
    files = {p.relative_to(directory).as_posix(): p.stat().st_size for p in sorted(directory.rglob("*")) if p.is_file()}
    manifest = {"schema": SCHEMA, "family": family.name, "hub_id": hub_id, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _move_in(workplace: Path, snapshot: Path) -> None:
    for attempt in range(5):
        try:
            workplace.rename(snapshot)
            return
        except OSError:
            if is_whole(snapshot):
                return  # another process was first
            if attempt == 4 or not snapshot.exists():
                raise
        # A folder cannot replace a full one, so what is damaged goes aside first.
        aside = workplace.with_name(_unique("damaged"))
        try:
            snapshot.rename(aside)
        except FileNotFoundError:
            pass  # another process moved it
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def point_main_at(repository: Path, commit: str) -> None:
    """Let a repository's main be that commit, in one step."""
    reference = repository / "refs" / "main"
    if reference.is_file() and reference.read_text(encoding="utf-8") == commit:
        return
    reference.parent.mkdir(parents=True, exist_ok=True)
    draft = repository / _unique(".main")
    draft.write_text(commit, encoding="utf-8")
    draft.replace(reference)


def _unique(stem: str) -> str:
    # tempfile would make what others may not read, and a cache may be shared.
    return f"{stem}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _remove_abandoned(building: Path) -> None:
    oldest = time.time() - _ABANDONED_SECONDS
    for entry in building.iterdir():
        try:
            abandoned = entry.stat().st_mtime < oldest
        except FileNotFoundError:
            continue
        if abandoned:
            shutil.rmtree(entry, ignore_errors=True)
