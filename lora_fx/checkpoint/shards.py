"""How an output file lies on disk: its header, and where each tensor's bytes go.

Names, their order and the order of the bytes are the base's; new tensors come last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fx.checkpoint.plan import Change, Plan
from lora_fx.checkpoint.provenance import METADATA
from lora_fx.files.safetensors import DTYPES, Header, TensorInfo

CODES = {name: code for code, (name, _) in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """One tensor of an output file: where it will lie, and what it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    source: TensorInfo
    change: Change | None


@dataclass(frozen=True)
class Shard:
    """One output file with its header; `slots` in the order of their bytes."""

    source: Path
    target: Path
    head: bytes
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.head) + sum(s.stop - s.start for s in self.slots)


def lay_out(
    plan: Plan, source: Path, target: Path, name: str, header: Header, text: str
) -> Shard | None:
    """The output file of a shard; None where nothing in it changes."""
    mine = {
        n: plan.changes[n]
        for n, info in header.tensors.items()
        if n in plan.changes and plan.base.tensors[n] == info
    }
    new = [plan.changes[n] for n, home in plan.added.items() if home == name]
    if not mine and not new:
        return None
    slots, at = [], 0
    by_start = sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    for n, info in by_start:
        change = mine.get(n)
        dtype, size = info.dtype, info.stop - info.start
        if change is not None:
            dtype, size = change.dtype, change.nbytes
        slots.append(Slot(n, dtype, info.shape, at, at + size, info, change))
        at += size
    for change in new:
        size = change.nbytes
        slots.append(
            Slot(change.name, change.dtype, change.shape, at, at + size, change.source, change)
        )
        at += size
    place = {s.name: s for s in slots}
    # A file without metadata loads in transformers, one without this of its metadata does not.
    metadata = header.metadata or {"format": "pt"}
    entries: dict[str, Any] = {"__metadata__": {**metadata, METADATA: text}}
    for n in (*header.tensors, *(c.name for c in new)):
        s = place[n]
        entries[n] = {
            "dtype": CODES[s.dtype],
            "shape": list(s.shape),
            "data_offsets": [s.start, s.stop],
        }
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return Shard(source, target, len(body).to_bytes(8, "little") + body, tuple(slots))
