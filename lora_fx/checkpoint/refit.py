"""An adapter refitted: updates of parts of fused weights as updates of the whole, or back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate

import numpy as np

from lora_fx.adapter.adapter import OTHER_READERS, Adapter
from lora_fx.adapter.fused import joined, sliced
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, is_on_base, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.fused_rows import known_rows, told_rows
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.read import read_json
from lora_fx.files.safetensors import Tensors
from lora_fx.targets.target import base_name, split_key

_MOST = 10**6
"""Rows that a whole can have."""


def refitted(
    adapter: Adapter, base: str | None, fuse: bool, split: bool, table: str | None
) -> tuple[Adapter, list[str]]:
    """An adapter with one update of each whole, or of each part; and what became of which.

    Args:
        adapter: As a loader returned it.
        base: The checkpoint that says which rows are whose, and how large the whole of a region is.
        fuse: Parts, and regions of one tensor, become the whole.
        split: Wholes become parts.
        table: A file that says which rows are whose.

    Raises:
        LoraFxError: Nothing to do, rows that are not known or are no division of the whole, an
            update that is no LoRA or DoRA of a linear layer.
    """
    if fuse == split or not (base or table):
        raise LoraFxError(
            "expected one of --fuse and --split, with --base or --map", "--fuse --base FOLDER"
        )
    opened = open_checkpoint(base) if base else None
    tensors, config = (opened.tensors, opened.config()) if opened else ({}, {})
    if table:
        rows = told_rows(adapter, read_json(table), table)
    else:
        rows = known_rows(adapter, tensors, config, apart=split)
    regions = _regions(adapter, tensors) if fuse else {}
    where = table or str(base)
    entries, said, notes = dict(adapter.entries), list[str](), list[str]()
    read = dict(adapter.metadata.get(OTHER_READERS) or {})
    for key in {**rows, **regions}:
        spans = rows.get(key, {})
        every = {**spans, **regions.get(key, {})}
        mine = {k: entries[k] for k in (key, *(() if split else every)) if k in entries}
        if not mine or (mine.keys() == {key} and not split):
            continue
        lows = {k: _linear(k, entries.pop(k), entries) for k in mine}
        out = _size(key, every, lows, where)
        at = {k: _rows(span, out) for k, span in every.items()} | {key: np.arange(out)}
        covered = np.sort(np.concatenate([at[k] for k in spans or [key]]))
        if not np.array_equal(covered, at[key]):
            raise LoraFxError(
                f"{where}: {key!r} has {out} rows, of which {', '.join(spans)} are no division",
                f"expected each row in one part, and not {json.dumps(spans)}",
            )
        if split:
            parts = {k: sliced(lows[key], at[k]) for k in spans}
            live = {k: p for k, p in parts.items() if p.b.any() or variant_of(p).reads_weight}
            new = live or parts
        else:
            new = {key: joined(key, out, {k: (low, at[k]) for k, low in lows.items()})}
        if taken := entries.keys() & new.keys():
            raise LoraFxError(f"{min(taken)!r} has an update of its own too", "--exclude it")
        entries |= new
        read |= {k: read[name] for name in mine if name in read for k in new}
        old, made = ([f"{k} {every.get(k, '')}".strip() for k in names] for names in (mine, new))
        said.append(f"{', '.join(old)} → {', '.join(made)}")
        first, *others = lows
        scaled = [k for k in others if lows[k].scale != lows[first].scale]
        notes += [f"B of {k!r} is multiplied, in fp32: {first!r} has another scale" for k in scaled]
    if not said:
        what = "the whole" if split else "a part"
        raise LoraFxError(
            f"{where}: the adapter has no update of {what} of a fused weight that is known here",
            "--map FILE names wholes and parts, with the rows of each",
        )
    metadata = {**adapter.metadata, "notes": [*adapter.metadata.get("notes", []), *notes]}
    metadata |= {OTHER_READERS: read} if read else {}
    return replace(adapter, entries=entries, metadata=metadata), said


def _regions(adapter: Adapter, base: Tensors) -> dict[str, dict[str, str]]:
    """Regions of whole rows of a matrix, as parts of it; others stay what they are."""
    result: dict[str, dict[str, str]] = {}
    for key, low in adapter.lowrank.items():
        name, layout = base_name(key), low.layout
        if key.endswith("]") and layout and len(layout.stored) == 2 and name in base:
            (out,), (in_,), shape = layout.out, layout.in_, base[name].shape
            bounds = split_key(key, shape)[1]
            if bounds[in_] == (0, shape[in_]):
                low_, high = bounds[out]
                result.setdefault(name, {})[key] = f"{low_}:{high}:{shape[out]}"
    return result


def _linear(key: str, entry: Entry, others: Mapping[str, Entry]) -> LowRank:
    """An update whose rows can be moved; raises for others."""
    if (bias := f"{key.removesuffix('weight')}bias") in others:
        raise LoraFxError(f"{bias!r} is trained too, and cannot move with {key!r}", "--exclude it")
    if isinstance(entry, LowRank) and is_on_base(entry) and variant_of(entry).rows_apart:
        origin = entry.origin
        odd = origin.kernel or origin.tied or entry.use or origin.op in ("embedding", "experts")
        if entry.a.ndim == 2 and not odd:
            return entry
    raise LoraFxError(
        f"{key!r} is {name_of(entry)}; expected LoRA or DoRA of a linear layer",
        "--as lora --rank R makes LoRA of other methods; --exclude leaves it out",
    )


def _example_of_rows(key: str, parts: Iterable[str], lows: Mapping[str, LowRank]) -> dict[str, str]:
    """What a map could say of the parts of a whole: one after another, as large as is known.

    Args:
        key: The whole.
        parts: The names of its parts.
        lows: Updates of the whole or of parts.
    """
    names = [*parts]
    sizes = [len(lows[name].b) if name in lows else 64 for name in names]
    if key in lows:
        out = len(lows[key].b)
        ends = [out * (i + 1) // len(names) for i in range(len(names))]
    else:
        ends = [*accumulate(sizes)]
    starts = [0, *ends]
    return {
        name.removesuffix(".weight"): f"{start}:{end}"
        for name, start, end in zip(names, starts, ends, strict=False)
    }


def _size(key: str, spans: Mapping[str, str], lows: Mapping[str, LowRank], where: str) -> int:
    """How many rows the whole has: by an update of it, or by one of a part and its rows."""
    if not all(spans.values()):
        example = json.dumps({key.removesuffix(".weight"): _example_of_rows(key, spans, lows)})
        raise LoraFxError(
            f"{where}: which rows of {key!r} are whose is not known", f"--map FILE, as {example}"
        )
    numbers = {k: [*map(int, span.split(":"))] for k, span in spans.items()}
    name, low = next(iter(lows.items()))
    first, last, *period = numbers.get(name, (0, len(low.b)))
    if name != key and not period:
        return max(high for _, high, *_ in numbers.values())
    return min(_MOST, (period or [last])[0] * len(low.b) // max(1, last - first))


def _rows(span: str, out: int) -> Array:
    low, high, period = (int(n) for n in f"{span}:{max(1, out)}".split(":")[:3])
    at = np.arange(out)
    return at[(low <= at % period) & (at % period < high)]
