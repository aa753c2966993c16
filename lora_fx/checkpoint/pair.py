"""A base and an adapter side by side, for doctor: what is known of both, sound or not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.base_fingerprint import stretches
from lora_fx.checkpoint.expert_stacks import stacked
from lora_fx.checkpoint.findings import Finding
from lora_fx.checkpoint.int8 import int8_of
from lora_fx.checkpoint.match import match, stored_names
from lora_fx.checkpoint.merge_options import MergeOptions
from lora_fx.checkpoint.provenance import adapter_hash
from lora_fx.checkpoint.raw_adapter import Raw, read_raw
from lora_fx.checkpoint.renaming import Renaming, renaming
from lora_fx.checkpoint.tied_names import Tie
from lora_fx.checkpoint.tied_uses import tie_and_names
from lora_fx.dtypes import FLOATING, Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, open_checkpoint
from lora_fx.files.quantised.dequantise import CodesInfo, dequantised
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.formats.io import check_elements, load_adapter, tensor_file
from lora_fx.targets.target import base_name


@dataclass(frozen=True)
class Pair:
    """What the checks look at.

    Attributes:
        base: The checkpoint.
        tensors: Its tensors, a tied head that is not stored among them; those that a merge takes
            by option only as floats.
        codes: All quantised weights of it as floats.
        tie: How its head and embedding are tied.
        path: The adapter.
        raw: Its file without judgement; an empty one for formats other than PEFT's.
        adapter: As far as it can be read.
        refusal: Why its reader does not take it.
        rename: The adapter's names → the base's.
        misfits: Key → why it does not fit its tensor.
        digest: The hash under which a merge records the adapter; empty where it is refused.
        options: Of the merge that is asked about.
    """

    base: Checkpoint
    tensors: Tensors
    codes: Tensors
    tie: Tie | None
    path: Path
    raw: Raw
    adapter: Adapter
    refusal: LoraFxError | None
    rename: Renaming
    misfits: Mapping[str, str]
    digest: str
    options: MergeOptions

    def tensor(self, key: str) -> TensorInfo | None:
        """The base's tensor that a merge would change for a key; of a stack, its first matrix."""
        entry = self.adapter.entries.get(key)
        names = () if entry is None else stored_names(key, entry, self.rename)
        return self.rename.tensors[names[0]] if names else self.rename.info(base_name(key))

    def ratio(self, key: str) -> float | None:
        """‖ΔW‖/‖W‖: ΔW exactly, W from samples of its tensor; None where it cannot be had."""
        low, name = self.adapter.lowrank.get(key), self.rename(base_name(key))
        info = self.codes.get(name, self.tensor(key))
        if low is None or info is None or info.dtype not in FLOATING or 0 in info.shape:
            return None
        weight = math.sqrt(math.prod(info.shape) * float(np.mean(np.square(sample(info)))))
        ratio = low.norm / weight if weight else math.inf
        return ratio if math.isfinite(ratio) else None


Check = Callable[[Pair], Iterable[Finding]]


def open_pair(base: str | Path, adapter: str | Path, options: MergeOptions) -> Pair:
    """Read the headers of a base and the whole of an adapter.

    Raises:
        LoraFxError: A file that cannot be read at all.
    """
    checkpoint, path = open_checkpoint(Path(base)), Path(adapter)
    check_elements(tensor_file(path), 2 * checkpoint.elements)
    codes: Tensors = {}
    with contextlib.suppress(LoraFxError):  # told by a check of its own
        every = dequantised(checkpoint, "bfloat16").tensors
        codes = {n: t for n, t in every.items() if isinstance(t, CodesInfo)}
    asked = {n: t for n, t in codes.items() if int8_of(n, checkpoint) is None}
    read: Adapter | None = None
    refusal, digest = None, ""
    try:
        read = load_adapter(path, base=base, resolve=False)
        digest = adapter_hash(read)
        read = read.resolved({**checkpoint.tensors, **asked})
    except LoraFxError as error:
        refusal = error
    raw = Raw()
    with contextlib.suppress(LoraFxError):  # its reader has said so
        raw = read_raw(path)
    if refusal is not None and read is None and raw.file is None:
        raise refusal
    read = raw.adapter() if read is None else read
    tie, stored = tie_and_names(checkpoint, read.entries)
    tensors = {**stored, **asked}
    rename = renaming(read, tensors, checkpoint.config(), [])
    with contextlib.suppress(LoraFxError):  # told by the last check
        read = stacked(read, rename)
    reasons = {key: _misfit(key, read, rename) for key in read.entries}
    misfits = {key: why for key, why in reasons.items() if why}
    return Pair(
        checkpoint, tensors, codes, tie, path, raw, read, refusal, rename, misfits, digest, options
    )


def _misfit(key: str, adapter: Adapter, rename: Renaming) -> str:
    """Why one update does not fit its tensor; empty where it fits, or has none."""
    old = base_name(key)
    stack = rename.stack(old)
    if stack:
        names = [part.tensor for part in stack.parts]
        name = rename(old)
    else:
        names = stored_names(key, adapter.entries[key], rename)
        name = names[0] if names else ""
    if not names:
        return ""
    metadata = {k: v for k, v in adapter.metadata.items() if k == "fan_in_fan_out"}
    entries = {name + key.removeprefix(old): adapter.entries[key]}
    one = replace(adapter, entries=entries, metadata=metadata)
    try:
        match(one, {n: rename.tensors[n] for n in names}, rename.config, "")
    except LoraFxError as error:
        return error.message
    return ""


def sample(info: TensorInfo) -> Array:
    """Elements of a float tensor from its start, middle and end, in fp64."""
    try:
        parts = stretches(info, 4096, (0.0, 0.5, 1.0))
    except LoraFxError:  # codes or scales that are no numbers
        if not isinstance(info, CodesInfo):
            raise
        return np.full(1, np.nan)
    return np.concatenate(parts).astype(np.float64)
