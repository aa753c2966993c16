"""Our own JSON in the header of an adapter file: what PEFT's names and config do not say.

`{"version": 1, "format": 1, "metadata": {…}, "entries": {key: …}}`, one object for each entry:

* `{"a", "b", "layout", "use", "extra"}`: a low-rank update. Rank, alpha and variant come from the
  config where the tensors have PEFT's names, since people edit it; else they are here, with
  "magnitude" for DoRA. "swapped" says that a is Bᵀ and b is Aᵀ.
* `{"full"}`, `{"dense", "scale", "layout", "extra"}`, `{"rows", "index"}`: names of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.update_json import from_json
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows
from lora_fx.errors import LoraFxError, check_format, one_line
from lora_fx.files.safetensors import is_float
from lora_fx.formats.base import holds
from lora_fx.formats.peft.names import OWN, PREFIX, Group, split_name
from lora_fx.formats.peft.source import PeftFile


def own_sections(ours: Mapping[str, Any], file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries and the metadata of our JSON; both empty for files of PEFT."""
    if not ours:
        return {}, {}
    found, metadata = ours.get("entries"), ours.get("metadata")
    check_format(ours, f"{file}: metadata lora_fx")
    if not isinstance(found, dict) or not isinstance(metadata, dict):
        raise LoraFxError(f"{file}: metadata lora_fx is damaged")
    return found, dict(metadata)


def own_entries(
    found: Mapping[str, Any],
    source: PeftFile,
    update: Callable[[Group], LowRank],
    groups: Mapping[str, Group],
    taken: set[str],
) -> Iterator[tuple[str, Entry, Group | None]]:
    """The entries that our JSON describes, each with the layer of PEFT's that it was read from.

    Args:
        found: key → object.
        source: The file.
        update: Reads the update of a layer as PEFT would.
        groups: PEFT's layers in the file.
        taken: Gets the names of the tensors that were read.
    """
    for key, entry in found.items():
        try:
            value, group = _one(entry, source, update, groups, taken)
            fits = not isinstance(value, LowRank) or holds(value.layout, value.shape)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise LoraFxError(
                f"{source.file}: metadata lora_fx does not fit the tensors at {key!r}: "
                f"{type(error).__name__} {one_line(error)}",
                "the file was edited; save the adapter again",
            ) from error
        if isinstance(value, LowRank) and not fits:
            raise LoraFxError(
                f"{source.file}: {key!r} has A {list(value.a.shape)} and B {list(value.b.shape)}; "
                f"expected those of its layout {entry['layout']}",
                "the file was edited; save the adapter again",
            )
        yield key, value, group


def _one(
    entry: Any,
    source: PeftFile,
    update: Callable[[Group], LowRank],
    groups: Mapping[str, Group],
    taken: set[str],
) -> tuple[Entry, Group | None]:
    for kind in ("full", "dense", "rows"):
        if kind in entry:
            name = entry[kind]
            taken.add(name)
            whole = source.full(name)
            if kind == "full":
                return whole, None
            if not is_float(source.tensors[name]):
                raise ValueError(f"{name!r} has no float dtype")
            value = np.ascontiguousarray(whole.value, np.float32)
            if kind == "rows":
                index = tuple(int(i) for i in entry["index"])
                if len(index) != len(value):
                    raise ValueError(f"{len(index)} rows, {len(value)} in {name!r}")
                return ReplacedRows(index, value), None
            return from_json(Dense(value), entry), None
    names = (str(entry["a"]), str(entry["b"]))
    group = None
    if names[0].startswith(OWN):
        taken.update(names)
        low = _pair(source, names, entry, taken)
    else:
        split = split_name(names[0].removeprefix(PREFIX))
        if split is None:
            raise ValueError(f"{names[0]!r} is no name of an A")
        group = groups[split[0]]
        taken.update(group.names.values())
        low = update(group)
    a, b = low.a, low.b
    if entry.get("swapped"):
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    told = from_json(replace(low, a=a, b=b), entry)
    return replace(told, mutated=low.mutated or told.mutated), group


def _pair(source: PeftFile, names: tuple[str, str], entry: Any, taken: set[str]) -> LowRank:
    """An update under names of our own."""
    a, b = (source.factor(name) for name in names)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
        raise LoraFxError(
            f"{source.file}: {names[0]!r} is {list(a.shape)} and {names[1]!r} is "
            f"{list(b.shape)}; expected [*batch, r, in] and [*batch, out, r]"
        )
    magnitude = None
    if "magnitude" in entry:
        taken.add(entry["magnitude"])
        size = math.prod(b.shape[:-1])
        magnitude = source.vector(entry["magnitude"], size).reshape(b.shape[:-1])
    return LowRank(a, b, float(entry["alpha"]), None, str(entry["variant"]), magnitude=magnitude)
