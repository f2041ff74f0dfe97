"""A simulated accelerator: importing this makes ``torch.device("sim")`` and ``torch.sim``.

Tensors on it live in host memory and are computed by the CPU's kernels, with the same bits; what is simulated is
the *device*: each byte on it is counted, tensors of different devices do not mix, copies across are counted, its memory
has an end. The library behind it is built on first use (see :mod:`.build`).

Other libraries' lists of devices leave it out: ``with adapted_libraries():`` adapts them and gives them back,
:func:`adapt_libraries` adapts them until the process ends, and so does ``DIFFOPT_SIM_ADAPT=1`` at the import.

``DIFFOPT_SIM_DEVICES`` says how many devices there are: 2 if it is not set.
"""

from __future__ import annotations

import torch

from pytest_diffopt.accelerators.simulated.build import ensure_library
from pytest_diffopt.accelerators.simulated.libraries import (
    adapt_as_environment_says,
    adapt_libraries,
    adapted_libraries,
)
from pytest_diffopt.errors import UnverifiableError

__all__ = ["adapt_libraries", "adapted_libraries"]


def _load() -> None:
    """Once in a process: torch has a single place for a device of a third party."""
    if hasattr(torch, "sim"):
        return
    other = torch._C._get_privateuse1_backend_name()
    if other != "privateuseone":
        raise UnverifiableError(
            f"The simulated accelerator cannot be used in this process: torch has one place for a third party's device, "
            f"and {other!r} has taken it. Run without the package that registers it."
        )
    library = ensure_library()
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UnverifiableError(
            f"The simulated accelerator was built and cannot be loaded ({error.__cause__ or error}); "
            f"remove {library.parent}, and it is built again."
        ) from error
    from pytest_diffopt.accelerators.simulated import face, inductor

    face.register()
    inductor.register_with_compilers()


_load()
adapt_as_environment_says()
