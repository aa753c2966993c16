"""The table of targets: one row each, without columns that are empty in every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from markupsafe import Markup

from lora_fx.report import charts
from lora_fx.report.html_text import number, percent, shape
from lora_fx.report.rows import Row
from lora_fx.text import JsonView


class Column(NamedTuple):
    """A column: heading, its meaning, a function for the cell (empty: unknown), whether numeric."""

    head: str
    title: str
    cell: Callable[[Row], str]
    numeric: bool = True


def _columns(command: str) -> list[Column]:
    error = "difference" if command == "verify" else "error"
    return [
        Column("op", "", lambda row: row.op, False),
        Column("role", "", lambda row: row.role, False),
        Column("shape", "", _shape),
        Column("rank", "", lambda row: _sum(map(str, row.rank))),
        Column("α", "", lambda row: _sum(f"{alpha:g}" for alpha in row.alpha)),
        Column("params", "elements of A and B", lambda row: _known(row.parameters, number)),
        Column("FLOPs", "share of the weight FLOPs", lambda row: _known(row.share)),
        Column("effect", "‖Δ‖/‖W‖", lambda row: _known(row.effect)),
        Column(
            "rounding",
            "share of the update lost; below zero where rounding added to it",
            lambda row: _known(row.rounding),
        ),
        Column(
            "unmoved", "share of the elements that did not change", lambda row: _known(row.unmoved)
        ),
        Column(error, "relative", lambda row: _known(row.error, number)),
        Column("‖ΔW‖", "of s·BA", lambda row: _sum(map(_norm, row.spectra))),
        Column("stable rank", "‖ΔW‖²/σ₁²", lambda row: _sum(map(_stable_rank, row.spectra))),
        Column("spectrum", "singular values of s·BA", _sparks, False),
        Column("", "", _remarks, False),
    ]


class TargetTable(NamedTuple):
    """The columns in use (`left`: the numbers of text columns), and (key, cells) for each row.

    `widest` is the number of characters of the longest key.
    """

    columns: list[Column]
    rows: list[tuple[str, list[str]]]
    left: list[int]
    means: str
    widest: int


def table(result: JsonView, rows: list[Row]) -> TargetTable | None:
    """Return the table of the targets; None without rows."""
    if not rows:
        return None
    norms = [spectrum["norm"] for spectrum in _spectra(rows)]
    if not any(norms):  # nothing is trained yet
        rows = [replace(row, spectra=[]) for row in rows]
    columns = []
    cells_by_column = []
    for column in _columns(str(result.get("command", ""))):
        cells = [column.cell(row) for row in rows]
        if any(cells):
            columns.append(column)
            cells_by_column.append(cells)
    table_rows = []
    for position, row in enumerate(rows):
        table_rows.append((row.key, [cells[position] for cells in cells_by_column]))
    return TargetTable(
        columns,
        table_rows,
        left=[position for position, column in enumerate(columns, 2) if not column.numeric],
        means=" · ".join(f"{column.head}: {column.title}" for column in columns if column.title),
        widest=max(len(row.key) for row in rows),
    )


def _spectra(rows: list[Row]) -> Iterator[JsonView]:
    for row in rows:
        yield from row.spectra


def _sum(texts: Iterable[str]) -> str:
    return " + ".join(texts)


def _known(value: float | None, show: Callable[[object], str] = percent) -> str:
    """Return a number formatted by `show`; empty for None."""
    if value is None:
        return ""
    return show(value)


def _shape(row: Row) -> str:
    if not row.shape:
        return ""
    return shape(row.shape)


def _sparks(row: Row) -> Markup:
    return Markup("").join(map(charts.spark, row.spectra))


def _remarks(row: Row) -> str:
    """Return other remarks on a row, each once; its updates if no adapter has ranks."""
    texts = list(row.remarks)
    if not row.rank:
        texts.append(row.updates)
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _norm(spectrum: JsonView) -> str:
    return number(float(spectrum["norm"]))


def _stable_rank(spectrum: JsonView) -> str:
    """Return ‖ΔW‖²/σ₁²; a dash if ΔW is zero."""
    largest = spectrum["sigma"][0] if spectrum["sigma"] else 0
    if not largest:
        return "–"
    return number((spectrum["norm"] / largest) ** 2)
