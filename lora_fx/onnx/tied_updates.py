"""One tied tensor as several constants: which of them an update of the tensor reaches.

An exporter stores a tied embedding and head apart (the head transposed). The copies say in their
metadata what they are copies of, so that one update reaches each of them, or those that its use
names, in the layout that they have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, name_of
from lora_fx.adapter.variant import variant_of
from lora_fx.errors import LoraFxError
from lora_fx.targets.target import Found, Target, base_name, split_use


def spread(given: Mapping[str, Entry], found: Found, copies: Mapping[str, str]) -> dict[str, Entry]:
    """An entry for every copy of a tensor that an update reaches.

    Args:
        given: Entries of an adapter that is bound to a module, or not bound.
        found: The targets of the ONNX graph.
        copies: What `copies_of` gave.

    Raises:
        LoraFxError: The update is of one use, and the file does not tell which copy that is.
    """
    entries: dict[str, Entry] = {}
    for key, entry in given.items():
        name = base_name(key)
        twins = [c for c, source in copies.items() if source == name]
        stored = [t for c in (name, *twins) if (t := found.get(c)) is not None]
        call = not twins and split_use(key)[1].startswith("call:")  # the order of nodes is kept
        if not stored or call or not isinstance(entry, LowRank):
            entries[key] = entry
            continue
        reached = _reached(key, entry, stored)
        if not twins and not (entry.use or split_use(key)[1]):
            entries[key] = entry
            continue
        for target in reached:
            entries[target.key] = _turned(entry, target.op == "embedding")
    return entries


def _reached(key: str, entry: LowRank, stored: Sequence[Target]) -> Sequence[Target]:
    """The copies that an update is for: all of them, or the lookup's, or the head's."""
    use = entry.use or split_use(key)[1]
    if not use:
        origin = entry.origin
        only_lookups = {t.op for t in stored} == {"embedding"}
        if origin.tied and origin.op != "embedding" and only_lookups:
            raise LoraFxError(
                f"the update of {key!r} is for a lookup and for another product ({origin.op}), and "
                "the file has only the lookup by this name",
                "fold the adapter first: lora-fx export MODEL ADAPTER -o X.onnx",
            )
        return stored
    lookup = (use if use.startswith("op:") else f"op:{entry.origin.op}") == "op:embedding"
    meant = []
    for t in stored:
        keys = t.keys_of([s for s in t.sites if (s.op == "embedding") == lookup])
        meant += [t if k == t.key else t.of_use(split_use(k)[1]) for k in keys]
    reached = [t for t in meant if t is not None]
    if use != "op:embedding" and sum(len(t.sites) for t in reached) != 1:
        raise LoraFxError(  # which of the file's nodes is that use, nothing tells
            f"the update of {key!r} acts on its use {use!r}, and the file reads the tensor as "
            f"{', '.join(f'{t.key} ({len(t.sites)} uses)' for t in stored)}",
            "fold the adapter first: lora-fx export MODEL ADAPTER -o X.onnx",
        )
    return reached


def as_lookup(entry: LowRank) -> bool:
    """True where in of an update is the rows of a table; a bound one may lie as the head does."""
    named = entry.origin.op == "embedding"
    return named and (entry.layout is None or entry.layout.in_ == (0,))


def op_of(entry: LowRank) -> str:
    """The op of an update, where that still says which way round the update lies."""
    op = entry.origin.op
    return "" if op == "embedding" and not as_lookup(entry) else op


def _turned(entry: LowRank, lookup: bool) -> LowRank:
    """The update as a copy's op reads it: a lookup's in and out are the head's swapped."""
    was_lookup = as_lookup(entry)
    origin = replace(entry.origin, tied=False, twins=())
    turned = replace(entry, use="", layout=None, origin=origin)
    if lookup == was_lookup:
        return turned
    if variant_of(entry).reads_weight:
        raise LoraFxError(
            f"a {name_of(entry)} update is for both the lookup and the head of a tied tensor, "
            "whose rows are the columns of the other",
            "give the update to one of them",
        )
    turned = variant_of(entry).turned(turned, "")
    return replace(turned, origin=replace(origin, op="embedding" if lookup else "linear"))
