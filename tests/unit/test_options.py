"""The table of options, and what becomes of them."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_diffopt.accelerators import KINDS
from pytest_diffopt.options import OPTIONS, Settings


def test_every_option_is_a_field_of_the_settings_with_the_same_default() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert {option.name: option.default or fields[option.name] for option in OPTIONS} == fields


def test_every_option_has_an_ini_option_of_the_same_name_with_underscores() -> None:
    for option in OPTIONS:
        assert option.flag.removeprefix("--").replace("-", "_") == option.ini


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.parse], ids=lambda option: option.name)
def test_the_default_of_an_option_is_a_value_that_it_takes(option) -> None:  # type: ignore[no-untyped-def]
    assert option.parse(option.default) == getattr(Settings(), option.name)


def test_the_header_says_what_is_set() -> None:
    assert Settings().header == "diffopt: device auto, compile backend as the recipe says"
    chosen = Settings(device="cpu", compile_backend="eager", hub=True, strict=True)
    assert chosen.header == "diffopt: device cpu, compile backend eager, hub allowed, strict"


def test_the_device_is_auto_or_a_kind_of_accelerator() -> None:
    (device,) = (option for option in OPTIONS if option.name == "device")
    assert device.takes == f"one of: auto, {', '.join(KINDS)}"
