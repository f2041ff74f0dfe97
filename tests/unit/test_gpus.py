"""The table of cards: no more memory than was seen, and where; figures that agree; names found as people write them."""

from __future__ import annotations

import re

import pytest

from pytest_diffopt.accelerators.compute_capabilities import COMPUTE_CAPABILITIES
from pytest_diffopt.accelerators.gpus import CARDS, Card, card
from pytest_diffopt.errors import DiffoptError

MIB = 1024**2
GIB = 1024**3

# As programs printed it: the least that was seen of each, in GiB and to as many decimals.
SEEN = {
    "gtx-1070": 7.92,
    "rtx-3060-12gb": 11.75,
    "rtx-3070": 7.63,
    "rtx-3080-10gb": 9.75,
    "rtx-3090": 23.59,
    "rtx-4060": 7.75,
    "rtx-4070-ti": 11.73,
    "rtx-4080-super": 15.60,
    "rtx-4090": 23.43,
    "rtx-5070": 11.49,
    "rtx-5090": 31.37,
    "rtx-a4000": 15.61,
    "rtx-a6000": 47.53,
    "rtx-6000-ada": 44.43,
    "rtx-pro-6000": 94.97,
    "p100-16gb": 15.89,
    "v100-16gb": 15.75,
    "v100-32gb": 31.74,
    "t4": 14.74,
    "a10": 21.99,
    "a30": 23.53,
    "l20": 44.53,
    "l40": 44.40,
    "l40s": 44.42,
    "a100-40gb": 39.39,
    "a100-80gb": 79.25,
    "a800-80gb": 79.33,
    "h100-80gb": 79.11,
    "h20": 95.00,
    "h200": 139.72,
    "b200": 178.35,
}

# There are others with less memory, which CUDA calls the same.
SHARE_THEIR_NAME = ("rtx-3060-12gb", "rtx-4060-ti-16gb")


@pytest.mark.parametrize("name", SEEN)
def test_a_card_has_what_was_seen_of_it(name: str) -> None:
    assert CARDS[name].measured
    assert round(CARDS[name].total_bytes / GIB, 2) == SEEN[name]


def test_a_card_of_which_nothing_was_seen_has_less_than_its_like_and_says_so() -> None:
    unseen = {name: known for name, known in CARDS.items() if not known.measured}
    assert unseen.keys() == CARDS.keys() - SEEN.keys()
    assert all("No report of CUDA's total was found" in known.note for known in unseen.values())
    assert CARDS["rtx-4060-ti-16gb"].total_bytes < CARDS["rtx-a4000"].total_bytes
    assert CARDS["rtx-4070"].total_bytes < CARDS["rtx-3060-12gb"].total_bytes
    assert CARDS["l4"].total_bytes < CARDS["a10"].total_bytes
    assert CARDS["rtx-5080"].total_bytes < CARDS["rtx-4080-super"].total_bytes
    assert CARDS["h800-80gb"].total_bytes <= CARDS["h100-80gb"].total_bytes


@pytest.mark.parametrize("known", CARDS.values(), ids=lambda known: known.name)
def test_no_card_has_more_than_is_sold_nor_loses_more_than_error_correction_takes(known: Card) -> None:
    assert 0.9 * known.nominal_bytes < known.total_bytes < known.nominal_bytes
    assert re.match(r"[\w.-]+/[\w.-]+(#\d+|: \S)", known.source)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("rtx_4060_ti_16gb", "rtx-4060-ti-16gb"),
        ("NVIDIA A100 80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 3080", "rtx-3080-10gb"),
        ("NVIDIA H800", "h800-80gb"),
        ("rtx_pro_6000_blackwell", "rtx-pro-6000"),
    ],
)
def test_a_card_is_found_as_people_write_it(spelling: str, name: str) -> None:
    assert card(spelling) is CARDS[name]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("rtx-4091", " Did you mean 'rtx-4090'?"),
        ("a100", " Did you mean 'a100-40gb' or 'a100-80gb'?"),
        ("v100", " Did you mean 'v100-16gb' or 'v100-32gb'?"),
        ("h100", " Did you mean 'h100-80gb'?"),
        ("a100-sxm4", " Did you mean 'a100-40gb' or 'a100-80gb'?"),
        ("NVIDIA GeForce RTX 3060", " Did you mean 'rtx-3060-12gb'?"),
        ("voodoo", ""),
        ("", ""),
    ],
)
def test_an_unknown_card_is_refused_with_the_nearest_and_all_names(wrong: str, hint: str) -> None:
    with pytest.raises(DiffoptError) as raised:
        card(wrong)
    assert str(raised.value) == f"No card is called {wrong!r}.{hint} There are {', '.join(CARDS)}."


def test_the_table_of_cards_cannot_be_written_to() -> None:
    with pytest.raises(TypeError):
        CARDS["rtx-4090"] = CARDS["t4"]  # type: ignore[index]


@pytest.mark.parametrize("known", CARDS.values(), ids=lambda known: known.name)
def test_a_card_has_all_that_cuda_tells_of_it(known: Card) -> None:
    has = known.hardware
    assert known.limits is COMPUTE_CAPABILITIES[has.capability]
    assert known.cuda_name.startswith(("NVIDIA ", "Tesla "))
    assert has.source
    assert 10 <= has.multiprocessors <= 200
    assert 2 * MIB <= has.l2_bytes <= 128 * MIB
    assert 1000 <= has.clock_mhz <= 3000
    assert has.bus_bits % 64 == 0
    assert has.pcie is None or (has.pcie[0] in (3, 4, 5) and has.pcie[1] in (8, 16))


@pytest.mark.parametrize("known", CARDS.values(), ids=lambda known: known.name)
def test_its_memory_is_as_fast_as_its_clock_and_the_width_of_its_bus_make_it(known: Card) -> None:
    has = known.hardware
    made = 2 * has.memory_clock_mhz * 10**6 * has.bus_bits // 8
    assert made == pytest.approx(has.bytes_per_second, rel=0.03)


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("rtx-4090", ((8, 9), 128, 72 * MIB, 384, 1008 * 10**9)),
        ("a100-80gb", ((8, 0), 108, 40 * MIB, 5120, 2039 * 10**9)),
        ("h100-80gb", ((9, 0), 132, 50 * MIB, 5120, 3350 * 10**9)),
        ("rtx-5090", ((12, 0), 170, 96 * MIB, 512, 1792 * 10**9)),
        ("b200", ((10, 0), 148, 129_536 * 1024, 7680, 7672 * 10**9)),
        ("v100-32gb", ((7, 0), 80, 6 * MIB, 4096, 900 * 10**9)),
        ("gtx-1070", ((6, 1), 15, 2 * MIB, 256, 256 * 10**9)),
        ("t4", ((7, 5), 40, 4 * MIB, 256, 320 * 10**9)),
    ],
)
def test_a_card_has_its_makers_figures(name: str, figures: tuple[object, ...]) -> None:
    has = card(name).hardware
    assert (has.capability, has.multiprocessors, has.l2_bytes, has.bus_bits, has.bytes_per_second) == figures


def test_no_two_cards_are_called_the_same() -> None:
    spellings = [spelling for known in CARDS.values() for spelling in (known.name, *known.aliases)]
    assert len(set(spellings)) == len(spellings)
    assert all(card(spelling) is known for known in CARDS.values() for spelling in (known.name, *known.aliases))
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", spelling) for spelling in spellings)


def test_what_cuda_calls_a_card_is_that_card() -> None:
    assert all(card(known.cuda_name) is known for known in CARDS.values() if known.name not in SHARE_THEIR_NAME)


@pytest.mark.parametrize("name", SHARE_THEIR_NAME)
def test_what_cuda_calls_cards_with_different_memory_alike_is_no_card(name: str) -> None:
    with pytest.raises(DiffoptError, match=f"Did you mean '{name}'"):
        card(CARDS[name].cuda_name)
