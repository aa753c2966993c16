"""The origin of merged weights: hashes of the base and the adapters, in the files' metadata.

`lora_fx.merge` in the `__metadata__` of every shard that a merge wrote is JSON: a list of merges,
oldest first, each {"version", "format", "base": {"layout", "sample"}, "adapters": [{"hash",
"weight"}], "dtype"} and, where they are not the defaults, "options": how, rank, allow_unused,
allow_missing. A base and an adapter of the Hub have "hub": ORG/NAME@COMMIT.
Nothing else in it depends on the time or on paths, so equal inputs give equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, ReplacedRows, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.refusal import MERGED, MergeRefusal
from lora_fx.errors import LoraFxError, check_format, stamp
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.stored_tensors import stored_bytes
from lora_fx.files.strict_json import json_value
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
"""The fields of an update that go into its adapter's hash, in order."""


def layout_hash(tensors: Tensors) -> str:
    """A hash of the sorted (name, dtype, shape) of all tensors: every fine-tune has its base's."""
    rows = sorted((name, info.dtype, list(info.shape)) for name, info in tensors.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def sample_hash(tensors: Iterable[tuple[str, TensorInfo]]) -> str:
    """A hash of both ends of these tensors, which differs between a base and its fine-tunes."""
    digest = hashlib.sha256()
    for name, info in sorted(tensors, key=lambda item: item[0]):
        size = info.stop - info.start
        first = stored_bytes(info, 0, min(SAMPLE, size))
        last = stored_bytes(info, max(0, size - SAMPLE), size)
        digest.update(name.encode() + b"\0" + first.tobytes() + last.tobytes())
    return digest.hexdigest()


def adapter_hash(adapter: Adapter) -> str:
    """A hash of all factors and scales, by key; names of files and metadata do not count."""
    digest = hashlib.sha256()
    for key in sorted(adapter.entries):
        digest.update(key.encode() + b"\0")
        for name, value in _hashed(adapter.entries[key]):
            if isinstance(value, np.ndarray):
                digest.update(f"{value.dtype}{value.shape}".encode())
                if value.size:
                    digest.update(np.ascontiguousarray(value).data.cast("B"))
            elif value is not None:
                number = float(value) if name == "scale" else tuple(value)
                digest.update(repr(number).encode() + b"\0")
    return digest.hexdigest()


def _hashed(entry: Entry) -> Iterator[tuple[str, Any]]:
    """The fields of an update that its adapter's hash is made of, in order."""
    for name in _HASHED[type(entry)]:
        yield name, getattr(entry, name)
    if isinstance(entry, LowRank):
        yield from variant_of(entry).beside(entry).items()


def history(checkpoint: Checkpoint) -> list[Json]:
    """The merges that a checkpoint has been through; of the shard that has most of them."""
    shards = (checkpoint.of or checkpoint).shards  # those of a view are not on disk
    histories = []
    for name, header in shards.items():
        text = header.metadata.get(METADATA)
        histories.append(merges_of(text, str(checkpoint.folder / name)))
    return max(histories, key=len, default=[])


def merges_of(text: str | None, where: str) -> list[Json]:
    """The merges in a file's metadata; empty if it records none.

    Raises:
        LoraFxError: The text is not a list of merges, or a later lora-fx wrote it.
    """
    if text is None:
        return []
    place = f"{where}: metadata {METADATA}"
    hint = "was the file edited?"
    merges = json_value(text, place, hint=hint)
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        raise LoraFxError(f"{place} is not a list of merges", hint)
    merges = [{**stamp(), **merge} for merge in merges]  # 0.1 wrote version alone
    for merge in merges:
        check_format(merge, place)
    return merges


def _is_merge(merge: object) -> bool:
    """Whether a part of a file's metadata has the form of a merge."""
    if not isinstance(merge, dict) or not isinstance(merge.get("adapters"), list):
        return False
    return all(
        isinstance(adapter, dict) and isinstance(adapter.get("hash", ""), str)
        for adapter in merge["adapters"]
    )


def refuse_again(
    path: Path, merges: Iterable[JsonView], adapters: Iterable[tuple[str, str]], *, again: bool
) -> None:
    """Raise if one of the adapters, (where, hash), is already in the merges of a file."""
    merged: set[object] = set()
    for merge in merges:
        merged |= {adapter.get("hash") for adapter in merge["adapters"]}
    for where, digest in adapters:
        if digest in merged and not again:
            raise MergeRefusal(
                MERGED,
                (),
                f"{path}: {where} is already merged into it",
                "start from the original base; --again merges it once more",
            )
