"""Targets and ranks in the structure of the model: a box for each block, a cell for each target.

The structure is that of the keys: `layers.0.attn.q_proj.weight` is the cell `q` of the block
`layers.0`. Boxes flow like words, so a page of any width holds them. The colour of a cell is its
rank; where all ranks are equal, its share of the adapter's parameters.
"""

from __future__ import annotations

from typing import NamedTuple

from lora_fx.errors import visible
from lora_fx.report.html_text import percent
from lora_fx.report.rows import Row
from lora_fx.text import JsonView

SHADES = 5
MOST = 16
"""The most cells of a block. A larger one, or one with equal names, is split at the next index."""
WIDTH = 340
"""The width of a block's cells in pixels; a box fits a narrow screen."""
HEIGHT = 42
_CHARACTER = 8.6
"""The largest width of a character in a cell's label at 14 pixels."""


class Cell(NamedTuple):
    """A target in its block: its text, its shade (0 to SHADES − 1), and its position."""

    label: str
    value: str
    shade: int
    x: int
    y: int
    wide: int
    high: int = HEIGHT


def blocks(rows: list[Row]) -> JsonView | None:
    """Return the boxes of the model; None if no rank and no size is known, as for a comparison."""
    if not any(row.rank or row.parameters for row in rows):
        return None
    scale = _scale_of(rows)
    total = sum(row.parameters or 0 for row in rows)
    if scale.by_rank:
        legend = "Number and colour: the rank."
        low = str(scale.low)
        top = str(scale.top)
    else:
        legend = "Colour: the share of the adapter's parameters."
        if any(row.rank for row in rows):
            legend = f"Number: the rank. {legend}"
        low = "0"
        top = percent(scale.top / max(1, total))
    boxes = [_box(name, block_rows, total, scale) for name, block_rows in grouped(rows)]
    return {"legend": legend, "low": low, "top": top, "shades": SHADES, "boxes": boxes}


def grouped(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Return (block, its rows), in the order of the rows.

    >>> rows = [Row("h.0.fc.weight"), Row("h.1.fc.weight"), Row("head.weight")]
    >>> [block for block, _ in grouped(rows)]
    ['h.0', 'h.1', '']
    """
    return _split([(row, _path(row.key)) for row in rows], 0)


def _split(rows: list[tuple[Row, list[str]]], start: int) -> list[tuple[str, list[Row]]]:
    """Return (block, its rows), for rows with their paths.

    A block ends at the first number of a path from word `start` on. One of too many cells, or
    with two of one name, is split again at the next number.
    """
    blocks: dict[str, list[tuple[Row, list[str]]]] = {}
    ends: dict[str, int] = {}
    for row, path in rows:
        end = _end_of_block(path, start)
        name = ".".join(path[:end])
        blocks.setdefault(name, []).append((row, path))
        ends[name] = end

    result = []
    for name, block in blocks.items():
        labels = {_label(row, name) for row, _ in block}
        is_crowded = len(block) > MOST or len(labels) < len(block)
        if is_crowded and any(_has_number(path[ends[name] : -1]) for _, path in block):
            result += _split(block, ends[name])
        else:
            result.append((name, [row for row, _ in block]))
    return result


def _end_of_block(path: list[str], start: int) -> int:
    """Return the number of words of a path that name its block."""
    for position, word in enumerate(path[:-1]):
        if position >= start and word.isdigit():
            return position + 1
    if start == 0:
        return len(path) - 1
    return start


def _has_number(words: list[str]) -> bool:
    return any(word.isdigit() for word in words)


def _path(key: str) -> list[str]:
    """Return the dotted path of a key without `.weight`; a region stays with its last word."""
    name, bracket, region = key.partition("[")
    name, at, use = name.partition("@")
    words = name.removesuffix(".weight").split(".")
    return [*words[:-1], words[-1] + at + use + bracket + region]


def _label(row: Row, block: str) -> str:
    """Return the text of a cell: the role, or the path within the block."""
    if row.role and len(row.role) <= 6:
        return row.role
    path_in_block = ".".join(_path(row.key))[len(block) :].lstrip(".")
    last_word = path_in_block.rpartition(".")[2]
    label = visible(last_word.removesuffix("_proj").removesuffix("_lin"))
    if len(label) > 12:
        return label[:11] + "…"
    return label


class _Scale(NamedTuple):
    """The colour scale of cells: by rank, from `low` to `top`, or by number of parameters."""

    by_rank: bool
    low: int
    top: int

    def value(self, row: Row) -> int:
        """Return the number that a cell's colour shows."""
        if self.by_rank:
            return sum(row.rank)
        return row.parameters or 0

    def shade(self, row: Row) -> int:
        """Return the colour of a cell."""
        above = self.value(row) - self.low
        return max(0, round((SHADES - 1) * above / max(1, self.top - self.low)))


def _scale_of(rows: list[Row]) -> _Scale:
    """Return the scale: ranks, or numbers of parameters if all ranks are equal."""
    ranks = {sum(row.rank) for row in rows if row.rank}
    if len(ranks) > 1:
        return _Scale(by_rank=True, low=min(ranks), top=max(sum(row.rank) for row in rows))
    return _Scale(by_rank=False, low=0, top=max(row.parameters or 0 for row in rows))


def _box(name: str, rows: list[Row], total: int, scale: _Scale) -> JsonView:
    """Return one block as a figure; its label lists every cell as text."""
    x = 0
    y = 0
    widest = 0
    cells = []
    for row in rows:
        label = _label(row, name)
        value = "+".join(map(str, row.rank)) or "·"
        longest = max(len(label), len(value))
        wide = round(max(30, _CHARACTER * longest + 14))
        if x and x + wide > WIDTH:
            x = 0
            y += HEIGHT + 2
        cells.append(Cell(label, value, scale.shade(row), x, y, wide))
        x += wide + 2
        widest = max(widest, x)

    title = name or "model"
    share = ""
    label = title
    if total:
        share = percent(sum(row.parameters or 0 for row in rows) / total)
        label = f"{title}, {share}"
    words = "; ".join(f"{cell.label} rank {cell.value}" for cell in cells)
    return {
        "title": title,
        "part": share,
        "label": f"{label}: {words}",
        "wide": widest - 2,
        "high": y + HEIGHT,
        "cells": cells,
    }
