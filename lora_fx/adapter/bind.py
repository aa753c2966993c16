"""An adapter in the keys and layouts of a model; every misfit is named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import factor_dtype
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.targets.found import Found
from lora_fx.targets.keys import own_use, split_use
from lora_fx.text import Json, JsonView, near, some

OTHER_READERS = "other_readers"
"""The adapter metadata that keeps what reads a tensor beside the products of its update."""


def reading(found: Found, keys: Iterable[str], metadata: JsonView) -> Json:
    """Metadata of an adapter of a model that says what else reads the tensors of its updates.

    Args:
        found: The model's targets; targets of a checkpoint, whose readers nobody knows, change
            nothing.
        keys: The keys of the updates.
        metadata: What else is known.
    """
    if not any(t.sites for t in found.targets):
        return dict(metadata)
    known = {k: found.get(k) for k in keys}
    rows = {k: list(t.other_readers) for k, t in known.items() if t and t.other_readers}
    kept = {k: v for k, v in metadata.items() if k != OTHER_READERS}
    return {**kept, **({OTHER_READERS: rows} if rows else {})}


def bind_full(full: Mapping[str, Full], found: Found) -> dict[str, Full]:
    """Whole tensors under the first names of the model's; one value of all names is one change."""
    groups: dict[str, dict[str, Full]] = {}
    for key, entry in full.items():
        if key not in found.shapes:
            raise LoraFxError(
                f"adapter tensor {key!r} is not in the model", near(key, found.shapes)
            )
        have, want = tuple(entry.value.shape), tuple(found.shapes[key])
        if have != want:
            raise MisfitError(
                f"adapter tensor {key!r} is {list(have)}; the model's is {list(want)}"
            )
        groups.setdefault(found.first_names.get(key, key), {})[key] = entry
    bound = {}
    for name, entries in groups.items():
        names = [n for n, first in found.first_names.items() if first == name]
        key, entry = next(iter(entries.items()))
        if not means_all(entries, names):
            raise LoraFxError(
                f"the adapter's whole tensor {key!r} is for that name alone; the model has one "
                f"tensor for it and {some([n for n in names if n != key])}",
                "lora_fx.insert, fold, attach or export of the model itself, with the adapter, "
                "gives that name a tensor of its own",
            )
        several = len(names) > 1
        bound[name] = replace(entry, tied=several, twins=tuple(n for n in names if n != name))
    return bound


def means_all(entries: Mapping[str, Full], names: Collection[str]) -> bool:
    """True for whole tensors that are one change of a tensor with all of these names.

    PEFT saves the modules one by one: where it keeps them tied (ensure_weight_tying) all are
    there, and equal.

    Args:
        entries: Those of the tensor, by the name that they were saved under.
        names: All names of the tensor.
    """
    first = next(iter(entries.values()))
    equal = all(np.array_equal(first.value, entry.value) for entry in entries.values())
    return equal and (any(e.tied for e in entries.values()) or set(names) <= set(entries))


def bind_lowrank(key: str, entry: LowRank, found: Found) -> tuple[str, LowRank]:
    """The key of the model, and the update under it."""
    plain, named = (key, "") if key in found.by_key else split_use(key)
    target = found.get(plain)
    if target is None:
        raise LoraFxError(f"adapter key {key!r} is no target of the model", near(key, found.by_key))
    layout, use = target.layout, named or entry.use
    lookup = entry.origin.op == "embedding"
    if target.tied and entry.layout is None:  # a file names a module, so it means one use
        if not entry.origin.tied:  # there the file means all uses
            use = use or target.named_use(key, lookup=lookup)
        if lookup:  # a lookup's in is the rows; the target's layout is the matmul's
            entry = variant_of(entry).turned(entry, key)
    elif entry.layout is None and key in (shared := target.modules) and len(shared) > 1:
        use = use or key
    if entry.layout == layout.transposed():
        # PEFT and extract go by the stored axes, or a table's name; the graph by what it contracts.
        entry = variant_of(entry).turned(entry, key)
    entry = _of_dtype(key, entry, target.parameter.dtype)
    entry = variant_of(entry).fitted(entry, key, layout)
    a, b = layout.factor_shapes(entry.rank)
    if entry.a.shape != a or entry.b.shape != b:
        raise MisfitError(
            f"the update of {key!r} has A {list(entry.a.shape)} and B {list(entry.b.shape)}; "
            f"the weight {list(layout.stored)} needs A {list(a)} and B {list(b)}"
        )
    own = target.of_use(use) if use and target.sites else target
    if own is None:
        raise LoraFxError(
            f"the update of {key!r} acts on its use {use!r}, and the model has no such use",
            f"its uses are {', '.join(target.each_use)}",
        )
    if len(own.sites) < len(target.sites):
        target = own
    several = target.of_several
    twins = tuple(target.parameter.aliases) if several else ()
    origin = replace(entry.origin, op=target.op, tied=several, twins=twins)
    return target.key, replace(entry, layout=layout, use=own_use(target.key), origin=origin)


def _of_dtype(key: str, entry: LowRank, dtype: str) -> LowRank:
    """The update with complex a and b where the weight is complex; raises where it is real."""
    kind = factor_dtype(dtype)
    if kind.kind == "c":
        return replace(entry, a=entry.a.astype(kind), b=entry.b.astype(kind))
    if "c" in (entry.a.dtype.kind, entry.b.dtype.kind):
        raise MisfitError(f"the update of {key!r} has complex A and B; the weight is {dtype}")
    return entry
