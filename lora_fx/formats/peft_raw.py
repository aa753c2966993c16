"""A PEFT adapter read without judging it: what is there, under whatever names, sound or not.

`peft.read` stops at the first thing that is wrong. A diagnosis needs everything else too, so here
tensors are only sorted by their names, and nothing is refused but what is no file of tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import is_float, read_json, read_tensors
from lora_fx.formats.peft.config import Pattern, facts
from lora_fx.formats.peft.file import CONFIG, WEIGHTS
from lora_fx.formats.peft.names import OWN, PREFIX, from_tensors

_PART = re.compile(
    r"(?P<lead>.+)\.lora_(?:(?P<table>embedding_)?(?P<half>[AB])(?P<name>\.(?!weight$|bias$)\w+)?"
    r"(?P<leaf>\.weight|\.bias)?|(?P<magnitude>magnitude_vector)(\.\w+)?)"
)
_WRAPPERS = frozenset(("base_layer", "modules_to_save", "original_module"))


@dataclass
class Part:
    """The tensors of one update: a, b, magnitude, bias → name in the file."""

    key: str
    kind: str = ""
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """An adapter's file as it is.

    Attributes:
        file: The tensors' file.
        tensors: All of them.
        config: adapter_config.json, or the one inside our own file; empty where there is none.
        updates: Key → the tensors of a low-rank update.
        whole: Key → the name of a whole tensor.
        prefixes: Name → what stands before it instead of PEFT's prefix.
        broken: Key → why its tensors make no update.
    """

    file: Path
    tensors: Mapping[str, Array]
    config: Mapping[str, Any]
    updates: Mapping[str, Part]
    whole: Mapping[str, str]
    prefixes: Mapping[str, str]
    broken: dict[str, str] = field(default_factory=dict)

    def adapter(self) -> Adapter:
        """What of it makes an adapter; `broken` says what does not. alpha is NaN where unknown."""
        entries: dict[str, Entry] = {}
        for key, part in self.updates.items():
            try:
                entries[key] = self._update(part)
            except LoraFxError as error:
                self.broken[key] = error.message
        for key, name in self.whole.items():
            entries.setdefault(key, Full(self.tensors[name]))
        return Adapter(entries, {"peft": facts(self.config)})

    def _update(self, part: Part) -> LowRank:
        if not {"a", "b"} <= set(part.names):
            have, lost = ("A", "B") if "a" in part.names else ("B", "A")
            raise LoraFxError(f"it has {have} and no {lost}")
        a, b = (self.tensors[part.names[half]] for half in "ab")
        if not a.size or not b.size or not is_float(a) or not is_float(b):
            raise LoraFxError(f"A is {a.dtype} {list(a.shape)}, B is {b.dtype} {list(b.shape)}")
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = a.astype(np.float32), b.astype(np.float32)
        extra: dict[str, Any] = {}
        if not part.key.endswith("]") and a.ndim >= 2:
            a, b, extra = from_tensors(part.kind, a, b, part.key)
        variant = "rslora" if self.config.get("use_rslora") else "lora"
        return LowRank(a, b, self._alpha(part.key), None, variant, "", extra)

    def _alpha(self, key: str) -> float:
        try:
            pattern = Pattern(self.config, "alpha_pattern", "lora_alpha", str(self.file))
            alpha = pattern.of(key.removesuffix(".weight"))
        except LoraFxError:
            alpha = None
        return float("nan") if alpha is None else alpha


def read_raw(path: str | Path) -> Raw | None:
    """The file of an adapter of PEFT; None for a file that has neither its config nor its names.

    Raises:
        LoraFxError: Not a file of tensors, or a config that is no JSON.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    tensors, header = read_tensors(file)
    config = _config(file, header)
    updates: dict[str, Part] = {}
    whole: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    for name in tensors:
        _sort(name, updates, whole, prefixes)
    if config is None and not updates:
        return None
    return Raw(file, tensors, config or {}, updates, whole, prefixes)


def _config(file: Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        ours = json.loads(header.get("lora_fx", "{}"))
    except (ValueError, RecursionError):
        ours = {}
    if isinstance(ours, dict) and isinstance(ours.get("config"), dict):
        inside: dict[str, Any] = ours["config"]
        return inside
    beside = file.parent / CONFIG
    return read_json(beside) if beside.is_file() else None


def _sort(
    name: str, updates: dict[str, Part], whole: dict[str, str], prefixes: dict[str, str]
) -> None:
    at = name.find(PREFIX)
    own = name.startswith(OWN)
    core = name.removeprefix(OWN) if own else name[at + len(PREFIX) :] if at >= 0 else name
    match = _PART.fullmatch(core)
    if not own and at:
        prefixes[name] = name[:at] if at > 0 else ""
    if match is None:
        if ".base_layer." not in core and ".original_module." not in core:
            key = core.removesuffix(".full") if own else core
            whole[_unwrapped(key)] = name
        return
    lead = _unwrapped(match["lead"])
    key = lead if own else f"{lead}.weight"
    part = updates.setdefault(key, Part(key))
    if match["magnitude"]:
        part.names["magnitude"] = name
    elif match["leaf"] == ".bias":
        part.names["bias"] = name
    else:
        part.names[match["half"].lower()] = name
        part.kind = "embedding" if match["table"] else "linear"


def _unwrapped(name: str) -> str:
    return ".".join(p for p in name.split(".") if p not in _WRAPPERS)
