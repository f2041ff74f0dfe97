"""Every global that a recipe, or the code under test, may change is borrowed: written down first, given back after.

A setting that one test leaves behind decides the next test's verdict (a raised recompile limit hides recompiles, a TF32
flag moves numbers). So :func:`borrowed_state` gives everything back, also after a raise, and
:func:`differences` names what was left changed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CONFIG_MODULES = (
    "torch._dynamo.config",
    "torch._inductor.config",
    "torch._functorch.config",
    "torch.fx.experimental._config",
    "torch.compiler.config",
)
"""Where torch keeps the settings of its compiler; each one offers ``get_config_copy``."""

RNG_NAMES = ("python random", "numpy random", "torch random", "accelerator random")


@dataclass(frozen=True)
class Global:
    """One global: how to read it and how to give it back. ``read`` returns something that compares with ``==``."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]


@dataclass(frozen=True)
class Difference:
    """A global that is not as it was."""

    name: str
    before: str
    after: str


def _torch() -> Any:
    import torch

    return torch


def _attribute(name: str, path: str) -> Global:
    """A global that is a plain attribute, ``torch.backends.cudnn.benchmark``."""
    *parents, last = path.split(".")

    def holder() -> Any:
        found = _torch()
        for parent in parents:
            found = getattr(found, parent)
        return found

    return Global(name, lambda: getattr(holder(), last), lambda value: setattr(holder(), last, value))


def _precisions() -> tuple[Global, ...]:
    """TF32 and its kin. Newer torch has one string a backend, older torch a flag: mixing the two raises there."""
    torch = _torch()
    if hasattr(torch.backends, "fp32_precision"):
        paths: tuple[str, ...] = (
            "backends.fp32_precision",
            "backends.cuda.matmul.fp32_precision",
            "backends.cudnn.fp32_precision",
            "backends.cudnn.conv.fp32_precision",
            "backends.cudnn.rnn.fp32_precision",
            "backends.mkldnn.fp32_precision",
            "backends.mkldnn.matmul.fp32_precision",
            "backends.mkldnn.conv.fp32_precision",
        )
    else:
        paths = ("backends.cuda.matmul.allow_tf32", "backends.cudnn.allow_tf32")
    return tuple(_attribute(f"torch.{path}", path) for path in paths)


def _write_default_device(device: Any) -> None:
    torch = _torch()
    torch.set_default_device(device)


def _read_default_device() -> Any:
    # torch.get_default_device() answers "cpu" where none is set; the mode itself tells the two apart
    return getattr(_torch().utils._device, "CURRENT_DEVICE", None)


def _read_callbacks() -> tuple[Any, ...]:
    handler = importlib.import_module("torch._dynamo").callback_handler
    return tuple(handler.start_callbacks), tuple(handler.end_callbacks)


def _write_callbacks(value: tuple[Any, ...]) -> None:
    handler = importlib.import_module("torch._dynamo").callback_handler
    handler.start_callbacks[:], handler.end_callbacks[:] = value


def _read_stance() -> Any:
    stance = importlib.import_module("torch._dynamo.eval_frame")._stance
    return stance.stance, stance.skip_guard_eval_unsafe, stance.backend


def _write_stance(value: Any) -> None:
    eval_frame = importlib.import_module("torch._dynamo.eval_frame")
    stance, unsafe, backend = value
    eval_frame._set_stance(eval_frame.DynamoStance(stance, unsafe, backend))


def _global_module_hooks() -> list[str]:
    module = importlib.import_module("torch.nn.modules.module")
    return sorted(name for name in vars(module) if name.startswith("_global_") and hasattr(vars(module)[name], "items"))


def _read_module_hooks() -> Any:
    module = importlib.import_module("torch.nn.modules.module")
    return tuple((name, tuple(getattr(module, name).items())) for name in _global_module_hooks())


def _write_module_hooks(value: Any) -> None:
    module = importlib.import_module("torch.nn.modules.module")
    for name, items in value:
        hooks = getattr(module, name)
        hooks.clear()
        hooks.update(items)


_LIBRARY_LOGGERS = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes")


class _Levels(dict[str, Any]):
    """Levels of loggers by name; loggers that only one side knows were made in between, and count for nothing."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and all(self[name] == other[name] for name in self.keys() & other.keys())

    __hash__ = None


def _read_logging() -> Any:
    levels = {
        name: (logger.level, logger.disabled)
        for name, logger in list(logging.Logger.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and name.split(".")[0] in _LIBRARY_LOGGERS
    }
    return _Levels({"": (logging.root.level, logging.root.disabled), **levels})


def _write_logging(value: Any) -> None:
    for name, (level, disabled) in value.items():
        logger = logging.getLogger(name) if name else logging.root
        if (logger.level, logger.disabled) != (level, disabled):
            logger.setLevel(level)
            logger.disabled = disabled


_ENVIRONMENT = (
    *("TORCH", "PYTORCH", "DIFFUSERS", "TRANSFORMERS", "HF_", "ACCELERATE", "BNB", "BITSANDBYTES", "TOKENIZERS"),
    *("CUDA", "NVIDIA", "OMP_", "MKL_", "TRITON"),
)


def _read_environment() -> Any:
    return {k: v for k, v in os.environ.items() if k.startswith(_ENVIRONMENT)}


def _write_environment(value: Any) -> None:
    for name in _read_environment():
        if name not in value:
            del os.environ[name]
    os.environ.update(value)


_FLAGS = (
    "backends.cudnn.enabled",
    "backends.cudnn.benchmark",
    "backends.cudnn.benchmark_limit",
    "backends.cudnn.deterministic",
    "backends.mkldnn.enabled",
    "backends.mkldnn.deterministic",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_accumulation",
    "utils.deterministic.fill_uninitialized_memory",
)


def _has(path: str) -> bool:
    found = _torch()
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError):
            return False
    return True


_held_modes: list[Any] = []


def _write_inference_mode(value: bool) -> None:
    # the guard that was left open belongs to somebody else: one of ours, held, stands above it
    _held_modes.append(_torch()._C._InferenceMode(value))


def _read_print_options() -> Any:
    options = importlib.import_module("torch._tensor_str").PRINT_OPTS
    return tuple(sorted(vars(options).items(), key=lambda item: item[0])) if vars(options) else ()


def _write_print_options(value: Any) -> None:
    options = importlib.import_module("torch._tensor_str").PRINT_OPTS
    for name, held in value:
        setattr(options, name, held)


def _read_function_modes() -> int:
    return int(_torch()._C._len_torch_function_stack())


def _write_function_modes(count: int) -> None:
    torch = _torch()
    while torch._C._len_torch_function_stack() > count:
        torch._C._pop_torch_function_stack()


def _read_attention_backend() -> Any:
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return getattr(registry, "_active_backend", None)


def _write_attention_backend(value: Any) -> None:
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    if registry is not None and value is not None:
        registry._active_backend = value


def _autocast(kind: str) -> Global:
    torch = _torch()

    def write(value: Any) -> None:
        torch.set_autocast_enabled(kind, value[0])
        torch.set_autocast_dtype(kind, value[1])

    return Global(
        f"torch autocast {kind}", lambda: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)), write
    )


def _globals() -> tuple[Global, ...]:
    torch = _torch()
    entries = [
        Global("torch default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Global("torch default device", _read_default_device, _write_default_device),
        Global("torch grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Global("torch.float32_matmul_precision", torch.get_float32_matmul_precision, _write_matmul_precision),
        *_precisions(),
        *(_attribute(f"torch.{path}", path) for path in _FLAGS if _has(path)),
        Global("torch inference mode", torch.is_inference_mode_enabled, _write_inference_mode),
        Global("torch.backends.mha", torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
        Global("torch autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        Global("torch print options", _read_print_options, _write_print_options),
        Global("torch function modes", _read_function_modes, _write_function_modes),
        Global("diffusers attention backend", _read_attention_backend, _write_attention_backend),
        Global(
            "torch deterministic algorithms",
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
        Global("torch anomaly mode", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        Global("torch threads", torch.get_num_threads, torch.set_num_threads),
        *(
            Global(
                f"torch.backends.cuda {name}",
                getattr(torch.backends.cuda, f"{name}_sdp_enabled"),
                getattr(torch.backends.cuda, f"enable_{name}_sdp"),
            )
            for name in ("flash", "math", "mem_efficient", "cudnn")
            if hasattr(torch.backends.cuda, f"{name}_sdp_enabled")
        ),
        *(_autocast(kind) for kind in ("cpu", "cuda")),
        Global("torch compiler stance", _read_stance, _write_stance),
        Global("torch compiler callbacks", _read_callbacks, _write_callbacks),
        Global("torch.nn global module hooks", _read_module_hooks, _write_module_hooks),
        Global("logging levels", _read_logging, _write_logging),
        Global("environment variables", _read_environment, _write_environment),
        Global("working directory", os.getcwd, os.chdir),
    ]
    if (device := _device_module()) is not None:
        entries.append(Global("accelerator's current device", device.current_device, device.set_device))
    return tuple(entries)


def _write_matmul_precision(value: str) -> None:
    if _torch().get_float32_matmul_precision() != value:
        _torch().set_float32_matmul_precision(value)


def _config_modules() -> dict[str, Any]:
    found = {}
    for name in CONFIG_MODULES:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            if hasattr(module, "get_config_copy"):
                found[name] = module
    return found


@dataclass(frozen=True)
class Snapshot:
    """The value of every borrowed global at one moment."""

    configs: dict[str, dict[str, Any]]
    values: dict[str, Any]
    random: dict[str, Any]


def _settings(module: Any) -> dict[str, Any]:
    """What a module of settings holds now; torch's own copy lists a setting that was deleted too."""
    held = getattr(module, "_config", {})
    return {
        name: value for name, value in module.get_config_copy().items() if not getattr(held.get(name), "hide", False)
    }


def take_snapshot() -> Snapshot:
    """Write every borrowed global down."""
    configs = {name: _settings(module) for name, module in _config_modules().items()}
    return Snapshot(configs, {entry.name: entry.read() for entry in _globals()}, read_random())


def read_random() -> dict[str, Any]:
    """The state of every global random generator, by name."""
    torch = _torch()
    state: dict[str, Any] = {"python random": random.getstate(), "torch random": torch.get_rng_state()}
    if "numpy" in sys.modules:
        state["numpy random"] = sys.modules["numpy"].random.get_state()
    if (device := _device_module()) is not None:
        state["accelerator random"] = device.get_rng_state_all()
    return state


def _device_module() -> Any:
    """torch's module of the accelerator that has been used in this process; None where there is none."""
    torch = _torch()
    return torch.cuda if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def write_random(state: dict[str, Any]) -> None:
    """Put the global random generators into a state that :func:`read_random` gave."""
    torch = _torch()
    random.setstate(state["python random"])
    torch.set_rng_state(state["torch random"])
    if "numpy random" in state:
        sys.modules["numpy"].random.set_state(state["numpy random"])
    if "accelerator random" in state:
        _device_module().set_rng_state_all(state["accelerator random"])


def _same(left: Any, right: Any) -> bool:
    torch = _torch()
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return bool(torch.equal(left, right))
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    try:
        return bool(left is right or left == right)
    except (TypeError, ValueError, RuntimeError):  # arrays answer == with an array
        import numpy as np

        return bool(np.array_equal(left, right))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def differences(before: Snapshot, after: Snapshot, *, with_random: bool = False) -> list[Difference]:
    """What is not as it was, by name; the random generators only where asked for."""
    found = []
    for module, settings in before.configs.items():
        later = after.configs.get(module, {})
        for key, value in settings.items():
            if key not in later:
                found.append(Difference(f"{module}.{key}", _shown(value), "deleted"))
            elif not _same(value, later[key]):
                found.append(Difference(f"{module}.{key}", _shown(value), _shown(later[key])))
    for name, value in before.values.items():
        later = after.values[name]
        if _same(value, later):
            continue
        if isinstance(value, dict):  # one by one: which variable, which logger
            for key in sorted(value.keys() | later.keys()):
                if value.get(key) != later.get(key) and (key in value or not isinstance(value, _Levels)):
                    one, old, new = f"{name} {key or 'of the root'}", value.get(key), later.get(key)
                    found.append(Difference(one, _shown(old), _shown(new)))
        else:
            found.append(Difference(name, _shown(value), _shown(later)))
    if with_random:
        found += [
            Difference(name, "its state", "another state") for name in random_changed(before.random, after.random)
        ]
    return found


def random_changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of the random generators that are in another state."""
    return [name for name, state in before.items() if not _same(state, after.get(name))]


def give_back(before: Snapshot) -> None:
    """Make every borrowed global what it was at the snapshot."""
    modules = _config_modules()
    for name, settings in before.configs.items():
        module = modules[name]
        now = _settings(module)
        for key, value in settings.items():
            if key not in now or not _same(value, now[key]):
                setattr(module, key, value)
    for entry in _globals():
        # a device that was first used in between has globals that are not in the snapshot
        if entry.name in before.values and not _same(before.values[entry.name], entry.read()):
            entry.write(before.values[entry.name])
    write_random(before.random)


def reset_compiler_caches() -> None:
    """Forget what was compiled, keeping the callbacks that were registered (torch's own reset drops them)."""
    torch = _torch()
    callbacks = _read_callbacks()
    torch.compiler.reset()
    _write_callbacks(callbacks)


@contextlib.contextmanager
def borrowed_state(*, reset_compiler: bool = True) -> Iterator[Snapshot]:
    """Give every global back when the context closes, also after a raise.

    Args:
        reset_compiler: also forget compiled frames at entry and exit, so that nothing compiled by other code counts here.

    Yields:
        the snapshot that will be given back.
    """
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch._inductor.config")
    before = take_snapshot()
    if reset_compiler:
        reset_compiler_caches()
    try:
        yield before
    finally:
        if reset_compiler:
            reset_compiler_caches()
        give_back(before)
