"""A base and an adapter side by side, for doctor: what is known of both, sound or not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.int8 import Int8, stored_as
from lora_fx.checkpoint.match import match, named, stacked
from lora_fx.checkpoint.provenance import adapter_hash
from lora_fx.checkpoint.renaming import Renaming, renaming
from lora_fx.checkpoint.tied import Tie, tie_of
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, open_checkpoint
from lora_fx.files.copying import read_at
from lora_fx.files.safetensors import WEIGHTS, TensorInfo
from lora_fx.formats.io import format_of, load_adapter
from lora_fx.formats.peft_raw import Raw, read_raw
from lora_fx.targets.target import base_name

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        keys: Of the adapter, or names of tensors, that it is about.
        found: What is there.
        expected: What should be.
        hint: What to do.
        severity: error: the pair is wrong; warning: look at it; note. Of the check, where empty.
        check: Name of the check.
    """

    keys: Sequence[str]
    found: str
    expected: str
    hint: str
    severity: str = ""
    check: str = ""

    def to_json(self) -> dict[str, Any]:
        """One row of `findings[]`."""
        return {
            "check": self.check,
            "severity": self.severity,
            "keys": list(self.keys),
            "found": self.found,
            "expected": self.expected,
            "hint": self.hint,
        }


@dataclass(frozen=True)
class Pair:
    """What the checks look at.

    Attributes:
        base: The checkpoint.
        config: Its config.json.
        tensors: Its tensors, a tied head that is not stored among them.
        tie: Of head and embedding.
        path: The adapter.
        raw: Its file without judgement; None for formats other than PEFT's.
        adapter: As far as it can be read.
        refusal: Why its reader does not take it.
        rename: The adapter's names → the base's.
        misfits: Key → why it does not fit its tensor.
        digest: The hash under which a merge records the adapter; empty where it is refused.
    """

    base: Checkpoint
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    tie: Tie | None
    path: Path
    raw: Raw | None
    adapter: Adapter
    refusal: LoraFxError | None
    rename: Renaming
    misfits: Mapping[str, str]
    digest: str

    @property
    def fields(self) -> Mapping[str, Any]:
        """adapter_config.json; empty where there is none."""
        return self.raw.config if self.raw else {}

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The tensors of the adapter's file."""
        return self.raw.tensors if self.raw else {}

    def tensor(self, key: str) -> TensorInfo | None:
        """The base's tensor of a key."""
        return self.rename.info(base_name(key), self.tensors)

    def int8(self, key: str) -> Int8 | None:
        """How the base's tensor of a key is stored, where that is int8 that merge takes."""
        info = self.tensor(key)
        try:
            return stored_as(self.rename(base_name(key)), info, self.base) if info else None
        except LoraFxError:
            return None

    def ratio(self, key: str) -> float | None:
        """‖ΔW‖/‖W‖: ΔW exactly, W from samples of its tensor; None where it cannot be had."""
        low, info = self.adapter.lowrank.get(key), self.tensor(key)
        if low is None or info is None or not math.prod(info.shape):
            return None
        if info.dtype in WEIGHTS:
            rms = math.sqrt(float(np.mean(np.square(sample(info)))))
        elif (int8 := self.int8(key)) is not None:
            rms = int8.rms(info)
        else:
            return None
        size = norm(low)
        weight = math.sqrt(math.prod(info.shape)) * rms
        return size / weight if weight and math.isfinite(size) else None


def open_pair(base: str | Path, adapter: str | Path) -> Pair:
    """Read the headers of a base and the whole of an adapter.

    Raises:
        LoraFxError: A file that cannot be read at all.
    """
    checkpoint, path = open_checkpoint(Path(base)), Path(adapter)
    read: Adapter | None = None
    refusal, digest = None, ""
    try:
        read = load_adapter(path)
        digest = adapter_hash(read)
        read = named(read, checkpoint.tensors)
    except LoraFxError as error:
        refusal = error
    raw = None
    try:
        raw = read_raw(path) if _of_peft(path) else None
    except LoraFxError:
        if refusal is not None:
            raise refusal from None
    if read is None and raw is None:
        read = load_adapter(path, base=base)  # its names are not the base's; or this raises
    if read is None:
        assert raw is not None
        read = raw.adapter()
    tensors, config = dict(checkpoint.tensors), checkpoint.config()
    tie = tie_of(tensors, config, read.entries)
    if tie is not None:
        tensors = tie.known(tensors)
    rename = renaming(read, tensors, config, [])
    with contextlib.suppress(LoraFxError):  # told by the last check
        read = stacked(read, tensors, config, rename)
    misfits = {}
    for key, entry in read.entries.items():
        why = _misfit(key, entry, read, tensors, config, rename)
        if why:
            misfits[key] = why
    return Pair(checkpoint, config, tensors, tie, path, raw, read, refusal, rename, misfits, digest)


def _of_peft(path: Path) -> bool:
    """True for what is PEFT's, or no format's that is known."""
    try:
        return format_of(path) == "peft"
    except LoraFxError:
        return path.exists()


def _misfit(
    key: str,
    entry: Entry,
    adapter: Adapter,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    rename: Renaming,
) -> str:
    old = base_name(key)
    name, stack = rename(old), rename.stack(old)
    names = {part.tensor for part in stack.parts} if stack else {name} & {*tensors}
    if not names:
        return ""
    metadata = {k: v for k, v in adapter.metadata.items() if k == "fan_in_fan_out"}
    one = replace(adapter, entries={name + key.removeprefix(old): entry}, metadata=metadata)
    try:
        match(one, {n: tensors[n] for n in names}, config, "")
    except LoraFxError as error:
        return error.message
    return ""


def norm(low: LowRank) -> float:
    """‖s·BA‖ in Frobenius norm, without BA: its square is s² Σ (AAᵀ ∘ BᵀB)."""
    a, b = low.a.astype(np.float64), low.b.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.sum((a @ np.swapaxes(a, -1, -2)) * (np.swapaxes(b, -1, -2) @ b))
        return float(abs(low.scale) * np.sqrt(max(square, 0.0)))


def sample(info: TensorInfo, count: int = 4096) -> Array:
    """Elements of a float tensor from its start, middle and end, in fp64."""
    dtype = numpy_dtype(info.dtype)
    size = (info.stop - info.start) // dtype.itemsize
    n = min(count, size)
    parts = []
    with open(info.file, "rb") as f:
        for at in (0, (size - n) // 2, size - n):
            raw = read_at(f.fileno(), n * dtype.itemsize, info.start + at * dtype.itemsize)
            parts.append(np.frombuffer(raw, dtype).astype(np.float64))
    return np.concatenate(parts)
