"""The table of targets: one row each, and only the columns that some row has something in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from markupsafe import Markup

from lora_fx.report import charts
from lora_fx.report.formatting import number, percent, shape
from lora_fx.report.rows import Row
from lora_fx.text import JsonView


class Column(NamedTuple):
    """A heading and its meaning, the cell of a row (empty: nothing known), whether a number."""

    head: str
    title: str
    cell: Callable[[Row], str]
    numeric: bool = True


def _columns(command: str) -> list[Column]:
    error = "difference" if command == "verify" else "error"
    return [
        Column("op", "", lambda r: r.op, False),
        Column("role", "", lambda r: r.role, False),
        Column("shape", "", lambda r: shape(r.shape) if r.shape else ""),
        Column("rank", "", lambda r: " + ".join(map(str, r.rank))),
        Column("α", "", lambda r: " + ".join(f"{a:g}" for a in r.alpha)),
        Column("params", "elements of A and B", lambda r: _known(r.parameters, number)),
        Column("FLOPs", "share of the weight FLOPs", lambda r: _known(r.share)),
        Column("effect", "‖Δ‖/‖W‖", lambda r: _known(r.effect)),
        Column("rounding", "share of the update lost", lambda r: _known(r.rounding)),
        Column("unmoved", "share of the elements that stayed", lambda r: _known(r.unmoved)),
        Column(error, "relative", lambda r: _known(r.error, number)),
        Column(
            "‖ΔW‖", "of s·BA", lambda r: " + ".join(number(float(s["norm"])) for s in r.spectra)
        ),
        Column("stable rank", "‖ΔW‖²/σ₁²", lambda r: " + ".join(map(_stable, r.spectra))),
        Column("spectrum", "singular values of s·BA", _sparks, False),
        Column("", "", _said, False),
    ]


class TargetTable(NamedTuple):
    """The columns in use, of which `left` (from 1, the key's) hold text, and (key, cells) a row."""

    columns: list[Column]
    rows: list[tuple[str, list[str]]]
    left: list[int]
    means: str


def table(result: JsonView, rows: list[Row]) -> TargetTable | None:
    """The table of the targets; None without rows."""
    if not rows:
        return None
    if not any(s["norm"] for r in rows for s in r.spectra):
        rows = [replace(r, spectra=[]) for r in rows]  # nothing is trained yet
    columns = _columns(str(result.get("command", "")))
    filled = [(c, cells) for c in columns if any(cells := [c.cell(r) for r in rows])]
    used = [c for c, _ in filled]
    return TargetTable(
        used,
        [(r.key, cells) for r, *cells in zip(rows, *(cells for _, cells in filled), strict=True)],
        [i for i, c in enumerate(used, 2) if not c.numeric],
        " · ".join(f"{c.head}: {c.title}" for c in used if c.title),
    )


def _known(x: float | None, show: Callable[[object], str] = percent) -> str:
    return "" if x is None else show(x)


def _sparks(row: Row) -> Markup:
    return Markup("").join(map(charts.spark, row.spectra))


def _said(row: Row) -> str:
    texts = [*row.said, row.updates if not row.rank else ""]
    return "; ".join(dict.fromkeys(filter(None, texts)))


def _stable(spectrum: JsonView) -> str:
    top = spectrum["sigma"][0] if spectrum["sigma"] else 0
    return number((spectrum["norm"] / top) ** 2) if top else "–"
