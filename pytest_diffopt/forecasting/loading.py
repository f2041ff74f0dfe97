"""How a full-size model is loaded in a forecast: the libraries' own code, in an order that is the same every time."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

ONE_AT_A_TIME = "HF_DEACTIVATE_ASYNC_LOAD"
"""Of transformers: tensors are read by one thread, so that what is loaded first does not depend on the machine."""


@contextlib.contextmanager
def in_order(begins: Callable[[str], object], ends: Callable[[str], object]) -> Iterator[None]:
    """Load the components of pipelines one after the other, in the order of the pipeline's own arguments.

    The libraries load them in the order of a set, which differs between processes.

    Args:
        begins, ends: told the name of each component that is loaded.
    """
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import pipeline_utils

    extract: Any = DiffusionPipeline.extract_init_dict.__func__
    load = pipeline_utils.load_sub_model

    def extract_in_order(cls: Any, config_dict: Any, **kwargs: Any) -> Any:
        found, *rest = extract(cls, config_dict, **kwargs)
        order = list(inspect.signature(cls.__init__).parameters)
        return ({name: found[name] for name in sorted(found, key=order.index)}, *rest)

    def load_and_tell(*args: Any, **kwargs: Any) -> Any:
        name = str(kwargs.get("name", ""))
        begins(name)
        try:
            return load(*args, **kwargs)
        finally:
            ends(name)

    before = os.environ.get(ONE_AT_A_TIME)
    with contextlib.ExitStack() as stack:
        os.environ[ONE_AT_A_TIME] = "1"
        stack.callback(_give_back, before)
        DiffusionPipeline.extract_init_dict = classmethod(extract_in_order)
        stack.callback(delattr, DiffusionPipeline, "extract_init_dict")  # it was inherited
        pipeline_utils.load_sub_model = load_and_tell
        stack.callback(setattr, pipeline_utils, "load_sub_model", load)
        yield


def _give_back(value: str | None) -> None:
    if value is None:
        os.environ.pop(ONE_AT_A_TIME, None)
    else:
        os.environ[ONE_AT_A_TIME] = value
