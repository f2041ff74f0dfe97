"""Public cards and the memory that CUDA reports on them, which is less than what is printed on the box.

How much the driver keeps for itself differs by its version, and error correction takes a part where it is on. So that
"fits" is never said wrongly, a card has the least that was seen in public, where somebody's program printed it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pytest_diffopt.errors import DiffoptError

GenerationName = Literal["turing", "ampere", "ada", "hopper", "blackwell"]
"""NVIDIA's own names of its architectures; :mod:`pytest_diffopt.forecasting.generations` has what differs between them."""

_MIB = 1024**2
_GIB = 1024**3

# More than a driver was seen to keep of a GeForce's memory: 584 MiB, of an RTX 4090 of 24 GiB that reports 23.43.
_KEPT_BYTES = 600 * _MIB

USABLE_NOTE = (
    "Of it, a process that uses CUDA takes about 0.25 to 0.65 GiB for its context and libraries before the first tensor, "
    "and a desktop up to 1 GiB. On Windows the driver reports nearly the whole card, and pages to the host's memory when it "
    "is full."
)
"""What holds for every card: its ``total_bytes`` are not all a pipeline's."""


@dataclass(frozen=True)
class Card:
    """A card and its memory.

    Args:
        name: what people type, ``"rtx-4090"``; with the memory where a model is sold with several: ``"a100-80gb"``.
        title: the maker's name.
        generation: of its GPU, ``"ada"``; NVIDIA's own names of its architectures.
        nominal_bytes: as it is sold; a card's GB are GiB.
        total_bytes: the least that ``torch.cuda.get_device_properties(0).total_memory`` or an out-of-memory error was seen
            to report on Linux; to 0.01 GiB, as printed, where no exact number was seen.
        source: where it was seen, ``"owner/repository#issue"`` or ``"owner/repository: file"``.
        note: what to know of the number; empty for nothing.
        measured: False if no report was found, and ``total_bytes`` is ``nominal_bytes``, or what nvidia-smi has, less what
            drivers were seen to keep.
    """

    name: str
    title: str
    generation: GenerationName
    nominal_bytes: int
    total_bytes: int
    source: str
    note: str = ""
    measured: bool = True


def _seen(
    name: str, title: str, generation: GenerationName, nominal_gib: int, total_gib: float, source: str, note: str = ""
) -> Card:
    return Card(name, title, generation, nominal_gib * _GIB, int(total_gib * _GIB), source, note)


def _exact(
    name: str, title: str, generation: GenerationName, nominal_gib: int, total_bytes: int, source: str, note: str = ""
) -> Card:
    return Card(name, title, generation, nominal_gib * _GIB, total_bytes, source, note)


def _unseen(name: str, title: str, generation: GenerationName, nominal_gib: int, whole_bytes: int, source: str) -> Card:
    note = "No report of CUDA's total was found: what is known of the card, less 600 MiB, more than drivers were seen to keep."
    return Card(name, title, generation, nominal_gib * _GIB, whole_bytes - _KEPT_BYTES, source, note, measured=False)


_ECC = "Error correction, which is on by default, takes a part of the memory."

_CARDS = (
    _seen("rtx-3060-12gb", "NVIDIA GeForce RTX 3060 12GB", "ampere", 12, 11.75, "smy20011/dreambooth-gui#78"),
    _seen(
        "rtx-3090",
        "NVIDIA GeForce RTX 3090",
        "ampere",
        24,
        23.59,
        "Stable-X/StableNormal#33",
        "23.70 with other drivers.",
    ),
    _seen("rtx-4060", "NVIDIA GeForce RTX 4060", "ada", 8, 7.75, "ESRSchao/EdgeRegNet#2"),
    _unseen(
        "rtx-4060-ti-16gb",
        "NVIDIA GeForce RTX 4060 Ti 16GB",
        "ada",
        16,
        16 * _GIB,
        "huggingface/huggingface.js#712, its 16 GB",
    ),
    _unseen(
        "rtx-4070", "NVIDIA GeForce RTX 4070", "ada", 12, 12282 * _MIB, "meta-llama/llama#466, 12282 MiB by nvidia-smi"
    ),
    _unseen(
        "rtx-4080",
        "NVIDIA GeForce RTX 4080",
        "ada",
        16,
        16 * _GIB,
        "aigc-apps/sd-webui-EasyPhoto#281, 15.99 GiB on Windows",
    ),
    _seen(
        "rtx-4090",
        "NVIDIA GeForce RTX 4090",
        "ada",
        24,
        23.43,
        "siliconflow/onediff: onediff_comfy_nodes/benchmarks/results/exp5/system_info.md",
        "23.52 to 23.68 with other drivers.",
    ),
    _seen("rtx-5090", "NVIDIA GeForce RTX 5090", "blackwell", 32, 31.37, "Wan-Video/Wan2.1#465"),
    _seen("rtx-a4000", "NVIDIA RTX A4000", "ampere", 16, 15.61, "DengKaiCQ/VGGT-Long#6"),
    _seen("rtx-a6000", "NVIDIA RTX A6000", "ampere", 48, 47.53, "black-forest-labs/flux2#23"),
    _seen("rtx-6000-ada", "NVIDIA RTX 6000 Ada Generation", "ada", 48, 44.43, "DINGYANB/MTVCrafter#21", _ECC),
    _exact(
        "t4",
        "NVIDIA T4",
        "turing",
        16,
        15095 * _MIB,
        "sylvia-ymlin/cuda-kernels-from-scratch: README.md",
        _ECC,
    ),
    _exact("a10", "NVIDIA A10", "ampere", 24, 23_609_475_072, "aalanwyr/face2cuda: step2cuda/README.md", _ECC),
    _unseen("l4", "NVIDIA L4", "ada", 24, 23034 * _MIB, "NVIDIA/TensorRT-LLM#2398, 23034 MiB by nvidia-smi"),
    _seen("a30", "NVIDIA A30", "ampere", 24, 23.53, "google/RB-Modulation#5"),
    _seen("l40", "NVIDIA L40", "ada", 48, 44.40, "QwenLM/Qwen3-VL#2097", _ECC),
    _seen("l40s", "NVIDIA L40S", "ada", 48, 44.42, "stepfun-ai/Step-Video-T2V#8", _ECC),
    _exact("a100-40gb", "NVIDIA A100 40GB", "ampere", 40, 42_298_834_944, "bottlerocket-os/bottlerocket#3873"),
    _seen("a100-80gb", "NVIDIA A100 80GB", "ampere", 80, 79.25, "levihsu/OOTDiffusion#235"),
    _seen("h100-80gb", "NVIDIA H100 80GB", "hopper", 80, 79.11, "vllm-project/vllm#27508"),
)

CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card in _CARDS})
"""The cards by name, smaller families first; cannot be written to."""


def card(name: str) -> Card:
    """The card of that name, in any case; spaces and underscores count as hyphens, and ``nvidia`` and ``geforce`` as nothing.

    Raises:
        DiffoptError: there is none; the sentence has the nearest name, and all.
    """
    words = str(name).casefold().replace("_", " ").replace("-", " ").split()
    wanted = "-".join(word for word in words if word not in ("nvidia", "geforce"))
    if wanted in CARDS:
        return CARDS[wanted]
    near = [known for known in CARDS if wanted and known.startswith(f"{wanted}-")]
    near = near or difflib.get_close_matches(wanted, CARDS, n=1)
    hint = f" Did you mean {' or '.join(repr(known) for known in near)}?" if near else ""
    raise DiffoptError(f"No card is called {name!r}.{hint} There are {', '.join(CARDS)}.")
