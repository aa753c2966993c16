"""Our own JSON in the header of an adapter file: what PEFT's names and config do not say.

`{"version": 1, "format": 1, "metadata": {…}, "entries": {key: …}}`, one object for each entry:

* `{"a", "b", "layout", "use", "extra"}`: a low-rank update. Rank, alpha and variant come from the
  config where the tensors have PEFT's names, since people edit it; else they are here, with
  "magnitude" for DoRA. "swapped" says that a is Bᵀ and b is Aᵀ.
* `{"full"}`, `{"dense", "scale", "layout", "extra"}`, `{"rows", "index"}`: names of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows, from_json
from lora_fx.adapter.variant import (
    bare,
    expect_variant,
    fields_of_files,
    named_variant,
    with_values,
)
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.safetensors import is_float
from lora_fx.formats.header_json import holds
from lora_fx.formats.peft.layer_reader import LayerReader
from lora_fx.formats.peft.names import OWN, PREFIX, Group, split_name
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.peft.stacks import candidates, one_stack
from lora_fx.text import JsonView


def own_entries(
    rows: JsonView, reader: LayerReader, found: Mapping[str, Group], entries: dict[str, Entry]
) -> None:
    """Add the entries that our JSON describes, and biases of B beside them.

    Args:
        rows: key → object.
        reader: The file's reader.
        found: PEFT's layers in it.
        entries: Get them.
    """
    layers: list[tuple[LowRank, Group]] = []
    for key, row in rows.items():
        try:
            entry, group = _one(key, row, reader, found)
            fits = not isinstance(entry, LowRank) or holds(entry.layout, entry.shape)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise LoraFxError(
                f"{reader.file}: metadata lora_fx does not fit the tensors at {key!r}: "
                f"{type(error).__name__} {one_line(error)}",
                "the file was edited; save the adapter again",
            ) from error
        if isinstance(entry, LowRank) and not fits:
            raise LoraFxError(
                f"{reader.file}: {key!r} has A {list(entry.a.shape)} and B {list(entry.b.shape)}; "
                f"expected those of its layout {row['layout']}",
                "the file was edited; save the adapter again",
            )
        entries[key] = entry
        if isinstance(entry, LowRank) and group is not None:
            layers.append((entry, group))
    for low, group in layers:  # once every trained bias is there
        reader.bias(entries, low, group)


def _one(
    key: str, row: JsonView, reader: LayerReader, found: Mapping[str, Group]
) -> tuple[Entry, Group | None]:
    """The entry of one object, and the layer of PEFT's that it was read from."""
    source, taken = reader.source, reader.taken
    for kind in ("full", "dense", "rows"):
        if kind in row:
            name = row[kind]
            taken.add(name)
            whole = source.full(name)
            if kind == "full":
                twins = row.get("tied", True)  # files without it meant all uses
                if isinstance(twins, list):
                    taken.update(PREFIX + twin for twin in twins)
                    return replace(whole, tied=bool(twins), twins=tuple(twins)), None
                return replace(whole, tied=bool(twins)), None
            if not is_float(source.tensors[name]):
                raise ValueError(f"{name!r} has no float dtype")
            value = np.ascontiguousarray(whole.value, np.float32)
            if kind == "rows":
                index = tuple(int(i) for i in row["index"])
                if len(index) != len(value):
                    raise ValueError(f"{len(index)} rows, {len(value)} in {name!r}")
                return ReplacedRows(index, value), None
            return from_json(Dense(value), row), None
    named = str(row.get("variant", reader.variant))
    expect_variant(named, f"{source.name}: the update of {key!r}")
    if not named_variant(named).peft_type:
        stored = {field: str(row[field]) for field in fields_of_files() if field in row}
        taken.update(stored.values())
        values = {f: source.master(name, source.tensors[name]) for f, name in stored.items()}
        return with_values(from_json(bare(values, row), row), values), None
    names = (str(row["a"]), str(row["b"]))
    group = None
    if names[0].startswith(OWN):
        taken.update(names)
        low = _pair(source, names, row, taken)
    else:
        split = split_name(names[0].removeprefix(PREFIX))
        if split is None:
            raise ValueError(f"{names[0]!r} is no name of an A")
        group = found[split[0]]
        taken.update(group.names.values())
        batch = (row["layout"] or {}).get("batch")
        # the end of its name may be that of another one's parameter: h.h.weight beside h.weight
        modules = source.config.get("target_modules")
        listed = isinstance(modules, list) and group.module in modules
        if batch or (not listed and "weight" in candidates(source.config, group.module)):
            low = one_stack(key, group, source, reader.ranks, reader.alphas)
            low = replace(low, variant=reader.variant)
            low = low if batch else replace(low, a=low.a[0], b=low.b[0])
            reader.modules.append(group.module)
        else:
            low = reader.update(group, found)
    if row.get("swapped"):
        low = replace(low, a=np.ascontiguousarray(low.b.T), b=np.ascontiguousarray(low.a.T))
    told = from_json(low, row)
    return replace(told, mutated=low.mutated or told.mutated), group


def _pair(source: PeftFile, names: tuple[str, str], entry: JsonView, taken: set[str]) -> LowRank:
    """An update under names of our own."""
    a, b = (source.factor(name) for name in names)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
        raise LoraFxError(
            f"{source.name}: {names[0]!r} is {list(a.shape)} and {names[1]!r} is "
            f"{list(b.shape)}; expected [*batch, r, in] and [*batch, out, r]",
            "save the adapter again",
        )
    magnitude = None
    if "magnitude" in entry:
        taken.add(entry["magnitude"])
        size = math.prod(b.shape[:-1])
        magnitude = source.numbers(entry["magnitude"], size).reshape(b.shape[:-1])
    return LowRank(a, b, float(entry["alpha"]), None, str(entry["variant"]), magnitude=magnitude)
