"""The table of options, and what becomes of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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
    if option.repeatable:
        assert option.default == getattr(Settings(), option.name) == ()
    else:
        assert option.parse(option.default) == getattr(Settings(), option.name)


def test_the_header_says_what_is_set() -> None:
    assert Settings().header == "diffopt: device auto, compile backend as the recipe says"
    chosen = Settings(device="cpu", compile_backend="eager", hub=True, strict=True)
    assert chosen.header == "diffopt: device cpu, compile backend eager, hub allowed, strict"


def test_the_device_is_auto_or_a_kind_of_accelerator() -> None:
    (device,) = (option for option in OPTIONS if option.name == "device")
    assert device.takes == f"one of: auto, {', '.join(KINDS)}"


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [("docs_timeout", "12.5", 12.5), ("docs_extract", "", None), ("docs_report", "", None)],
)
def test_options_of_pages_are_parsed(name: str, given: str, value: object) -> None:
    (option,) = (option for option in OPTIONS if option.name == name)
    assert option.parse is not None
    assert option.parse(given) == value


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("gpu", "NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("gpu", " ", None),
        ("gpu_devices", "16", 16),
        ("gpu_memory", "12GiB", 12 * 2**30),
        ("gpu_memory", "1024", 1024),
    ],
)
def test_options_of_the_gpu_are_parsed(name: str, given: str, value: object) -> None:
    (option,) = (option for option in OPTIONS if option.name == name)
    assert option.parse is not None
    assert option.parse(given) == value


@pytest.mark.parametrize("given", ["0", "-1", "inf", "nan", "soon"])
def test_a_timeout_is_a_time(given: str) -> None:
    (option,) = (option for option in OPTIONS if option.name == "docs_timeout")
    assert option.parse is not None
    with pytest.raises(ValueError):
        option.parse(given)


@pytest.mark.parametrize("name", ["docs_extract", "docs_report"])
def test_a_file_that_cannot_be_written_is_refused_and_none_is_made(name: str, tmp_path: Path) -> None:
    (option,) = (option for option in OPTIONS if option.name == name)
    assert option.parse is not None
    assert option.parse(str(tmp_path / "new.md")) == str(tmp_path / "new.md")
    for wrong in (tmp_path, tmp_path / "gone" / "x.md"):
        with pytest.raises(ValueError):
            option.parse(str(wrong))
    assert list(tmp_path.iterdir()) == []
