"""What a family of replicas is: a tiny pipeline and the public repositories that it stands for."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas.description import Description


@dataclass(frozen=True)
class Variant:
    """Weights that public repositories keep a second time, and that ``variant=`` of ``from_pretrained`` asks for.

    A replica's are the same file under a second name: they take no room, and hold what the first name holds.

    Args:
        name: what is asked for, e.g. ``"fp16"``.
        hub_ids: those of the family whose public repositories have it.
        components: names of the components that have it.
    """

    name: str
    hub_ids: tuple[str, ...]
    components: tuple[str, ...]


@dataclass(frozen=True)
class ComponentRepository:
    """A public repository that holds one component alone, at its root, for pipelines of the family.

    Args:
        hub_id: the public id (``"org/name"``), in any case.
        component: name of the family's component that stands for it.
        config: entries of its config that differ from the family's own.
    """

    hub_id: str
    component: str
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Family:
    """A tiny pipeline of the same classes as public ones, built from configs, seeded, with no download.

    To add one, write a builder and register it from a ``conftest.py``::

        # conftest.py
        def build(hub_id=None):
            from diffusers import AutoencoderKL, MyPipeline, MyTransformer2DModel

            with reproducible():
                transformer = MyTransformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=64)
                randomize(transformer)
                ...
                return MyPipeline(transformer=transformer, ...)

        def pytest_diffopt_register_replicas(registry):
            registry.register(
                Family(
                    name="tiny-mine",
                    hub_ids=("my-org/my-model",),
                    components=("text_encoder", "transformer", "vae"),
                    pipeline_class="MyPipeline",
                    default_size=(96, 96),
                    build=build,
                )
            )

    ``reproducible`` and ``randomize`` are in ``pytest_diffopt.replicas.initialization``. Import the libraries inside
    the builder, so that registering costs nothing. Make the inputs of every ``torch.nn.Linear`` a multiple of 128, or
    no quantization backend takes them; write the replica so that another prompt and another seed change its output.

    Args:
        name: what a recipe calls it, e.g. ``"tiny-flux"``; without a slash.
        hub_ids: public ids (``"org/name"``) that resolve to it, in any case.
        components: names of its components that are a ``torch.nn.Module``; a recipe is checked against them unbuilt.
        pipeline_class: name of the pipeline's class, e.g. ``"FluxPipeline"``.
        default_size: (height, width) in pixels of an image that it makes in a moment; of a video (height, width, frames).
        build: takes one of ``hub_ids``, in the registered case, or None for the family's own default; returns the
            pipeline on the CPU in float32, bitwise the same in every call.
        sources: files besides the builder's own whose change must rebuild a cached replica.
        notes: how it differs from the public pipelines, for people.
        full_sizes: the public pipelines in their own size, each with a ``name`` of its own; they are known by it and by
            their hub id wherever a full-size model is asked for.
        variants: second names of weights, for those of ``hub_ids`` whose public repositories have them.
        component_repositories: public repositories of a single component, which are no pipelines.

    Raises:
        ReplicaError: the name holds a slash, a hub id is not ``"org/name"``, a size is not positive, or a variant or a
            component's repository is of something that the family does not have.
    """

    name: str
    hub_ids: tuple[str, ...]
    components: tuple[str, ...]
    pipeline_class: str
    default_size: tuple[int, int] | tuple[int, int, int]
    build: Callable[[str | None], Any]
    sources: tuple[str | os.PathLike[str], ...] = ()
    notes: str = ""
    full_sizes: tuple[Description, ...] = ()
    variants: tuple[Variant, ...] = ()
    component_repositories: tuple[ComponentRepository, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ReplicaError(f"A family's name is a word without a slash, such as 'tiny-flux'; found {self.name!r}.")
        for hub_id in (*self.hub_ids, *(repository.hub_id for repository in self.component_repositories)):
            if hub_id.count("/") != 1 or not all(hub_id.split("/")):
                raise ReplicaError(f"{self.name}: a hub id is written 'org/name'; found {hub_id!r}.")
        if len(self.default_size) not in (2, 3) or min(self.default_size) < 1:
            raise ReplicaError(
                f"{self.name}: default_size is (height, width) in pixels, or (height, width, frames); "
                f"found {self.default_size!r}."
            )
        for variant in self.variants:
            self._require("hub ids", self.hub_ids, variant.hub_ids)
            self._require("components", self.components, variant.components)
        self._require("components", self.components, [alone.component for alone in self.component_repositories])

    def _require(self, what: str, own: Iterable[str], named: Iterable[str]) -> None:
        if foreign := sorted(set(named) - set(own)):
            raise ReplicaError(
                f"{self.name}: {', '.join(foreign)} is none of the family's {what}, which are {', '.join(own) or 'none'}."
            )

    @property
    def repository(self) -> str:
        """The hub id under which the family's own default is kept in the cache: ``"pytest-diffopt/<name>"``."""
        return f"pytest-diffopt/{self.name}"

    def canonical(self, name_or_hub_id: str) -> str | None:
        """The hub id as registered that ``name_or_hub_id`` means, in any case; None if it is not one of this family."""
        wanted = name_or_hub_id.casefold()
        if wanted in (self.name.casefold(), self.repository.casefold()):
            return self.repository
        return next((hub_id for hub_id in self.hub_ids if hub_id.casefold() == wanted), None)

    def component_repository(self, hub_id: str) -> ComponentRepository | None:
        """The family's repository of a single component that ``hub_id`` means, in any case; None if it has none such."""
        wanted = hub_id.casefold()
        return next((alone for alone in self.component_repositories if alone.hub_id.casefold() == wanted), None)

    def source_hash(self) -> str:
        """40 hexadecimal digits that change with the files which build the family.

        Raises:
            ReplicaError: the builder's file is unknown and ``sources`` is empty, or one of them cannot be read.
        """
        try:
            own = inspect.getsourcefile(inspect.unwrap(self.build))
        except TypeError:
            own = None
        files = [*([own] if own else []), *self.sources]
        digest = hashlib.sha256(f"{self.name}\n{self.pipeline_class}\n".encode())
        try:
            for file in files:
                digest.update(Path(file).read_bytes())
        except OSError as error:
            raise ReplicaError(f"{self.name}: cannot read {error.filename}, a source of the replica.") from error
        if not files:
            raise ReplicaError(f"{self.name}: no file holds its builder; name those that do in Family(sources=...).")
        return digest.hexdigest()[:40]
