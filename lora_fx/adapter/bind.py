"""Binding: give an adapter the keys and layouts of a model, or raise an error for each misfit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.fused import other_split
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import factor_dtype
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.targets.found import Found
from lora_fx.targets.keys import own_use, split_use
from lora_fx.targets.target import Target, check_disjoint
from lora_fx.text import Json, JsonView, near, some

OTHER_READERS = "other_readers"
"""The metadata field that lists operations that read an updated tensor without the update."""


def reading(found: Found, keys: Iterable[str], metadata: JsonView) -> Json:
    """Return the adapter's metadata with the operations that read tensors without the updates.

    Args:
        found: The model's targets; targets of a checkpoint, whose readers nobody knows, change
            nothing.
        keys: The keys of the updates.
        metadata: The metadata so far.
    """
    if not any(target.sites for target in found.targets):
        return dict(metadata)
    readers = {}
    for key in keys:
        target = found.get(key)
        if target is not None and target.other_readers:
            readers[key] = list(target.other_readers)
    result = {name: value for name, value in metadata.items() if name != OTHER_READERS}
    if readers:
        result[OTHER_READERS] = readers
    return result


def bound_entries(entries: Mapping[str, Entry], found: Found) -> dict[str, Entry]:
    """Return whole tensors and low-rank updates with the keys and layouts of a model.

    Args:
        entries: Bound or not; their keys may be aliases.
        found: The model's targets.

    Raises:
        LoraFxError: A key that the model lacks, a shape that does not fit, or two updates of one
            tensor.
    """
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, Full)}
    bound: dict[str, Entry] = {**_bound_tensors(tensors, found)}
    for key, entry in _split_as_model(entries, found).items():
        if isinstance(entry, Full):
            continue
        assert isinstance(entry, LowRank)  # the caller let nothing else through
        target_key, low = _bound_update(key, entry, found)
        if target_key in bound:
            raise LoraFxError(
                f"adapter keys name {target_key!r} twice ({key!r} is an alias)",
                "merge the two updates first",
            )
        bound[target_key] = low
    check_disjoint(found[key] for key, entry in bound.items() if isinstance(entry, LowRank))
    return bound


def _split_as_model(entries: Mapping[str, Entry], found: Found) -> dict[str, Entry]:
    """Return the entries, with updates fused or split as the model's projections are."""
    result: dict[str, Entry] = {}
    for key, entry in entries.items():
        if isinstance(entry, LowRank) and found.get(key) is None:
            result |= other_split(key, entry, found) or {key: entry}
        else:
            result[key] = entry
    return result


def _bound_tensors(tensors: Mapping[str, Full], found: Found) -> dict[str, Full]:
    """Return whole tensors by the model's first names; equal ones under all names are one entry."""
    by_first_name: dict[str, dict[str, Full]] = {}
    for key, entry in tensors.items():
        if key not in found.shapes:
            raise LoraFxError(
                f"adapter tensor {key!r} is not in the model", near(key, found.shapes)
            )
        shape = tuple(entry.value.shape)
        expected_shape = tuple(found.shapes[key])
        if shape != expected_shape:
            raise MisfitError(
                f"adapter tensor {key!r} is {list(shape)}; the model's is {list(expected_shape)}",
                "load the model with as many labels as the adapter has, and export adapters with "
                "other sizes as another file; or leave the tensor out with lora-fx convert ADAPTER "
                f"-o OUT --exclude {key}",
            )
        first_name = found.first_names.get(key, key)
        by_first_name.setdefault(first_name, {})[key] = entry
    return {name: _bound_tensor(name, group, found) for name, group in by_first_name.items()}


def _bound_tensor(first_name: str, entries: Mapping[str, Full], found: Found) -> Full:
    """Return the one entry that stands for the entries under all names of a tensor."""
    names = [name for name, first in found.first_names.items() if first == first_name]
    key, entry = next(iter(entries.items()))
    if not means_all(entries, names):
        raise LoraFxError(
            f"the adapter's whole tensor {key!r} is for that name alone, but the model has one "
            f"tensor for it and {some([name for name in names if name != key])}",
            "call lora_fx.insert, fold, attach or export on the original model with the adapter, "
            "which gives that name a separate tensor",
        )
    twins = tuple(name for name in names if name != first_name)
    return replace(entry, tied=len(names) > 1, twins=twins)


def means_all(entries: Mapping[str, Full], names: Collection[str]) -> bool:
    """Whether these whole tensors are one change of the tensor that has all of these names.

    PEFT saves the modules one by one: where it keeps them tied (ensure_weight_tying) all are
    there, and equal.

    Args:
        entries: The entries of the tensor, by the name that they were saved under.
        names: All names of the tensor.
    """
    first = next(iter(entries.values()))
    if not all(np.array_equal(first.value, entry.value) for entry in entries.values()):
        return False
    return any(entry.tied for entry in entries.values()) or set(names) <= set(entries)


def _bound_update(key: str, entry: LowRank, found: Found) -> tuple[str, LowRank]:
    """Return the model's key of an update, and the update in the layout of its target."""
    tensor_key = key
    key_use = ""
    if key not in found.by_key:
        tensor_key, key_use = split_use(key)
    target = found.get(tensor_key)
    if target is None:
        raise LoraFxError(
            f"adapter key {key!r} is not a target of the model", near(key, found.by_key)
        )

    use = _use_of(key, key_use or entry.use, entry, target)
    entry = _in_order_of(target, key, entry)
    entry = _of_dtype(key, entry, target.parameter.dtype)
    entry = variant_of(entry).fitted(entry, key, target.layout)
    a_shape, b_shape = target.layout.factor_shapes(entry.rank)
    if entry.a.shape != a_shape or entry.b.shape != b_shape:
        raise MisfitError(
            f"the update of {key!r} has A {list(entry.a.shape)} and B {list(entry.b.shape)}; "
            f"expected A {list(a_shape)} and B {list(b_shape)} for the weight "
            f"{list(target.layout.stored)}"
        )

    reached = _reached(key, use, target)
    tied = reached.of_several
    twins = tuple(reached.parameter.aliases) if tied else ()
    origin = replace(entry.origin, op=reached.op, tied=tied, twins=twins)
    use = own_use(reached.key)
    return reached.key, replace(entry, layout=target.layout, use=use, origin=origin)


def _use_of(key: str, use: str, entry: LowRank, target: Target) -> str:
    """Return the use that an update applies to; empty for all uses.

    An update that is not bound comes from a file, which names a module by its key. So it means the
    use in that module, unless the file says that it means all of them.

    Args:
        key: The key of the update.
        use: The use that its key or the update itself names; empty for none.
        entry: The update.
        target: The target of the key.
    """
    if use or entry.layout is not None:
        return use
    if target.tied:
        if entry.origin.tied:
            return ""
        return target.named_use(key, lookup=entry.origin.op == "embedding")
    modules = target.modules
    if key in modules and len(modules) > 1:
        return key
    return ""


def _in_order_of(target: Target, key: str, entry: LowRank) -> LowRank:
    """Return the update with its in and out axes in the order of the target."""
    if target.tied and entry.layout is None and entry.origin.op == "embedding":
        # A lookup's in is the rows; the target's layout is the matmul's.
        entry = variant_of(entry).turned(entry, key)
    if entry.layout == target.layout.transposed():
        # PEFT and extract go by the stored axes, or a table's name; the graph by what it contracts.
        entry = variant_of(entry).turned(entry, key)
    return entry


def _reached(key: str, use: str, target: Target) -> Target:
    """Return the part of the target with the uses that an update applies to."""
    if not use or not target.sites:
        return target
    target_of_use = target.of_use(use)
    if target_of_use is None:
        raise LoraFxError(
            f"the update of {key!r} is for its use {use!r}, but the model has no such use",
            f"its uses are {', '.join(target.each_use)}",
        )
    if len(target_of_use.sites) == len(target.sites):
        return target
    return target_of_use


def _of_dtype(key: str, entry: LowRank, dtype: str) -> LowRank:
    """Return the update with complex a and b for a complex weight; raise if the weight is real."""
    kind = factor_dtype(dtype)
    if kind.kind == "c":
        return replace(entry, a=entry.a.astype(kind), b=entry.b.astype(kind))
    if "c" in (entry.a.dtype.kind, entry.b.dtype.kind):
        raise MisfitError(f"the update of {key!r} has complex A and B; the weight is {dtype}")
    return entry
