"""A PEFT adapter read without judging it: what is there, under whatever names, sound or not.

`peft.file` stops at the first thing that is wrong. A diagnosis needs everything else too, so here
tensors are only sorted by their names, and nothing is refused but what is no file of tensors.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.qalora import grouped
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.read import json_object
from lora_fx.files.safetensors import is_float, read_tensors
from lora_fx.formats.io import format_of, tensor_file
from lora_fx.formats.peft.config import Pattern, facts, group_of
from lora_fx.formats.peft.file import PEFT, config_of
from lora_fx.formats.peft.names import OWN, PREFIX, Group, from_tensors, split_name, unwrapped
from lora_fx.text import JsonView

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
