"""The origin of merged weights: hashes of base and adapters in the metadata of files.

`lora_fx.merge` in the `__metadata__` of every shard that a merge wrote is JSON: a list of merges,
oldest first, each {"version", "format", "base": {"layout", "sample"}, "adapters": [{"hash",
"weight"}], "dtype"} and, where they are not the defaults, "options": how, rank, allow_unused,
allow_missing. A base and an adapter of the Hub have "hub": ORG/NAME@COMMIT.
Nothing else in it depends on the time or on paths, so equal inputs give equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from lora_fx.checkpoint.refusal import MERGED, MergeRefusal
from lora_fx.errors import LoraFxError, check_format, stamp
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.stored_tensors import stored_bytes
from lora_fx.files.strict_json import json_value
from lora_fx.text import Json, JsonView

METADATA = "lora_fx.merge"
SAMPLE = 32 << 10
"""The number of bytes at each end of a tensor that a sample holds."""


def layout_hash(tensors: Tensors) -> str:
    """Return a hash of the sorted (name, dtype, shape) of all tensors, equal for all fine-tunes."""
    rows = sorted((name, info.dtype, list(info.shape)) for name, info in tensors.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def sample_hash(tensors: Iterable[tuple[str, TensorInfo]]) -> str:
    """Return a hash of both ends of these tensors; a base and its fine-tunes differ in it."""
    digest = hashlib.sha256()
    for name, info in sorted(tensors, key=lambda item: item[0]):
        size = info.stop - info.start
        first = stored_bytes(info, 0, min(SAMPLE, size))
        last = stored_bytes(info, max(0, size - SAMPLE), size)
        digest.update(name.encode() + b"\0" + first.tobytes() + last.tobytes())
    return digest.hexdigest()


def history(checkpoint: Checkpoint) -> list[Json]:
    """Return the merges that a checkpoint records, from the shard with the most of them."""
    shards = (checkpoint.of or checkpoint).shards  # those of a view are not on disk
    histories = []
    for name, header in shards.items():
        text = header.metadata.get(METADATA)
        histories.append(merges_of(text, str(checkpoint.folder / name)))
    return max(histories, key=len, default=[])


def merges_of(text: str | None, where: str) -> list[Json]:
    """Return the merges in a file's metadata; empty if it records none.

    Raises:
        LoraFxError: The text is not a list of merges, or a later lora-fx wrote it.
    """
    if text is None:
        return []
    place = f"{where}: metadata {METADATA}"
    hint = "check whether the file was edited"
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
    """Raise if one of the adapters, given as (where, hash), is already merged into a file."""
    merged: set[object] = set()
    for merge in merges:
        merged |= {adapter.get("hash") for adapter in merge["adapters"]}
    for where, digest in adapters:
        if digest in merged and not again:
            raise MergeRefusal(
                MERGED,
                (),
                f"{path}: {where} is already merged into it",
                "start from the original base; or pass --again to merge it once more",
            )
