"""The layout of an output file: its header, and the place of each tensor's bytes.

Names, their order and the order of the bytes are the base's; new tensors come last.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.checkpoint.provenance import METADATA
from lora_fx.checkpoint.tensor_change import TensorChange
from lora_fx.dtypes import DTYPES
from lora_fx.files.safetensors import Header, TensorInfo
from lora_fx.text import Json


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of an output file: its place, and its source."""

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
        return len(self.head) + sum(slot.stop - slot.start for slot in self.slots)


def untouched_runs(slots: Iterable[TensorSlot]) -> Iterator[list[TensorSlot]]:
    """Untouched tensors that lie one behind the other, in what is read as in what is written."""

    def shift(slot: TensorSlot) -> tuple[Path, int] | None:
        if slot.change is not None:
            return None
        return slot.source.file, slot.source.start - slot.start

    for file_and_shift, run in itertools.groupby(slots, shift):
        if file_and_shift is not None:
            yield [*run]


def lay_out(plan: MergePlan, name: str, target: Path, record: str) -> Shard | None:
    """Lay out the output file of a shard; None where nothing in it changes.

    Args:
        plan: The plan.
        name: The shard's name.
        target: The output file.
        record: What its metadata says of the merge.
    """
    header = plan.base.shards[name]
    changes: dict[str, TensorChange] = {}
    for tensor, info in header.tensors.items():
        if tensor in plan.changes and plan.base.tensors[tensor] == info:
            changes[tensor] = plan.changes[tensor]
    added = [plan.changes[tensor] for tensor, home in plan.added.items() if home == name]
    if not changes and not added and plan.base.of is None:
        return None

    slots = _slots(header, changes, added)
    head = _head(header, slots, added, record)
    return Shard(target, head, tuple(slots.values()))


def _slots(
    header: Header, changes: Mapping[str, TensorChange], added: Sequence[TensorChange]
) -> dict[str, TensorSlot]:
    """The place of each tensor in the output: in the order of the base, new tensors last."""
    slots: dict[str, TensorSlot] = {}
    start = 0

    def place(name: str, info: TensorInfo, change: TensorChange | None) -> None:
        nonlocal start
        dtype = info.dtype if change is None else change.dtype
        size = info.stop - info.start if change is None else change.nbytes
        slots[name] = TensorSlot(name, dtype, start, start + size, info, change)
        start += size

    def position(item: tuple[str, TensorInfo]) -> tuple[Path, int, int]:
        _, info = item
        return info.file, info.start, info.stop

    for name, info in sorted(header.tensors.items(), key=position):
        place(name, info, changes.get(name))
    for change in added:
        place(change.name, change.source, change)
    return slots


def _head(
    header: Header,
    slots: Mapping[str, TensorSlot],
    added: Sequence[TensorChange],
    record: str,
) -> bytes:
    """The header of an output file: names in the base's order, new ones last."""
    # A file without metadata loads in transformers, one without this of its metadata does not.
    metadata = header.metadata or {"format": "pt"}
    entries: Json = {"__metadata__": {**metadata, METADATA: record}}
    for name in (*header.tensors, *(change.name for change in added)):
        slot = slots[name]
        entries[name] = {
            "dtype": DTYPES[slot.dtype].code,
            "shape": list(slot.source.shape),
            "data_offsets": [slot.start, slot.stop],
        }
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body
