"""Tiny ``.gguf`` files in the hub's layout: public repositories of quantized checkpoints, written of a replica's weights.

``ensure_gguf("city96/FLUX.1-dev-gguf", "flux1-dev-Q4_K_S.gguf")`` writes that file out of tiny-flux's transformer. The
names in it are those of the public file, and so are the types: what the public ones keep in a float type is kept here, and
what a row's length does not allow falls back to another type, as llama.cpp does it. The key of the folder and the commit
are as in `pytest_diffopt.replicas.cache`; a file lies beside the others of its repository.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas import cache, ggml_types
from pytest_diffopt.replicas.catalogue import registry

if TYPE_CHECKING:
    import numpy as np
    import torch

WRITTEN_BY = 2
"""Changed with what is written: files of an older number are written anew."""


@dataclass(frozen=True)
class GgufRepository:
    """A public repository of ``.gguf`` files, and the replica whose weights stand for its.

    Args:
        hub_id: in its public spelling.
        replica: the hub id whose replica has the weights; its config is what the loader takes as well.
        component: of the replica.
        architecture: as the files say it.
        public_names: the component's state dict → the tensors of the public files, by their names.
        kept_wide: parts of names whose tensors stay float in the public files.
        more_bits: parts of names that get the next type in files whose name ends in ``_M``.
        bfloat16: names among the wide ones that are BF16, not F16: diffusers tells models apart by the width of plain
            tensors, and takes a replica's for another model's; a BF16 tensor is bytes to it.
    """

    hub_id: str
    replica: str
    component: str
    architecture: str
    public_names: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    kept_wide: tuple[str, ...]
    more_bits: tuple[str, ...]
    bfloat16: tuple[str, ...] = ()


def flux_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ``FluxTransformer2DModel``'s parameters by black-forest-labs' names, projections joined as there."""
    import torch

    def joined(*names: str) -> torch.Tensor:
        return torch.cat([state[name] for name in names])

    public: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        for theirs, ours in {
            "time_in": "time_text_embed.timestep_embedder",
            "vector_in": "time_text_embed.text_embedder",
            "guidance_in": "time_text_embed.guidance_embedder",
        }.items():
            if f"{ours}.linear_1.{kind}" in state:
                public[f"{theirs}.in_layer.{kind}"] = state[f"{ours}.linear_1.{kind}"]
                public[f"{theirs}.out_layer.{kind}"] = state[f"{ours}.linear_2.{kind}"]
        public[f"img_in.{kind}"] = state[f"x_embedder.{kind}"]
        public[f"txt_in.{kind}"] = state[f"context_embedder.{kind}"]
        public[f"final_layer.linear.{kind}"] = state[f"proj_out.{kind}"]
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        public[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for at in _numbers(state, "transformer_blocks"):
            ours, theirs = f"transformer_blocks.{at}", f"double_blocks.{at}"
            for stream, norm, qkv, out, ff in (
                ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
                ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
            ):
                public[f"{theirs}.{stream}_mod.lin.{kind}"] = state[f"{ours}.{norm}.linear.{kind}"]
                public[f"{theirs}.{stream}_attn.qkv.{kind}"] = joined(*(f"{ours}.attn.{one}.{kind}" for one in qkv))
                public[f"{theirs}.{stream}_attn.proj.{kind}"] = state[f"{ours}.attn.{out}.{kind}"]
                public[f"{theirs}.{stream}_mlp.0.{kind}"] = state[f"{ours}.{ff}.net.0.proj.{kind}"]
                public[f"{theirs}.{stream}_mlp.2.{kind}"] = state[f"{ours}.{ff}.net.2.{kind}"]
        for at in _numbers(state, "single_transformer_blocks"):
            ours, theirs = f"single_transformer_blocks.{at}", f"single_blocks.{at}"
            public[f"{theirs}.modulation.lin.{kind}"] = state[f"{ours}.norm.linear.{kind}"]
            public[f"{theirs}.linear1.{kind}"] = joined(
                *(f"{ours}.{one}.{kind}" for one in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
            )
            public[f"{theirs}.linear2.{kind}"] = state[f"{ours}.proj_out.{kind}"]
    for at in _numbers(state, "transformer_blocks"):
        for stream, query, key in (("img", "norm_q", "norm_k"), ("txt", "norm_added_q", "norm_added_k")):
            norms = f"double_blocks.{at}.{stream}_attn.norm"
            public[f"{norms}.query_norm.scale"] = state[f"transformer_blocks.{at}.attn.{query}.weight"]
            public[f"{norms}.key_norm.scale"] = state[f"transformer_blocks.{at}.attn.{key}.weight"]
    for at in _numbers(state, "single_transformer_blocks"):
        norms = f"single_blocks.{at}.norm"
        public[f"{norms}.query_norm.scale"] = state[f"single_transformer_blocks.{at}.attn.norm_q.weight"]
        public[f"{norms}.key_norm.scale"] = state[f"single_transformer_blocks.{at}.attn.norm_k.weight"]
    return public


def _numbers(state: Mapping[str, object], blocks: str) -> list[int]:
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in state)
    return sorted({int(match[1]) for match in found if match})


_FLUX: dict[str, Any] = {
    "component": "transformer",
    "architecture": "flux",
    "public_names": flux_names,
    "kept_wide": ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."),
    "more_bits": ("mlp.2.", "linear2."),
    "bfloat16": ("img_in.weight",),  # 128 inputs in plain would be FLUX.1-Depth
}

REPOSITORIES: dict[str, GgufRepository] = {
    one.hub_id.casefold(): one
    for one in (
        GgufRepository("city96/FLUX.1-dev-gguf", "black-forest-labs/FLUX.1-dev", **_FLUX),
        GgufRepository("city96/FLUX.1-schnell-gguf", "black-forest-labs/FLUX.1-schnell", **_FLUX),
    )
}
"""By their hub ids in lower case. To add one of another family, write its ``public_names``."""

_ADDRESS = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/[^/]+/(.+?)(?:\?.*)?")


def resolve(file: str, *, allow_hub: bool = False) -> str:
    """What ``from_single_file`` takes for a recipe's ``file``: the replica's file of a known repository, else itself.

    Args:
        file: a path, ``"org/name/file.gguf"``, or an address on the hub.
        allow_hub: take what is public itself.

    Raises:
        ReplicaError: it is no file on this machine, and no replica stands for its repository.
    """
    if Path(file).expanduser().is_file():
        return str(Path(file).expanduser())
    address = _ADDRESS.fullmatch(file)
    hub_id, name = address.groups() if address else ("/".join(file.split("/")[:2]), "/".join(file.split("/")[2:]))
    if allow_hub:
        return file if address else f"https://huggingface.co/{hub_id}/blob/main/{name}"
    if hub_id.casefold() in REPOSITORIES and name:
        return str(ensure_gguf(hub_id, name))
    known = ", ".join(one.hub_id for one in REPOSITORIES.values())
    raise ReplicaError(
        f"{file!r} is no file on this machine, and no replica stands for its repository. Replicas stand for: {known}. "
        f"To download it, run with --diffopt-hub (or pass allow_hub=True)."
    )


def ensure_gguf(repo_id: str, filename: str) -> Path:
    """The path of a ``.gguf`` file in the hub's layout, written if the cache does not hold it.

    The replica whose config the loader looks up is there after this too. Processes may call it at once.

    Args:
        repo_id: a public repository in any case, as the caller spells it.
        filename: with the type in its name, ``"flux1-dev-Q4_K_S.gguf"``.

    Raises:
        ReplicaError: no replica stands for the repository, the name says no type, or the file cannot be written.
    """
    repository = REPOSITORIES.get(repo_id.casefold())
    if repository is None:
        known = ", ".join(one.hub_id for one in REPOSITORIES.values())
        raise ReplicaError(f"No replica stands for {repo_id!r}; .gguf files are written for {known}.")
    kind, mixed = ggml_types.of_file_name(filename)
    replica = cache.ensure(repository.replica)
    _also_in_public_case(repository.replica)
    source = hashlib.sha256(f"{WRITTEN_BY} {replica.name} {ggml_types.WRITTEN_BY}".encode()).hexdigest()[:40]
    folder = cache.hub_directory() / f"models--{repo_id.replace('/', '--')}"
    target = folder / "snapshots" / source / filename
    try:
        if not target.is_file():  # moved in whole, so what is there is whole
            _write(repository, replica, kind, mixed, target)
        cache.point_main_at(folder, source)
    except OSError as error:
        raise ReplicaError(f"{filename}: it cannot be written below {folder} ({error})") from error
    return target


def _also_in_public_case(hub_id: str) -> None:
    family = registry.find(hub_id)
    if family is not None:
        cache.ensure_family(family, family.canonical(hub_id) or family.repository, spelling=hub_id)


def _write(repository: GgufRepository, replica: Path, kind: str, mixed: bool, target: Path) -> None:
    import gguf
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in sorted((replica / repository.component).glob("*.safetensors")):
        state |= load_file(file)
    workplace = cache.workplace(repository.component)
    try:
        draft = workplace / "draft.gguf"
        writer = gguf.GGUFWriter(draft, repository.architecture)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in repository.public_names(state).items():
            array: np.ndarray[Any, Any] = tensor.float().numpy()
            wide = array.ndim < 2 or any(name.startswith(part) for part in repository.kept_wide)
            raised = mixed and any(part in name for part in repository.more_bits)
            of_wide = "F32" if array.ndim < 2 else "BF16" if name in repository.bfloat16 else "F16"
            data, of = ggml_types.stored(array, of_wide if wide else kind, raised=raised and not wide)
            writer.add_tensor(name, data, raw_dtype=of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


@contextlib.contextmanager
def loadable() -> Iterator[None]:
    """diffusers reads a FLUX file of any width inside this.

    Its conversion knows one width by heart, 3072; inside this it takes the file's own, which is the same for every public
    file. The function is exchanged in diffusers' table of conversions, and given back.
    """
    from diffusers.loaders import single_file_model

    entry: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    original = entry["checkpoint_mapping_fn"]
    entry["checkpoint_mapping_fn"] = _of_any_width(original)
    try:
        yield
    finally:
        entry["checkpoint_mapping_fn"] = original


_WIDTH = 3072


def _of_any_width(convert: Any) -> Any:
    if _WIDTH not in getattr(convert, "__code__", _of_any_width.__code__).co_consts:
        return (
            convert  # another version, which may read it off the file itself, or a function that is exchanged already
        )

    @functools.wraps(convert)
    def convert_any_width(checkpoint: Any, **kwargs: Any) -> Any:
        prefix = "model.diffusion_model."
        out = checkpoint.get("img_in.bias", checkpoint.get(f"{prefix}img_in.bias"))
        if out is None:
            return convert(checkpoint, **kwargs)
        code = convert.__code__
        width = int(out.shape[0])
        constants = tuple(width if type(one) is int and one == _WIDTH else one for one in code.co_consts)
        of_width = types.FunctionType(code.replace(co_consts=constants), convert.__globals__)
        return of_width(checkpoint, **kwargs)

    return convert_any_width
