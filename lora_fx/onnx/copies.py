"""One tied tensor as several constants: which of them an update of the tensor reaches.

An exporter stores a tied embedding and head apart (the head transposed). The copies say in their
metadata what they are copies of, so that one update reaches each of them, or those that its use
names, in the layout that they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry
from lora_fx.errors import LoraFxError
from lora_fx.targets.found import Found
from lora_fx.targets.target import Target, base_name, split_use

COPY_OF = "lora_fx.copy_of"


def copies_of(model: ir.Model) -> dict[str, str]:
    """Initialiser → the tensor that it is another copy of."""
    values = model.graph.initializers.values()
    return {str(v.name): v.metadata_props[COPY_OF] for v in values if COPY_OF in v.metadata_props}


def spread(adapter: Adapter, found: Found, copies: Mapping[str, str]) -> Adapter:
    """The adapter with an entry for every copy of a tensor that its update reaches.

    Args:
        adapter: Bound to a module, or not bound.
        found: Targets of the ONNX graph.
        copies: Of `copies_of`.

    Raises:
        LoraFxError: The update is of one use, and the file does not tell which copy that is.
    """
    entries: dict[str, Entry] = {}
    for key, entry in adapter.entries.items():
        name = base_name(key)
        twins = [c for c, source in copies.items() if source == name]
        if not twins or not isinstance(entry, LowRank):
            entries[key] = entry
            continue
        reached = _reached(key, entry, [found.get(c) for c in (name, *twins)])
        for target in reached:
            entries[target.key] = _turned(entry, target.op == "embedding")
    return replace(adapter, entries=entries)


def _reached(key: str, entry: LowRank, stored: Sequence[Target | None]) -> list[Target]:
    """The copies that an update is for: all of them, or the lookup's, or the head's."""
    targets = [t for t in stored if t is not None]
    use = entry.use or split_use(key)[1]
    if not use:
        return targets
    lookup = (use if use.startswith("op:") else f"op:{entry.extra.get('op')}") == "op:embedding"
    meant = [t for t in targets if (t.op == "embedding") == lookup]
    if not use.startswith("op:") and len(meant) != 1:
        raise LoraFxError(
            f"the update of {key!r} acts on its use {use!r}, and the file stores the tensor as "
            f"{', '.join(t.key for t in targets)}",
            "give the update the name of one of these",
        )
    return meant


def _turned(entry: LowRank, lookup: bool) -> LowRank:
    """The update as a copy's op reads it: a lookup's in and out are the head's swapped."""
    was_lookup = entry.extra.get("op") == "embedding"
    extra = {k: v for k, v in entry.extra.items() if k != "tied"}
    turned = replace(entry, use="", layout=None, extra=extra)
    if lookup == was_lookup:
        return turned
    if entry.magnitude is not None:
        raise LoraFxError(
            "a DoRA update is for both the lookup and the head of a tied tensor, whose rows are "
            "the columns of the other",
            "give the update to one of them",
        )
    a, b = np.swapaxes(entry.b, -1, -2), np.swapaxes(entry.a, -1, -2)
    op = "embedding" if lookup else "linear"
    return replace(turned, a=a, b=b, extra={**turned.extra, "op": op})
