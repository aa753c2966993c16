"""The table of targets: one row for each, and only the columns in which some row has a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from markupsafe import Markup

from lora_fx.report import charts
from lora_fx.report.formatting import number, percent, shape
from lora_fx.report.rows import Row
from lora_fx.text import JsonView


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        head: Its heading.
        title: What the heading means.
        cell: Row → the text of its cell; empty where nothing is known.
        numeric: Whether its cells are numbers.
    """

    head: str
    title: str
    cell: Callable[[Row], str]
    numeric: bool = True


def _columns(command: str) -> list[Column]:
    """All columns that a table may have."""
    error = "difference" if command == "verify" else "error"
    return [
        Column("op", "", lambda row: row.op, False),
        Column("role", "", lambda row: row.role, False),
        Column("shape", "", lambda row: shape(row.shape) if row.shape else ""),
        Column("rank", "", lambda row: _sum(map(str, row.rank))),
        Column("α", "", lambda row: _sum(f"{alpha:g}" for alpha in row.alpha)),
        Column("params", "elements of A and B", lambda row: _number(row.parameters)),
        Column("FLOPs", "share of the weight FLOPs", lambda row: _percent(row.share)),
        Column("effect", "‖Δ‖/‖W‖", lambda row: _percent(row.effect)),
        Column("rounding", "share of the update lost", lambda row: _percent(row.rounding)),
        Column("unmoved", "share of the elements that stayed", lambda row: _percent(row.unmoved)),
        Column(error, "relative", lambda row: _number(row.error)),
        Column("‖ΔW‖", "of s·BA", lambda row: _sum(map(_norm, row.spectra))),
        Column("stable rank", "‖ΔW‖²/σ₁²", lambda row: _sum(map(_stable_rank, row.spectra))),
        Column("spectrum", "singular values of s·BA", _sparks, False),
        Column("", "", _notes, False),
    ]


class TargetTable(NamedTuple):
    """The table of a page.

    Attributes:
        columns: The columns in use, after that of the keys.
        rows: (key, cells) of each row.
        left: The numbers of the columns that hold text; the key's is 1.
        means: What the headings mean, for people.
    """

    columns: list[Column]
    rows: list[tuple[str, list[str]]]
    left: list[int]
    means: str


def table(result: JsonView, rows: list[Row]) -> TargetTable | None:
    """The table of the targets; None without rows."""
    if not rows:
        return None
    if not any(_has_norm(row) for row in rows):
        rows = [replace(row, spectra=[]) for row in rows]  # nothing is trained yet
    columns: list[Column] = []
    cells_of_rows: list[list[str]] = [[] for _row in rows]
    for column in _columns(str(result.get("command", ""))):
        cells = [column.cell(row) for row in rows]
        if any(cells):
            columns.append(column)
            for cells_of_row, cell in zip(cells_of_rows, cells, strict=True):
                cells_of_row.append(cell)
    return TargetTable(
        columns,
        [(row.key, cells) for row, cells in zip(rows, cells_of_rows, strict=True)],
        [number for number, column in enumerate(columns, 2) if not column.numeric],
        " · ".join(f"{column.head}: {column.title}" for column in columns if column.title),
    )


def _has_norm(row: Row) -> bool:
    """True for a row with an update that is not all zero."""
    return any(spectrum["norm"] for spectrum in row.spectra)


def _sum(texts: Iterable[str]) -> str:
    """What several adapters have, as a sum."""
    return " + ".join(texts)


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def _norm(spectrum: JsonView) -> str:
    return number(float(spectrum["norm"]))


def _stable_rank(spectrum: JsonView) -> str:
    """‖ΔW‖²/σ₁²; a dash for an update that is all zero."""
    sigma = spectrum["sigma"]
    if not sigma or not sigma[0]:
        return "–"
    return number((spectrum["norm"] / sigma[0]) ** 2)


def _sparks(row: Row) -> Markup:
    """The spectra of all adapters beside each other."""
    return Markup("").join(map(charts.spark, row.spectra))


def _notes(row: Row) -> str:
    """What else is said of a target, each sentence once."""
    texts = list(row.remarks)
    if not row.rank:
        texts.append(row.updates)
    return "; ".join(dict.fromkeys(filter(None, texts)))
