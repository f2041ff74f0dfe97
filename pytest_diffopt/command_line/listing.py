"""``models`` and ``cards``: what a forecast knows by name, and where each number is from."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_diffopt.accelerators.gpus import CARDS as KNOWN_CARDS
from pytest_diffopt.accelerators.gpus import USABLE_NOTE, Card
from pytest_diffopt.command_line.command import HELD, Command
from pytest_diffopt.command_line.terminals import has_color, width_of
from pytest_diffopt.report.tables import lines_of, new_table

if TYPE_CHECKING:
    from pytest_diffopt.replicas.description import Description


_FIGURES_NOTE = (
    "arch: its compute capability, 8.9 is sm_89. SMs: its multiprocessors. GB/s: what its memory transfers at the most."
)
_FIGURES = ("SMs", "GB/s", "sold as (GB)", "CUDA reports (GiB)")
_WHOLE = ("card", "arch")  # what is typed elsewhere is not broken


def model_lines(models: Sequence[Description], *, width: int, color: bool = False) -> list[str]:
    """A line a full size: its names, pipeline and default size, and the repositories in which its configs were read."""
    cells = []
    for model in models:
        size = "×".join(map(str, model.default_size or ()))
        sources = dict.fromkeys(part.source.split(":")[0] for part in model.components.values() if part.source)
        cells.append([model.name, model.hub_id or "", model.pipeline_class, size, "\n".join(sources)])
    return _lines(("model", "hub id", "pipeline", "size", "its configs were read in"), cells, width, color)


def card_lines(cards: Sequence[Card], *, width: int, color: bool = False) -> list[str]:
    """A line a card: its memory as sold and as CUDA reports it, where that was seen, its figures, and what holds for all."""
    titles = ("card", "title", "arch", "SMs", "GB/s", "sold as (GB)", "CUDA reports (GiB)", "seen in")
    cells = [
        [
            one.name,
            one.title,
            "sm_{}{}".format(*one.hardware.capability),
            f"{one.hardware.multiprocessors}",
            f"{one.hardware.bytes_per_second / 10**9:.0f}",
            f"{one.nominal_bytes // 2**30}",
            f"{one.total_bytes / 2**30:.2f}",
            f"{one.source}\n{one.note}".strip(),
        ]
        for one in cards
    ]
    lines = _lines(titles, cells, width, color)
    return [*lines, "", *textwrap.wrap(USABLE_NOTE, width), "", *textwrap.wrap(_FIGURES_NOTE, width)]


def _lines(titles: Sequence[str], cells: Sequence[Sequence[str]], width: int, color: bool) -> list[str]:
    from rich.text import Text

    table = new_table()
    for title in titles:
        figures, whole = title in _FIGURES, title in _WHOLE
        table.add_column(title, justify="right" if figures else "left", overflow="fold", no_wrap=whole)
    for row in cells:
        table.add_row(*map(Text, row))
    return lines_of(table, width=width, color=color)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _list_models(given: argparse.Namespace) -> int:
    from pytest_diffopt.replicas.catalogue import registry

    models = list(registry.full_sizes.values())
    print(*model_lines(models, width=width_of(sys.stdout), color=has_color(sys.stdout)), sep="\n")
    return HELD


def _list_cards(given: argparse.Namespace) -> int:
    cards = list(KNOWN_CARDS.values())
    print(*card_lines(cards, width=width_of(sys.stdout), color=has_color(sys.stdout)), sep="\n")
    return HELD


MODELS = Command("models", "List the full-size models that are known by name", _no_arguments, _list_models)
CARDS = Command("cards", "List the cards that are known by name, and what they have", _no_arguments, _list_cards)
