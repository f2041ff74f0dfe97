"""What a quantization backend has to say of itself, and the rules that its keyword arguments are checked by."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_diffopt.part import Mistake, did_you_mean, is_torch, refused

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.observation.observation import Layer
    from pytest_diffopt.recipe import Quantization

Rule = Callable[[Any], Any]
"""Takes what a recipe says and returns what is kept of it, or raises `pytest_diffopt.part.Mistakes`."""

UNQUANTIZED = "unquantized"
"""The format of a layer of a quantization library whose weight never was quantized."""


@dataclass(frozen=True)
class Stored:
    """What a layer's weight really holds, read off its tensors; see `pytest_diffopt.observation.observation.Layer`."""

    format: str
    weight_bytes: int
    state_bytes: int = 0
    dtype: str = ""
    compute_dtype: str = ""
    double_quantized: bool = False
    activations: str = ""
    granularity: str = ""


class Backend(abc.ABC):
    """A quantization backend: everything that the package knows of it.

    Attributes:
        name: what recipes call it. library: the same for all backends whose layers are of one library.
        distribution: the package whose version an observation writes down; None where diffusers itself does it.
        imports: modules that are imported before a recipe with this backend is observed, since imports change globals.
        rules: keyword argument → its rule; `implied` for those that the backend's name says already.
        required: those that must be given, each with what it holds.
        while_loading: the libraries quantize while they load; else live modules are.
        in_place: live modules can be quantized too.
        compute_key: the keyword argument with the dtype that its layers multiply in; empty where that follows the input.
        forecasts: a forecast of a full-size model knows what its kernels take.
    """

    name: ClassVar[str]
    library: ClassVar[str]
    distribution: ClassVar[str | None] = None
    imports: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[Mapping[str, Rule]]
    required: ClassVar[Mapping[str, str]] = {}
    skip_key: ClassVar[str] = "modules_to_not_convert"
    compute_key: ClassVar[str] = ""
    while_loading: ClassVar[bool] = True
    in_place: ClassVar[bool] = True
    forecasts: ClassVar[bool] = False

    # What a recipe says.

    def rules_of(self, kwargs: Mapping[str, Any]) -> Mapping[str, Rule]:
        """The rules where they depend on what else is given."""
        return self.rules

    def together(self, kwargs: Mapping[str, Any]) -> Iterator[Mistake]:
        """Mistakes that lie between arguments, each of which is right alone."""
        return iter(())

    def named_out(self, quantization: Quantization) -> tuple[str, ...]:
        """Names of modules that the recipe keeps out."""
        return (*quantization.skip_modules, *(quantization.kwargs.get(self.skip_key) or ()))

    # How it is done.

    def library_kwargs(self, quantization: Quantization) -> dict[str, Any]:
        """The recipe's arguments in the library's own terms."""
        kwargs = dict(quantization.kwargs)
        if skipped := self.named_out(quantization):
            kwargs[self.skip_key] = list(skipped)
        return kwargs

    def config(self, quantization: Quantization, *, of_diffusers: bool) -> Any:
        """The config object that diffusers, or else transformers, loads one component with."""
        raise NotImplementedError(f"{self.name} has no config to load a component with")

    @abc.abstractmethod
    def quantize(
        self, component: torch.nn.Module, paths: list[str], quantization: Quantization, device: torch.device
    ) -> None:
        """Quantize the Linear layers at these paths of a live component, on that device."""

    def kept_plain(self, component: torch.nn.Module, quantization: Quantization) -> tuple[str, ...]:
        """Modules that the library leaves plain by rules of its own that no list in the component holds."""
        return ()

    # What a layer is.

    @abc.abstractmethod
    def is_layer(self, module: Any) -> bool:
        """Whether a module is one of the backend's layers; its weight may still be plain."""

    @abc.abstractmethod
    def read(self, module: Any, count: int) -> Stored | None:
        """What the weight of one of its layers, which stands for ``count`` weights, really holds."""

    def beside(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors that belong to a parameter and are none themselves, with their names."""
        return iter(())

    def of_layer(self, path: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors that a layer of its holds, besides parameters and buffers."""
        return iter(())

    def owns(self, layer: Any, parameter: torch.Tensor) -> bool:
        """Whether a parameter that is no quantized weight is in its dtype because of the backend."""
        return False

    @abc.abstractmethod
    def widen(self, layer: Any, wide: torch.dtype) -> None:
        """Make a layer multiply in a wider dtype with the weight values it has; parameters are cast after this.

        Raises:
            NotImplementedError: it cannot, with the reason.
        """

    @abc.abstractmethod
    def kwargs_of(self, component: torch.nn.Module, layers: list[Any]) -> dict[str, Any] | None:
        """The recipe's kwargs that would make a live component's layers; None where none of them is quantized."""

    # What the check says.

    @abc.abstractmethod
    def wrong(self, quantization: Quantization, layer: Layer) -> str:
        """What is wrong with a quantized layer that the recipe meant; empty where nothing is."""

    @abc.abstractmethod
    def most_bytes(self, layer: Layer) -> int:
        """What a layer in its format takes at most, in bytes, inner tensors included."""


# Rules.


def dtype_name(value: object) -> object:
    """``torch.bfloat16`` and ``"torch.bfloat16"`` as ``"bfloat16"``; anything else as it is."""
    text = str(value) if is_torch(value, "dtype") else value
    return text.removeprefix("torch.") if isinstance(text, str) else text


def one_of(*words: object, prepare: Callable[[object], object] = lambda value: value) -> Rule:
    """One of these values."""

    def rule(value: object) -> object:
        prepared = prepare(value)
        if not isinstance(prepared, str | int) or isinstance(prepared, bool) or prepared not in words:
            names = [word for word in words if isinstance(word, str)]
            raise refused(value, f"{did_you_mean(prepared, names)}allowed: {', '.join(map(repr, words))}")
        return prepared

    return rule


def true_or_false(value: object) -> object:
    if not isinstance(value, bool):
        raise refused(value, "true or false")
    return value


def implied(value: object) -> object:
    """For an argument that the backend's name says already: true, and left out."""
    if value is not True:
        raise refused(value, "true, or leave it out: the backend implies it")
    return value


def not_negative(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise refused(value, "a finite number >= 0")
    return float(value)  # transformers refuses an int here


def list_of_names(value: object) -> object:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise refused(value, "a list of strings")
    return list(value)  # transformers refuses a tuple here


# Tensors.


def kind_name(dtype: Any) -> str:
    """``torch.int8`` → ``"int8"``."""
    return str(dtype).removeprefix("torch.")


def parts_of(tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with elements that a tensor is made of, by name: itself (``""``), or those inside a wrapper."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        yield "", tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        for inner, part in parts_of(getattr(tensor, name)):
            yield f"{name}.{inner}" if inner else name, part


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's own elements, of a wrapper's inner tensors; 0 for a lazy parameter that has no shape yet."""
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return 0
    return sum(part.numel() * part.element_size() for _, part in parts_of(tensor))


def groups(layer: Layer) -> int:
    """How many scales a layer has, by its granularity: ``"PerTensor"``, ``"PerRow"`` or ``"PerGroup(128)"``."""
    if layer.granularity == "PerTensor":
        return 1
    size = granularity_size(layer.granularity)
    return layer.out_features * (math.ceil(layer.in_features / size) if size else 1)


def granularity_size(granularity: str) -> int:
    """128 of ``"PerGroup(128)"``; 0 of any other."""
    return int(granularity[9:-1]) if granularity.startswith("PerGroup(") else 0
