"""A checkpoint of any description whose weights are a hole: real files, no values, no room on the disk.

The real ``DiffusionPipeline.from_pretrained`` and every quantizer run on it, so that what they allocate and when can be
seen with no download. Where a hole is read it is zeros.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas.description import Component, Description, build_on_meta, write_configs

if TYPE_CHECKING:
    import torch

PUBLISHED_SHARD_BYTES: Mapping[str, int] = {"diffusers": 10 * 10**9, "transformers": 5 * 10**9}
"""The most bytes in one file of most public repositories, by library: diffusers' default, and transformers' before its 5."""

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}

# Source of the names: safetensors, docs/source/metadata_parsing.mdx.
_FORMAT_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}

DTYPES: Mapping[str, str] = {written: name for name, written in _FORMAT_DTYPES.items()}
"""The name of a dtype in the format of safetensors → torch's."""


def write_checkpoint(
    description: Description,
    directory: Path | str,
    *,
    max_shard_bytes: int | Mapping[str, int] | None = None,
    on_built: Callable[[str, torch.nn.Module], object] | None = None,
) -> Path:
    """Write ``description`` as a directory that ``DiffusionPipeline.from_pretrained`` loads; returns the directory.

    Byte for byte the same for the same arguments and libraries. Weights have the names of the installed classes (an older
    public file may call them otherwise and be renamed while it loads), in alphabetical order, tied ones once; shapes as
    the config says, floating point ones in the component's ``dtype``.

    Args:
        directory: is made; may exist if it is empty.
        max_shard_bytes: None for one file a component; else the most bytes of weights in one file, alike for all or by
            library: :data:`PUBLISHED_SHARD_BYTES` cuts as the public repositories are cut. A weight that is larger has a
            file of its own.
        on_built: told each component that is a module, by name, on the meta device.

    Raises:
        ReplicaError: the directory is not empty or cannot be written, ``max_shard_bytes`` is not positive, or a component
            cannot be built.
    """
    directory = Path(directory)
    limits = max_shard_bytes if isinstance(max_shard_bytes, Mapping) else dict.fromkeys(_STEMS, max_shard_bytes)
    for library, limit in limits.items():
        if limit is not None and limit < 1:
            raise ReplicaError(f"max_shard_bytes is a positive number of bytes; found {limit} for {library}.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ReplicaError(
                f"The directory {str(directory)!r} is not empty; a checkpoint is written into a new one."
            )
        modules = build_on_meta(description)
        write_configs(description, directory)
        for name, module in modules.items():
            if on_built is not None:
                on_built(name, module)
            component = description.components[name]
            _write_weights(directory / name, component, module, limits.get(component.library))
    except OSError as error:
        raise ReplicaError(f"{description.name}: the checkpoint cannot be written ({error}).") from error
    return directory


def stored_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of ``module`` holds, by name in alphabetical order: parameters and persistent buffers, tied ones once.

    Of tensors that are one, the name that comes first in the module is kept.
    """
    kept: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        kept.setdefault(id(tensor), (name, tensor))
    return dict(sorted(kept.values(), key=lambda pair: pair[0]))


def _write_weights(folder: Path, component: Component, module: torch.nn.Module, limit_bytes: int | None) -> None:
    tensors = stored_tensors(module)
    stem = _STEMS[component.library]
    shards = _shards(tensors, limit_bytes)
    if len(shards) == 1:
        _write_hole(folder / f"{stem}.safetensors", tensors)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_hole(folder / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, torch.Tensor], limit_bytes: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and limit_bytes is not None and filled_bytes + tensor.nbytes > limit_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += tensor.nbytes
    return shards


def _write_hole(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * tensor.element_size()
        dtype = _FORMAT_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format asks for data that starts at a multiple of 8 bytes
    with file.open("wb") as written:
        written.write(struct.pack("<Q", len(encoded)))
        written.write(encoded)
        written.truncate(8 + len(encoded) + offset)
