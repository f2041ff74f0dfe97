"""What a pipeline is made of, in any size: the classes and the configs of its components, with no weights.

A family says once which classes its pipelines have and what all its sizes share (:class:`Architecture`); its replica and
every full-size model are sizes of it (:meth:`Architecture.sized`). A directory that holds config files alone is read into
the same form, so that whatever builds one builds all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.libraries import found_in
from pytest_diffopt.replicas import tokenizers

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"

LIBRARIES = ("diffusers", "transformers")

Kind = Literal["module", "scheduler", "tokenizer", "files"]

# What libraries write into a config file by themselves, and Component.class_path or .dtype say already.
_WRITTEN = ("_class_name", "_diffusers_version", "_name_or_path", "architectures", "transformers_version")
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Published:
    """A component's config in a size that is public.

    Args:
        config: the entries of its config file that the family's sizes do not share.
        source: where the values can be read, as ``"owner/repository: file"``.
        dtype: in which its weights are published, by torch's name (``"bfloat16"``); None for what has none.
    """

    config: Mapping[str, Any] = field(hash=False)
    source: str
    dtype: str | None = None


@dataclass(frozen=True)
class Component:
    """One entry of a pipeline's ``model_index.json``.

    Args:
        class_path: library and class, ``"diffusers.FluxTransformer2DModel"``.
        config: what the class is built from, as in its config file. A tokenizer's is the keyword arguments of
            :func:`pytest_diffopt.replicas.tokenizers.in_memory`.
        dtype: of its weights in a checkpoint, by torch's name; None if it has none or it is not known.
        source: where the config can be read.
        files: a folder whose files it is loaded from as they are: tokenizers and processors of a directory.
    """

    class_path: str
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dtype: str | None = None
    source: str = ""
    files: Path | None = None

    @property
    def library(self) -> str:
        """``"diffusers"`` or ``"transformers"``."""
        return self.class_path.split(".")[0]

    @property
    def class_name(self) -> str:
        """The class without its library."""
        return self.class_path.split(".")[1]


@dataclass(frozen=True)
class Description:
    """A pipeline in one size.

    Args:
        name: what people call it, ``"flux.1-dev"``.
        pipeline_class: name of the diffusers class, ``"FluxPipeline"``.
        components: by name, in the order in which they are built.
        options: the pipeline's further arguments; None for a component that it may lack and does.
        hub_id: the public repository, ``"org/name"``; None if there is none.
        default_size: (height, width) in pixels that the pipeline makes by default; of a video (height, width, frames).
    """

    name: str
    pipeline_class: str
    components: Mapping[str, Component] = field(hash=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    hub_id: str | None = None
    default_size: tuple[int, int] | tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Architecture:
    """What all sizes of a family have in common.

    Args:
        pipeline_class: name of the diffusers class.
        classes: component → ``"library.Class"``, in the order in which they are built.
        shared: component → entries of its config that are equal in every size.
        options: as in :class:`Description`.
    """

    pipeline_class: str
    classes: Mapping[str, str] = field(hash=False)
    shared: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def sized(
        self,
        name: str,
        configs: Mapping[str, Mapping[str, Any] | Published],
        *,
        hub_id: str | None = None,
        default_size: tuple[int, int] | tuple[int, int, int] | None = None,
    ) -> Description:
        """The pipeline in the size that ``configs`` give its components; what a config repeats of ``shared`` wins.

        Raises:
            ReplicaError: a component of the family has neither a config nor a shared one, or one is not the family's.
        """
        unknown = configs.keys() - self.classes.keys()
        missing = self.classes.keys() - configs.keys() - self.shared.keys()
        if unknown or missing:
            raise ReplicaError(
                f"{name}: {self.pipeline_class} is made of {', '.join(self.classes)}; "
                f"configs are missing for {', '.join(sorted(missing)) or 'none'} "
                f"and too many for {', '.join(sorted(unknown)) or 'none'}."
            )
        components = {}
        for part, class_path in self.classes.items():
            own = configs.get(part, {})
            own = own if isinstance(own, Published) else Published(own, "")
            config = {**self.shared.get(part, {}), **own.config}
            components[part] = Component(class_path, config, own.dtype, own.source)
        return Description(name, self.pipeline_class, components, self.options, hub_id, default_size)


def kind(component: Component) -> Kind:
    """What a component is: a module, a scheduler, a tokenizer, or something that only its own files describe.

    Raises:
        ReplicaError: the installed library has no such class, or it is of neither library.
    """
    import torch

    found = component_class(component)
    if issubclass(found, torch.nn.Module):
        return "module"
    if getattr(found, "config_name", None) == "scheduler_config.json":
        return "scheduler"
    return "tokenizer" if "Tokenizer" in component.class_name else "files"


def component_class(component: Component) -> Any:
    """The class itself, out of the installed library.

    Raises:
        ReplicaError: the installed library has no such class, or it is of neither library.
    """
    if component.library not in LIBRARIES:
        raise ReplicaError(f"{component.class_path} is of no known library; allowed: {', '.join(LIBRARIES)}.")
    found = found_in(component.library, component.class_name)
    if not isinstance(found, type):
        installed = import_module(component.library).__version__
        raise ReplicaError(f"The installed {component.library} {installed} has no {component.class_name}.")
    return found


def build_component(component: Component) -> Any:
    """One component out of its config, on the default device and in the default dtype; a module in eval mode.

    Weights are whatever the class draws from torch's global generator. A config entry that the installed class does not
    know is ignored, with the library's own warning, as ``from_pretrained`` does.

    Raises:
        ReplicaError: its class is unknown, it refuses the config, or only its files describe it.
    """
    found, what = component_class(component), kind(component)
    if what == "tokenizer":
        return tokenizers.in_memory(component.class_name, **component.config)
    if what == "files":
        raise ReplicaError(f"{component.class_path} is loaded from files; it cannot be built from a config.")
    try:
        if component.library == "diffusers":
            built = found.from_config(dict(component.config))
        else:
            built = found(found.config_class.from_dict(dict(component.config)))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ReplicaError(
            f"{component.class_path} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error
    return built.eval() if what == "module" else built


def build_components(description: Description) -> dict[str, Any]:
    """All components by name, in order, as :func:`build_component` makes them.

    Raises:
        ReplicaError: one cannot be built; the sentence says which.
    """
    built = {}
    for name, component in description.components.items():
        with _named(description, name):
            built[name] = build_component(component)
    return built


def build_pipeline(description: Description, components: Mapping[str, Any]) -> Any:
    """The pipeline of these components, which :func:`build_components` made."""
    return getattr(import_module("diffusers"), description.pipeline_class)(**components, **description.options)


def build_on_meta(description: Description) -> dict[str, torch.nn.Module]:
    """The components that are modules, in their full size and published dtype, on the meta device: shapes, no memory.

    Floating point parameters and buffers have the component's ``dtype``, float32 where it is not known. What a library
    keeps in float32 when it loads a checkpoint is float32 only after it did so.

    Raises:
        ReplicaError: one cannot be built; the sentence says which.
    """
    import torch

    built: dict[str, torch.nn.Module] = {}
    for name, component in description.components.items():
        with _named(description, name):
            if kind(component) == "module":
                with torch.device("meta"):
                    module = build_component(component)
                # Past diffusers' and transformers' own to(), which warn of the modules that loading keeps in float32.
                built[name] = torch.nn.Module.to(module, getattr(torch, component.dtype or "float32"))
    return built


def parameter_count(module: torch.nn.Module) -> int:
    """Number of a module's parameters; those that are tied count once, buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def read_description(directory: Path | str, name: str | None = None) -> Description:
    """The description of a pipeline whose config files are in ``directory``, in the layout of diffusers; no weights needed.

    A tokenizer that has no folder is made in memory. The dtype of a transformers model is the one of its config; diffusers
    writes none.

    Args:
        directory: holds ``model_index.json`` and a folder for each component with its config file.
        name: what to call it; the directory's own name if None.

    Raises:
        ReplicaError: a file is missing or is no JSON object, or the installed libraries lack a class; with every missing
            file at once.
    """
    directory = Path(directory)
    if not (directory / INDEX).is_file():
        raise ReplicaError(f"The directory {str(directory)!r} holds no diffusers pipeline: it lacks {INDEX}.")
    index = _read_object(directory / INDEX)
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise ReplicaError(f"{directory / INDEX} names no pipeline class: its '_class_name' is {pipeline_class!r}.")
    components: dict[str, Component] = {}
    options: dict[str, Any] = {}
    missing: list[str] = []
    for entry, value in index.items():
        if entry.startswith("_"):
            continue
        if not (isinstance(value, list) and len(value) == 2):
            options[entry] = value
        elif value[0] is None or value[1] is None:
            options[entry] = None
        else:
            component = Component(f"{value[0]}.{value[1]}", source=str(directory / entry))
            components[entry] = _read_component(directory / entry, component, missing)
    if missing:
        files = [Path(file).relative_to(directory).as_posix() for file in missing]
        raise ReplicaError(f"The directory {str(directory)!r} lacks {', '.join(files)}, which its {INDEX} asks for.")
    return Description(name or directory.resolve().name, pipeline_class, components, options)


def config_file(component: Component) -> str:
    """The name of the file that holds a module's or a scheduler's config."""
    return "scheduler_config.json" if kind(component) == "scheduler" else "config.json"


def write_configs(description: Description, directory: Path) -> None:
    """Write ``model_index.json`` and every component's folder but for weights, as ``save_pretrained`` lays them out."""
    index: dict[str, Any] = {"_class_name": description.pipeline_class}
    for option, value in description.options.items():
        index[option] = [None, None] if value is None else value
    for name, component in description.components.items():
        index[name] = [component.library, component.class_name]
        folder, what = directory / name, kind(component)
        if component.files is not None:
            shutil.copytree(component.files, folder)
        elif what == "tokenizer":
            build_component(component).save_pretrained(folder)
        else:
            folder.mkdir()
            _write_object(folder / config_file(component), {**_identity(component), **component.config})
    _write_object(directory / INDEX, index)


def _identity(component: Component) -> dict[str, Any]:
    if component.library == "diffusers":
        return {"_class_name": component.class_name}
    found = component_class(component)
    return {
        "architectures": [component.class_name],
        "model_type": found.config_class.model_type,
        "dtype": component.dtype or "float32",
    }


def _read_component(folder: Path, component: Component, missing: list[str]) -> Component:
    what = kind(component)
    if what in ("tokenizer", "files"):
        there = folder.is_dir() and any(folder.iterdir())
        if what == "files" and not there:
            missing.append(str(folder))
        return Component(component.class_path, source=component.source, files=folder if there else None)
    file = folder / config_file(component)
    if not file.is_file():
        missing.append(str(file))
        return component
    config = _read_object(file)
    if "quantization_config" in config:
        raise ReplicaError(
            f"{file} is of a checkpoint that is quantized already; give the config of the one that is not, and quantize it "
            f"in the recipe."
        )
    dtypes = [config.pop(key) for key in _DTYPE_KEYS if key in config]
    dtype = next((given for given in dtypes if isinstance(given, str)), None)
    kept = {key: value for key, value in config.items() if key not in _WRITTEN}
    return Component(component.class_path, kept, dtype, str(file))


def _read_object(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReplicaError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(read, dict):
        raise ReplicaError(f"{file} holds no JSON object but a {type(read).__name__}.")
    return read


def _write_object(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class _named:
    """Puts the names of the pipeline and of the component before the sentence of a ReplicaError."""

    def __init__(self, description: Description, component: str) -> None:
        self.where = f"{description.name}, {component}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ReplicaError):
            raise ReplicaError(f"{self.where}: {error}") from error
