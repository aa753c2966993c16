"""One row for each target, with the facts that a command's result has on it.

Commands name their rows differently (`targets`, `tensors`, `extracted`, `truncated`, `updates`,
`differences`); what the adapter's file says comes from `page.adapters`. Rows of one key are one:
an adapter's key is that of a target when both end in the same path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from lora_fx.text import JsonView, by_key


@dataclass
class Row:
    """The facts of a result on one target; an unknown field is None.

    Attributes:
        share: Its share of the weight FLOPs.
        effect: ‖Δ‖/‖W‖.
        rounding: Share of the update that the output's dtype lost.
        unmoved: Share of the elements that rounding left where they were.
        error: Error of the fold, as its check measured it.
        spectra: One of each adapter: {sigma, norm}.
        updates: What changes the tensor, in words; ranks and scales where no adapter says them.
        remarks: Other things that the result says of it.
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
    remarks: list[str] = field(default_factory=list)


def rows_of(result: JsonView) -> list[Row]:
    """Return a row for every target of a result, in the model's order.

    Targets are in the order of the graph, and so are updates of adapters where `page.order` has
    it; tensors of files, and updates for which no model is known, are by name.
    """
    rows: dict[str, Row] = {}
    flops = result.get("flops") or {}
    total = sum(flops.get(name) or 0 for name in ("reached", "refused", "unreached"))
    for row, entry in _entries(rows, result, "targets"):
        _add_target(row, entry, total)
    for row, entry in _entries(rows, result, "tensors"):
        _add_tensor(row, entry)
    for name in ("extracted", "truncated"):
        for row, entry in _entries(rows, result, name):
            _add_new_rank(row, entry)
    for row, entry in _entries(rows, result, "differences"):
        row.error = entry.get("ratio")
        if row.error is None:
            row.error = entry.get("rel")
        row.remarks.append(str(entry.get("what", "")))
    _add_adapters(rows, result)
    all_rows = list(rows.values())
    targets = result.get("targets")
    count = len(targets) if isinstance(targets, list) else 0
    order = (result.get("page") or {}).get("order") or ()
    return all_rows[:count] + _in_order(_ordered(all_rows[count:]), order)


def _in_order(rows: list[Row], order: Sequence[str]) -> list[Row]:
    """Return rows in an order of keys; regions of a key by their first numbers, others at the end.

    >>> rows = [Row("a.weight"), Row("b.weight"), Row("c.weight[8:16]"), Row("c.weight[0:8]")]
    >>> [r.key for r in _in_order(rows, ["c.weight", "b.weight"])]
    ['c.weight[0:8]', 'c.weight[8:16]', 'b.weight', 'a.weight']
    """
    positions = {_path(key): position for position, key in enumerate(order)}

    def place(row: Row) -> tuple[int, list[int]]:
        path = _path(row.key)
        if path not in positions:
            return len(order), []
        region = row.key.partition("[")[2]
        return positions[path], [int(start) for start in re.findall(r"(\d+)(?::|\])", region)]

    return sorted(rows, key=place)


def _ordered(rows: list[Row]) -> list[Row]:
    """Return rows with layer 2 before layer 10, which files order by text; else unchanged.

    >>> [r.key for r in _ordered([Row("h.0.b"), Row("h.10.a"), Row("h.2.b"), Row("h.2.a")])]
    ['h.0.b', 'h.2.b', 'h.2.a', 'h.10.a']
    """
    positions: dict[str, int] = {}  # what stands before the first number → when it came first

    def place(row: Row) -> tuple[int, list[int]]:
        numbers = []
        for word in row.key.split("."):
            if word.isascii() and word.isdigit():
                numbers.append(int(word))
        start = row.key
        if numbers:
            start = row.key.partition(f".{numbers[0]}.")[0]
        return positions.setdefault(start, len(positions)), numbers

    return sorted(rows, key=place)


def _add_target(row: Row, entry: JsonView, total: int) -> None:
    """Read one entry of a list of targets; its share is of `total` FLOPs."""
    row.op = str(entry.get("op", ""))
    row.role = str(entry.get("role", ""))
    row.shape = list(entry.get("shape") or [])
    row.rank = _listed(entry.get("rank"))
    row.alpha = _listed(entry.get("alpha"))
    if total and entry.get("flops") is not None:
        row.share = entry["flops"] / total
    if row.rank and "in" in entry and "out" in entry:
        width = entry["in"] + entry["out"]
        row.parameters = prod(entry.get("batch") or []) * row.rank[0] * width


def _listed(value: Any) -> list[Any]:
    """Return a value as a list of one; an empty list for None."""
    if value is None:
        return []
    return [value]


def _add_tensor(row: Row, entry: JsonView) -> None:
    """Read the entry of one tensor in the result of a merge."""
    row.shape = row.shape or list(entry.get("shape") or [])
    gain = entry.get("gain")
    row.rounding = None if gain is None else 1 - gain
    row.unmoved = entry.get("lost")
    row.effect = entry.get("ratio")
    row.updates = "; ".join(map(str, entry.get("updates") or []))
    int8 = entry.get("int8")
    if int8 and int8.get("error") is not None:
        row.rounding = int8["error"]


def _add_new_rank(row: Row, entry: JsonView) -> None:
    """Read the entry of one update in the result of extract or truncate."""
    row.shape = list(entry.get("shape") or row.shape)
    rank = entry["rank"] if "rank" in entry else entry["after"]
    row.rank = [int(rank)]
    row.effect = entry.get("change")
    row.error = entry.get("relative")
    if "before" in entry:
        row.remarks.append(f"rank {entry['before']} → {entry['after']}")


def _add_adapters(rows: dict[str, Row], result: JsonView) -> None:
    """Read the files of the adapters into the rows of their keys.

    The row of an update is the row of the same key, else of the same path, else the only row of a
    nearby path, else a new row.
    """
    paths = {key: _path(key) for key in rows}
    keys_by_path = {path: key for key, path in paths.items()}
    keys_by_last_word = by_key((path.rpartition("_")[2], key) for key, path in paths.items())
    for adapter in (result.get("page") or {}).get("adapters") or []:
        for entry in adapter["updates"]:
            key = str(entry["key"])
            if key not in rows:
                match = keys_by_path.get(_path(key))
                key = match or _nearest(key, keys_by_last_word, paths) or key
            row = rows.setdefault(key, Row(key))
            _add_update(row, entry, is_first=not row.rank)


def _add_update(row: Row, entry: JsonView, is_first: bool) -> None:
    """Read one update of a file; for the first adapter, only fields that the result lacks."""
    if entry.get("sigma") is not None:
        row.spectra.append(entry)
    row.shape = row.shape or list(entry.get("shape") or [])
    if is_first or len(row.spectra) > 1:
        row.rank += _listed(entry.get("rank"))
        row.parameters = (row.parameters or 0) + (entry.get("parameters") or 0)
    else:
        row.parameters = entry.get("parameters") or row.parameters
    if entry.get("alpha") is not None and len(row.alpha) < len(row.rank):
        row.alpha.append(entry["alpha"])
    if entry.get("kind") not in ("lora", None):
        row.remarks.append(str(entry["kind"]))


def _path(key: str) -> str:
    """Return a key without region and last word, with underscores for dots, as kohya writes."""
    name = key.partition("[")[0].partition("@")[0].rstrip("~")
    return re.sub(r"[._]+", "_", name.removesuffix(".weight"))


def _nearest(
    key: str, keys_by_last_word: dict[str, list[str]], paths: dict[str, str]
) -> str | None:
    """Return the only key whose path ends with this key's path, or the reverse; else None."""
    path = "_" + _path(key)
    matches = []
    for candidate in keys_by_last_word.get(path.rpartition("_")[2], ()):
        candidate_path = "_" + paths[candidate]
        if path.endswith(candidate_path) or candidate_path.endswith(path):
            matches.append(candidate)
    if len(matches) != 1:
        return None
    return matches[0]


def _entries(rows: dict[str, Row], result: JsonView, name: str) -> Iterator[tuple[Row, JsonView]]:
    """Yield (row, entry) for a list of the result; verify has a number instead of the list."""
    entries = result.get(name)
    if not isinstance(entries, list):
        return
    for entry in entries:
        if isinstance(entry, dict) and "key" in entry:
            key = str(entry["key"])
            yield rows.setdefault(key, Row(key)), entry
