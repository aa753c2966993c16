"""The whole page: a string that is one HTML file, which asks for nothing outside itself.

Everything can be read without a script; the script sorts and filters the table. The policy in
the head lets a browser run that script alone, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from lora_fx.errors import visible
from lora_fx.report import charts
from lora_fx.report.rows import Row, broken, number, percent, plural, rows_of, shape, size
from lora_fx.text import JsonView, strict_json

TEMPLATES = Path(__file__).parent / "templates"


def page(result: JsonView) -> str:
    """The page of a command's JSON object (docs/json.md).

    Args:
        result: With what only a page shows under `page`: `argv`, `when`, `seconds`, `host`,
            `notes` (of `warnings`, those that ask for nothing), `versions`, `files` rows of {of,
            path, bytes, sha256}, `adapters` rows of {path, updates: rows of {key, kind, rank,
            alpha, parameters, shape, sigma, norm}}; all may be missing.
    """
    rows = rows_of(result)
    more: JsonView = result.get("page") or {}
    notes = set(more.get("notes") or ())
    said: list[str] = result.get("warnings") or []
    script = (TEMPLATES / "table.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "result": result,
        "what": "tensor" if result.get("command") in ("merge", "verify") else "target",
        "headline": headline(str(result.get("error") or "")),
        "warnings": [text for text in said if text not in notes],
        "notes": [text for text in said if text in notes],
        "more": more,
        "facts": [*facts(result, rows)],
        "curve_of_losses": charts.training(result),
        "structure": charts.blocks(rows),
        "rounding": charts.rounding(rows),
        "table": table(result, rows),
        "command_line": shlex.join(more.get("argv") or ()),
        "data": strict_json(result),
        "style": Markup((TEMPLATES / "style.css").read_text("utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
    }
    return _templates().get_template("page.html.j2").render(values)


@cache
def _templates() -> Environment:
    """Jinja's environment: every value is made visible, then escaped, unless it is markup."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {f.__name__: f for f in (broken, number, percent, plural, shape, size)}
    made.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"), "default": str, "allow_nan": False,
    }  # fmt: skip
    return made


class Fact(NamedTuple):
    """A number, what it is, what to hold it against, and whether it is as it should be."""

    label: str
    value: str
    beside: str = ""
    ok: bool | None = None


def facts(result: JsonView, rows: list[Row]) -> Iterator[Fact]:
    """The numbers of the strip, the most telling first."""
    if isinstance(result.get("tensors"), int):
        wrong = result["tensors"] - result["equal"]
        yield Fact("Tensors that differ", number(wrong), "", wrong == 0)
    if "merges" in result:
        good = sum(bool(m.get("ok")) for m in result["merges"])
        count = len(result["merges"])
        yield Fact("Merges", f"{good} of {count}", "done", good == count)
    parity: list[JsonView] = result.get("parity") or []
    if parity:
        yield _decisive(parity)
    yield from _training(result)
    if lost := [row.rounding for row in rows if row.rounding is not None]:
        most, of = max(lost), f"of {len(lost)} tensors"
        yield Fact("Largest rounding loss", percent(most), of, most < 0.1)
    if result.get("limit"):
        spent = f"{number(result['used'])} of {number(result['limit'])} {result['unit']}"
        yield Fact("Budget used", percent(result["used"] / result["limit"]), spent)
    if "relative" in result:
        yield Fact("Error of all updates", percent(result["relative"]), "‖Δ − Δ′‖/‖Δ‖")
    if any(r.rank or r.parameters for r in rows):
        ranks = sorted({r for row in rows for r in row.rank if isinstance(r, int)})
        some = f"rank {ranks[0]}" if len(ranks) == 1 else ""
        some = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else some
        yield Fact("Targets", number(len(rows)), some)
    trained, frozen = result.get("trained"), result.get("frozen")
    if isinstance(trained, int) and isinstance(frozen, int):
        share = percent(trained / max(1, trained + frozen))
        yield Fact("Trained share", share, f"{number(trained)} parameters")
    elif isinstance(trained, int):
        yield Fact("Trained", number(trained), "parameters")
    if result.get("adapted_share") is not None:
        yield Fact("Adapted", percent(result["adapted_share"]), "of the weight FLOPs")
    files = (result.get("page") or {}).get("files") or ()
    out, source = ([f["bytes"] for f in files if f["of"] == of] for of in ("output", "input"))
    if out:
        beside = f"inputs {size(sum(source))}" if source else ""
        yield Fact("Written", size(sum(out)), beside)


def headline(error: str, most: int = 90) -> str:
    """An error as a heading: all of a short one, else its start without the path before it.

    >>> headline("runs/a.safetensors: its keys fit no parameter; expected layers.0.fc", 40)
    'its keys fit no parameter …'
    """
    if len(error) <= most:
        return error
    told = re.sub(r"^\S+: ", "", error)
    ends = [m.start() for m in re.finditer(r"[;,:.] ", told[: most + 1])]
    cut = max(ends, default=0)
    return (told[:cut] if cut > most / 3 else told[:most].rpartition(" ")[0] or told[:most]) + " …"


def _decisive(parity: Sequence[JsonView]) -> Fact:
    """The comparison that the answer hangs on.

    Of those that failed it is the one that is furthest over its gate. Where all hold it is the
    largest, which is how near the two are: a fold that nearly fills a gate of 1e-6 is not.
    """
    failed = [p for p in parity if not p["ok"]]
    telling = failed or [p for p in parity if not p.get("blank")] or parity
    decisive = max(telling, key=_over_gate if failed else _size)
    of = f"; {decisive['of']}" if decisive.get("of") else ""
    beside = f"gate {number(decisive['tol'])}{of}; {plural(len(parity), 'comparison')}"
    rel = "∞" if decisive["rel"] is None else number(decisive["rel"])
    label = "Relative error over its gate" if failed else "Largest relative error"
    return Fact(label, rel, beside, not failed)


def _size(p: JsonView) -> float:
    return math.inf if p["rel"] is None else float(p["rel"])


def _over_gate(p: JsonView) -> float:
    return _size(p) / max(float(p["tol"]), 1e-30)


def _training(result: JsonView) -> list[Fact]:
    validation = result.get("validation")
    if not isinstance(validation, dict) or "losses" not in result:
        return []
    kept = f"step {result.get('best_step')} of {len(result['losses'])}"
    best = validation.get(str(result.get("best_step")))
    if best is None:
        return [Fact("Kept", kept, "no validation", False)]
    before = result.get("before")
    if before is None:
        return [Fact("Validation loss", number(float(best)), kept)]
    beside = f"before {number(float(before))}; {kept}"
    ok: bool | None = best < before
    if ok and result.get("best_step") == len(result["losses"]):
        ok = None  # still falling at the last step: more steps would have been better
    return [Fact("Validation loss", number(float(best)), beside, ok)]


# The table of targets: one row each, and only the columns that some row has something in.


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
