"""A pipeline's components are loaded in one order, so that what loading takes at its peak is the same in every process."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

ONE_AT_A_TIME = "HF_DEACTIVATE_ASYNC_LOAD"
"""Of transformers: tensors are read by one thread, so that what is loaded first does not depend on the machine."""


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Load the components of pipelines one after the other, in the order of the pipeline's own arguments.

    diffusers loads them in the order of a set of strings, which differs between processes.
    """
    from diffusers import DiffusionPipeline

    extract: Any = DiffusionPipeline.extract_init_dict.__func__

    def extract_in_order(cls: Any, /, config_dict: Any, **kwargs: Any) -> Any:
        found, *rest = extract(cls, config_dict, **kwargs)
        order = list(inspect.signature(cls.__init__).parameters)
        return ({name: found[name] for name in sorted(found, key=order.index)}, *rest)

    kept = vars(DiffusionPipeline).get("extract_init_dict")
    before = os.environ.get(ONE_AT_A_TIME)
    os.environ[ONE_AT_A_TIME] = "1"
    DiffusionPipeline.extract_init_dict = classmethod(extract_in_order)
    try:
        yield
    finally:
        if kept is None:
            del DiffusionPipeline.extract_init_dict  # it was inherited
        else:
            DiffusionPipeline.extract_init_dict = kept
        if before is None:
            os.environ.pop(ONE_AT_A_TIME, None)
        else:
            os.environ[ONE_AT_A_TIME] = before
