"""A base and an adapter, read together for doctor, whether they are valid or not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.adapter_hash import adapter_hash
from lora_fx.checkpoint.base_fingerprint import stretches
from lora_fx.checkpoint.findings import Finding
from lora_fx.checkpoint.int8 import int8_of
from lora_fx.checkpoint.match import match, stored_names
from lora_fx.checkpoint.merge_settings import MergeOptions
from lora_fx.checkpoint.raw_adapter import Raw, read_raw
from lora_fx.checkpoint.renaming import Renaming, renaming
from lora_fx.checkpoint.stored_stacks import stacked
from lora_fx.checkpoint.tied_names import Tie
from lora_fx.checkpoint.tied_uses import tie_and_names
from lora_fx.dtypes import FLOATING, Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, open_checkpoint
from lora_fx.files.quantised.dequantise import CodesInfo, dequantised
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.formats.io import check_elements, load_adapter, tensor_file
from lora_fx.targets.keys import base_name


@dataclass(frozen=True)
class Pair:
    """A base and an adapter, as doctor's checks see them.

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
        """Return the base tensor that a merge would change for a key; a stack's first matrix."""
        entry = self.adapter.entries.get(key)
        names = [] if entry is None else stored_names(key, entry, self.rename)
        if names:
            return self.rename.tensors[names[0]]
        return self.rename.info(base_name(key))

    def ratio(self, key: str) -> float | None:
        """‖ΔW‖/‖W‖, with W estimated from samples of its tensor; None if it cannot be computed."""
        low = self.adapter.lowrank.get(key)
        info = self.codes.get(self.rename(base_name(key)), self.tensor(key))
        if low is None or info is None or info.dtype not in FLOATING or 0 in info.shape:
            return None
        mean_square = float(np.mean(np.square(sample(info))))
        weight = math.sqrt(math.prod(info.shape) * mean_square)
        if not weight:
            return None
        ratio = low.norm / weight
        return ratio if math.isfinite(ratio) else None


Check = Callable[[Pair], Iterable[Finding]]


def open_pair(base: str | Path, adapter: str | Path, options: MergeOptions) -> Pair:
    """Read the headers of a base and the whole content of an adapter.

    Raises:
        LoraFxError: A file that cannot be read at all.
    """
    checkpoint = open_checkpoint(Path(base))
    path = Path(adapter)
    check_elements(tensor_file(path), 2 * checkpoint.elements)
    codes = _codes_of(checkpoint)
    by_option = {name: info for name, info in codes.items() if int8_of(name, checkpoint) is None}

    loaded, refusal, digest = _read_adapter(path, base, {**checkpoint.tensors, **by_option})
    raw = Raw()
    with contextlib.suppress(LoraFxError):  # its reader refuses it for the same
        raw = read_raw(path)
    if loaded is None:
        if refusal is not None and raw.file is None:
            raise refusal
        loaded = raw.adapter()

    tie, names = tie_and_names(checkpoint, loaded.entries)
    tensors = {**names, **by_option}
    rename = renaming(loaded, tensors, checkpoint.config(), [])
    with contextlib.suppress(LoraFxError):  # a finding of the last check
        loaded = stacked(loaded, rename)
    misfits: dict[str, str] = {}
    for key in loaded.entries:
        why = _misfit(key, loaded, rename)
        if why:
            misfits[key] = why
    return Pair(
        base=checkpoint,
        tensors=tensors,
        codes=codes,
        tie=tie,
        path=path,
        raw=raw,
        adapter=loaded,
        refusal=refusal,
        rename=rename,
        misfits=misfits,
        digest=digest,
        options=options,
    )


def _read_adapter(
    path: Path, base: str | Path, tensors: Tensors
) -> tuple[Adapter | None, LoraFxError | None, str]:
    """Return the adapter as far as it can be read, the error that stopped the reader, and a hash.

    Args:
        path: Its file or folder.
        base: The checkpoint.
        tensors: Those of the checkpoint, by which the adapter's names are resolved.
    """
    adapter: Adapter | None = None
    digest = ""
    try:
        adapter = load_adapter(path, base=base, resolve=False)
        digest = adapter_hash(adapter)
        return adapter.resolved(tensors), None, digest
    except LoraFxError as refusal:
        return adapter, refusal, digest


def _codes_of(checkpoint: Checkpoint) -> Tensors:
    """Return a checkpoint's quantised weights as floats; empty if they cannot be read."""
    try:
        tensors = dequantised(checkpoint, "bfloat16").tensors
    except LoraFxError:  # a finding of a check of its own
        return {}
    return {name: info for name, info in tensors.items() if isinstance(info, CodesInfo)}


def _misfit(key: str, adapter: Adapter, rename: Renaming) -> str:
    """Return why an update does not fit its tensor; empty if it fits or has no tensor."""
    adapter_name = base_name(key)
    stack = rename.stack(adapter_name)
    if stack:
        names = [part.tensor for part in stack.parts]
        name = rename(adapter_name)
    else:
        names = stored_names(key, adapter.entries[key], rename)
        name = names[0] if names else ""
    if not names:
        return ""

    metadata = {}
    if "fan_in_fan_out" in adapter.metadata:
        metadata["fan_in_fan_out"] = adapter.metadata["fan_in_fan_out"]
    entries = {name + key.removeprefix(adapter_name): adapter.entries[key]}
    one_update = replace(adapter, entries=entries, metadata=metadata)
    try:
        match(one_update, {name: rename.tensors[name] for name in names}, rename.config, "")
    except LoraFxError as error:
        return error.message
    return ""


def sample(info: TensorInfo) -> Array:
    """Return elements of a float tensor from its start, middle and end, in fp64."""
    try:
        samples = stretches(info, 4096, (0.0, 0.5, 1.0))
    except LoraFxError:  # codes or scales that are no numbers
        if not isinstance(info, CodesInfo):
            raise
        return np.full(1, np.nan)
    return np.concatenate(samples).astype(np.float64)
