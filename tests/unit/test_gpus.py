"""The table of cards: it says no more memory than was seen, and where; names are found as people write them."""

from __future__ import annotations

import re

import pytest

from pytest_diffopt.accelerators.gpus import CARDS, Card, card
from pytest_diffopt.errors import DiffoptError

GIB = 1024**3

# As programs printed it: the least that was seen of each, in GiB and to as many decimals.
SEEN = {
    "rtx-3060-12gb": 11.75,
    "rtx-3090": 23.59,
    "rtx-4060": 7.75,
    "rtx-4090": 23.43,
    "rtx-5090": 31.37,
    "rtx-a4000": 15.61,
    "rtx-a6000": 47.53,
    "rtx-6000-ada": 44.43,
    "t4": 14.74,
    "a10": 21.99,
    "a30": 23.53,
    "l40": 44.40,
    "l40s": 44.42,
    "a100-40gb": 39.39,
    "a100-80gb": 79.25,
    "h100-80gb": 79.11,
}


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
    ],
)
def test_a_card_is_found_as_people_write_it(spelling: str, name: str) -> None:
    assert card(spelling) is CARDS[name]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("rtx-4091", " Did you mean 'rtx-4090'?"),
        ("a100", " Did you mean 'a100-40gb' or 'a100-80gb'?"),
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
