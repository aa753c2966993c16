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
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, ReplacedRows, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.refusal import BASE, MERGED, MergeRefusal
from lora_fx.checkpoint.renaming import renaming
from lora_fx.dtypes import FLOATING, Array, numpy_dtype
from lora_fx.errors import LoraFxError, check_format, stamp
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.stored_tensors import stored_bytes, stored_elements
from lora_fx.files.strict_json import json_value
from lora_fx.targets.target import base_name
from lora_fx.text import Json, JsonView, is_whole

METADATA = "lora_fx.merge"
VERSION = 1
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


def other_model(adapter: Adapter, where: str, base: Checkpoint) -> str:
    """What the configs of an adapter and of a checkpoint say that each is of.

    Empty where one of them does not say it, or both name the same.
    """
    named, config = adapter.metadata.get(NAMED), base.config()
    theirs, kind = config.get("_name_or_path"), config.get("model_type")
    if not isinstance(named, str) or not named or not (theirs or kind):
        return ""
    last = named.rstrip("/").rpartition("/")[2].lower()
    if last in (str(theirs).rstrip("/").rpartition("/")[2].lower(), base.path.name.lower()):
        return ""
    size = config.get("hidden_size")
    described = repr(theirs) if theirs else f"a {kind}"
    described += f" of hidden size {size}" if is_whole(size) else ""
    return (
        f"{where} was trained on {named!r}, says its config; that of {base.path} says {described}"
    )


def base_note(
    adapter: Adapter, where: str, base: Checkpoint, known: Tensors, any_base: bool
) -> str:
    """Why an adapter's base is not verified; empty where the checkpoint is that base.

    Args:
        adapter: An adapter with metadata["base"], or without.
        where: The adapter, for messages.
        base: The checkpoint.
        known: Its tensors under every name that an adapter may use.
        any_base: Say so, instead of raising, where it is another base.

    Raises:
        LoraFxError: The adapter was trained on other weights.
    """
    rename = renaming(adapter, known, base.config(), [])
    recorded: JsonView | None = adapter.metadata.get(FIELD)
    same, why = compared(recorded, lambda n, dtype: sample_of(n, known.get(rename(n)), dtype))
    if same is None:
        if recorded is None and (named := adapter.metadata.get(NAMED)):
            why = f"its config names {named!r}, and holds no sample of the weights"
        return f"{where}: its base is not verified: {why}"
    if same:
        return ""
    said = f"{where}: it was trained on other weights than those of {base.path}"
    if history(base):
        return f"{said}, which other adapters were merged into"
    if any_base:
        return said
    assert recorded is not None  # it was compared
    raise MergeRefusal(
        BASE,
        adapter.lowrank,
        f"{said}: samples of the {len(recorded['names'])} tensors that it changed there differ",
        "merge it into the base that it was trained on; --any-base merges it anyway",
    )


# Which base an adapter was trained on, told by a sample of the weights that it changes.
#
# metadata["base"] of an adapter is {"version", "dtype", "names", "sample"}. `sample` is the sha256
# over the parameters of all low-rank keys, in the order of their `names`: name, shape, and the
# first and last 4096 elements of the stored tensor as the model held them. `dtype` is that of the
# parameters, or {name: dtype} where they differ. `names` stay when updates are taken out later.
#
# A checkpoint's values are cast to `dtype` before they are hashed, so a bfloat16 file that was
# loaded as float32 is the same base.


NAMED = "base_model_name_or_path"
"""Of an adapter's metadata: what PEFT calls its base."""
FIELD = "base"
ENDS = 4096
"""Elements at each end of a tensor that the sample holds."""


def fingerprint(samples: Iterable[tuple[str, tuple[int, ...], Array]]) -> Json:
    """The fingerprint of a base.

    Args:
        samples: (name, shape, both ends) of every parameter; the ends in the model's dtype, see
            `ends`.
    """
    rows = sorted(samples, key=lambda row: row[0])
    dtypes = {name: str(values.dtype) for name, _, values in rows}
    kinds = set(dtypes.values())
    dtype = kinds.pop() if len(kinds) == 1 else dtypes
    names = [name for name, _, _ in rows]
    return {"version": VERSION, "dtype": dtype, "names": names, "sample": _digest(rows)}


def file_fingerprint(keys: Iterable[str], tensors: Tensors) -> Json:
    """{"base": fingerprint} of a checkpoint as it is stored; empty where it lacks one of them."""
    names = parameters_of(keys)
    found = [(n, tensors[n]) for n in names if n in tensors and tensors[n].dtype in FLOATING]
    if not found or len(found) < len(names):
        return {}
    return {FIELD: fingerprint((n, t.shape, _read(t, t.dtype)) for n, t in found)}


def ends(length: int) -> tuple[slice, slice]:
    """The first and the last elements of a flat tensor; they overlap where it is short."""
    return slice(ENDS), slice(max(0, length - ENDS), length)


def parameters_of(keys: Iterable[str]) -> list[str]:
    """The parameters of low-rank keys that a checkpoint can hold: no computed weights."""
    return sorted({base_name(k) for k in keys if not base_name(k).endswith("~")})


Sample = tuple[tuple[int, ...], Array]
"""Shape, and both ends in the dtype asked for; see `ends`."""


class Unknown(Exception):
    """A parameter cannot be sampled, and why."""


def sample_of(name: str, info: TensorInfo | None, dtype: str) -> Sample:
    """The sample of a parameter's tensor in a checkpoint; raises Unknown."""
    if info is None:
        raise Unknown(f"the checkpoint has no tensor {name!r}")
    if info.dtype not in FLOATING:
        raise Unknown(f"{name!r} is {info.dtype} and was {dtype}")
    return info.shape, _read(info, dtype)


def compared(
    recorded: JsonView | None, sample: Callable[[str, str], Sample]
) -> tuple[bool | None, str]:
    """Are these weights those that an adapter was trained on? The reason where it is not known.

    Args:
        recorded: metadata["base"] of the adapter.
        sample: (parameter, dtype) → its sample; raises Unknown.

    Returns:
        True, False, or None with the reason.
    """
    if recorded is None:
        return None, "the adapter does not say what it was trained on"
    damaged = "what the adapter says of its base is damaged"
    try:
        version, dtype, digest = recorded["version"], recorded["dtype"], str(recorded["sample"])
        names = sorted(str(name) for name in recorded["names"])
        dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(names, str(dtype))
    except (TypeError, LookupError):
        return None, damaged
    if version != VERSION:
        return None, f"what the adapter says of its base is of version {version!r}"
    if not names or not all(str(dtypes.get(n)) in FLOATING for n in names):
        return None, damaged
    try:
        rows = [(name, *sample(name, str(dtypes[name]))) for name in names]
    except Unknown as why:
        return None, str(why)
    return _digest(rows) == digest, ""


def _digest(rows: Iterable[tuple[str, tuple[int, ...], Array]]) -> str:
    whole = hashlib.sha256()
    for name, shape, values in rows:
        whole.update(json.dumps([name, list(shape), str(values.dtype)]).encode())
        whole.update(np.ascontiguousarray(values).view(np.uint8).data)
    return whole.hexdigest()


def _read(info: TensorInfo, dtype: str) -> Array:
    """Both ends of a stored tensor, cast."""
    first, last = stretches(info, ENDS, (0.0, 1.0))
    return cast(np.concatenate([first[:ENDS], last[-ENDS:]]), dtype)


def stretches(info: TensorInfo, count: int, places: Sequence[float]) -> list[Array]:
    """Some `count` elements of a tensor at each of these places, 0 its start and 1 its end.

    Fewer where it is shorter; more of codes, which are read by whole rows.
    """
    if isinstance(info, CodesInfo):
        size, count = math.prod(info.shape[:-1]), -(-count // info.shape[-1])
        read = info.weight.rows
    else:
        # by its bytes: the shape of a stack is that of all its matrices, and these are the first's
        size = (info.stop - info.start) // numpy_dtype(info.dtype).itemsize
        read = partial(stored_elements, info)
    few = min(count, size)
    starts = (int(place * (size - few)) for place in places)
    return [read(at, at + few).reshape(-1) for at in starts]


def cast(values: Array, dtype: str) -> Array:
    """Values in a dtype by name; what it cannot hold becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(numpy_dtype(dtype))
