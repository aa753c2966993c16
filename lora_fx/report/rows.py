"""One row per target, from all that a command's result says about it.

Commands name their lists differently (`targets`, `tensors`, `extracted`, `truncated`, `updates`,
`differences`); what the adapters' files say is in `page.adapters`. What is said of one key is one
row: an adapter's key is that of a target where both end in the same path.
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
        remarks: What else the result says of it, in words.
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
    """A row for every target of a result, in the model's order.

    Targets are in the order of the graph; tensors of files and updates of adapters lie by letters.
    """
    rows: dict[str, Row] = {}
    flops = result.get("flops") or {}
    total_flops = sum(flops.get(group) or 0 for group in ("reached", "refused", "unreached"))
    for row, target in _entries(rows, result, "targets"):
        _add_target(row, target, total_flops)
    for row, tensor in _entries(rows, result, "tensors"):
        _add_tensor(row, tensor)
    for name in ("extracted", "truncated"):
        for row, update in _entries(rows, result, name):
            _add_computed_update(row, update)
    for row, difference in _entries(rows, result, "differences"):
        ratio = difference.get("ratio")
        row.error = difference.get("rel") if ratio is None else ratio
        row.remarks.append(str(difference.get("what", "")))
    _add_adapters(rows, result)

    n_targets = len(result.get("targets") or ())
    rows_in_order = list(rows.values())
    return rows_in_order[:n_targets] + _ordered(rows_in_order[n_targets:])


def _entries(rows: dict[str, Row], result: JsonView, name: str) -> Iterator[tuple[Row, JsonView]]:
    """(row, entry) for the entries of a list of the result; verify has a number where merge has it.

    A row that is missing is added.
    """
    entries = result.get(name)
    if not isinstance(entries, list):
        return
    for entry in entries:
        if isinstance(entry, dict) and "key" in entry:
            key = str(entry["key"])
            yield rows.setdefault(key, Row(key)), entry


def _ordered(rows: list[Row]) -> list[Row]:
    """Rows with layer 2 before layer 10, which files have the other way round; else as they are.

    >>> [r.key for r in _ordered([Row("h.0.b"), Row("h.10.a"), Row("h.2.b"), Row("h.2.a")])]
    ['h.0.b', 'h.2.b', 'h.2.a', 'h.10.a']
    """
    group_of: dict[str, int] = {}

    def place(row: Row) -> tuple[int, list[int]]:
        words = row.key.split(".")
        numbers = [int(word) for word in words if word.isascii() and word.isdigit()]
        start = row.key
        if numbers:
            start = row.key.partition(f".{numbers[0]}.")[0]
        group = group_of.setdefault(start, len(group_of))
        return group, numbers

    return sorted(rows, key=place)


def _add_target(row: Row, target: JsonView, total_flops: int) -> None:
    """Add what the list of targets says."""
    row.op = str(target.get("op", ""))
    row.role = str(target.get("role", ""))
    row.shape = list(target.get("shape") or [])
    rank = target.get("rank")
    row.rank = [] if rank is None else [rank]
    alpha = target.get("alpha")
    row.alpha = [] if alpha is None else [alpha]
    flops = target.get("flops")
    if total_flops and flops is not None:
        row.share = flops / total_flops
    if row.rank and "in" in target and "out" in target:
        batch = prod(target.get("batch") or [])
        row.parameters = batch * row.rank[0] * (target["in"] + target["out"])


def _add_tensor(row: Row, tensor: JsonView) -> None:
    """Add what a merge says of a tensor that it changed."""
    row.shape = row.shape or list(tensor.get("shape") or [])
    gain = tensor.get("gain")
    row.rounding = None if gain is None else 1 - gain
    row.unmoved = tensor.get("lost")
    row.effect = tensor.get("ratio")
    row.updates = "; ".join(map(str, tensor.get("updates") or []))
    int8 = tensor.get("int8")
    if int8 and int8.get("error") is not None:
        row.rounding = int8["error"]


def _add_computed_update(row: Row, update: JsonView) -> None:
    """Add what extract or truncate says of an update that it made."""
    row.shape = list(update.get("shape") or row.shape)
    rank = update["rank"] if "rank" in update else update["after"]
    row.rank = [int(rank)]
    row.effect = update.get("change")
    row.error = update.get("relative")
    if "before" in update:
        row.remarks.append(f"rank {update['before']} → {update['after']}")


def _add_adapters(rows: dict[str, Row], result: JsonView) -> None:
    """Add what the files of the adapters say to the row that each of their keys means.

    1. The row of this key.
    2. The last row whose key is the same path.
    3. The only row whose path is the end of this one's, or the other way round.
    4. A new row.
    """
    path_of = {key: _path(key) for key in rows}
    key_of = {path: key for key, path in path_of.items()}
    keys_by_last_word = by_key((path.rpartition("_")[2], key) for key, path in path_of.items())
    for adapter in (result.get("page") or {}).get("adapters") or []:
        for update in adapter["updates"]:
            key = str(update["key"])
            if key not in rows:
                key = key_of.get(_path(key)) or _nearest(key, keys_by_last_word, path_of) or key
            row = rows.setdefault(key, Row(key))
            _add_update(row, update, is_first=not row.rank)


def _add_update(row: Row, update: JsonView, is_first: bool) -> None:
    """Add what a file says of one update.

    Args:
        row: The target's row.
        update: What the file says. Of the first adapter, only what the result has not said counts.
        is_first: Whether the result has said nothing of ranks.
    """
    if update.get("sigma") is not None:
        row.spectra.append(update)
    row.shape = row.shape or list(update.get("shape") or [])
    if is_first or len(row.spectra) > 1:
        if update.get("rank") is not None:
            row.rank.append(update["rank"])
        row.parameters = (row.parameters or 0) + (update.get("parameters") or 0)
    else:
        row.parameters = update.get("parameters") or row.parameters
    if update.get("alpha") is not None and len(row.alpha) < len(row.rank):
        row.alpha.append(update["alpha"])
    if update.get("kind") not in ("lora", None):
        row.remarks.append(str(update["kind"]))


def _path(key: str) -> str:
    """A key without its region and its last word, the dots as underscores, as kohya writes."""
    name = key.partition("[")[0].partition("@")[0].rstrip("~")
    return re.sub(r"[._]+", "_", name.removesuffix(".weight"))


def _nearest(
    key: str, keys_by_last_word: dict[str, list[str]], path_of: dict[str, str]
) -> str | None:
    """The only key whose path is the end of this one's, or the other way round."""
    path = f"_{_path(key)}"
    matches: list[str] = []
    for other_key in keys_by_last_word.get(path.rpartition("_")[2], ()):
        other_path = f"_{path_of[other_key]}"
        if path.endswith(other_path) or other_path.endswith(path):
            matches.append(other_key)
    if len(matches) != 1:
        return None
    return matches[0]
