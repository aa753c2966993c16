"""lora-fx's JSON in the header of a PEFT file, for facts that PEFT's format cannot store.

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

from lora_fx.adapter.entry_json import from_json
from lora_fx.adapter.factor_tensors import with_values
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows
from lora_fx.adapter.variant import bare, expect_variant, fields_of_files, named_variant
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.tensor_files import is_float
from lora_fx.formats.header_json import holds
from lora_fx.formats.peft.layer_reader import LayerReader
from lora_fx.formats.peft.names import OWN, PREFIX, Group, split_name
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.peft.stacks import candidates, one_stack
from lora_fx.text import JsonView

_EDITED = "the file was edited; save the adapter again"


def own_entries(
    rows: JsonView,
    reader: LayerReader,
    layers: Mapping[str, Group],
    entries: dict[str, Entry],
) -> None:
    """Add the entries that lora-fx's JSON describes, and the biases of B that belong to them.

    Args:
        rows: key → object.
        reader: The file's reader.
        layers: PEFT's layers in it.
        entries: Get them.
    """
    updates_of_layers: list[tuple[LowRank, Group]] = []
    for key, row in rows.items():
        entry, group = _read_row(key, row, reader, layers)
        entries[key] = entry
        if isinstance(entry, LowRank) and group is not None:
            updates_of_layers.append((entry, group))
    for update, group in updates_of_layers:  # once every trained bias is there
        reader.add_bias(entries, update, group)


def _read_row(
    key: str, row: JsonView, reader: LayerReader, layers: Mapping[str, Group]
) -> tuple[Entry, Group | None]:
    """Return the entry of one object, and its PEFT layer; raise if the tensors do not fit."""
    try:
        entry, group = _entry_of(key, row, reader, layers)
        fits = not isinstance(entry, LowRank) or holds(entry.layout, entry.shape)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise LoraFxError(
            f"{reader.file}: metadata lora_fx does not fit the tensors at {key!r}: "
            f"{type(error).__name__} {one_line(error)}",
            _EDITED,
        ) from error
    if isinstance(entry, LowRank) and not fits:
        raise LoraFxError(
            f"{reader.file}: {key!r} has A {list(entry.a.shape)} and B {list(entry.b.shape)}; "
            f"expected the shapes of its layout {row['layout']}",
            _EDITED,
        )
    return entry, group


def _entry_of(
    key: str, row: JsonView, reader: LayerReader, layers: Mapping[str, Group]
) -> tuple[Entry, Group | None]:
    """Return the entry of one object, and the PEFT layer that it was read from.

    The first of these that the object has says what it is: "full", "dense", "rows"; the name of a
    variant that PEFT does not have; else it is A and B, under names of ours or of PEFT's.
    """
    for kind in ("full", "dense", "rows"):
        if kind in row:
            return _whole_tensor(kind, row, reader), None

    variant = str(row.get("variant", reader.variant))
    expect_variant(variant, f"{reader.source.name}: the update of {key!r}")
    if not named_variant(variant).peft_type:
        return _update_of_variant(row, reader), None

    a_name = str(row["a"])
    b_name = str(row["b"])
    if a_name.startswith(OWN):
        update = _own_pair(a_name, b_name, row, reader)
        return _as_described(update, row), None
    update, group = _update_of_layer(key, a_name, row, reader, layers)
    return _as_described(update, row), group


def _as_described(update: LowRank, row: JsonView) -> LowRank:
    """Return the update with the layout, use and other fields of its object."""
    if row.get("swapped"):
        update = replace(
            update, a=np.ascontiguousarray(update.b.T), b=np.ascontiguousarray(update.a.T)
        )
    described = from_json(update, row)
    return replace(described, mutated=update.mutated or described.mutated)


def _whole_tensor(kind: str, row: JsonView, reader: LayerReader) -> Entry:
    """Return a trained tensor, a full ΔW, or rows of an embedding."""
    name = row[kind]
    reader.taken.add(name)
    full = reader.source.full(name)
    if kind == "full":
        return _full(full, row, reader)

    if not is_float(reader.source.tensors[name]):
        raise ValueError(f"{name!r} does not have a float dtype")
    value = np.ascontiguousarray(full.value, np.float32)
    if kind == "dense":
        return from_json(Dense(value), row)

    index = tuple(int(i) for i in row["index"])
    if len(index) != len(value):
        raise ValueError(f"{len(index)} row numbers, but {len(value)} rows in {name!r}")
    return ReplacedRows(index, value)


def _full(full: Full, row: JsonView, reader: LayerReader) -> Full:
    """Return a trained tensor with the other names of the tensor, which PEFT stores as well."""
    twins = row.get("tied", True)  # files without it meant all uses
    if not isinstance(twins, list):
        return replace(full, tied=bool(twins))
    reader.taken.update(PREFIX + twin for twin in twins)
    return replace(full, tied=bool(twins), twins=tuple(twins))


def _update_of_variant(row: JsonView, reader: LayerReader) -> LowRank:
    """Return an update whose variant PEFT lacks, with the tensors that the variant needs."""
    source = reader.source
    stored = {field: str(row[field]) for field in fields_of_files() if field in row}
    reader.taken.update(stored.values())
    values = {field: source.master(name, source.tensors[name]) for field, name in stored.items()}
    return with_values(from_json(bare(values, row), row), values)


def _update_of_layer(
    key: str, a_name: str, row: JsonView, reader: LayerReader, layers: Mapping[str, Group]
) -> tuple[LowRank, Group]:
    """Return an update under PEFT's names, and its layer: of a module or a parameter."""
    split = split_name(a_name.removeprefix(PREFIX))
    if split is None:
        raise ValueError(f"{a_name!r} is not the name of a factor A")
    lead, _, _ = split
    group = layers[lead]
    reader.taken.update(group.names.values())

    has_batch = (row["layout"] or {}).get("batch")
    config = reader.source.config
    # the end of its name may be that of another one's parameter: h.h.weight beside h.weight
    target_modules = config.get("target_modules")
    names = {group.module, group.module.rpartition(".")[2]}
    is_listed = isinstance(target_modules, list) and not names.isdisjoint(target_modules)
    if not has_batch and (is_listed or "weight" not in candidates(config, group.module)):
        return reader.update(group, layers), group

    stack = one_stack(key, group, reader.source, reader.ranks, reader.alphas)
    stack = replace(stack, variant=reader.variant)
    reader.modules.append(group.module)
    if has_batch:
        return stack, group
    return replace(stack, a=stack.a[0], b=stack.b[0]), group


def _own_pair(a_name: str, b_name: str, row: JsonView, reader: LayerReader) -> LowRank:
    """Return an update whose tensors have lora-fx's names."""
    source = reader.source
    reader.taken.update((a_name, b_name))
    a = source.factor(a_name)
    b = source.factor(b_name)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
        raise LoraFxError(
            f"{source.name}: {a_name!r} is {list(a.shape)} and {b_name!r} is "
            f"{list(b.shape)}; expected [*batch, r, in] and [*batch, out, r]",
            "save the adapter again",
        )
    magnitude = None
    if "magnitude" in row:
        reader.taken.add(row["magnitude"])
        magnitude = _own_magnitude(source, row["magnitude"], b)
    return LowRank(a, b, float(row["alpha"]), None, str(row["variant"]), magnitude=magnitude)


def _own_magnitude(source: PeftFile, name: str, b: Array) -> Array:
    """Return the magnitude of an update, [*batch, out] like the rows of B."""
    shape = b.shape[:-1]
    return source.numbers(name, math.prod(shape)).reshape(shape)
