"""What a block does to the libraries, seen on the way: its pipelines' calls, what it compiles, and pictures it would download.

All of it is patched for good, in a process that runs one block and ends. For a reference the same block is run with what
it compiles left eager, or what it offloads left on the accelerator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_diffopt.libraries import exchange_everywhere
from pytest_diffopt.part import did_you_mean
from pytest_diffopt.preparation import media, quantization

CallHandler = Callable[[Any, dict[str, Any], frozenset[str], Callable[..., Any]], Any]


@dataclass(frozen=True)
class CompileCall:
    """One call of torch.compile.

    Attributes:
        module_id: of the module whose method, or which itself, is compiled; 0 for any other function.
        method: the method's name; empty for the module itself.
        function: how it is called in a sentence.
    """

    module_id: int
    method: str
    function: str
    kwargs: Mapping[str, Any]


@dataclass
class Interception:
    """What was seen.

    Attributes:
        compiles: every call of torch.compile, in order.
        memory_formats: id of a module → the memory format that it was converted to.
        pictures: addresses that a generated picture or video stands for.
        single_files: id of a model → the file or address that it was loaded from, if that is one file.
        not_encoded: videos that were not written, since nothing that encodes them is installed.
        not_there: components that the block names and its pipeline does not have, a sentence each.
        offloads: names of methods that were called to offload something.
    """

    compiles: list[CompileCall] = field(default_factory=list)
    memory_formats: dict[int, str] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    offloads: list[str] = field(default_factory=list)
    single_files: dict[int, str] = field(default_factory=dict)
    not_encoded: list[str] = field(default_factory=list)
    not_there: list[str] = field(default_factory=list)
    _wrapped: set[type] = field(default_factory=set)
    _kept: list[Any] = field(default_factory=list)

    def install(
        self, on_call: CallHandler, *, compiles: bool, offloads: bool, device: str, compile_backend: str | None = None
    ) -> None:
        """Patch the libraries.

        Args:
            on_call: given a pipeline, all arguments of its call by their names, the names of those that the block gave, and
                the call itself; returns its result.
            compiles: False leaves eager what the block compiles. offloads: False places what the block offloads.
            device: where that is then placed, if the block does not say.
            compile_backend: in place of the backends that the block names.
        """
        self._see_calls(on_call)
        self._see_compiles(really=compiles, backend=compile_backend)
        self._see_offloads(really=offloads, device=device)
        self._make_pictures()
        self._see_names_of_components()
        self._see_single_files()
        self._encode_where_possible()

    # Calls of pipelines.

    def _see_calls(self, on_call: CallHandler) -> None:
        from diffusers import DiffusionPipeline

        register_modules: Any = DiffusionPipeline.register_modules

        @functools.wraps(register_modules)
        def register(pipeline: Any, **kwargs: Any) -> None:
            register_modules(pipeline, **kwargs)
            self._wrap_call(type(pipeline), on_call)

        DiffusionPipeline.register_modules = register

    def _wrap_call(self, kind: Any, on_call: CallHandler) -> None:
        if kind in self._wrapped or "__call__" not in vars(kind):
            return
        self._wrapped.add(kind)
        original = kind.__call__
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(pipeline, *args, **kwargs)
            said = frozenset(bound.arguments)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            arguments.pop(next(iter(signature.parameters)))
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    arguments |= arguments.pop(name, {})
            return on_call(pipeline, arguments, said, functools.partial(original, pipeline))

        kind.__call__ = call

    # torch.compile.

    def _see_compiles(self, *, really: bool, backend: str | None) -> None:
        import torch

        compile_: Any = torch.compile
        module_class: Any = torch.nn.Module

        @functools.wraps(compile_)
        def seen(model: Any = None, **kwargs: Any) -> Any:
            if model is None:  # a decorator with arguments
                return lambda function: seen(function, **kwargs)
            self.compiles.append(_described(model, kwargs))
            self._kept.append(model)  # so that no other object gets its id
            if backend is not None:
                of_inductor = ("mode", "options") if backend != "inductor" else ()  # other backends refuse them
                kwargs = {key: value for key, value in kwargs.items() if key not in of_inductor} | {"backend": backend}
            return compile_(model, **kwargs) if really else model

        torch.compile = seen
        if not really:
            module_compile = module_class.compile

            @functools.wraps(module_compile)
            def not_compiled(module: Any, *args: Any, **kwargs: Any) -> None:
                self.compiles.append(_described(module, kwargs))

            module_class.compile = not_compiled
        to = module_class.to

        @functools.wraps(to)
        def moved(module: Any, *args: Any, **kwargs: Any) -> Any:
            if (memory_format := kwargs.get("memory_format")) is not None:
                self.memory_formats[id(module)] = str(memory_format).removeprefix("torch.")
                self._kept.append(module)
            return to(module, *args, **kwargs)

        module_class.to = moved

    # Offloading.

    def _see_offloads(self, *, really: bool, device: str) -> None:
        import diffusers.hooks
        from diffusers import DiffusionPipeline
        from diffusers.models import ModelMixin

        for holder, name in (
            (DiffusionPipeline, "enable_model_cpu_offload"),
            (DiffusionPipeline, "enable_sequential_cpu_offload"),
            (DiffusionPipeline, "enable_group_offload"),
            (ModelMixin, "enable_group_offload"),
        ):
            if hasattr(holder, name):
                setattr(holder, name, self._offload(name, getattr(holder, name), really=really, device=device))
        original = diffusers.hooks.apply_group_offloading
        seen = self._offload("apply_group_offloading", original, really=really, device=device)
        exchange_everywhere("apply_group_offloading", original, seen)

    def _offload(self, name: str, original: Any, *, really: bool, device: str) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def offload(*args: Any, **kwargs: Any) -> Any:
            self.offloads.append(name)
            if excluded := kwargs.get("exclude_modules"):
                self._note_names(args[0], "exclude_modules", [excluded] if isinstance(excluded, str) else excluded)
            if really:
                return original(*args, **kwargs)
            said = signature.bind(*args, **kwargs).arguments
            target = said[next(iter(signature.parameters))]
            target.to(said.get("onload_device") or said.get("device") or device)
            return None

        return offload

    # Names of components: diffusers passes over one that is not there.

    def _see_names_of_components(self) -> None:
        from diffusers import DiffusionPipeline

        from_pretrained = DiffusionPipeline.from_pretrained.__func__

        @functools.wraps(from_pretrained)
        def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
            pipeline = from_pretrained(cls, *args, **kwargs)
            config = kwargs.get("quantization_config")
            named = [
                *(getattr(config, "components_to_quantize", None) or ()),
                *(getattr(config, "quant_mapping", None) or ()),
            ]
            self._note_names(pipeline, "quantization", named)
            return pipeline

        DiffusionPipeline.from_pretrained = classmethod(loaded)

    def _note_names(self, pipeline: Any, what: str, named: Iterable[Any]) -> None:
        there = list(getattr(pipeline, "components", {}))
        for name in named:
            if isinstance(name, str) and name not in there:
                guess = did_you_mean(name, there)
                self.not_there.append(
                    f"{what} names {name}, which the {type(pipeline).__name__} does not have; "
                    + (guess or f"it has: {', '.join(there)}").rstrip()
                )

    # Pictures.

    def _make_pictures(self) -> None:
        from diffusers.utils import loading_utils

        for name, make in (("load_image", media.picture), ("load_video", media.video)):
            original = getattr(loading_utils, name, None)
            if original is not None:
                exchange_everywhere(name, original, self._loader(original, make))

    def _loader(self, original: Any, make: Callable[[], Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(source: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(source, str) or not source.startswith(("http://", "https://")):
                return original(source, *args, **kwargs)
            self.pictures.append(source)
            made = make()
            convert = args[0] if args else kwargs.get("convert_method")
            return convert(made) if callable(convert) else made

        return load

    # Files.

    def _see_single_files(self) -> None:
        from diffusers.loaders import FromOriginalModelMixin

        holder: Any = FromOriginalModelMixin
        original = holder.from_single_file.__func__

        @functools.wraps(original)
        def from_single_file(kind: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
            model = original(kind, file, *args, **kwargs)
            self.single_files[id(model)] = str(file)
            self._kept.append(model)
            quantization.note_types_of_file(model, str(file))
            return model

        holder.from_single_file = classmethod(from_single_file)

    def _encode_where_possible(self) -> None:
        from diffusers.utils import export_utils

        original = export_utils.export_to_video

        @functools.wraps(original)
        def export_to_video(frames: Any, output_video_path: Any = None, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(frames, output_video_path, *args, **kwargs)
            except ImportError:  # of what encodes: the recipe is run by now
                self.not_encoded.append(str(output_video_path or "video"))
                return output_video_path

        exchange_everywhere("export_to_video", original, export_to_video)


def _described(model: Any, kwargs: Mapping[str, Any]) -> CompileCall:
    import torch

    kept = {name: value for name, value in kwargs.items() if value is not None}
    if isinstance(model, torch.nn.Module):
        return CompileCall(id(model), "", type(model).__name__, kept)
    owner = getattr(model, "__self__", None)
    name = getattr(model, "__name__", type(model).__name__)
    if isinstance(owner, torch.nn.Module):
        return CompileCall(id(owner), name, f"{type(owner).__name__}.{name}", kept)
    return CompileCall(0, "", name, kept)
