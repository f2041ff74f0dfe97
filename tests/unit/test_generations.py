"""Generations of GPUs: every card has one, and the constants are those of torch's source."""

from __future__ import annotations

import pytest

from pytest_diffopt.accelerators.gpus import CARDS, Card
from pytest_diffopt.errors import DiffoptError
from pytest_diffopt.forecasting.generations import GENERATIONS, generation
from pytest_diffopt.forecasting.record import CONTEXT_BYTES

MIB = 1024**2


@pytest.mark.parametrize("known", CARDS.values(), ids=lambda known: known.name)
def test_every_card_has_a_generation_that_is_known(known: Card) -> None:
    assert generation(known.generation).name == known.generation


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("t4", "turing"),
        ("rtx-3090", "ampere"),
        ("rtx-a6000", "ampere"),
        ("a100-80gb", "ampere"),
        ("rtx-4090", "ada"),
        ("rtx-6000-ada", "ada"),
        ("l4", "ada"),
        ("h100-80gb", "hopper"),
        ("rtx-5090", "blackwell"),
    ],
)
def test_a_card_is_of_its_makers_generation(name: str, of: str) -> None:
    assert CARDS[name].generation == of


def test_cublas_holds_eight_mebibytes_and_a_bit_and_thirty_two_from_hopper_on() -> None:
    held = {name: one.cublas_workspace_bytes for name, one in GENERATIONS.items()}
    small = 8 * MIB + 128 * 1024
    assert held == {"turing": small, "ampere": small, "ada": small, "hopper": 32 * MIB, "blackwell": 32 * MIB}


def test_flash_attention_begins_with_ampere_and_cudnn_comes_first_on_hopper_alone() -> None:
    assert [name for name, one in GENERATIONS.items() if not one.has_flash_attention] == ["turing"]
    assert [name for name, one in GENERATIONS.items() if one.prefers_cudnn_attention] == ["hopper"]


def test_what_cuda_takes_for_itself_covers_the_public_reports() -> None:
    least, most = CONTEXT_BYTES
    assert all(least <= report * MIB <= most for report in (256, 300, 400, 426, 616))


def test_an_unknown_generation_is_refused_with_all_names() -> None:
    with pytest.raises(DiffoptError) as raised:
        generation("volta")
    assert str(raised.value) == "No GPU generation is called 'volta'. There are turing, ampere, ada, hopper, blackwell."
