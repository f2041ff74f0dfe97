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
    small = 8 * MIB + 128 * 1024
    held = {name: one.cublas_workspace_bytes for name, one in GENERATIONS.items()}
    assert {name for name, size in held.items() if size == small} == {"pascal", "volta", "turing", "ampere", "ada"}
    assert {name for name, size in held.items() if size == 32 * MIB} == {"hopper", "blackwell-datacenter", "blackwell"}


def test_flash_attention_begins_with_ampere_and_cudnn_comes_first_on_hopper_and_blackwell_in_data_centers() -> None:
    assert [name for name, one in GENERATIONS.items() if not one.has_flash_attention] == ["pascal", "volta", "turing"]
    asked_first = [name for name, one in GENERATIONS.items() if one.prefers_cudnn_attention]
    assert asked_first == ["hopper", "blackwell-datacenter"]


@pytest.mark.parametrize("known", CARDS.values(), ids=lambda known: known.name)
def test_a_card_can_do_what_its_generation_can(known: Card) -> None:
    newest_first = sorted(GENERATIONS.values(), key=lambda one: one.capability, reverse=True)
    nearest = next(one for one in newest_first if one.capability <= known.hardware.capability)
    assert nearest.name == known.generation


def test_what_cuda_takes_for_itself_covers_the_public_reports() -> None:
    least, most = CONTEXT_BYTES
    assert all(least <= report * MIB <= most for report in (256, 300, 400, 426, 616))


def test_an_unknown_generation_is_refused_with_all_names() -> None:
    with pytest.raises(DiffoptError) as raised:
        generation("kepler")
    names = "pascal, volta, turing, ampere, ada, hopper, blackwell-datacenter, blackwell"
    assert str(raised.value) == f"No GPU generation is called 'kepler'. There are {names}."
