"""A PEFT adapter that is read without checks: all of its tensors, valid or not.

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
from lora_fx.files.strict_json import json_object
from lora_fx.files.tensor_files import is_float, read_tensors
from lora_fx.formats.io import format_of, tensor_file
from lora_fx.formats.peft.config import group_of
from lora_fx.formats.peft.file import PEFT, config_of
from lora_fx.formats.peft.names import OWN, PREFIX, Group, from_tensors, split_name, unwrapped
from lora_fx.formats.peft.pattern import Pattern
from lora_fx.formats.peft.target_modules import facts
from lora_fx.text import JsonView

_ADAPTER = re.compile(r"(\.lora_(?:[AB]|embedding_[AB]|magnitude_vector))\.(?!weight$|bias$)\w+")
"""The adapter's name inside a tensor's name, which PEFT leaves out of its files."""


_SAVED = ("modules_to_save", "original_module")


@dataclass(frozen=True)
class Raw:
    """The unchecked content of an adapter's file.

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
        """The adapter with the valid tensors; `broken` gets the others. An unknown alpha is NaN."""
        entries: dict[str, Entry] = {}
        for key, group in self.updates.items():
            try:
                entries[key] = self._update(key, group)
            except LoraFxError as error:
                self.broken[key] = error.message
        for key, name in self.whole.items():
            entries.setdefault(key, Full(self.tensors[name]))
        return Adapter(entries, {"peft": facts(self.config)})

    def _update(self, key: str, group: Group) -> LowRank:
        """The update of a key's tensors; raises where they make none."""
        a, b = self._factors(group)
        op = ""
        kernel: tuple[int, ...] = ()
        if not key.endswith("]") and a.ndim >= 2:
            a, b, op, kernel = from_tensors(group.kind, a, b, key)
        variant = "rslora" if self.config.get("use_rslora") else "lora"
        low = LowRank(a, b, self._alpha(key), None, variant, origin=Origin(op, kernel))
        if group.kind != "linear":
            return low
        size = group_of(self.config, low.a, f"{self.file}: {key!r}")
        return grouped(low, size) if size > 0 else low

    def _factors(self, group: Group) -> tuple[Array, Array]:
        """A and B in fp32; raises where one is missing, empty or no float."""
        if "a" not in group.names:
            raise LoraFxError("it has B and no A", "save the adapter again")
        if "b" not in group.names:
            raise LoraFxError("it has A and no B", "save the adapter again")
        a = self.tensors[group.names["a"]]
        b = self.tensors[group.names["b"]]
        if not a.size or not b.size or not is_float(a) or not is_float(b):
            raise LoraFxError(
                f"A is {a.dtype} {list(a.shape)}, B is {b.dtype} {list(b.shape)}",
                "save the adapter again",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            return a.astype(np.float32), b.astype(np.float32)

    def _alpha(self, key: str) -> float:
        """The alpha of an update by the config; NaN where it gives none."""
        alpha = None
        with contextlib.suppress(LoraFxError):
            pattern = Pattern(self.config, "alpha_pattern", "lora_alpha", str(self.file))
            alpha = pattern.of(key.removesuffix(".weight"))
        return math.nan if alpha is None else alpha


def read_raw(path: Path) -> Raw:
    """Read the file of a PEFT adapter; empty if it has neither PEFT's config nor PEFT's names.

    Raises:
        LoraFxError: Not a file of tensors, or a config that is no JSON.
    """
    file = tensor_file(path)
    with contextlib.suppress(LoraFxError):  # of no format that is known
        if format_of(path) != PEFT.name:
            return Raw()
    tensors, header = read_tensors(file)
    embedded: JsonView = {}
    with contextlib.suppress(LoraFxError):  # damaged: there may be a config beside the file
        embedded = json_object(header.get("lora_fx", "{}"), str(file))
    config, _ = config_of(file, embedded)
    raw = Raw(file, tensors, config or {})
    if raw.config.get("peft_type", "LORA") == "LORA":
        for name in tensors:
            _sort(name, raw)
    if config is None and not raw.updates:
        return Raw()
    return raw


def _sort(name: str, raw: Raw) -> None:
    """Put a tensor into the group that its name gives."""
    is_ours = name.startswith(OWN)
    start = name.find(PREFIX)
    if is_ours:
        core = name.removeprefix(OWN)
    else:
        core = name[start + len(PREFIX) :] if start >= 0 else name
        if start != 0:
            raw.prefixes[name] = name[: max(0, start)]

    plain = _ADAPTER.sub(r"\1", core)
    parts = split_name(plain) or split_name(f"{plain}.weight")
    if parts is None:
        if ".base_layer." not in core and ".original_module." not in core:
            key = core.removesuffix(".full") if is_ours else core
            raw.whole[unwrapped(key, *_SAVED)] = name
        return
    lead, kind, part = parts
    module = unwrapped(lead, *_SAVED)
    key = module if is_ours else f"{module}.weight"
    group = raw.updates.setdefault(key, Group(lead, "", {}))
    group.names[part] = name
    if part in ("a", "b"):
        group.kind = kind
