"""Lets a pipeline's VAE work tile by tile, or image by image, through diffusers' own switches, and puts them back.

Tiles overlap and are blended, so the output is not the whole image's: a reference has the same switches.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_diffopt.errors import PreparationError

if TYPE_CHECKING:
    import torch

    from pytest_diffopt.recipe import Recipe

VAE = "vae"
"""The component's name in every pipeline that recipes name it for."""

_STRIDE = 0.75  # of a tile's side: what diffusers' own tiles have, 192 of 256


@dataclass
class Switched:
    """What was switched on, and how each was before."""

    _before: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def switch_on(self, components: Mapping[str, torch.nn.Module], recipe: Recipe) -> None:
        """Switch on what the recipe says; nothing where it says nothing.

        Raises:
            PreparationError: the pipeline has no VAE, or its VAE has no such switch.
        """
        wanted = [name for name in ("vae_tiling", "vae_slicing") if getattr(recipe, name)]
        if not wanted:
            return
        if VAE not in components:
            raise PreparationError(f"{wanted[0]}: the pipeline has no vae, but {', '.join(sorted(components))}")
        vae: Any = components[VAE]
        self._before.append((vae, _switches(vae)))
        if recipe.vae_tiling:
            _has(vae, "vae_tiling", "enable_tiling", "use_tiling")
            if isinstance(recipe.vae_tiling, bool):
                vae.enable_tiling()
            else:
                _tile(vae, recipe.vae_tiling)
        if recipe.vae_slicing:
            _has(vae, "vae_slicing", "enable_slicing", "use_slicing")
            vae.enable_slicing()

    def put_back(self) -> None:
        """As it was: a factory may return the same pipeline again."""
        while self._before:
            vae, before = self._before.pop()
            for name in _switches(vae).keys() - before.keys():
                delattr(vae, name)
            for name, value in before.items():
                setattr(vae, name, value)


def _switches(vae: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(vae).items() if name.startswith(("use_tiling", "use_slicing", "tile_"))}


def _has(vae: Any, wanted: str, method: str, attribute: str) -> None:
    # diffusers' base class has the methods for every VAE; they raise where the attribute is missing
    if not hasattr(vae, method) or not hasattr(vae, attribute):
        raise PreparationError(f"{wanted}: {type(vae).__name__} has no {method}()")


def _tile(vae: Any, side: int) -> None:
    """Tiles of ``side`` pixels. Newer VAEs take them as arguments; of AutoencoderKL people set the attributes."""
    taken = inspect.signature(vae.enable_tiling).parameters
    if "tile_sample_min_height" in taken:
        named = {f"tile_sample_min_{edge}": side for edge in ("height", "width")}
        named |= {f"tile_sample_stride_{edge}": int(side * _STRIDE) for edge in ("height", "width")}
        vae.enable_tiling(**{name: value for name, value in named.items() if name in taken})
    elif hasattr(vae, "tile_sample_min_size") and hasattr(vae, "tile_latent_min_size"):
        compression = vae.tile_sample_min_size // vae.tile_latent_min_size
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // compression
        vae.enable_tiling()
    else:
        raise PreparationError(f"vae_tiling: {type(vae).__name__} does not say how large a tile is; write true")


_TILED = ("tiled_decode", "tiled_encode")
_TILE_SIDES = ("tile_sample_min_size", "tile_sample_min_height", "tile_sample_min_width")


def more_than_a_tile(vae: Any) -> int:
    """Pixels of a side that takes several tiles of a VAE; 0 where it does not work tile by tile."""
    if not getattr(vae, "use_tiling", False):
        return 0
    side = max([value for name in _TILE_SIDES if isinstance(value := getattr(vae, name, None), int)], default=0)
    return -(-side * 3 // 2 // 32) * 32


@contextlib.contextmanager
def counting_tiles(components: Mapping[str, torch.nn.Module], tiled: list[str]) -> Iterator[None]:
    """Inside this the name of a component is added to ``tiled`` each time that it works tile by tile."""
    with contextlib.ExitStack() as stack:
        for name, module in components.items():
            for method in _TILED if getattr(module, "use_tiling", False) else ():
                original = getattr(module, method, None)
                if inspect.ismethod(original):
                    object.__setattr__(module, method, _noting(original, name, tiled))
                    stack.callback(object.__delattr__, module, method)
        yield


def _noting(method: Callable[..., Any], name: str, tiled: list[str]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        tiled.append(name)
        return method(*args, **kwargs)

    return noting
