"""Targets and ranks on the structure of the model: a box per block, a cell per target.

The structure is that of the keys: `layers.0.attn.q_proj.weight` is the cell `q` of the block
`layers.0`. Boxes flow like words, so a page of any width holds them. The colour of a cell is its
rank; where all ranks are equal, its share of the adapter's parameters.
"""

from __future__ import annotations

from typing import NamedTuple

from lora_fx.errors import visible
from lora_fx.report.formatting import percent
from lora_fx.report.rows import Row
from lora_fx.text import JsonView

SHADES = 5
MOST = 16
"""Cells of a block. Above, or with two cells of one name, it is split at the next index."""
WIDTH = 340
"""The width of the cells of one block, in pixels: a box fits a narrow screen."""
HEIGHT = 42
_GAP = 2
_CHARACTER = 8.6
"""Width of a character of a cell's label at 14 pixels, at most."""

_RowAndWords = tuple[Row, list[str]]
"""A row, and the words of its key."""


class Cell(NamedTuple):
    """A target in its block: what is written in it, its shade (0 to SHADES − 1), and its place."""

    label: str
    value: str
    shade: int
    x: int
    y: int
    wide: int
    high: int = HEIGHT


def blocks(rows: list[Row]) -> JsonView | None:
    """The boxes of the model; None where no rank and no size is known, as of a comparison."""
    if not any(row.rank or row.parameters for row in rows):
        return None
    scale = _scale(rows)
    total = _parameters(rows)
    return {
        "legend": scale.legend,
        "low": scale.low_text,
        "top": scale.top_text,
        "shades": SHADES,
        "boxes": [_box(name, members, total, scale) for name, members in grouped(rows)],
    }


def grouped(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """(block, its rows), in the order of the rows.

    >>> [n for n, _ in grouped([Row("h.0.fc.weight"), Row("h.1.fc.weight"), Row("head.weight")])]
    ['h.0', 'h.1', '']
    """
    return _split([(row, _words(row.key)) for row in rows], 0)


def _split(rows: list[_RowAndWords], start: int) -> list[tuple[str, list[Row]]]:
    """(block, its rows) of rows whose keys have their first `start` words in common.

    1. Rows whose keys are equal up to the next index, and with it, are a block.
    2. A block that is too large, or has two cells of one label, is split at the next index.
    """
    members_of: dict[str, list[_RowAndWords]] = {}
    length_of: dict[str, int] = {}
    for row, words in rows:
        length = _length_of_block(words, start)
        name = ".".join(words[:length])
        members_of.setdefault(name, []).append((row, words))
        length_of[name] = length

    result: list[tuple[str, list[Row]]] = []
    for name, members in members_of.items():
        if _is_split(name, members, length_of[name]):
            result += _split(members, length_of[name])
        else:
            result.append((name, [row for row, _words_of_key in members]))
    return result


def _length_of_block(words: list[str], start: int) -> int:
    """How many words of a key name its block: those up to the first index from `start` on.

    Without an index these are all words but the last, or the first `start`, where that is not 0.
    """
    for i in range(start, len(words) - 1):
        if words[i].isdigit():
            return i + 1
    if start == 0:
        return len(words) - 1
    return start


def _is_split(name: str, members: list[_RowAndWords], length: int) -> bool:
    """True for a block that can be split at an index, and is too large or has equal labels.

    Args:
        name: The block.
        members: Its rows.
        length: How many words name the block.
    """
    labels = {_label(row, name) for row, _words_of_key in members}
    is_crowded = len(members) > MOST or len(labels) < len(members)
    return is_crowded and any(
        any(word.isdigit() for word in words[length:-1]) for _row, words in members
    )


def _words(key: str) -> list[str]:
    """The dotted path of a key without `.weight`; a region stays with its last word."""
    name, bracket, region = key.partition("[")
    name, at, use = name.partition("@")
    *first_words, last_word = name.removesuffix(".weight").split(".")
    return [*first_words, last_word + at + use + bracket + region]


def _label(row: Row, block: str) -> str:
    """The label of a cell: the role, or the last word of the path within the block."""
    if row.role and len(row.role) <= 6:
        return row.role
    path = ".".join(_words(row.key))[len(block) :].lstrip(".")
    word = path.rpartition(".")[2]
    label = visible(word.removesuffix("_proj").removesuffix("_lin"))
    return label if len(label) <= 12 else label[:11] + "…"


class _Scale(NamedTuple):
    """What the colour of a cell stands for.

    Attributes:
        by_rank: Whether for the rank, or for the number of parameters.
        low: The number of the first shade.
        top: The number of the last shade.
        legend: The sentence that says so.
        low_text: The first shade's number, for people.
        top_text: The last shade's number, for people.
    """

    by_rank: bool
    low: int
    top: int
    legend: str
    low_text: str
    top_text: str

    def shade(self, row: Row) -> int:
        """The shade of a row's cell."""
        share = (_value(row, self.by_rank) - self.low) / max(1, self.top - self.low)
        return max(0, round((SHADES - 1) * share))


def _scale(rows: list[Row]) -> _Scale:
    """The scale by rank; by parameters where all ranks are equal."""
    ranks = {sum(row.rank) for row in rows if row.rank}
    by_rank = len(ranks) > 1
    top = max((_value(row, by_rank) for row in rows), default=0)
    if by_rank:
        low = min(ranks)
        return _Scale(True, low, top, "Number and colour: the rank.", str(low), str(top))
    legend = "Colour: the share of the adapter's parameters."
    if ranks:
        legend = f"Number: the rank. {legend}"
    return _Scale(False, 0, top, legend, "0", percent(top / max(1, _parameters(rows))))


def _value(row: Row, by_rank: bool) -> int:
    """The number that a cell's colour stands for."""
    if by_rank:
        return sum(row.rank)
    return row.parameters or 0


def _parameters(rows: list[Row]) -> int:
    """The parameters of all rows."""
    return sum(row.parameters or 0 for row in rows)


def _box(name: str, rows: list[Row], total: int, scale: _Scale) -> JsonView:
    """One block as a figure; its label says every cell in words."""
    cells = _cells(name, rows, scale)
    title = name or "model"
    words = "; ".join(f"{cell.label} rank {cell.value}" for cell in cells)
    label = f"{title}: {words}"
    share = ""
    if total:
        share = percent(_parameters(rows) / total)
        label = f"{title}, {share}: {words}"
    return {
        "title": title,
        "part": share,
        "label": label,
        "wide": max(cell.x + cell.wide for cell in cells),
        "high": cells[-1].y + HEIGHT,
        "cells": cells,
    }


def _cells(name: str, rows: list[Row], scale: _Scale) -> list[Cell]:
    """The cells of a block, in lines of at most WIDTH pixels."""
    cells: list[Cell] = []
    x = 0
    y = 0
    for row in rows:
        label = _label(row, name)
        value = "+".join(map(str, row.rank)) or "·"
        characters = max(len(label), len(value))
        wide = round(max(30, _CHARACTER * characters + 8))
        if x and x + wide > WIDTH:
            x = 0
            y += HEIGHT + _GAP
        cells.append(Cell(label, value, scale.shade(row), x, y, wide))
        x += wide + _GAP
    return cells
