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
from lora_fx.checkpoint.tensor_change import TensorChange
from lora_fx.dtypes import DTYPES
from lora_fx.files.safetensors import Header, TensorInfo
from lora_fx.probe.probe import PROPERTY
from lora_fx.text import Json


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of an output file: its position and its source."""

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
        """The size of the file in bytes."""
        return len(self.head) + sum(slot.stop - slot.start for slot in self.slots)


def untouched_runs(slots: Iterable[TensorSlot]) -> Iterator[list[TensorSlot]]:
    """Yield runs of untouched tensors that are adjacent both in the source and in the output."""

    def shift(slot: TensorSlot) -> tuple[Path, int] | None:
        if slot.change is not None:
            return None
        return slot.source.file, slot.source.start - slot.start

    for file_and_shift, run in itertools.groupby(slots, shift):
        if file_and_shift is not None:
            yield [*run]


def lay_out(plan: MergePlan, name: str, target: Path, texts: Mapping[str, str]) -> Shard | None:
    """Lay out the output file of a shard; return None if nothing in it changes.

    Args:
        plan: The plan.
        name: The shard's name.
        target: The output file.
        texts: What its metadata says of the merge.
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
    head = _head(header, slots, added, texts)
    return Shard(target, head, tuple(slots.values()))


def _slots(
    header: Header, changes: Mapping[str, TensorChange], added: Sequence[TensorChange]
) -> dict[str, TensorSlot]:
    """Return each tensor's position in the output: the base's order, then new tensors."""
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
    texts: Mapping[str, str],
) -> bytes:
    """Return the header of an output file: names in the base's order, then new tensors."""
    # A file without metadata loads in transformers, one without this of its metadata does not.
    metadata = dict(header.metadata or {"format": "pt"})
    metadata.pop(PROPERTY, None)  # an earlier merge's
    entries: Json = {"__metadata__": {**metadata, **texts}}
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
