"""bind: an adapter in the keys and layouts of a model; every misfit is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter import Adapter
from lora_fx.changes import Entry, is_plain, name_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.experts import place
from lora_fx.fused import other_split
from lora_fx.ir.layout import Layout
from lora_fx.lowrank import Full, LowRank
from lora_fx.targets.found import Found
from lora_fx.targets.regions import (
    check_disjoint,
    disjoint,
    each_use,
    lookup_use,
    modules,
    named_use,
    of_use,
    op_of,
    own_use,
    tied,
)
from lora_fx.text import near


def bind(adapter: Adapter, found: Found) -> Adapter:
    """An adapter in the keys and layouts of `found`; every misfit is named.

    Args:
        adapter: Bound or not; its keys may be aliases.
        found: The model's targets.
    """
    stacks = place(adapter.entries, found.shapes.get, tuple(found.shapes))
    adapter = replace(adapter, entries=stacks)
    _check_graph(adapter)
    if "naming" in adapter.metadata:  # a file that does not name parameters
        from lora_fx.formats.naming import resolve  # formats are built on this module

        adapter = resolve(adapter, found.shapes)
    entries: dict[str, Entry] = {}
    first = {
        a: t.parameter.name
        for t in found.targets
        for a in t.parameter.aliases
        if not t.parameter.name.endswith("~")  # there the alias is no tensor
    }
    for key, entry in _resplit(adapter, found).items():
        bound: LowRank | Full
        if isinstance(entry, Full):
            name, bound = first.get(key, key), _bind_full(key, entry, found.shapes)
        else:
            name, bound = _bind_lowrank(key, entry, found)
            if name in entries:
                name = _apart(name, entries, bound, found)
        if name in entries:
            raise LoraFxError(
                f"adapter keys name {name!r} twice ({key!r} is an alias)",
                "one tensor has one update; merge the two first",
            )
        entries[name] = bound
    low = {k: v for k, v in entries.items() if isinstance(v, LowRank)}
    check_disjoint((v.use and of_use(found[k], v.use)) or found[k] for k, v in low.items())
    return replace(adapter, entries=entries)


def _check_graph(adapter: Adapter) -> None:
    """Raise for an entry that no graph can hold: all but low-rank updates and whole tensors."""
    for key, entry in adapter.entries.items():
        plain = replace(entry, magnitude=None) if isinstance(entry, LowRank) else entry
        if not is_plain(plain):
            raise LoraFxError(
                f"a graph: the adapter's {key!r} is {name_of(plain)}; expected lora, rslora, dora "
                "or a whole tensor",
                "lora-fx merge folds it into a checkpoint",
            )


def _resplit(adapter: Adapter, found: Found) -> dict[str, LowRank | Full]:
    """Updates of split projections for a fused weight, and the reverse, under the model's keys."""
    entries: dict[str, LowRank | Full] = {}
    for key, entry in adapter.entries.items():
        if not isinstance(entry, LowRank):
            assert isinstance(entry, Full)  # check_plain
            entries[key] = entry
        elif found.get(key) is not None:
            entries[key] = entry
        else:
            entries |= other_split(key, entry, found) or {key: entry}
    return entries


def _apart(name: str, entries: dict[str, Entry], new: LowRank, found: Found) -> str:
    """The key of an update whose tensor has one already, each at uses of its own; else `name`."""
    old, t = entries[name], found[name]
    if not isinstance(old, LowRank) or not old.use or not new.use:
        return name
    first, second = of_use(t, old.use), of_use(t, new.use)
    if first is None or second is None or not disjoint((first, second)):
        return name
    del entries[name]
    entries[first.key] = old
    return second.key


def _bind_full(key: str, entry: Full, shapes: Mapping[str, tuple[int, ...]]) -> Full:
    if key not in shapes:
        raise LoraFxError(f"adapter tensor {key!r} is not in the model", near(key, shapes))
    have, want = tuple(entry.value.shape), tuple(shapes[key])
    if have != want:
        raise LoraFxError(
            f"adapter tensor {key!r} is {list(have)}; the model's is {list(want)}",
            "was the adapter trained on another model?",
        )
    return entry


def _bind_lowrank(key: str, entry: LowRank, found: Found) -> tuple[str, LowRank]:
    target = found.get(key)
    if target is None:
        raise LoraFxError(f"adapter key {key!r} is no target of the model", near(key, found.by_key))
    layout, use = target.layout, entry.use or own_use(key)
    lookup = entry.extra.get("op") == "embedding"
    if tied(target) and entry.layout is None:  # a file names a module, so it means one use
        if not entry.extra.get("tied"):  # there the file means all uses
            use = use or (lookup_use(target) if lookup else named_use(target, key))
        if lookup:  # a lookup's in is the rows; the target's layout is the matmul's
            entry = _turnable(key, entry)
            entry = replace(entry, a=np.swapaxes(entry.b, -1, -2), b=np.swapaxes(entry.a, -1, -2))
    elif entry.layout is None and key in (shared := modules(target)) and len(shared) > 1:
        use = use or key
    if entry.extra.get("op") == "experts" and entry.layout == layout.transposed():
        # PEFT goes by the stored axes, the graph by what the product contracts.
        entry = _turnable(key, entry)
        entry = replace(entry, a=np.swapaxes(entry.b, -1, -2), b=np.swapaxes(entry.a, -1, -2))
    if entry.magnitude is not None:
        entry = replace(entry, magnitude=_lengths(key, entry, layout))
    a = (*layout.batch_shape, entry.rank, layout.in_size)
    b = (*layout.batch_shape, layout.out_size, entry.rank)
    if entry.a.shape != a or entry.b.shape != b:
        raise LoraFxError(
            f"the update of {key!r} has A {list(entry.a.shape)} and B {list(entry.b.shape)}; "
            f"the weight {list(layout.stored)} needs A {list(a)} and B {list(b)}",
            "was the adapter trained on another model?",
        )
    if use and target.sites and of_use(target, use) is None:
        raise LoraFxError(
            f"the update of {key!r} acts on its use {use!r}, and the model has no such use",
            f"its uses are {', '.join(each_use(target))}",
        )
    extra = {**entry.extra, "op": op_of(target, use)}
    return target.key, replace(entry, layout=layout, use=use, extra=extra)


def _turnable(key: str, entry: LowRank) -> LowRank:
    """The entry itself; raises for DoRA's, which has lengths of rows and none of columns."""
    if entry.magnitude is not None:
        raise LoraFxError(
            f"the DoRA update of {key!r} is for a use that reads the tensor the other way round; "
            "the model has one weight for both",
            "lora-fx merge folds it into a checkpoint",
        )
    return entry


def _lengths(key: str, entry: LowRank, layout: Layout) -> Array:
    """DoRA's magnitude as [*batch, out]."""
    assert entry.magnitude is not None
    shape = (*layout.batch_shape, layout.out_size)
    if entry.magnitude.size != math.prod(shape):
        raise LoraFxError(
            f"the DoRA magnitude of {key!r} has {entry.magnitude.size} numbers; the weight has "
            f"{math.prod(shape)} rows",
            "was the adapter trained on another model?",
        )
    return entry.magnitude.reshape(shape)
