"""The picture of residency: read back as XML, its geometry compared with the figures it was drawn from."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from pytest_diffopt.byte_sizes import unit_of
from pytest_diffopt.observation.observation import Owner, PhaseResidency, Residency
from pytest_diffopt.report.pictures import HEIGHT, WIDTH, described, residency_pictures, residency_svg, ticks

MIB = 1 << 20
OWNERS = (
    Owner("text_encoder", "weights"),
    Owner("transformer", "weights"),
    Owner("transformer", "working"),
    Owner("", "other"),
    Owner("", "before"),
)
RESIDENCY = Residency(
    owners=OWNERS,
    phases=(
        PhaseResidency("loading", 0, 10, 10, 60 * MIB, "", "aten::copy_"),
        PhaseResidency("call 0", 10, 60, 40, 95 * MIB, "transformer", "aten::addmm"),
        PhaseResidency("call 1", 61, 99, 61, 61 * MIB),
    ),
    positions=(0, 10, 40, 60, 61, 99),
    bytes=tuple(
        tuple(count * MIB for count in row)
        for row in (
            (0, 0, 0, 0, 5),
            (20, 35, 0, 0, 5),
            (20, 40, 30, 0, 5),
            (20, 35, 1, 0, 5),
            (20, 35, 0, 1, 5),
            (0,) * 5,
        )
    ),
)


class Drawn:
    """A picture, read back."""

    def __init__(self, svg: str) -> None:
        self.root = ElementTree.fromstring(svg)
        self.texts = {"".join(one.itertext()): one for one in self.every("text")}
        self.areas = [self.corners(str(one.get("d"))) for one in self.every("path")]

    def every(self, tag: str) -> list[ElementTree.Element]:
        return list(self.root.iter(f"{{http://www.w3.org/2000/svg}}{tag}"))

    @staticmethod
    def corners(path: str) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path)]

    def y_of(self, label: str) -> float:
        """Where the axis has that label."""
        return float(self.texts[label].get("y", "nan")) - 4


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn(residency_svg(RESIDENCY, "flux & <friends>"))


def test_it_stands_alone_and_says_what_it_shows(drawn: Drawn) -> None:
    svg = residency_svg(RESIDENCY, "flux & <friends>")
    assert not re.search(r"<script|<image|<foreignObject|href|url\(|@import| on\w+=", svg)
    assert svg.count("http") == 1  # the name of SVG itself
    assert drawn.root.get("role") == "img"
    assert drawn.every("title")[0].text == "flux & <friends>"
    assert drawn.every("desc")[0].text == described(RESIDENCY)
    style = str(drawn.every("style")[0].text)
    assert "prefers-color-scheme: dark" in style
    selectors = re.findall(r"^([^@}\n]+) \{", style, flags=re.MULTILINE)
    assert selectors
    assert all(one.startswith(".residency ") for one in selectors)  # a page that holds it keeps its own look


def test_its_words_name_each_phases_peak_and_what_ran() -> None:
    assert described(RESIDENCY) == (
        "Memory on the accelerator over time, by owner: loading peaks at 60.00 MiB, while the pipeline ran aten::copy_; "
        "call 0 peaks at 95.00 MiB, while transformer ran aten::addmm; call 1 peaks at 61.00 MiB."
    )


def test_the_areas_are_stacked_to_scale(drawn: Drawn) -> None:
    zero, hundred = drawn.y_of("0"), drawn.y_of("100 MiB")

    def height(mib: float) -> float:
        return zero + (hundred - zero) * mib / 100

    tops = [min(y for _, y in area) for area in drawn.areas]
    assert tops == pytest.approx([height(20), height(60), height(90), height(90), height(95)], abs=0.2)
    for below, above in zip(drawn.areas, drawn.areas[1:], strict=False):
        assert set(above) & set(below)  # each begins where the one under it ends
    assert {y for x, y in drawn.areas[-1] if x == max(x for x, _ in drawn.areas[-1])} >= {round(zero, 1)}


def test_the_peak_is_marked_where_it_is(drawn: Drawn) -> None:
    (mark,) = drawn.every("circle")
    label = drawn.texts["95.00 MiB aten::addmm"]
    assert float(mark.get("cy", "nan")) == pytest.approx(min(y for _, y in drawn.areas[-1]), abs=0.2)
    assert float(label.get("y", "nan")) < float(mark.get("cy", "nan"))
    left, right = (min(x for x, _ in drawn.areas[0]), max(x for x, _ in drawn.areas[0]))
    assert float(mark.get("cx", "nan")) == pytest.approx(left + (right - left) * 40 / 99, abs=0.2)
    assert "peak 95.00 MiB in call 0, while transformer ran aten::addmm" in drawn.texts


def test_each_phase_has_its_boundaries_and_its_name(drawn: Drawn) -> None:
    assert {"loading", "call 0", "call 1"} <= set(drawn.texts)
    edges = [line for line in drawn.every("line") if line.get("class") == "phase"]
    assert len(edges) == len({0, 10, 60, 61, 99})


def test_the_legend_has_what_each_held_at_the_peak_from_the_top_of_the_stack(drawn: Drawn) -> None:
    names = [text for text in drawn.texts if text in {str(owner) for owner in OWNERS}]
    assert names == [str(owner) for owner in reversed(OWNERS)]
    row = {text for text, one in drawn.texts.items() if one.get("y") == drawn.texts["transformer working"].get("y")}
    assert row == {"transformer working", "30.00 MiB"}


def test_a_component_keeps_its_colour_and_different_ones_differ(drawn: Drawn) -> None:
    fills = [(one.get("fill"), one.get("fill-opacity")) for one in drawn.every("path")]
    assert len(set(fills)) == len(OWNERS)
    assert fills[1][0] == fills[2][0] != fills[0][0]


def test_everything_lies_inside_whatever_the_names_and_however_many() -> None:
    owners = tuple(Owner(f"a_component_with_quite_a_long_name_{at}", "weights") for at in range(40))
    phases = tuple(PhaseResidency(f"call {at}", at, at + 1, at + 1, 40 + at) for at in range(60))
    crowded = Residency(owners, phases, tuple(range(61)), tuple((1 + at,) + (1,) * 39 for at in range(61)))
    drawn = Drawn(residency_svg(crowded, "a title that is longer than any picture could be wide, " * 3))
    for one in (*drawn.every("text"), *drawn.every("rect"), *drawn.every("circle")):
        for name, end in (("x", WIDTH), ("cx", WIDTH), ("y", HEIGHT), ("cy", HEIGHT)):
            assert 0 <= float(one.get(name, 0)) <= end
    for text, one in drawn.texts.items():
        if one.get("class") != "title":
            assert len(text) * 8 < WIDTH
    assert [text for text in drawn.texts if text.startswith("call")] == ["call 0"]  # it alone has room, on its left


def pair(residency: Residency, title: str) -> tuple[Drawn, Drawn]:
    wide, mark, narrow = residency_pictures(residency, title).partition(
        '<svg xmlns="http://www.w3.org/2000/svg" class="residency narrow'
    )
    return Drawn(wide), Drawn(mark + narrow)


def test_a_page_has_the_picture_for_a_phone_too_with_the_same_areas_and_all_that_it_says() -> None:
    wide, narrow = pair(RESIDENCY, "flux & <friends>")
    assert (wide.root.get("class"), narrow.root.get("class")) == ("residency wide", "residency narrow")
    assert len(wide.areas) == len(OWNERS)
    assert narrow.areas == []  # they are most of a page's bytes, and so there once
    (use,) = narrow.every("use")
    (held,) = wide.every("g")
    assert use.get("href") == f"#{held.get('id')}"
    x, y, across, down = map(float, re.findall(r"[-\d.]+", str(use.get("transform"))))
    corners = [(across * at + x, down * below + y) for area in wide.areas for at, below in area]
    peak = narrow.every("circle")[0]
    assert min(below for _, below in corners) == pytest.approx(float(peak.get("cy", 0)), abs=0.2)
    ends = [float(one.get("x1", 0)) for one in narrow.every("line") if one.get("class") == "phase"]
    assert (min(at for at, _ in corners), max(at for at, _ in corners)) == pytest.approx(
        (min(ends), max(ends)), abs=0.2
    )
    assert {"30.00 MiB", "transformer working", "peak 95.00 MiB in call 0"} <= narrow.texts.keys()
    style = str(wide.every("style")[0].text)
    assert "@media (max-width: 640px) {\n.residency.wide { display: none; }" in style


def test_of_a_picture_for_a_phone_everything_lies_inside_and_no_text_is_longer_than_it_is_wide() -> None:
    owners = tuple(Owner(f"a_component_with_quite_a_long_name_{at}", "weights") for at in range(40))
    phases = tuple(
        PhaseResidency(f"call {at}", at, at + 1, at + 1, 40 + at, "unet", "aten::" + "x" * 60) for at in range(60)
    )
    crowded = Residency(owners, phases, tuple(range(61)), tuple((1 + at,) + (1,) * 39 for at in range(61)))
    _, drawn = pair(crowded, "a title that is longer than any picture could be wide, " * 3)
    width, height = map(float, str(drawn.root.get("viewBox")).split()[2:])
    for one in (*drawn.every("text"), *drawn.every("rect"), *drawn.every("circle")):
        for name, end in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(one.get(name, 0)) <= end
    for text, one in drawn.texts.items():
        assert len(text) * (8.5 if one.get("class") == "title" else 6) < width, text


@pytest.mark.parametrize("empty", [Residency(), Residency((), (PhaseResidency("loading", 0, 0, 0, 0),), (0,), ((),))])
def test_a_run_that_took_no_memory_has_a_picture_too(empty: Residency) -> None:
    assert Drawn(residency_svg(empty, "nothing\x00")).areas == []


@pytest.mark.parametrize("highest", [0.3, 1, 7, 9.99, 14.4, 39.9, 512, 1023])
def test_an_axis_has_a_few_round_numbers(highest: float) -> None:
    found = ticks(highest)
    assert 4 <= len(found) <= 9
    assert found[0] == 0
    assert highest - found[1] < found[-1] <= highest + 1e-9


def test_the_axis_is_in_gib_from_one_on() -> None:
    assert unit_of(1 << 30) == (1 << 30, "GiB")
    assert unit_of((1 << 30) - 1) == (MIB, "MiB")
