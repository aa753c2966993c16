"""One row per target, from whatever a command's result says about it.

Commands name their rows differently (`targets`, `tensors`, `extracted`, `truncated`, `updates`,
`differences`); what the adapter's file says comes from `page.adapters`. Rows of one key are one:
an adapter's key is that of a target when both end in the same path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from markupsafe import Markup

from lora_fx.errors import visible
from lora_fx.text import JsonView, by_key, counted, is_number


@dataclass
class Row:
    """What is known about one target; a field that no part of the result knows is None.

    Attributes:
        share: Its share of the weight FLOPs.
        effect: ‖Δ‖/‖W‖.
        rounding: Share of the update that the output's dtype lost.
        unmoved: Share of the elements that rounding left where they were.
        error: Error of the fold, as its check measured it.
        spectra: One of each adapter: {sigma, norm}.
        updates: What changes the tensor, in words; ranks and scales where no adapter says them.
    """

    key: str
    op: str = ""
    role: str = ""
    shape: list[int] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    parameters: int | None = None
    share: float | None = None
    effect: float | None = None
    rounding: float | None = None
    unmoved: float | None = None
    error: float | None = None
    spectra: list[JsonView] = field(default_factory=list)
    updates: str = ""
    said: list[str] = field(default_factory=list)


def rows_of(result: JsonView) -> list[Row]:
    """A row for every target of a result, in the model's order.

    That is the graph's for targets; tensors of files and updates of adapters lie by letters.
    """
    rows: dict[str, Row] = {}
    flops = result.get("flops") or {}
    total = sum(flops.get(of) or 0 for of in ("reached", "refused", "unreached"))
    for row, found in _told(rows, result, "targets"):
        _target(row, found, total)
    for row, found in _told(rows, result, "tensors"):
        row.shape = row.shape or list(found.get("shape") or [])
        gain = found.get("gain")
        row.rounding = None if gain is None else 1 - gain
        row.unmoved, row.effect = found.get("lost"), found.get("ratio")
        row.updates = "; ".join(map(str, found.get("updates") or []))
        if (int8 := found.get("int8")) and int8.get("error") is not None:
            row.rounding = int8["error"]
    for name in ("extracted", "truncated"):
        for row, found in _told(rows, result, name):
            row.shape = list(found.get("shape") or row.shape)
            row.rank = [int(found["rank"] if "rank" in found else found["after"])]
            row.effect, row.error = found.get("change"), found.get("relative")
            if "before" in found:
                row.said.append(f"rank {found['before']} → {found['after']}")
    for row, found in _told(rows, result, "differences"):
        row.error = found.get("ratio") if found.get("ratio") is not None else found.get("rel")
        row.said.append(str(found.get("what", "")))
    known = len(result.get("targets") or ())
    _adapters(rows, result)
    every = list(rows.values())
    return every[:known] + _ordered(every[known:])


def _ordered(rows: list[Row]) -> list[Row]:
    """Rows with layer 2 before layer 10, which files have the other way round; else as they are.

    >>> [r.key for r in _ordered([Row("h.0.b"), Row("h.10.a"), Row("h.2.b"), Row("h.2.a")])]
    ['h.0.b', 'h.2.b', 'h.2.a', 'h.10.a']
    """
    first: dict[str, int] = {}

    def place(row: Row) -> tuple[int, list[int]]:
        parts = row.key.split(".")
        numbers = [int(p) for p in parts if p.isascii() and p.isdigit()]
        start = row.key.partition(f".{numbers[0]}.")[0] if numbers else ""
        return first.setdefault(start if numbers else row.key, len(first)), numbers

    return sorted(rows, key=place)


def _target(row: Row, found: JsonView, total: int) -> None:
    row.op, row.role = str(found.get("op", "")), str(found.get("role", ""))
    row.shape = list(found.get("shape") or [])
    row.rank = [] if found.get("rank") is None else [found["rank"]]
    row.alpha = [] if found.get("alpha") is None else [found["alpha"]]
    if total and found.get("flops") is not None:
        row.share = found["flops"] / total
    if row.rank and "in" in found and "out" in found:
        row.parameters = prod(found.get("batch") or []) * row.rank[0] * (found["in"] + found["out"])


def _adapters(rows: dict[str, Row], result: JsonView) -> None:
    """What the files of the adapters say, on the row that each of their keys means."""
    have = {k: _path(k) for k in rows}
    exact = {path: k for k, path in have.items()}
    tails = by_key((path.rpartition("_")[2], k) for k, path in have.items())
    for adapter in (result.get("page") or {}).get("adapters") or []:
        for found in adapter["updates"]:
            key = str(found["key"])
            at = key if key in rows else exact.get(_path(key)) or _nearest(key, tails, have)
            row = rows.setdefault(at or key, Row(at or key))
            _update(row, found, fresh=not row.rank)


def _update(row: Row, found: JsonView, fresh: bool) -> None:
    """What a file says of one update: of the first adapter only what the result has not said."""
    if found.get("sigma") is not None:
        row.spectra.append(found)
    row.shape = row.shape or list(found.get("shape") or [])
    if fresh or len(row.spectra) > 1:
        row.rank += [found["rank"]] if found.get("rank") is not None else []
        row.parameters = (row.parameters or 0) + (found.get("parameters") or 0)
    else:
        row.parameters = found.get("parameters") or row.parameters
    if found.get("alpha") is not None and len(row.alpha) < len(row.rank):
        row.alpha.append(found["alpha"])
    if found.get("kind") not in ("lora", None):
        row.said.append(str(found["kind"]))


def _path(key: str) -> str:
    """A key without its region and its last word, the dots as underscores, as kohya writes."""
    name = key.partition("[")[0].partition("@")[0].rstrip("~")
    return re.sub(r"[._]+", "_", name.removesuffix(".weight"))


def _nearest(key: str, tails: dict[str, list[str]], have: dict[str, str]) -> str | None:
    """The only key whose path is the end of this one's, or the other way round."""
    path = "_" + _path(key)
    hits = [
        k
        for k in tails.get(path.rpartition("_")[2], ())
        if path.endswith("_" + have[k]) or ("_" + have[k]).endswith(path)
    ]
    return hits[0] if len(hits) == 1 else None


def _told(rows: dict[str, Row], result: JsonView, name: str) -> Iterator[tuple[Row, JsonView]]:
    """(row, what is said of it) of a list of the result; verify has a number where merge has it."""
    found = result.get(name)
    for x in found if isinstance(found, list) else ():
        if isinstance(x, dict) and "key" in x:
            key = str(x["key"])
            yield rows.setdefault(key, Row(key)), x


# Text for HTML: escaping, and how numbers look. Nothing here trusts a name.
#
# Keys and paths come from files. A character that is not seen, or that turns the text round it
# (U+202E), is shown by its code; the rest is escaped.


THIN = "\u202f"
"""A narrow space that does not break: between groups of three digits."""


def broken(key: str) -> Markup:
    """A key as HTML that a line may break after a dot of, in pieces of a dozen characters.

    >>> broken("model.layers.0.self_attn.q_proj.weight")
    Markup('model.layers.<wbr>0.self_attn.<wbr>q_proj.weight')
    """
    pieces = re.findall(r".{10,}?\.(?=.{6})|.+", key, re.S)
    return Markup("<wbr>").join(map(visible, pieces))


def number(value: object) -> str:
    r"""A number in at most four digits; whole numbers in full, and no number as a dash.

    >>> number(1.23456e-7), number(0.123456), number(12345678), number(None), number(1234.56)
    ('1.23e-07', '0.1235', '12\u202f345\u202f678', '–', '1235')
    """
    if not is_number(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}".replace(",", THIN)
    if math.isnan(value) or math.isinf(value):
        return "∞" if value > 0 else "NaN" if math.isnan(value) else "−∞"
    if value == 0:
        return "0"
    if value < 0:
        return "−" + number(-value)
    return f"{value:.2e}" if not 1e-2 <= abs(value) < 1e5 else f"{value:#.4g}".rstrip(".")


def percent(value: object) -> str:
    r"""A share in per cent, three digits; tiny ones in powers of ten, and none as a dash.

    >>> percent(0.0123456), percent(1.0), percent(2e-7), percent(0.99999), percent(None)
    ('1.23\xa0%', '100\xa0%', '2.0e-05\xa0%', '99.99\xa0%', '–')
    >>> percent(-3.21e-5), percent(0)
    ('−0.0032\xa0%', '0\xa0%')
    """
    if not is_number(value) or not math.isfinite(value):
        return "–"
    if value < 0:
        return "−" + percent(-value)
    points = 100 * value
    if points < 1e-4:
        return f"{points:.1e}\u00a0%" if points else "0\u00a0%"
    if points < 0.01:
        return f"{points:#.2g}\u00a0%"
    if 99 < points < 100:
        return f"{min(points, 99.99):.2f}\u00a0%"
    return f"{points:#.3g}".rstrip(".") + "\u00a0%" if points < 999.5 else f"{points:.0f}\u00a0%"


def size(count: object) -> str:
    r"""Bytes for people.

    >>> size(999), size(12_345_678), size(999_999)
    ('999\xa0B', '12.3\xa0MB', '1\xa0MB')
    """
    if not isinstance(count, int):
        return "–"
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f}\u00a0{unit}" if unit == "B" else f"{value:.3g}\u00a0{unit}"


def shape(dims: Sequence[object]) -> str:
    """A shape with multiplication signs.

    >>> shape([768, 3072])
    '768 × 3072'
    """
    return " × ".join(map(str, dims)) if dims else "scalar"


def plural(count: int, word: str) -> str:
    """A count and its word.

    >>> plural(1, "target"), plural(2, "target")
    ('1 target', '2 targets')
    """
    return counted(count, word, number(count))
