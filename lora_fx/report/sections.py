"""The sections below the table: parity, stages, merges, what was refused, files, the run itself."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lora_fx.report.charts import spark
from lora_fx.report.rows import Row
from lora_fx.report.text import Json, broken, code, esc, number, percent, shape, size


def parity(result: Json) -> str:
    """Every comparison that was run: what, where, how far from its gate."""
    found: list[Json] = result.get("parity") or []
    heads = ("compared", "at sizes", "output", "max |a − b|", "relative", "gate", "", "holds")
    rows = []
    for p in found:
        sizes = ", ".join(f"{code(k)} {esc(shape(v))}" for k, v in p["sizes"].items())
        gap = "∞" if p["max_abs"] is None else number(p["max_abs"])
        rel = "∞" if p["rel"] is None else number(p["rel"])
        rows.append(
            (
                esc(p["of"] or "models"), sizes, code(p["output"]), gap, rel, number(p["tol"]),
                _bar(p), _holds(bool(p["ok"])),
            )
        )  # fmt: skip
    return section("Parity", plain(heads, rows, text=(0, 1, 2)))


def _bar(p: Json) -> str:
    """How much of the gate is used up."""
    share = 1.0 if p["rel"] is None else min(1.0, p["rel"] / max(p["tol"], 1e-30))
    label = f"{percent(share)} of the gate" if p["ok"] else "over the gate"
    state = "gauge" if p["ok"] else '"gauge bad"'
    return (
        f'<svg class={state} role=img aria-label="{esc(label)}" width=80 '
        f'height=8><path class=all d="M0 4h80"/><path d="M0 4h{max(1, round(80 * share))}"/></svg>'
    )


def _holds(ok: bool) -> str:
    return "<b class=good>yes</b>" if ok else "<b class=bad>no</b>"


def stages(result: Json) -> str:
    """Rewrites of an optimised export: what each was worth, and why it was kept or not."""
    found: list[Json] = result.get("stages") or []
    heads = ("rewrite", "kept", "nodes", "weights", "time", "of the original", "error")
    rows = [
        (
            code(s["name"]) + (f"<br>{esc(s['why'])}" if s["why"] else ""),
            "yes" if s["kept"] else "no", number(s["nodes"]), size(s["bytes"]),
            "–" if s["seconds"] is None else f"{1e3 * s['seconds']:.3g}\u00a0ms",
            percent(s["ratio"]), number(s["error"]),
        )
        for s in found
    ]  # fmt: skip
    return section("Stages of the graph", plain(heads, rows, text=(0, 1)))


def merges(result: Json) -> str:
    """The merges of a fleet, with why one failed."""
    found: list[Json] = result.get("merges") or []
    rows = [
        (
            code(m.get("adapter", "")), code(m.get("out", "")), _holds(bool(m.get("ok"))),
            esc(m.get("error") or ("was there already" if m.get("kept") else "")),
        )
        for m in found
    ]  # fmt: skip
    return section("Merges", plain(("adapter", "written", "done", "why"), rows, text=(0, 1, 2, 3)))


def unhandled(result: Json) -> str:
    """What the adapters do not reach, and why: refusals, unreached, pinned, left out."""
    lists: list[tuple[str, Sequence[Any], Callable[[Any], tuple[str, str]]]] = [
        ("Refused", result.get("refusals") or (), lambda r: (r["key"], r["reason"])),
        (
            "Unreached",
            result.get("unreached") or (),
            lambda u: (f"{u['key']}  {shape(u['shape'])}", u["reason"]),
        ),
        (
            "Pinned dimensions",
            result.get("pinned") or (),
            lambda p: (f"{p['input']}, dimension {p['dim']} = {p['size']}", p["op"]),
        ),
        ("Left alone by the adapter", result.get("untouched") or (), lambda k: (k, "")),
        ("Left out", result.get("left_out") or (), lambda k: (k, "")),
        ("Removed", result.get("removed") or (), lambda k: (k, "")),
    ]
    parts = []
    for title, found, pair in lists:
        if found:
            parts.append(f"<h3>{title} <span class=count>{len(found)}</span></h3><ul>")
            for one in found:
                key, why = pair(one)
                parts.append(f"<li>{code(key)}{f' <span>{esc(why)}</span>' if why else ''}")
            parts.append("</ul>")
    return section("Not adapted, and why", "".join(parts))


def warnings(result: Json) -> str:
    """What had to be said, in full."""
    found = result.get("warnings") or []
    if not found:
        return ""
    return section("Warnings", f"<ul class=warned>{''.join(f'<li>{esc(w)}' for w in found)}</ul>")


def files(result: Json) -> str:
    """Inputs and outputs by their hashes."""
    found: list[Json] = (result.get("page") or {}).get("files") or []
    rows = [
        (esc(f["of"]), code(f["path"]), size(f["bytes"]), f"<code>{esc(f['sha256'])}</code>")
        for f in found
    ]
    said = (result.get("page") or {}).get("unhashed") or []
    more = f"<ul>{''.join(f'<li>{esc(s)}' for s in said)}</ul>" if said else ""
    return section("Files", plain(("", "path", "size", "sha256"), rows, text=(0, 1, 3)) + more)


def run(result: Json) -> str:
    """The command line and the versions: what to type to get this again."""
    added = result.get("page") or {}
    parts = []
    if added.get("argv"):
        parts.append(f"<pre tabindex=0>lora-fx {esc(shlex.join(added['argv']))}</pre>")
    versions = added.get("versions") or {}
    if versions:
        said = "".join(f"<div><dt>{esc(k)}<dd>{esc(v)}</div>" for k, v in versions.items())
        parts.append(f"<dl class=versions>{said}</dl>")
    return section("This run", "".join(parts))


def section(title: str, body: str) -> str:
    """A section with its heading; empty without a body."""
    name = title.lower().replace(" ", "-").replace(",", "")
    if not body:
        return ""
    return f"<section aria-labelledby={name}><h2 id={name}>{title}</h2>{body}</section>"


def plain(heads: Iterable[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table of HTML cells that scrolls by itself; empty without rows. `text`: left columns."""
    if not rows:
        return ""

    def tag(i: int) -> str:
        return " class=t" if i in text else ""

    top = "".join(f"<th scope=col{tag(i)}>{esc(h)}" for i, h in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{tag(i)}>{cell}" for i, cell in enumerate(row)) for row in rows
    )
    return (
        f"<div class=across tabindex=0><table class=small><thead><tr>{top}</thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


# The table of targets: one row each, and only the columns that some row has something in.
#
# End tags that HTML lets out are left out: it is most of the page at 500 targets.


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
