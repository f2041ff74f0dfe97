"""Every global is given back, also after a raise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config as inductor_config
import torch.fx.experimental._config as fx_config

from pytest_diffopt.preparation.borrowed_state import borrowed_state, differences, reset_compiler_caches, take_snapshot

dynamo_config: Any = torch._dynamo.config

CHANGES: dict[str, Callable[[], Any]] = {
    "torch._dynamo.config.recompile_limit": lambda: setattr(dynamo_config, "cache_size_limit", 77),
    "torch._dynamo.config.suppress_errors": lambda: setattr(dynamo_config, "suppress_errors", True),
    "torch._inductor.config.max_autotune": lambda: setattr(inductor_config, "max_autotune", True),
    "torch.fx.experimental._config.use_duck_shape": lambda: setattr(fx_config, "use_duck_shape", False),
    "torch default dtype": lambda: torch.set_default_dtype(torch.bfloat16),
    "torch default device": lambda: torch.set_default_device("meta"),
    "torch grad mode": lambda: torch.set_grad_enabled(False),
    "torch.float32_matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
    "torch.backends.cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "torch deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "torch autocast cpu": lambda: torch.set_autocast_enabled("cpu", True),
    "torch compiler stance": lambda: torch.compiler.set_stance("force_eager"),
    "torch compiler callbacks": lambda: torch._dynamo.callback_handler.register_end_callback(print),
    "torch.nn global module hooks": lambda: torch.nn.modules.module.register_module_forward_hook(print),
    "torch random": lambda: torch.manual_seed(12345),
    "environment variables TORCHDYNAMO_MADE_UP": lambda: __import__("os").environ.update(TORCHDYNAMO_MADE_UP="1"),
    "logging levels torch": lambda: logging.getLogger("torch").setLevel(7),
    "working directory": lambda: __import__("os").chdir("/"),
    "torch.backends.cudnn.enabled": lambda: setattr(torch.backends.cudnn, "enabled", False),
    "torch autocast cache": lambda: torch.set_autocast_cache_enabled(False),
    "torch.backends.mha": lambda: torch.backends.mha.set_fastpath_enabled(False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_global_is_named_and_given_back(name: str) -> None:
    before = take_snapshot()
    with borrowed_state() as borrowed:
        CHANGES[name]()
        found = [d.name for d in differences(borrowed, take_snapshot(), with_random=True)]
        assert name in found
    assert differences(before, take_snapshot(), with_random=True) == []


def test_everything_is_given_back_after_a_raise() -> None:
    before = take_snapshot()
    with pytest.raises(KeyError), borrowed_state():
        for change in CHANGES.values():
            change()
        raise KeyError
    assert differences(before, take_snapshot(), with_random=True) == []


def test_nothing_differs_where_nothing_was_changed() -> None:
    assert differences(take_snapshot(), take_snapshot(), with_random=True) == []


def test_an_alias_and_its_setting_are_one_global() -> None:
    with borrowed_state() as borrowed:
        dynamo_config.cache_size_limit = 9
        changed = [(d.name, d.before, d.after) for d in differences(borrowed, take_snapshot())]
    assert changed == [("torch._dynamo.config.recompile_limit", "8", "9")]


def test_forgetting_compiled_code_keeps_the_callbacks_that_torchs_own_reset_drops() -> None:
    with borrowed_state():
        torch._dynamo.callback_handler.register_start_callback(print)
        reset_compiler_caches()
        assert torch._dynamo.callback_handler.start_callbacks == [print]
        torch.compiler.reset()
        assert torch._dynamo.callback_handler.start_callbacks == []
