"""Public GPUs: the memory that CUDA reports on each, which is less than what is printed on the box, and what it is made of.

How much the driver keeps for itself differs by its version, and error correction takes a part where it is on. So that
"fits" is never said wrongly, a card has the least that was seen in public, where somebody's program printed it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from pytest_diffopt.accelerators.compute_capabilities import ComputeCapability, compute_capability
from pytest_diffopt.errors import DiffoptError

GenerationName = Literal["pascal", "volta", "turing", "ampere", "ada", "hopper", "blackwell-datacenter", "blackwell"]
"""NVIDIA's own names of its architectures, oldest first; Blackwell is one architecture with two compute capabilities,
10.x in data centers and 12.x elsewhere. :mod:`pytest_diffopt.forecasting.generations` has what differs between them."""

_KIB = 1024
_MIB = 1024**2
_GIB = 1024**3
_GB = 10**9

# More than a driver was seen to keep of a GeForce's memory: 584 MiB, of an RTX 4090 of 24 GiB that reports 23.43.
_KEPT_BYTES = 600 * _MIB

USABLE_NOTE = (
    "Of it, a process that uses CUDA takes about 0.25 to 0.65 GiB for its context and libraries before the first tensor, "
    "and a desktop up to 1 GiB. On Windows the driver reports nearly the whole card, and pages to the host's memory when it "
    "is full."
)
"""What holds for every card: its ``total_bytes`` are not all a pipeline's."""


@dataclass(frozen=True)
class Hardware:
    """What a card is made of.

    Args:
        capability: its compute capability, ``(8, 9)``; :attr:`Card.limits` has what follows from it.
        multiprocessors: that are switched on, ``multi_processor_count``.
        l2_bytes: its L2 cache, as ``L2_cache_size`` has it.
        clock_mhz: of its multiprocessors at the most that its maker states, the "boost clock".
        memory_clock_mhz: as CUDA reports it; the memory transfers twice a cycle of it.
        bus_bits: the width of the memory's bus.
        bytes_per_second: of its memory, as its maker states.
        source: where the figures are from.
        pcie: generation and lanes of its connector, ``(4, 16)``; None where no source was found.
    """

    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    clock_mhz: int
    memory_clock_mhz: int
    bus_bits: int
    bytes_per_second: int
    source: str
    pcie: tuple[int, int] | None = None


@dataclass(frozen=True)
class Card:
    """A card: its names, its memory and what it is made of.

    Args:
        name: what people type, ``"rtx-4090"``; with the memory where a model is sold with several: ``"a100-80gb"``.
        title: the maker's name.
        generation: of its GPU, ``"ada"``; NVIDIA's own names of its architectures.
        nominal_bytes: as it is sold; a card's GB are GiB.
        total_bytes: the least that ``torch.cuda.get_device_properties(0).total_memory`` or an out-of-memory error was seen
            to report on Linux; to 0.01 GiB, as printed, where no exact number was seen.
        source: where it was seen, ``"owner/repository#issue"`` or ``"owner/repository: file"``.
        cuda_name: what ``torch.cuda.get_device_name()`` says; cards that are sold with two sizes of memory may share it.
        aliases: what else it is called, written as its name is.
        note: what to know of the memory; empty for nothing.
        measured: False if no report was found, and ``total_bytes`` is ``nominal_bytes``, or what nvidia-smi has, less what
            drivers were seen to keep, or that of a card with the same chip and memory.
    """

    name: str
    title: str
    generation: GenerationName
    nominal_bytes: int
    total_bytes: int
    source: str
    cuda_name: str
    hardware: Hardware
    aliases: tuple[str, ...] = ()
    note: str = ""
    measured: bool = True

    @property
    def limits(self) -> ComputeCapability:
        """Threads, registers and shared memory, which its compute capability settles."""
        return compute_capability(*self.hardware.capability)


def _gib(number: float) -> int:
    return int(number * _GIB)


def _unseen(whole_bytes: int) -> int:
    return whole_bytes - _KEPT_BYTES


_UNSEEN_NOTE = (
    "No report of CUDA's total was found: what is known of the card, less 600 MiB, more than drivers were seen to keep."
)
_ECC = "Error correction, which is on by default, takes a part of the memory."

_TECHPOWERUP = "TechPowerUp's GPU database"
_QUERIED = "what deviceQuery printed of it, in thamada/nvidia-smi; TechPowerUp's GPU database"
_DATA_SHEET = "NVIDIA's data sheet of it; TechPowerUp's GPU database"
_WHITE_PAPER = "NVIDIA's white paper of its architecture; TechPowerUp's GPU database"
_TOPCPU = "https://www.topcpu.net/en/gpu-c/a40-pcie-vs-l20"
_FLOOD = "inclusionAI/flood: flood/ops/seg_la.py; TechPowerUp's GPU database"
_PRINTED = "pytorch/ao#4002; its bandwidth is of its clock and bus, NVIDIA's data sheet has up to 8 TB/s"
_SAME_CHIP = "of the card for other markets, which has the same chip and memory and faster links between GPUs"

_V100 = Hardware((7, 0), 80, 6 * _MIB, 1530, 877, 4096, 900 * _GB, _WHITE_PAPER, (3, 16))
_A100_80GB = Hardware((8, 0), 108, 40 * _MIB, 1410, 1593, 5120, 2039 * _GB, _QUERIED, (4, 16))
_H100_80GB = Hardware((9, 0), 132, 50 * _MIB, 1980, 2619, 5120, 3350 * _GB, _QUERIED, (5, 16))

_CARDS = (
    Card(
        "gtx-1070",
        "NVIDIA GeForce GTX 1070",
        "pascal",
        8 * _GIB,
        _gib(7.92),
        "stanford-futuredata/noscope#17",
        "NVIDIA GeForce GTX 1070",
        Hardware((6, 1), 15, 2 * _MIB, 1683, 4004, 256, 256 * _GB, _TECHPOWERUP, (3, 16)),
        aliases=("gtx-1070-8gb",),
    ),
    Card(
        "rtx-3060-12gb",
        "NVIDIA GeForce RTX 3060 12GB",
        "ampere",
        12 * _GIB,
        _gib(11.75),
        "smy20011/dreambooth-gui#78",
        "NVIDIA GeForce RTX 3060",
        Hardware((8, 6), 28, 2304 * _KIB, 1777, 7501, 192, 360 * _GB, _TECHPOWERUP, (4, 16)),
    ),
    Card(
        "rtx-3070",
        "NVIDIA GeForce RTX 3070",
        "ampere",
        8 * _GIB,
        _gib(7.63),
        "sshan-zhao/GASDA#19, 7.76 GiB",
        "NVIDIA GeForce RTX 3070",
        Hardware((8, 6), 46, 4 * _MIB, 1725, 7001, 256, 448 * _GB, _TECHPOWERUP, (4, 16)),
        aliases=("rtx-3070-8gb",),
        note="7.63 was printed with a newer driver.",
    ),
    Card(
        "rtx-3080-10gb",
        "NVIDIA GeForce RTX 3080 10GB",
        "ampere",
        10 * _GIB,
        _gib(9.75),
        "zai-org/CogVideo#34, 9.78 GiB",
        "NVIDIA GeForce RTX 3080",
        Hardware((8, 6), 68, 5 * _MIB, 1710, 9501, 320, 760 * _GB, _TECHPOWERUP, (4, 16)),
        aliases=("rtx-3080",),
        note="9.75 was printed with another driver. There are some with 12 GB, which CUDA calls the same.",
    ),
    Card(
        "rtx-3090",
        "NVIDIA GeForce RTX 3090",
        "ampere",
        24 * _GIB,
        _gib(23.59),
        "Stable-X/StableNormal#33",
        "NVIDIA GeForce RTX 3090",
        Hardware((8, 6), 82, 6 * _MIB, 1695, 9751, 384, 936 * _GB, _QUERIED, (4, 16)),
        note="23.70 with other drivers.",
    ),
    Card(
        "rtx-4060",
        "NVIDIA GeForce RTX 4060",
        "ada",
        8 * _GIB,
        _gib(7.75),
        "ESRSchao/EdgeRegNet#2",
        "NVIDIA GeForce RTX 4060",
        Hardware((8, 9), 24, 24 * _MIB, 2460, 8501, 128, 272 * _GB, _TECHPOWERUP, (4, 8)),
    ),
    Card(
        "rtx-4060-ti-16gb",
        "NVIDIA GeForce RTX 4060 Ti 16GB",
        "ada",
        16 * _GIB,
        _unseen(16 * _GIB),
        "huggingface/huggingface.js#712, its 16 GB",
        "NVIDIA GeForce RTX 4060 Ti",
        Hardware((8, 9), 34, 32 * _MIB, 2535, 9001, 128, 288 * _GB, _QUERIED, (4, 8)),
        note=_UNSEEN_NOTE,
        measured=False,
    ),
    Card(
        "rtx-4070",
        "NVIDIA GeForce RTX 4070",
        "ada",
        12 * _GIB,
        _unseen(12282 * _MIB),
        "meta-llama/llama#466, 12282 MiB by nvidia-smi",
        "NVIDIA GeForce RTX 4070",
        Hardware((8, 9), 46, 36 * _MIB, 2475, 10501, 192, 504 * _GB, _TECHPOWERUP, (4, 16)),
        note=_UNSEEN_NOTE,
        measured=False,
    ),
    Card(
        "rtx-4070-ti",
        "NVIDIA GeForce RTX 4070 Ti",
        "ada",
        12 * _GIB,
        _gib(11.73),
        "OpenLMLab/LOMO#17",
        "NVIDIA GeForce RTX 4070 Ti",
        Hardware((8, 9), 60, 48 * _MIB, 2610, 10501, 192, 504 * _GB, _TECHPOWERUP, (4, 16)),
    ),
    Card(
        "rtx-4080",
        "NVIDIA GeForce RTX 4080",
        "ada",
        16 * _GIB,
        _unseen(16 * _GIB),
        "aigc-apps/sd-webui-EasyPhoto#281, 15.99 GiB on Windows",
        "NVIDIA GeForce RTX 4080",
        Hardware((8, 9), 76, 64 * _MIB, 2505, 11201, 256, 717 * _GB, _TECHPOWERUP, (4, 16)),
        note=_UNSEEN_NOTE,
        measured=False,
    ),
    Card(
        "rtx-4080-super",
        "NVIDIA GeForce RTX 4080 SUPER",
        "ada",
        16 * _GIB,
        _gib(15.60),
        "shanice-l/UNOPose#4",
        "NVIDIA GeForce RTX 4080 SUPER",
        Hardware((8, 9), 80, 64 * _MIB, 2550, 11501, 256, 736 * _GB, _TECHPOWERUP, (4, 16)),
    ),
    Card(
        "rtx-4090",
        "NVIDIA GeForce RTX 4090",
        "ada",
        24 * _GIB,
        _gib(23.43),
        "siliconflow/onediff: onediff_comfy_nodes/benchmarks/results/exp5/system_info.md",
        "NVIDIA GeForce RTX 4090",
        Hardware((8, 9), 128, 72 * _MIB, 2520, 10501, 384, 1008 * _GB, _QUERIED, (4, 16)),
        note="23.52 to 23.68 with other drivers.",
    ),
    Card(
        "rtx-5070",
        "NVIDIA GeForce RTX 5070",
        "blackwell",
        12 * _GIB,
        _gib(11.49),
        "bsrikumar855-dot/GradeMIND-Reloded: docs/OCR_SPIKE.md",
        "NVIDIA GeForce RTX 5070",
        Hardware((12, 0), 48, 48 * _MIB, 2512, 14001, 192, 672 * _GB, _TECHPOWERUP, (5, 16)),
    ),
    Card(
        "rtx-5080",
        "NVIDIA GeForce RTX 5080",
        "blackwell",
        16 * _GIB,
        _unseen(16 * _GIB),
        "vllm-project/vllm#19906, its 16 GB",
        "NVIDIA GeForce RTX 5080",
        Hardware((12, 0), 84, 64 * _MIB, 2617, 15001, 256, 960 * _GB, _TECHPOWERUP, (5, 16)),
        note=_UNSEEN_NOTE,
        measured=False,
    ),
    Card(
        "rtx-5090",
        "NVIDIA GeForce RTX 5090",
        "blackwell",
        32 * _GIB,
        _gib(31.37),
        "Wan-Video/Wan2.1#465",
        "NVIDIA GeForce RTX 5090",
        Hardware((12, 0), 170, 96 * _MIB, 2407, 14001, 512, 1792 * _GB, _TECHPOWERUP, (5, 16)),
    ),
    Card(
        "rtx-a4000",
        "NVIDIA RTX A4000",
        "ampere",
        16 * _GIB,
        _gib(15.61),
        "DengKaiCQ/VGGT-Long#6",
        "NVIDIA RTX A4000",
        Hardware((8, 6), 48, 4 * _MIB, 1560, 7001, 256, 448 * _GB, _TECHPOWERUP, (4, 16)),
    ),
    Card(
        "rtx-a6000",
        "NVIDIA RTX A6000",
        "ampere",
        48 * _GIB,
        _gib(47.53),
        "black-forest-labs/flux2#23",
        "NVIDIA RTX A6000",
        Hardware((8, 6), 84, 6 * _MIB, 1800, 8001, 384, 768 * _GB, _TECHPOWERUP, (4, 16)),
    ),
    Card(
        "rtx-6000-ada",
        "NVIDIA RTX 6000 Ada Generation",
        "ada",
        48 * _GIB,
        _gib(44.43),
        "DINGYANB/MTVCrafter#21",
        "NVIDIA RTX 6000 Ada Generation",
        Hardware((8, 9), 142, 96 * _MIB, 2505, 10001, 384, 960 * _GB, _QUERIED, (4, 16)),
        aliases=("rtx-6000-ada-generation",),
        note=_ECC,
    ),
    Card(
        "rtx-pro-6000",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "blackwell",
        96 * _GIB,
        _gib(94.97),
        "antirez/ds4#431",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        Hardware((12, 0), 188, 128 * _MIB, 2617, 14001, 512, 1792 * _GB, _TECHPOWERUP, (5, 16)),
        aliases=("rtx-pro-6000-blackwell", "rtx-pro-6000-blackwell-workstation-edition"),
    ),
    Card(
        "p100-16gb",
        "NVIDIA P100 16GB",
        "pascal",
        16 * _GIB,
        16276 * _MIB,
        "NVIDIA/nvbench: examples/outputs/nvbench.example.exec_tag_sync.list.md, 16278 MiB of a Quadro GP100",
        "Tesla P100-PCIE-16GB",
        Hardware((6, 0), 56, 4 * _MIB, 1329, 715, 4096, 732 * _GB, _WHITE_PAPER, (3, 16)),
        aliases=("p100-pcie-16gb",),
        note="16276 to 16281 MiB were printed of the P100 itself, which has the chip of the Quadro GP100.",
    ),
    Card(
        "v100-16gb",
        "NVIDIA V100 16GB",
        "volta",
        16 * _GIB,
        16130 * _MIB,
        "ultralytics/yolov3: README.md",
        "Tesla V100-SXM2-16GB",
        _V100,
        aliases=("v100-sxm2-16gb",),
    ),
    Card(
        "v100-32gb",
        "NVIDIA V100 32GB",
        "volta",
        32 * _GIB,
        _gib(31.74),
        "liucongg/ChatGLM-Finetuning#73",
        "Tesla V100-SXM2-32GB",
        _V100,
        aliases=("v100-sxm2-32gb",),
    ),
    Card(
        "t4",
        "NVIDIA T4",
        "turing",
        16 * _GIB,
        15095 * _MIB,
        "sylvia-ymlin/cuda-kernels-from-scratch: README.md",
        "Tesla T4",
        Hardware((7, 5), 40, 4 * _MIB, 1590, 5001, 256, 320 * _GB, _DATA_SHEET, (3, 16)),
        note=_ECC,
    ),
    Card(
        "a10",
        "NVIDIA A10",
        "ampere",
        24 * _GIB,
        23_609_475_072,
        "aalanwyr/face2cuda: step2cuda/README.md",
        "NVIDIA A10",
        Hardware((8, 6), 72, 6 * _MIB, 1695, 6251, 384, 600 * _GB, "aalanwyr/face2cuda: step2cuda/README.md", (4, 16)),
        note=_ECC,
    ),
    Card(
        "l4",
        "NVIDIA L4",
        "ada",
        24 * _GIB,
        _unseen(23034 * _MIB),
        "NVIDIA/TensorRT-LLM#2398, 23034 MiB by nvidia-smi",
        "NVIDIA L4",
        Hardware((8, 9), 58, 48 * _MIB, 2040, 6251, 192, 300 * _GB, _QUERIED, (4, 16)),
        note=_UNSEEN_NOTE,
        measured=False,
    ),
    Card(
        "a30",
        "NVIDIA A30",
        "ampere",
        24 * _GIB,
        _gib(23.53),
        "google/RB-Modulation#5",
        "NVIDIA A30",
        Hardware((8, 0), 56, 24 * _MIB, 1440, 1215, 3072, 933 * _GB, _DATA_SHEET, (4, 16)),
    ),
    Card(
        "l20",
        "NVIDIA L20",
        "ada",
        48 * _GIB,
        _gib(44.53),
        "Tencent-Hunyuan/HunyuanCustom#36",
        "NVIDIA L20",
        Hardware((8, 9), 92, 96 * _MIB, 2520, 9001, 384, 864 * _GB, _TOPCPU, (4, 16)),
        note=_ECC,
    ),
    Card(
        "l40",
        "NVIDIA L40",
        "ada",
        48 * _GIB,
        _gib(44.40),
        "QwenLM/Qwen3-VL#2097",
        "NVIDIA L40",
        Hardware((8, 9), 142, 96 * _MIB, 2490, 9001, 384, 864 * _GB, _TECHPOWERUP, (4, 16)),
        note=_ECC,
    ),
    Card(
        "l40s",
        "NVIDIA L40S",
        "ada",
        48 * _GIB,
        _gib(44.42),
        "stepfun-ai/Step-Video-T2V#8",
        "NVIDIA L40S",
        Hardware((8, 9), 142, 96 * _MIB, 2520, 9001, 384, 864 * _GB, _QUERIED, (4, 16)),
        note=_ECC,
    ),
    Card(
        "a100-40gb",
        "NVIDIA A100 40GB",
        "ampere",
        40 * _GIB,
        42_298_834_944,
        "bottlerocket-os/bottlerocket#3873",
        "NVIDIA A100-SXM4-40GB",
        Hardware((8, 0), 108, 40 * _MIB, 1410, 1215, 5120, 1555 * _GB, _WHITE_PAPER, (4, 16)),
        aliases=("a100-sxm4-40gb", "a100-pcie-40gb"),
    ),
    Card(
        "a100-80gb",
        "NVIDIA A100 80GB",
        "ampere",
        80 * _GIB,
        _gib(79.25),
        "levihsu/OOTDiffusion#235",
        "NVIDIA A100-SXM4-80GB",
        _A100_80GB,
        aliases=("a100-sxm4-80gb",),
    ),
    Card(
        "a800-80gb",
        "NVIDIA A800 80GB",
        "ampere",
        80 * _GIB,
        _gib(79.33),
        "hahnyuan/PB-LLM#3",
        "NVIDIA A800-SXM4-80GB",
        replace(_A100_80GB, source=_SAME_CHIP),
        aliases=("a800", "a800-sxm4-80gb"),
    ),
    Card(
        "h100-80gb",
        "NVIDIA H100 80GB",
        "hopper",
        80 * _GIB,
        _gib(79.11),
        "vllm-project/vllm#27508",
        "NVIDIA H100 80GB HBM3",
        _H100_80GB,
        aliases=("h100-80gb-hbm3",),
    ),
    Card(
        "h800-80gb",
        "NVIDIA H800 80GB",
        "hopper",
        80 * _GIB,
        _gib(79.11),
        "vllm-project/vllm#27508, an H100",
        "NVIDIA H800",
        replace(_H100_80GB, source=_SAME_CHIP),
        aliases=("h800",),
        note="No report of CUDA's total was found: it is the H100's, which has the same chip and memory.",
        measured=False,
    ),
    Card(
        "h20",
        "NVIDIA H20",
        "hopper",
        96 * _GIB,
        97285 * _MIB,
        "alipay/PainlessInferenceAcceleration: flood/flood/ops/seg_la.py",
        "NVIDIA H20",
        Hardware((9, 0), 78, 60 * _MIB, 1980, 2619, 6144, 4000 * _GB, _FLOOD, (5, 16)),
        aliases=("h20-96gb",),
    ),
    Card(
        "h200",
        "NVIDIA H200",
        "hopper",
        141 * _GIB,
        _gib(139.72),
        "sgl-project/sglang#2895",
        "NVIDIA H200",
        Hardware((9, 0), 132, 60 * _MIB, 1980, 3201, 6144, 4800 * _GB, _DATA_SHEET, (5, 16)),
        aliases=("h200-141gb",),
    ),
    Card(
        "b200",
        "NVIDIA B200",
        "blackwell-datacenter",
        180 * _GIB,
        _gib(178.35),
        "pytorch/ao#4002",
        "NVIDIA B200",
        Hardware((10, 0), 148, 129_536 * _KIB, 1965, 3996, 7680, 7672 * _GB, _PRINTED, (5, 16)),
        aliases=("b200-180gb",),
    ),
)

CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card in _CARDS})
"""The cards by name, smaller families first; cannot be written to."""

_BY_SPELLING: Mapping[str, Card] = {spelling: card for card in _CARDS for spelling in (card.name, *card.aliases)}


def card(name: str) -> Card:
    """The card of that name or alias, in any case; spaces and underscores count as hyphens, the maker's brands as nothing.

    So what CUDA calls a card is found as well, ``"NVIDIA A100-SXM4-80GB"``, but for names that cards with different
    memory share.

    Raises:
        DiffoptError: there is none; the sentence has the nearest name, and all.
    """
    words = str(name).casefold().replace("_", " ").replace("-", " ").split()
    wanted = "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))
    if wanted in _BY_SPELLING:
        return _BY_SPELLING[wanted]
    spelled = [known for known in _BY_SPELLING if wanted and known.startswith(f"{wanted}-")]
    spelled = spelled or difflib.get_close_matches(wanted, _BY_SPELLING, n=1)
    near = dict.fromkeys(repr(_BY_SPELLING[known].name) for known in spelled)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise DiffoptError(f"No card is called {name!r}.{hint} There are {', '.join(CARDS)}.")
