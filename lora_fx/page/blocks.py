"""Targets and ranks on the structure of the model: a box per block, a cell per target.

The structure is that of the keys: `layers.0.attn.q_proj.weight` is the cell `q` of the block
`layers.0`. Boxes flow like words, so a page of any width holds them. The colour of a cell is its
rank; where all ranks are equal, its share of the adapter's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lora_fx.page.rows import Row
from lora_fx.page.text import esc, percent, visible

SHADES = 5
MOST = 16
"""Cells of a block. Above, or with two cells of one name, it is split at the next index."""
WIDTH = 264
"""Of the cells of one block, in pixels: a box fits a narrow screen."""
HEIGHT = 34
_CHARACTER = 6.1
"""Width of a character of a cell's label at 10 pixels, at most."""


class Cell(NamedTuple):
    """A target in its block: what is written in it, and its shade, 0 to SHADES − 1."""

    label: str
    value: str
    shade: int


def blocks(rows: list[Row]) -> str:
    """The figure as HTML; empty where no rank and no size is known, as of a comparison."""
    if not any(r.rank or r.parameters for r in rows):
        return ""
    value, shade, legend = _scale(rows)
    total = sum(r.parameters or 0 for r in rows)
    boxes = []
    for name, held in grouped(rows):
        cells = [Cell(_label(r, name), value(r), shade(r)) for r in held]
        boxes.append(_box(name, _part(held, total), cells))
    swatches = "".join(f"<i class=s{i}></i>" for i in range(SHADES))
    return (
        "<figure class=structure aria-labelledby=structure-is><figcaption id=structure-is>"
        f"A box per block, with its share of the parameters; a cell per target. {esc(legend[0])} "
        f"<span class=legend>{esc(legend[1])} {swatches} {esc(legend[2])}</span></figcaption>"
        f"<div class=boxes>{''.join(boxes)}</div></figure>"
    )


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


def _scale(
    rows: list[Row],
) -> tuple[Callable[[Row], str], Callable[[Row], int], tuple[str, str, str]]:
    """What a cell says, its shade, and (the legend's sentence, its low end, its high end)."""
    ranks = {sum(r.rank) for r in rows if r.rank}
    total = sum(r.parameters or 0 for r in rows)
    if len(ranks) > 1:
        low, high = min(ranks), max(ranks)

        def by_rank(row: Row) -> int:
            return round((SHADES - 1) * (sum(row.rank) - low) / (high - low)) if row.rank else 0

        return _rank, by_rank, ("Number and colour: the rank.", str(low), str(high))
    top = max((r.parameters or 0 for r in rows), default=0)

    def by_share(row: Row) -> int:
        return round((SHADES - 1) * (row.parameters or 0) / top) if top else 0

    number_is = "Number: the rank. " if ranks else ""
    most = percent(top / max(1, total))
    text = f"{number_is}Colour: the share of the adapter's parameters."
    return _rank, by_share, (text, "0", most)


def _rank(row: Row) -> str:
    return "+".join(map(str, row.rank)) or "·"


def _part(rows: list[Row], total: int) -> str:
    """Which share of the adapter's parameters a block holds."""
    return percent(sum(r.parameters or 0 for r in rows) / total) if total else ""


def _box(name: str, part: str, cells: list[Cell]) -> str:
    """One block as a figure; its label says every cell in words."""
    x = y = widest = 0
    drawn = []
    for cell in cells:
        wide = round(max(24, _CHARACTER * max(len(cell.label), len(cell.value)) + 8))
        if x and x + wide > WIDTH:
            x, y = 0, y + HEIGHT + 2
        middle = x + wide / 2
        drawn.append(
            f'<g class=s{cell.shade}><path d="M{x} {y}h{wide}v{HEIGHT}h-{wide}"/>'
            f"<text x={middle:g} y={y + 13}>{esc(cell.label)}</text>"
            f"<text x={middle:g} y={y + 27}>{esc(cell.value)}</text></g>"
        )
        x += wide + 2
        widest = max(widest, x)
    words = "; ".join(f"{c.label} rank {c.value}" for c in cells)
    title = name or "model"
    label = esc(f"{title}, {part}: {words}" if part else f"{title}: {words}")
    high = y + HEIGHT
    return (
        f"<div class=box><p><b>{esc(title)}</b> <span>{part}</span></p>"
        f'<svg role=img aria-label="{label}" width={widest - 2} height={high} '
        f'viewBox="0 0 {widest - 2} {high}">{"".join(drawn)}</svg></div>'
    )
