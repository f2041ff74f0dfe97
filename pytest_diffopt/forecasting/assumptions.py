"""What a forecast takes for granted and what may be assumed in its place: library versions, and what kernels take.

A forecast runs the installed libraries. Where an older one is known to take other memory, its behaviour is put in force
while models load, and given back.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pytest_diffopt.errors import DiffoptError

_ABSENT = object()
_FLAG_WORDS = "True or False"


@dataclass(frozen=True)
class Assumptions:
    """What was assumed; the defaults are the installed libraries, and kernels as CUDA is known to have them.

    Attributes:
        transformers: the version whose loading is assumed, ``"4.55"``; None for the installed one. See :meth:`keeps_wo`.
        t5_wo_float32: whether the ``wo`` layers of T5 are float32, whatever the version; None for what the version does.
        convolution_workspace: ``"expected"``, or ``"none"`` for convolutions that take no workspace.
        attention: ``"cuda"``, what CUDA chooses; ``"math"``, step by step everywhere; ``"fused"``, a kernel that takes
            nothing.
        cublas_workspace: whether cuBLAS's workspace is counted, which torch's allocator holds from the first product on.
    """

    transformers: str | None = None
    t5_wo_float32: bool | None = None
    convolution_workspace: Literal["expected", "none"] = "expected"
    attention: Literal["cuda", "math", "fused"] = "cuda"
    cublas_workspace: bool = True

    def keeps_wo(self, *, text_encoder_is_quantized: bool) -> bool:
        """Whether a T5 or UMT5 encoder that is loaded in bfloat16 has its ``wo`` layers in float32, as assumed.

        In float16 they are float32 in every version, so nothing is assumed of that. Read in the releases of
        huggingface/transformers, src/transformers/modeling_utils.py:

        - 4.57.3: float32 where a bitsandbytes quantizer loads (``use_keep_in_fp32_modules``), else bfloat16;
        - 5.0.0: float32 with and without a quantizer, since ``dtype_plan`` is made before the dtype is known;
        - 5.1.0 and later, 5.23.0 too: bfloat16 with and without (``_get_dtype_plan``; huggingface/transformers#43374).

        In all of them bitsandbytes leaves ``wo`` unquantized.
        """
        if self.t5_wo_float32 is not None:
            return self.t5_wo_float32
        version = self.transformers or importlib.metadata.version("transformers")
        return _version_keeps_wo(version, text_encoder_is_quantized)

    def sentences(self, *, text_encoder_is_quantized: bool, has_t5: bool = True) -> tuple[str, ...]:
        """What was taken for granted, each in a sentence, with the versions; in the order of the fields.

        Args:
            text_encoder_is_quantized: whether the recipe quantizes the T5 or UMT5 encoder.
            has_t5: whether the pipeline has one that is loaded in bfloat16.
        """
        said: list[str] = []
        installed = importlib.metadata.version("transformers")
        assumed_version = self.transformers if self.transformers is not None else installed
        if has_t5:
            kept = self.keeps_wo(text_encoder_is_quantized=text_encoder_is_quantized)
            dtype = "float32" if kept else "bfloat16"
            encoder = "a quantized T5 encoder" if text_encoder_is_quantized else "a T5 encoder"
            if self.t5_wo_float32 is not None:
                said.append(
                    f"The wo layers of {encoder} are {dtype}, as assumed (transformers {installed} is installed)."
                )
            elif self.transformers is not None:
                said.append(
                    f"The wo layers of {encoder} are {dtype}, as transformers {assumed_version} loads them "
                    f"({installed} is installed)."
                )
            else:
                said.append(
                    f"The wo layers of {encoder} are {dtype}, as transformers {installed}, which is installed, loads them."
                )
        elif self.transformers is not None:
            said.append(
                f"transformers {installed} is installed; nothing of {assumed_version} that matters here is known."
            )
        if self.convolution_workspace == "none":
            said.append("Convolutions take no workspace, as assumed.")
        if self.attention == "math":
            said.append("Attention is computed step by step, as assumed.")
        elif self.attention == "fused":
            said.append("Attention is computed by kernels that take no memory of their own, as assumed.")
        if not self.cublas_workspace:
            said.append("cuBLAS's workspace is not counted, as assumed.")
        return tuple(said)

    @contextlib.contextmanager
    def in_force(self, *, text_encoder_is_quantized: bool) -> Iterator[None]:
        """Load models meanwhile as assumed; what is changed in transformers is given back, after a raise as well.

        Raises: DiffoptError: the installed transformers keeps ``wo`` in float32 and cannot be told otherwise; only 5.0
            does.
        """
        wanted = self.keeps_wo(text_encoder_is_quantized=text_encoder_is_quantized)
        installed = importlib.metadata.version("transformers")
        if wanted == _version_keeps_wo(installed, text_encoder_is_quantized):
            yield
            return
        if not wanted:
            raise DiffoptError(
                f"transformers {installed} keeps the wo layers of T5 in float32, so a forecast cannot assume bfloat16. "
                f"Install transformers 5.1 or later."
            )
        from transformers import T5PreTrainedModel, UMT5PreTrainedModel

        with contextlib.ExitStack() as stack:
            # the encoders and the stacks inside them inherit it; unlike `_keep_in_fp32_modules` it holds for bfloat16 as well
            for holder in (T5PreTrainedModel, UMT5PreTrainedModel):
                _lend(stack, holder, "_keep_in_fp32_modules_strict", {"wo"})
            yield


def assumed(assume: Mapping[str, object] | None) -> Assumptions:
    """Read what is to be assumed: the names are the fields of :class:`Assumptions`.

    Raises:
        DiffoptError: a name is unknown, or a value is not of what its name takes; the sentence has what there is.
    """
    if assume is not None and not isinstance(assume, Mapping):
        raise DiffoptError(f"A forecast cannot assume {assume!r}. It takes a table of {', '.join(_ACCEPTED)}.")
    values: dict[str, Any] = {}
    for name, value in (assume or {}).items():
        if name not in _ACCEPTED:
            near = difflib.get_close_matches(str(name).casefold(), _ACCEPTED, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DiffoptError(f"A forecast cannot assume {name!r}.{hint} It can assume {', '.join(_ACCEPTED)}.")
        accepts, words = _ACCEPTED[name]
        if not accepts(value):
            raise DiffoptError(f"A forecast cannot assume {name} = {value!r}. It takes {words}.")
        values[name] = value
    return Assumptions(**values)


def _is_version(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d+\.\d+(\.\w+)*", value) is not None


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_one_of(*words: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in words


_ACCEPTED: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "transformers": (_is_version, 'a version as text, "4.55"'),
    "t5_wo_float32": (_is_flag, _FLAG_WORDS),
    "convolution_workspace": (_is_one_of("expected", "none"), '"expected" or "none"'),
    "attention": (_is_one_of("cuda", "math", "fused"), '"cuda", "math" or "fused"'),
    "cublas_workspace": (_is_flag, _FLAG_WORDS),
}


def _version_keeps_wo(version: str, text_encoder_is_quantized: bool) -> bool:
    major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
    if (major, minor) == (5, 0):
        return True
    return major < 5 and text_encoder_is_quantized


def _lend(stack: contextlib.ExitStack, holder: Any, name: str, value: Any) -> None:
    """Set a class's own attribute until the stack closes; one that it only inherited is taken away again."""
    own = vars(holder).get(name, _ABSENT)
    if own is _ABSENT:
        stack.callback(delattr, holder, name)
    else:
        stack.callback(setattr, holder, name, own)
    setattr(holder, name, value)
