"""One row per target, from whatever a command's result says about it.

Commands name their rows differently (`targets`, `tensors`, `extracted`, `truncated`, `updates`,
`differences`); what the adapter's file says comes from `page.adapters`. Rows of one key are one:
an adapter's key is that of a target when both end in the same path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from lora_fx.text import JsonView, by_key


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
