"""Targets and ranks on the structure of the model: a box per block, a cell per target.

The structure is that of the keys: `layers.0.attn.q_proj.weight` is the cell `q` of the block
`layers.0`. Boxes flow like words, so a page of any width holds them. The colour of a cell is its
rank; where all ranks are equal, its share of the adapter's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
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


_CHARACTER = 8.6
"""Width of a character of a cell's label at 14 pixels, at most."""


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
    if not any(r.rank or r.parameters for r in rows):
        return None
    shade, legend, low, top = _scale(rows)
    total = sum(r.parameters or 0 for r in rows)
    boxes = [_box(name, held, total, shade) for name, held in grouped(rows)]
    return {"legend": legend, "low": low, "top": top, "shades": SHADES, "boxes": boxes}


def grouped(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """(block, its rows), in the order of the rows.

    >>> [n for n, _ in grouped([Row("h.0.fc.weight"), Row("h.1.fc.weight"), Row("head.weight")])]
    ['h.0', 'h.1', '']
    """
    return _split([(r, _parts(r.key)) for r in rows], 0)


def _split(rows: list[tuple[Row, list[str]]], start: int) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[tuple[Row, list[str]]]] = {}
    ends: dict[str, int] = {}
    for row, parts in rows:
        inner = (i for i, p in enumerate(parts[:-1]) if i >= start and p.isdigit())
        at = next(inner, -1) + 1 or (len(parts) - 1 if start == 0 else start)
        name = ".".join(parts[:at])
        groups.setdefault(name, []).append((row, parts))
        ends[name] = at
    result = []
    for name, held in groups.items():
        labels = {_label(row, name) for row, _ in held}
        more = any(p.isdigit() for _, parts in held for p in parts[ends[name] : -1])
        deeper = more and (len(held) > MOST or len(labels) < len(held))
        result += _split(held, ends[name]) if deeper else [(name, [r for r, _ in held])]
    return result


def _parts(key: str) -> list[str]:
    """The dotted path of a key without `.weight`; a region stays with its last word."""
    name, bracket, region = key.partition("[")
    name, at, use = name.partition("@")
    parts = name.removesuffix(".weight").split(".")
    return [*parts[:-1], parts[-1] + at + use + bracket + region]


def _label(row: Row, block: str) -> str:
    """What is written in a cell: the role, or the path within the block."""
    if row.role and len(row.role) <= 6:
        return row.role
    last = ".".join(_parts(row.key))[len(block) :].lstrip(".").rpartition(".")[2]
    last = visible(last.removesuffix("_proj").removesuffix("_lin"))
    return last if len(last) <= 12 else last[:11] + "…"


def _scale(rows: list[Row]) -> tuple[Callable[[Row], int], str, str, str]:
    """The shade of a cell, the legend's sentence, its low end and its high end."""
    ranks = {sum(r.rank) for r in rows if r.rank}
    by_rank = len(ranks) > 1

    def value(row: Row) -> int:
        return sum(row.rank) if by_rank else row.parameters or 0

    low, top = min(ranks) if by_rank else 0, max(map(value, rows), default=0)

    def shade(row: Row) -> int:
        return max(0, round((SHADES - 1) * (value(row) - low) / max(1, top - low)))

    if by_rank:
        return shade, "Number and colour: the rank.", str(low), str(top)
    total = sum(r.parameters or 0 for r in rows)
    number_is = "Number: the rank. " if ranks else ""
    legend = f"{number_is}Colour: the share of the adapter's parameters."
    return shade, legend, "0", percent(top / max(1, total))


def _box(name: str, rows: list[Row], total: int, shade: Callable[[Row], int]) -> JsonView:
    """One block as a figure; its label says every cell in words."""
    x = y = widest = 0
    cells = []
    for row in rows:
        label, value = _label(row, name), "+".join(map(str, row.rank)) or "·"
        wide = round(max(30, _CHARACTER * max(len(label), len(value)) + 8))
        if x and x + wide > WIDTH:
            x, y = 0, y + HEIGHT + 2
        cells.append(Cell(label, value, shade(row), x, y, wide))
        x += wide + 2
        widest = max(widest, x)
    part = percent(sum(r.parameters or 0 for r in rows) / total) if total else ""
    title = name or "model"
    words = "; ".join(f"{c.label} rank {c.value}" for c in cells)
    return {
        "title": title,
        "part": part,
        "label": f"{title}, {part}: {words}" if part else f"{title}: {words}",
        "wide": widest - 2,
        "high": y + HEIGHT,
        "cells": cells,
    }
