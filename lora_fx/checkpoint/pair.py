"""A base and an adapter side by side, for doctor: what is known of both, sound or not."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.qalora import grouped
from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.match import match, stacked, stored_names, tie_and_names
from lora_fx.checkpoint.merge_plan import MergeOptions
from lora_fx.checkpoint.model_families import Tie
from lora_fx.checkpoint.provenance import adapter_hash, stretches
from lora_fx.checkpoint.renaming import Renaming, renaming
from lora_fx.checkpoint.requantise import int8_of
from lora_fx.dtypes import FLOATING, Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint, open_checkpoint
from lora_fx.files.quantised.dequantise import CodesInfo, dequantised
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.files.strict_json import json_object
from lora_fx.files.tensor_files import is_float, read_tensors
from lora_fx.formats.io import check_elements, format_of, load_adapter, tensor_file
from lora_fx.formats.peft.config import Pattern, facts, group_of
from lora_fx.formats.peft.file import PEFT, config_of
from lora_fx.formats.peft.names import OWN, PREFIX, Group, from_tensors, split_name, unwrapped
from lora_fx.targets.target import base_name
from lora_fx.text import Json, JsonView

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        keys: Keys of the adapter, or names of tensors, that it is about.
        found: What is there.
        expected: What should be.
        hint: What to do.
        severity: error: the pair is wrong; warning: look at it; note.
        check: Name of the check.
    """

    keys: Sequence[str]
    found: str
    expected: str
    hint: str
    severity: str = ERROR
    check: str = ""

    def to_json(self) -> Json:
        """One row of `findings[]`."""
        first = {"check": self.check, "severity": self.severity}
        return first | vars(self) | {"keys": list(self.keys)}


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


def about(keys: Sequence[str], found: str, expected: str, hint: str) -> Iterator[Finding]:
    """An error of all these keys; nothing where there are none."""
    if keys:
        yield Finding(keys, found, expected, hint)


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


# A PEFT adapter read without judging it: what is there, under whatever names, sound or not.
#
# `peft.file` stops at the first thing that is wrong. A diagnosis needs everything else too, so here
# tensors are only sorted by their names, and nothing is refused but what is no file of tensors.


_ADAPTER = re.compile(r"(\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.(?!weight$|bias$)\w+")
"""An adapter's own name within that of a tensor, which PEFT leaves out of its files."""
_SAVED = ("modules_to_save", "original_module")


@dataclass(frozen=True)
class Raw:
    """An adapter's file as it is.

    Attributes:
        file: The tensors' file; None for a format other than PEFT's, of which nothing is here.
        tensors: All of them.
        config: adapter_config.json, or the one inside our own file; empty where there is none.
        updates: Key → the tensors of a low-rank update.
        whole: Key → the name of a whole tensor.
        prefixes: Name → what stands before it instead of PEFT's prefix.
        broken: Key → why its tensors make no update.
    """

    file: Path | None = None
    tensors: Mapping[str, Array] = field(default_factory=dict)
    config: JsonView = field(default_factory=dict)
    updates: dict[str, Group] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def adapter(self) -> Adapter:
        """What of it makes an adapter; `broken` says what does not. alpha is NaN where unknown."""
        entries: dict[str, Entry] = {}
        for key, part in self.updates.items():
            try:
                entries[key] = self._update(key, part)
            except LoraFxError as error:
                self.broken[key] = error.message
        for key, name in self.whole.items():
            entries.setdefault(key, Full(self.tensors[name]))
        return Adapter(entries, {"peft": facts(self.config)})

    def _update(self, key: str, part: Group) -> LowRank:
        if not {"a", "b"} <= set(part.names):
            have, lost = ("A", "B") if "a" in part.names else ("B", "A")
            raise LoraFxError(f"it has {have} and no {lost}", "save the adapter again")
        a, b = (self.tensors[part.names[half]] for half in "ab")
        if not a.size or not b.size or not is_float(a) or not is_float(b):
            raise LoraFxError(
                f"A is {a.dtype} {list(a.shape)}, B is {b.dtype} {list(b.shape)}",
                "save the adapter again",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = a.astype(np.float32), b.astype(np.float32)
        op, kernel = "", a.shape[:0]
        if not key.endswith("]") and a.ndim >= 2:
            a, b, op, kernel = from_tensors(part.kind, a, b, key)
        alpha = None
        with contextlib.suppress(LoraFxError):
            pattern = Pattern(self.config, "alpha_pattern", "lora_alpha", str(self.file))
            alpha = pattern.of(key.removesuffix(".weight"))
        alpha = math.nan if alpha is None else alpha
        variant = "rslora" if self.config.get("use_rslora") else "lora"
        low = LowRank(a, b, alpha, None, variant, origin=Origin(op, kernel))
        size = group_of(self.config, low.a, f"{self.file}: {key!r}") if part.kind == "linear" else 0
        return grouped(low, size) if size > 0 else low


def read_raw(path: Path) -> Raw:
    """The file of an adapter of PEFT; an empty one where it has neither its config nor its names.

    Raises:
        LoraFxError: Not a file of tensors, or a config that is no JSON.
    """
    file = tensor_file(path)
    with contextlib.suppress(LoraFxError):  # of no format that is known
        if format_of(path) != PEFT.name:
            return Raw()
    tensors, header = read_tensors(file)
    ours: JsonView = {}
    with contextlib.suppress(LoraFxError):  # damaged: there may be a config beside the file
        ours = json_object(header.get("lora_fx", "{}"), str(file))
    config, _ = config_of(file, ours)
    raw = Raw(file, tensors, config or {})
    for name in tensors if raw.config.get("peft_type", "LORA") == "LORA" else ():
        _sort(name, raw)
    return raw if config is not None or raw.updates else Raw()


def _sort(name: str, raw: Raw) -> None:
    at = name.find(PREFIX)
    own = name.startswith(OWN)
    core = name.removeprefix(OWN) if own else name[at + len(PREFIX) :] if at >= 0 else name
    if not own and at:
        raw.prefixes[name] = name[:at] if at > 0 else ""
    plain = _ADAPTER.sub(r"\1", core)
    split = split_name(plain) or split_name(f"{plain}.weight")
    if split is None:
        if ".base_layer." not in core and ".original_module." not in core:
            key = core.removesuffix(".full") if own else core
            raw.whole[unwrapped(key, *_SAVED)] = name
        return
    lead, kind, part = split
    module = unwrapped(lead, *_SAVED)
    group = raw.updates.setdefault(module if own else f"{module}.weight", Group(lead, "", {}))
    group.names[part] = name
    group.kind = kind if part in "ab" else group.kind
