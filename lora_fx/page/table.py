"""The table of targets: one row each, and only the columns that some row has something in.

End tags that HTML lets out are left out: it is most of the page at 500 targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from lora_fx.page.curves import spark
from lora_fx.page.rows import Row
from lora_fx.page.text import Json, broken, esc, number, percent, shape

ERROR = {
    "extract": "error",
    "truncate": "error",
    "verify": "difference",
}
"""What `Row.error` is, by command."""


class Column(NamedTuple):
    """A heading and its meaning, the cell of a row (empty: nothing known), whether a number."""

    head: str
    title: str
    cell: Callable[[Row], str]
    numeric: bool = True


def _columns(command: str) -> list[Column]:
    return [
        Column("op", "", lambda r: esc(r.op), False),
        Column("role", "", lambda r: esc(r.role), False),
        Column("shape", "", lambda r: esc(shape(r.shape)) if r.shape else ""),
        Column("rank", "", lambda r: " + ".join(map(str, r.rank))),
        Column("α", "", lambda r: " + ".join(f"{a:g}" for a in r.alpha)),
        Column("params", "elements of A and B", lambda r: _number(r.parameters)),
        Column("FLOPs", "share of the weight FLOPs", lambda r: _percent(r.share)),
        Column("effect", "‖Δ‖/‖W‖", lambda r: _percent(r.effect)),
        Column("rounding", "share of the update lost", lambda r: _percent(r.rounding)),
        Column(
            "unmoved",
            "share of the elements that stayed",
            lambda r: _percent(r.unmoved),
        ),
        Column(ERROR.get(command, "error"), "relative", lambda r: _number(r.error)),
        Column("‖ΔW‖", "of s·BA", lambda r: _some(r, "norm")),
        Column("stable rank", "‖ΔW‖²/σ₁²", lambda r: " + ".join(map(_stable, r.spectra))),
        Column(
            "spectrum", "singular values of s·BA", lambda r: "".join(map(spark, r.spectra)), False
        ),
        Column("", "", _said, False),
    ]


def table(result: Json, rows: list[Row]) -> str:
    """The table as HTML; empty without rows."""
    if not rows:
        return ""
    if not any(s["norm"] for r in rows for s in r.spectra):
        rows = [replace(r, spectra=[]) for r in rows]  # nothing is trained yet
    used = []
    for column in _columns(str(result.get("command", ""))):
        cells = [column.cell(r) for r in rows]
        if any(cells):
            used.append((column, cells))
    heads = "".join(f"<th scope=col>{esc(c.head) or 'note'}" for c, _ in used)
    means = " · ".join(f"{c.head}: {c.title}" for c, _ in used if c.title)
    body = []
    for i, row in enumerate(rows):
        line = "".join(f"<td>{given[i]}" for _, given in used)
        body.append(f"<tr><th scope=row>{broken(row.key)}{line}")
    left = "".join(f" l{i + 2}" for i, (c, _) in enumerate(used) if not c.numeric)
    return (
        '<div class=across tabindex=0 role=region aria-label="Table of targets">'
        f'<table class="targets{left}" id=rows><thead><tr><th scope=col>target'
        f"{heads}</thead><tbody>{''.join(body)}</tbody></table></div>"
        + (f"<p class=count>{esc(means)}</p>" if means else "")
    )


def _number(x: float | None) -> str:
    return "" if x is None else number(x)


def _percent(x: float | None) -> str:
    return "" if x is None else percent(x)


def _said(row: Row) -> str:
    texts = [*row.said, row.updates if not row.rank else ""]
    return esc("; ".join(dict.fromkeys(filter(None, texts))))


def _stable(spectrum: Json) -> str:
    top = spectrum["sigma"][0] if spectrum["sigma"] else 0
    return number((spectrum["norm"] / top) ** 2) if top else "–"


def _some(row: Row, name: str) -> str:
    return " + ".join(number(float(s[name])) for s in row.spectra)
