"""An adapter refitted: updates of parts of fused weights as updates of the whole, or back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.bind import OTHER_READERS
from lora_fx.adapter.fused import joined, sliced
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, is_on_base, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.fused_rows import known_rows, rows_of_map
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.safetensors import Tensors
from lora_fx.files.strict_json import read_json
from lora_fx.targets.keys import base_name, split_key
from lora_fx.text import JsonView

_MOST = 10**6
"""Rows that a whole can have."""


@dataclass(frozen=True)
class Span:
    """Rows low ≤ i < high of a whole or, with a period, of every so many rows of it."""

    low: int
    high: int
    period: int | None = None

    @classmethod
    def of(cls, text: str) -> Span:
        """The span of `LOW:HIGH` or `LOW:HIGH:PERIOD`."""
        return cls(*map(int, text.split(":")))

    def rows(self, out: int) -> Array:
        """The numbers of the rows, in a whole of `out` rows."""
        rows = np.arange(out)
        period = max(1, out) if self.period is None else self.period
        return rows[(self.low <= rows % period) & (rows % period < self.high)]


def refitted(
    adapter: Adapter, base: str | None, fuse: bool, split: bool, table: str | None
) -> tuple[Adapter, list[str]]:
    """Fuse or split an adapter's updates of fused weights; returns what became of which, too.

    Args:
        adapter: As a loader returned it.
        base: The checkpoint that gives the rows of each part and the size of each whole tensor.
        fuse: Parts, and regions of one tensor, become the whole.
        split: Wholes become parts.
        table: A file that gives the rows of each part.

    Raises:
        LoraFxError: Nothing to do, rows that are not known or are no division of the whole, an
            update that is no LoRA or DoRA of a linear layer.
    """
    if fuse == split or not (base or table):
        raise LoraFxError(
            "expected one of --fuse and --split, with --base or --map",
            "for example --fuse --base FOLDER",
        )
    tensors: Tensors = {}
    config: JsonView = {}
    if base:
        opened = open_checkpoint(base)
        tensors = opened.tensors
        config = opened.config()
    if table:
        rows = rows_of_map(adapter, read_json(table), table)
    else:
        rows = known_rows(adapter, tensors, config, apart=split)
    regions = _regions(adapter, tensors) if fuse else {}

    refit = _Refit(adapter, table or str(base), split=split)
    for key in {**rows, **regions}:
        refit.move(key, rows.get(key, {}), regions.get(key, {}))
    if not refit.moves:
        what = "the whole" if split else "a part"
        raise LoraFxError(
            f"{refit.where}: the adapter has no update of {what} of a known fused weight",
            "pass --map FILE, which names fused weights and their parts, with the rows of each",
        )
    metadata = {
        **adapter.metadata,
        "notes": [*adapter.metadata.get("notes", []), *refit.notes],
    }
    if refit.readers:
        metadata[OTHER_READERS] = refit.readers
    return replace(adapter, entries=refit.entries, metadata=metadata), refit.moves


class _Refit:
    """The state of an adapter while parts become whole tensors, or whole tensors parts.

    Args:
        adapter: Its updates.
        where: The file that gives the rows of each part, for messages.
        split: Wholes become parts; else parts become wholes.

    Attributes:
        entries: The updates so far.
        readers: Key → what else reads its tensor.
        moves: A line for each conversion, for people.
        notes: Warnings for the user.
    """

    def __init__(self, adapter: Adapter, where: str, *, split: bool) -> None:
        self.where = where
        self.split = split
        self.entries = dict(adapter.entries)
        self.readers = dict(adapter.metadata.get(OTHER_READERS) or {})
        self.moves: list[str] = []
        self.notes: list[str] = []

    def move(self, whole: str, parts: Mapping[str, str], regions: Mapping[str, str]) -> None:
        """Replace the updates of one whole tensor, or of its parts.

        Args:
            whole: Its key.
            parts: Key of each part → its rows.
            regions: Key of each region that has an update → its rows.
        """
        spans = {**parts, **regions}
        names = [whole] if self.split else [whole, *spans]
        updated = [name for name in dict.fromkeys(names) if name in self.entries]
        if not updated or (updated == [whole] and not self.split):
            return

        lows: dict[str, LowRank] = {}
        for name in updated:
            lows[name] = _linear(name, self.entries.pop(name), self.entries)
        out = _size(whole, spans, lows, self.where)
        rows = {name: Span.of(span).rows(out) for name, span in spans.items()}
        rows[whole] = np.arange(out)
        self._check_division(whole, parts, rows)
        if self.split:
            replacing = _split(lows[whole], {part: rows[part] for part in parts})
        else:
            pieces = {name: (low, rows[name]) for name, low in lows.items()}
            replacing = {whole: joined(whole, out, pieces)}

        overwritten = self.entries.keys() & replacing.keys()
        if overwritten:
            raise LoraFxError(
                f"{min(overwritten)!r} already has another update", "leave that out with --exclude"
            )
        self.entries |= replacing
        self._tell(lows, replacing, spans)

    def _check_division(
        self, whole: str, parts: Mapping[str, str], rows: Mapping[str, Array]
    ) -> None:
        """Raise where a row of the whole is in no part, or in two."""
        covered = np.concatenate([rows[name] for name in parts or [whole]])
        if np.array_equal(np.sort(covered), rows[whole]):
            return
        raise LoraFxError(
            f"{self.where}: {whole!r} has {len(rows[whole])} rows, and the parts "
            f"{', '.join(parts)} do not cover each row once",
            f"put each row into exactly one part; found {json.dumps(parts)}",
        )

    def _tell(
        self,
        lows: Mapping[str, LowRank],
        replacing: Mapping[str, LowRank],
        spans: Mapping[str, str],
    ) -> None:
        """Record what became of updates: other readers of their tensors, the move, notes."""
        for name in lows:
            if name in self.readers:
                for key in replacing:
                    self.readers[key] = self.readers[name]

        before = [f"{key} {spans.get(key, '')}".strip() for key in lows]
        after = [f"{key} {spans.get(key, '')}".strip() for key in replacing]
        self.moves.append(f"{', '.join(before)} → {', '.join(after)}")

        first, *others = lows
        for key in others:
            if lows[key].scale != lows[first].scale:
                self.notes.append(
                    f"B of {key!r} is rescaled in fp32, because {first!r} has another scale"
                )


def _split(low: LowRank, rows: Mapping[str, Array]) -> dict[str, LowRank]:
    """The update of each part; those that change nothing are left out, unless none does."""
    parts = {key: sliced(low, part_rows) for key, part_rows in rows.items()}
    changing = {}
    for key, part in parts.items():
        if part.b.any() or variant_of(part).reads_weight:
            changing[key] = part
    return changing or parts


def _regions(adapter: Adapter, base: Tensors) -> dict[str, dict[str, str]]:
    """Regions of whole rows of a matrix, as parts of it; others stay what they are.

    Returns:
        Tensor → key of a region that is updated → its rows.
    """
    regions: dict[str, dict[str, str]] = {}
    for key, low in adapter.lowrank.items():
        name = base_name(key)
        layout = low.layout
        if not key.endswith("]") or name not in base:
            continue
        if layout is None or len(layout.stored) != 2:
            continue
        (out,) = layout.out
        (in_,) = layout.in_
        shape = base[name].shape
        _, bounds = split_key(key, shape)
        if bounds[in_] == (0, shape[in_]):
            start, end = bounds[out]
            regions.setdefault(name, {})[key] = f"{start}:{end}:{shape[out]}"
    return regions


def _linear(key: str, entry: Entry, others: Mapping[str, Entry]) -> LowRank:
    """Return a LoRA or DoRA update whose rows can be moved; raise for others."""
    bias = f"{key.removesuffix('weight')}bias"
    if bias in others:
        raise LoraFxError(
            f"{bias!r} is trained too, and cannot be fused or split with {key!r}", "--exclude it"
        )
    if isinstance(entry, LowRank) and _has_movable_rows(entry):
        return entry
    raise LoraFxError(
        f"{key!r} is {name_of(entry)}; expected LoRA or DoRA of a linear layer",
        "--as lora --rank R turns other methods into LoRA; --exclude leaves it out",
    )


def _has_movable_rows(low: LowRank) -> bool:
    """Whether rows of an update's B stand for rows of the weight, and each can be had alone."""
    if not is_on_base(low) or not variant_of(low).rows_apart:
        return False
    origin = low.origin
    if origin.kernel or origin.tied or low.use:
        return False
    return origin.op not in ("embedding", "experts") and low.a.ndim == 2


def _example_of_rows(key: str, parts: Iterable[str], lows: Mapping[str, LowRank]) -> dict[str, str]:
    """An example of a map: the parts of a tensor one after another, in their known sizes.

    Args:
        key: The whole.
        parts: The names of its parts.
        lows: Updates of the whole or of parts.
    """
    names = [*parts]
    example: dict[str, str] = {}
    start = 0
    for i, name in enumerate(names):
        if key in lows:
            end = len(lows[key].b) * (i + 1) // len(names)
        elif name in lows:
            end = start + len(lows[name].b)
        else:
            end = start + 64
        example[name.removesuffix(".weight")] = f"{start}:{end}"
        start = end
    return example


def _size(key: str, spans: Mapping[str, str], lows: Mapping[str, LowRank], where: str) -> int:
    """Count the rows of a whole, by an update of it, or by one of a part and that part's rows.

    Raises:
        LoraFxError: The rows of a part are not known.
    """
    if not all(spans.values()):
        example = json.dumps({key.removesuffix(".weight"): _example_of_rows(key, spans, lows)})
        raise LoraFxError(
            f"{where}: the rows of the parts of {key!r} are not known",
            f"pass --map FILE with content such as {example}",
        )
    by_name = {name: Span.of(span) for name, span in spans.items()}
    name, low = next(iter(lows.items()))
    count = len(low.b)
    span = by_name.get(name, Span(0, count))
    if name != key and span.period is None:
        return max(other.high for other in by_name.values())
    period = span.high if span.period is None else span.period
    return min(_MOST, period * count // max(1, span.high - span.low))
