"""Random weights for replicas: the same in every build, and lively enough that an output shows what was broken.

The libraries' own initial weights shrink a signal by about sqrt(3) a layer, so a prompt would hardly reach the image.
Here each layer keeps the size of its input, and whatever a library starts at zero or one gets random values too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def reproducible(seed: int = 0) -> Iterator[None]:
    """Build inside this: CPU, float32, gradients allowed and CPU random numbers from ``seed``, whatever the caller set.

    Gives back the CPU random state, the default dtype and the default device, also after a raise. Accelerators' random
    states are not touched: ``torch.manual_seed`` would reseed them too.
    """
    import torch

    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    try:
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)


def randomize(module: torch.nn.Module, *, seed: int = 0, gains: Mapping[str, float] | None = None) -> None:
    """Give every parameter of ``module`` a random value, in place.

    Matrices and convolutions are normal with a deviation of ``gain / sqrt(inputs)``; embeddings normal with deviation
    ``gain``; other vectors (scales of norms in any shape, biases) move by a tenth from where they stand. A parameter's
    values depend on ``seed`` and its name alone, so a block that is added or taken away leaves the others as they are.

    Args:
        module: on the CPU; its parameters' dtypes are kept.
        seed: of every parameter's own generator.
        gains: name pattern (as in ``fnmatch``) of a weight → its gain; 1 where none matches, the first match counts.
    """
    import torch

    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            gain = next((gain for pattern, gain in (gains or {}).items() if fnmatchcase(name, pattern)), 1.0)
            if id(parameter) in embeddings:
                parameter.copy_(noise * gain)
            elif parameter.dim() >= 2 and parameter[0].numel() > 1:
                parameter.copy_(noise * (gain / math.sqrt(parameter[0].numel())))
            else:
                parameter.add_((noise * 0.1).to(parameter.dtype))


def smooth_in_time(linear: torch.nn.Linear) -> None:
    """Damp the fast waves of a sinusoidal time embedding in the layer that reads them, in place, as training does.

    bfloat16 rounds a guidance of 3500 to 3504: a random layer would make another image of it, and the distance between
    bfloat16 and float32, which parity is measured by, would hide real faults.

    Args:
        linear: its inputs are cosines, then sines, of frequencies that fall from 1 to 1/10000 per unit of time.
    """
    import torch

    waves = linear.in_features // 2
    frequencies = 10000.0 ** (-torch.arange(waves, dtype=torch.float32) / waves)
    damping = (1 + 400 * frequencies).reciprocal()
    with torch.no_grad():
        linear.weight.mul_((damping / damping.square().mean().sqrt()).repeat(2))
