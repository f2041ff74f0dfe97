"""What forecasts say: the table in several widths, what is not sure to fit, the details, JSON and pictures."""

from __future__ import annotations

import dataclasses
import json
import re
from xml.etree import ElementTree

import pytest

from pytest_diffopt.accelerators.gpus import CARDS, Card
from pytest_diffopt.forecasting.record import Fit, Forecast, LiveTensors
from pytest_diffopt.report.forecasts import (
    ANY_CARD,
    Row,
    Target,
    detail_lines,
    document,
    missed,
    picture,
    table_lines,
)
from pytest_diffopt.report.pictures import residency_svg
from tests.made_forecasts import GIB, RESIDENCY
from tests.made_forecasts import of_the_guide as made


def row(recipe: str = "nf4", model: str = "flux.1-dev", **fields: object) -> Row:
    return Row(recipe, model, {ANY_CARD: made(recipe, **fields)})  # type: ignore[arg-type]


def a_card(name: str, gib: float) -> Card:
    return dataclasses.replace(CARDS["rtx-4090"], name=name, title=name, total_bytes=int(gib * GIB))


SIZES = [Target("12 GB", (a_card("a", 11.75),)), Target("24 GB", (a_card("b", 23.4),))]
RTX_4090 = Target("rtx-4090", (CARDS["rtx-4090"],), required=True)
BESIDE = "reserved, and CUDA's own beside; the card reports"
BUDGET = Target("in 16 GiB", budget_bytes=16 * GIB, required=True)
ROWS = [
    row("nf4"),
    row("nf4-offload", load=12.1962, vae=(5.3, 6.24, 7.1)),
    row("bf16", load=31.42, vae=(33.1, 33.8, 35.2)),
    Row("broken", "flux.1-dev", failure="No component is called 'unet'."),
]


def shown(rows: list[Row], targets: list[Target], width: int, *, color: bool = False) -> list[str]:
    return table_lines(rows, targets, width=width, color=color)


def test_the_whole_table_has_room_in_160_columns() -> None:
    lines = shown(ROWS, SIZES, 160)
    expected = """\
Peak memory in GiB, forecast without a GPU · flux.1-dev · 1024×1024 · 2 steps

recipe        model        load peak   call peak   in          range      peak   reserved   host RAM   transfers in / out   12 GB          24 GB
───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
nf4           flux.1-dev       12.20       14.95   vae   13.90–16.10   14.9453      15.07       3.00          2.00 / 0.50   does not fit   fits
nf4-offload   flux.1-dev       12.20        6.24   vae     5.30–7.10   12.1962      12.32       3.00          2.00 / 0.50   does not fit   fits
bf16          flux.1-dev       31.42       33.80   vae   33.10–35.20   33.8000      33.92       3.00          2.00 / 0.50   does not fit   does not fit
broken        flux.1-dev                                                failed

broken · flux.1-dev could not be forecast: No component is called 'unet'."""  # noqa: E501
    assert lines == expected.splitlines()


def test_in_80_columns_the_least_telling_figures_and_long_words_have_given_way() -> None:
    lines = shown(ROWS, SIZES, 80)
    expected = """\
recipe        call peak   in          range      peak   reserved   12 GB   24 GB
────────────────────────────────────────────────────────────────────────────────
nf4               14.95   vae   13.90–16.10   14.9453      15.07   no      fits
nf4-offload        6.24   vae     5.30–7.10   12.1962      12.32   no      fits
bf16              33.80   vae   33.10–35.20   33.8000      33.92   no      no"""
    assert lines[2:7] == expected.splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 130, 160, 200])
def test_at_any_width_the_table_keeps_to_it_and_says_the_peak_and_what_it_fits(width: int) -> None:
    lines = shown(ROWS, SIZES, width)
    assert max(map(len, lines)) <= width
    (line,) = [line for line in lines if line.startswith("nf4 ")]
    assert "14.9453" in line
    assert line.split()[-2:] == (["fit", "fits"] if "does not" in line else ["no", "fits"])


def test_models_have_a_column_where_they_differ_however_narrow() -> None:
    assert "model" in shown([row(), row("wan", "wan2.1-t2v-1.3b")], SIZES, 80)[3]
    assert "model" not in shown(ROWS, SIZES, 80)[2]


def test_what_no_recipe_has_is_no_column() -> None:
    assert "range" in shown(ROWS, [], 200)[2]
    assert "range" not in shown([row(vae=(14.9, 14.95, 14.98))], [], 200)[2]  # no wider than 1%


def test_the_caption_has_what_all_rows_share() -> None:
    two_sizes = made("two", sizes=((512, 512), (1024, 1024)))
    rows = [row(), Row("two", "flux.1-schnell", {ANY_CARD: two_sizes})]
    assert shown(rows, [], 160)[0] == "Peak memory in GiB, forecast without a GPU · 2 steps"
    assert shown(rows[1:], [], 160)[0].endswith("GPU · flux.1-schnell · 512×512, 1024×1024 · 2 steps")


def test_fits_are_in_colour_where_asked() -> None:
    rows = [row(), row("wide", vae=(10, 14, 23))]
    text = "\n".join(shown(rows, SIZES, 160, color=True))
    assert re.search(r"\x1b\[31mdoes not fit", text)
    assert re.search(r"\x1b\[33mmay fit", text)
    assert re.search(r"\x1b\[32mfits", text)
    assert "\x1b" not in "\n".join(shown(rows, SIZES, 160))


@pytest.mark.parametrize(
    ("totals", "fit"),
    [
        ((24.0, 23.4), "fits"),
        ((24.0, 14.3), "may fit"),
        ((14.0, 23.4), "may fit"),
        ((14.0, 13.0), "does not fit"),
        ((16.0,), "may fit"),
    ],
)
def test_a_size_fits_where_every_card_of_it_does(totals: tuple[float, ...], fit: Fit) -> None:
    cards = tuple(a_card(f"card-{total}", total) for total in totals)
    assert Target("24 GB", cards).fit(row()) == fit


def test_each_card_is_judged_by_the_forecast_with_its_own_kernels() -> None:
    small, large = a_card("small", 20), a_card("large", 20)
    forecasts = {"small": made(vae=(14, 15, 16)), "large": made(vae=(21, 22, 23), generation="hopper")}
    both = Row("nf4", "flux.1-dev", forecasts)
    assert [Target(card.name, (card,)).fit(both) for card in (small, large)] == ["fits", "does not fit"]
    assert Target("within", budget_bytes=20 * GIB).fit(both) == "may fit"
    assert both.shown is forecasts["large"]
    assert both.distinct == list(forecasts.values())


def test_forecasts_with_the_kernels_of_one_generation_are_one() -> None:
    first, again = made(seconds=1.0), made(seconds=2.0)
    assert Row("nf4", "flux.1-dev", {"rtx-4090": first, "l40s": again}).distinct == [first]


def test_what_is_not_sure_to_fit_is_told_with_its_numbers() -> None:
    assert missed(ROWS, [*SIZES, RTX_4090, BUDGET]) == [
        "nf4 · flux.1-dev is not sure to fit in 16 GiB: its peak is 13.90 GiB to 16.10 GiB, 16.00 GiB allowed.",
        f"bf16 · flux.1-dev does not fit rtx-4090: its peak is 33.10 GiB to 35.20 GiB, up to 35.32 GiB {BESIDE} 23.43 GiB.",
        "bf16 · flux.1-dev does not fit in 16 GiB: its peak is 33.10 GiB to 35.20 GiB, 16.00 GiB allowed.",
    ]


@pytest.mark.parametrize(("limit", "held"), [(15 * GIB, True), (15 * GIB - 1, False)])
def test_a_budget_is_held_to_the_byte(limit: int, held: bool) -> None:
    rows = [row(vae=(15, 15, 15))]
    sentences = missed(rows, [Target("in 15 GiB", budget_bytes=limit, required=True)])
    assert bool(sentences) is not held
    if not held:
        assert sentences == [
            "nf4 · flux.1-dev does not fit in 15 GiB: its peak is 15.00 GiB (1 bytes more), 15.00 GiB allowed."
        ]


def test_what_is_unknown_is_never_sure_to_fit() -> None:
    rows = [Row("nf4", "flux.1-dev", {ANY_CARD: made(vae=(13, 14, 15), unknown=("a kernel", "another"))})]
    (sentence,) = missed(rows, [RTX_4090])
    assert sentence == (
        "nf4 · flux.1-dev is not sure to fit rtx-4090: its peak is 13.00 GiB to 15.00 GiB, "
        f"up to 15.12 GiB {BESIDE} 23.43 GiB, and 2 things that --details names could not be known."
    )


def test_the_details_have_all_that_is_known() -> None:
    forecast = made(
        wide=("cuDNN's workspace differs by GPU: 0.3 to 1.5 GiB.",),
        assumptions=("transformers 5.23 loads T5's wo in bfloat16.",),
        unknown=("what my_kernels::fused takes beside its result.",),
    )
    expected = """\
nf4 · flux.1-dev
  FluxPipeline, bfloat16, 1024×1024, 2 steps, kernels of ada
  peak 14.9453 GiB (13.90 to 16.10) in the call of vae, at aten::convolution
  reserved 15.07 GiB (13.90 to 16.22)
  host 3.00 GiB, of it pinned 1.00 GiB
  transfers of a call 2.00 GiB in, 0.50 GiB out

  peaks (GiB)   in                  peak         range   while
  ────────────────────────────────────────────────────────────────────────
  load          text_encoder_2    6.0981
  load          transformer      12.1962
  call          transformer       5.0000                 aten::addmm
  call          vae              14.9453   13.90–16.10   aten::convolution

  alive at the peak (GiB)   module                           what                              bytes   tensors
  ────────────────────────────────────────────────────────────────────────────────────────────────────────────
  transformer               transformer_blocks.*.attn.to_q   weights                          7.0000        19
  vae                       decoder.up_blocks.*.conv         workspace of aten::convolution   3.0000         1
  the pipeline                                               working of aten::randn           0.0010         1

  the range is wide because
    - cuDNN's workspace differs by GPU: 0.3 to 1.5 GiB.

  taken for granted
    - transformers 5.23 loads T5's wo in bfloat16.

  not known, so nothing is said to fit
    - what my_kernels::fused takes beside its result."""
    assert detail_lines(forecast, width=120) == expected.splitlines()


def test_the_details_show_the_largest_twelve_tensors_and_add_up_the_rest() -> None:
    live = tuple(LiveTensors("vae", f"module_{size}", "working", "", size * GIB, 2) for size in range(1, 16))
    lines = detail_lines(made(live_at_peak=live), width=120)
    tensors = [line.split() for line in lines if "module_" in line]
    assert [cells[1] for cells in tensors] == [f"module_{size}" for size in range(15, 3, -1)]
    (rest,) = [line.split() for line in lines if " more " in line]
    assert rest == ["3", "more", "6.0000", "6"]


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_details_keep_to_their_width(width: int) -> None:
    forecast = made(assumptions=("a sentence that goes on, " * 12,))
    assert all(len(line) <= width for line in detail_lines(forecast, width=width))


def test_several_calls_are_told_apart() -> None:
    phases = made().phases
    forecast = made(phases=(*phases, dataclasses.replace(phases[-1], call=1)))
    found = [line.split()[:2] for line in detail_lines(forecast, width=100) if line.startswith("  call")]
    assert found == [["call", "0"], ["call", "0"], ["call", "1"]]


def test_the_document_holds_forecasts_that_can_be_read_back() -> None:
    text = document(ROWS, [RTX_4090])
    whole = json.loads(text)
    assert whole["schema_version"] == 1
    assert [Forecast.from_json(json.dumps(one)) for one in whole["forecasts"]] == [one.shown for one in ROWS[:3]]
    assert whole["fits"][2] == {
        "recipe": "bf16",
        "model": "flux.1-dev",
        "target": "rtx-4090",
        "required": True,
        "fit": "does not fit",
    }
    assert whole["failures"] == [{"recipe": "broken", "model": "flux.1-dev", "why": "No component is called 'unet'."}]
    assert text.endswith("}\n")


def lines_across(svg: str) -> list[float]:
    root = ElementTree.fromstring(svg)
    return [
        float(str(one.get("y1")))
        for one in root.iter("{http://www.w3.org/2000/svg}line")
        if one.get("class") == "limit"
    ]


def test_the_picture_has_a_line_at_the_memory_of_what_was_named() -> None:
    svg = picture(row(), [*SIZES, RTX_4090, BUDGET])
    assert svg is not None
    assert "nf4 · flux.1-dev, forecast</title>" in svg
    assert len(lines_across(svg)) == 2
    assert ">rtx-4090, 23.43 GiB<" in svg
    assert ">the limit, 16.00 GiB<" in svg
    assert "; rtx-4090 has 23.43 GiB; the limit has 16.00 GiB." in svg


def test_lines_stand_at_their_height_and_their_names_do_not_cover_each_other() -> None:
    svg = residency_svg(RESIDENCY, "flux", {"a": 16 * GIB, "b": 16 * GIB + 1, "c": 24 * GIB})
    ys = lines_across(svg)
    assert ys[0] == pytest.approx(ys[1], abs=0.1)
    assert ys[2] < ys[0] - 50
    names = {name: float(y) for y, name in re.findall(r'y="([\d.]+)">([abc]), \d', svg)}
    assert names["a"] - names["b"] >= 14
    root = ElementTree.fromstring(svg)
    ticks = {
        "".join(one.itertext()): float(str(one.get("y"))) - 4 for one in root.iter() if one.get("class") == "quiet"
    }
    assert ys[2] == pytest.approx(ticks["0"] + (ticks["20 GiB"] - ticks["0"]) * 24 / 20, abs=0.5)


def test_a_line_far_above_everything_does_not_flatten_the_picture() -> None:
    svg = residency_svg(RESIDENCY, "flux", {"h100-80gb": 79 * GIB})
    assert lines_across(svg) == []
    assert "; h100-80gb has 79.00 GiB." in svg
    assert svg.replace("; h100-80gb has 79.00 GiB", "") == residency_svg(RESIDENCY, "flux")


def test_without_residency_there_is_no_picture() -> None:
    assert picture(ROWS[3]) is None
    assert picture(Row("nf4", "flux.1-dev", {ANY_CARD: made(residency=None)})) is None
