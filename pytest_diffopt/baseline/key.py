"""What a recorded observation holds for: the accelerator, and the versions of the libraries that decide what a recipe does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_diffopt.quantization_backends import BACKENDS

if TYPE_CHECKING:
    from pytest_diffopt.accelerators import Accelerator
    from pytest_diffopt.observation.observation import Observation
    from pytest_diffopt.recipe import Recipe

_ALWAYS = ("python", "torch", "diffusers", "transformers", "accelerate")


@dataclass(frozen=True)
class Key:
    """What an entry of a baseline was recorded on.

    Attributes:
        accelerator: the kind of device (``"sim"``, ``"cuda"``, …). device: as it calls itself.
        capability: e.g. ``(8, 9)`` on CUDA; None where the device has none.
        compile_backend: that the run put in the place of the recipes' own; ``""`` where it did not.
        versions: of python (major and minor), torch, diffusers, transformers, accelerate, and of the libraries that
            quantize the recipe.
    """

    accelerator: str
    device: str
    capability: tuple[int, int] | None = None
    compile_backend: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def same_device(self, other: Key) -> bool:
        """Whether figures of one may be held against the other's: same device, same compile backend."""
        mine, theirs = ((key.accelerator, key.device, key.capability, key.compile_backend) for key in (self, other))
        return mine == theirs

    def distance(self, other: Key) -> tuple[int, ...]:
        """How far the versions are apart, for ordering: how many libraries differ, then by how much, torch first."""
        apart = [_apart(self.versions.get(name, ""), other.versions.get(name, "")) for name in self.versions]
        apart += [_apart("", version) for name, version in other.versions.items() if name not in self.versions]
        return (sum(any(one) for one in apart), *(sum(one[place] for one in apart) for place in range(3)))

    def differing(self, other: Key) -> list[str]:
        """The libraries whose versions differ, as ``"torch 2.12.0"``: the other's version."""
        names = [*self.versions, *(name for name in other.versions if name not in self.versions)]
        return [
            f"{name} {other.versions.get(name, 'absent')}"
            for name in names
            if self.versions.get(name) != other.versions.get(name)
        ]

    @property
    def place(self) -> str:
        """The device in words: ``cuda (NVIDIA L4, capability 8.9)``."""
        capability = f", capability {'.'.join(map(str, self.capability))}" if self.capability else ""
        backend = f", compile backend {self.compile_backend}" if self.compile_backend else ""
        return f"{self.accelerator} ({self.device}{capability}{backend})"

    def __str__(self) -> str:
        return f"{self.place}, {', '.join(f'{name} {version}' for name, version in self.versions.items())}"


def key_of(
    recipe: Recipe, observation: Observation, accelerator: Accelerator, compile_backend: str | None = None
) -> Key:
    """The key of what was observed of a recipe on an accelerator."""
    libraries = [*_ALWAYS, *(BACKENDS[one.backend].distribution or "" for one in recipe.quantizations)]
    versions = {name: observation.versions[name] for name in libraries if name in observation.versions}
    if "python" in versions:
        versions["python"] = ".".join(versions["python"].split(".")[:2])
    return Key(accelerator.kind, accelerator.name, accelerator.capability, compile_backend or "", versions)


def nearest(key: Key, recorded: Iterable[Key]) -> Key | None:
    """The recorded key on the same device whose versions are nearest; None where there is none on that device."""
    return min((one for one in recorded if one.same_device(key)), key=key.distance, default=None)


def _apart(mine: str, theirs: str) -> tuple[int, int, int]:
    if mine == theirs:
        return 0, 0, 0
    first, second = (([*map(int, re.findall(r"\d+", text)[:3]), 0, 0, 0])[:3] for text in (mine, theirs))
    apart = [abs(one - other) for one, other in zip(first, second, strict=True)]
    return (apart[0], apart[1], apart[2]) if any(apart) else (0, 0, 1)  # 2.13.0 and 2.13.0+cpu are near, not equal
