"""Where merged weights came from: hashes of a base and of an adapter, in the files' metadata.

`lora_fx.merge` in the `__metadata__` of every shard that a merge wrote is JSON: a list of merges,
oldest first, each {"version", "format", "base": {"layout", "sample"}, "adapters": [{"hash",
"weight"}], "dtype"} and, where they are not the defaults, "options": how, rank, allow_unused,
allow_missing. A base and an adapter of the Hub have "hub": ORG/NAME@COMMIT.
Nothing else in it depends on the time or on paths, so equal inputs give equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, ReplacedRows, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.refusal import MERGED, MergeRefusal
from lora_fx.errors import LoraFxError, check_format, stamp
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.read import json_value
from lora_fx.files.safetensors import TensorInfo, Tensors, stored_bytes
from lora_fx.text import Json, JsonView

METADATA = "lora_fx.merge"
SAMPLE = 32 << 10
"""Bytes at each end of a tensor that its sample holds."""


_HASHED: Mapping[type[Entry], tuple[str, ...]] = {
    LowRank: ("a", "b", "scale"),
    Full: ("value",),
    Hadamard: ("a1", "b1", "a2", "b2", "scale"),
    Kronecker: ("w1", "w2", "scale"),
    Rotation: ("turn",),
    Dense: ("value", "scale"),
    ReplacedRows: ("index", "value"),
}
"""What of an update its adapter's hash is made of, in order."""


def layout_hash(tensors: Tensors) -> str:
    """A hash of the sorted (name, dtype, shape) of all tensors: every fine-tune has its base's."""
    rows = sorted((n, t.dtype, list(t.shape)) for n, t in tensors.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def sample_hash(tensors: Iterable[tuple[str, TensorInfo]]) -> str:
    """A hash of both ends of these tensors, by name, which tells a base from its fine-tunes."""
    whole = hashlib.sha256()
    for name, info in sorted(tensors, key=lambda item: item[0]):
        size = info.stop - info.start
        first = stored_bytes(info, 0, min(SAMPLE, size))
        last = stored_bytes(info, max(0, size - SAMPLE), size)
        whole.update(name.encode() + b"\0" + first.tobytes() + last.tobytes())
    return whole.hexdigest()


def adapter_hash(adapter: Adapter) -> str:
    """A hash of all factors and scales, by key; names of files and metadata do not count."""
    whole = hashlib.sha256()
    for key in sorted(adapter.entries):
        whole.update(key.encode() + b"\0")
        entry = adapter.entries[key]
        parts = [(name, getattr(entry, name)) for name in _HASHED[type(entry)]]
        if isinstance(entry, LowRank):
            parts += variant_of(entry).beside(entry).items()
        for name, part in parts:
            if isinstance(part, np.ndarray):
                whole.update(f"{part.dtype}{part.shape}".encode())
                whole.update(np.ascontiguousarray(part).data.cast("B") if part.size else b"")
            elif part is not None:
                number = float(part) if name == "scale" else tuple(part)
                whole.update(repr(number).encode() + b"\0")
    return whole.hexdigest()


def history(checkpoint: Checkpoint) -> list[Json]:
    """The merges that a checkpoint has been through; of the shard that has most of them."""
    shards = (checkpoint.of or checkpoint).shards  # those of a view are not on disk
    texts = ((n, h.metadata.get(METADATA)) for n, h in shards.items())
    every = [merges_of(text, str(checkpoint.folder / name)) for name, text in texts]
    return max(every, key=len, default=[])


def merges_of(text: str | None, where: str) -> list[Json]:
    """The merges that a file's metadata tells of; none where it has no such text.

    Raises:
        LoraFxError: It is no list of merges, or a later lora-fx wrote it.
    """
    place = f"{where}: metadata {METADATA}"
    merges = [] if text is None else json_value(text, place, hint="was the file edited?")
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        raise LoraFxError(f"{place} is no list of merges", "was the file edited?")
    merges = [{**stamp(), **merge} for merge in merges]  # 0.1 wrote version alone
    for merge in merges:
        check_format(merge, place)
    return merges


def _is_merge(merge: object) -> bool:
    adapters = merge.get("adapters") if isinstance(merge, dict) else None
    return isinstance(adapters, list) and all(
        isinstance(a, dict) and isinstance(a.get("hash", ""), str) for a in adapters
    )


def refuse_again(
    path: Path, merges: Iterable[JsonView], adapters: Iterable[tuple[str, str]], *, again: bool
) -> None:
    """Raise where one of the adapters, (where, hash), is in the merges of a file already."""
    folded = {a.get("hash") for m in merges for a in m["adapters"]}
    for where, digest in adapters:
        if digest in folded and not again:
            raise MergeRefusal(
                MERGED,
                (),
                f"{path}: {where} is merged into it already",
                "start from the original base; --again merges it once more",
            )
