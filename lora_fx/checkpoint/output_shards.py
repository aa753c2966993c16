"""How an output file lies on disk: its header, and where each tensor's bytes go.

Names, their order and the order of the bytes are the base's; new tensors come last.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.checkpoint.provenance import METADATA
from lora_fx.checkpoint.tensor_change import TensorChange
from lora_fx.dtypes import DTYPES
from lora_fx.files.safetensors import TensorInfo
from lora_fx.text import Json


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of an output file: where it will lie, and what it is made of."""

    name: str
    dtype: str
    start: int
    stop: int
    source: TensorInfo
    change: TensorChange | None


@dataclass(frozen=True)
class Shard:
    """One output file with its header; `slots` in the order of their bytes."""

    target: Path
    head: bytes
    slots: tuple[TensorSlot, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.head) + sum(s.stop - s.start for s in self.slots)


def untouched_runs(slots: Iterable[TensorSlot]) -> Iterator[list[TensorSlot]]:
    """Untouched tensors that lie one behind the other, in what is read as in what is written."""

    def shift(slot: TensorSlot) -> tuple[Path, int] | None:
        return None if slot.change else (slot.source.file, slot.source.start - slot.start)

    for where, run in itertools.groupby(slots, shift):
        if where is not None:
            yield [*run]


def lay_out(plan: MergePlan, name: str, target: Path, text: str) -> Shard | None:
    """The output file of a shard; None where nothing in it changes."""
    header = plan.base.shards[name]
    mine = {
        n: plan.changes[n]
        for n, info in header.tensors.items()
        if n in plan.changes and plan.base.tensors[n] == info
    }
    new = [plan.changes[n] for n, home in plan.added.items() if home == name]
    if not mine and not new and plan.base.of is None:
        return None
    place: dict[str, TensorSlot] = {}
    at = 0
    by_start = sorted(header.tensors.items(), key=lambda n: (n[1].file, n[1].start, n[1].stop))
    old = [(n, info, mine.get(n)) for n, info in by_start]
    for n, info, change in [*old, *((c.name, c.source, c) for c in new)]:
        size = change.nbytes if change else info.stop - info.start
        place[n] = TensorSlot(n, (change or info).dtype, at, at + size, info, change)
        at += size
    # A file without metadata loads in transformers, one without this of its metadata does not.
    metadata = header.metadata or {"format": "pt"}
    entries: Json = {"__metadata__": {**metadata, METADATA: text}}
    for n in (*header.tensors, *(c.name for c in new)):
        s = place[n]
        code, shape = DTYPES[s.dtype].code, list(s.source.shape)
        entries[n] = {"dtype": code, "shape": shape, "data_offsets": [s.start, s.stop]}
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return Shard(target, len(body).to_bytes(8, "little") + body, tuple(place.values()))
