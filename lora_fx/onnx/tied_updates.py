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
from lora_fx.targets.found import Found
from lora_fx.targets.keys import base_name, split_use
from lora_fx.targets.target import Target


def spread(
    updates: Mapping[str, Entry], found: Found, copies: Mapping[str, str]
) -> dict[str, Entry]:
    """An entry for every copy of a tensor that an update reaches.

    Args:
        updates: Entries of an adapter that is bound to a module, or not bound.
        found: The targets of the ONNX graph.
        copies: What `copies_of` gave.

    Raises:
        LoraFxError: The update is of one use, and the file does not tell which copy that is.
    """
    entries: dict[str, Entry] = {}
    for key, entry in updates.items():
        name = base_name(key)
        _, use = split_use(key)
        twins = [copy for copy, source in copies.items() if source == name]
        targets = [found.get(stored_name) for stored_name in (name, *twins)]
        stored = [target for target in targets if target is not None]
        names_a_call = not twins and use.startswith("call:")  # the order of nodes is kept
        if not stored or names_a_call or not isinstance(entry, LowRank):
            entries[key] = entry
            continue
        reached = _reached(key, entry, stored)
        if not twins and not entry.use and not use:
            entries[key] = entry
            continue
        for target in reached:
            entries[target.key] = _turned(entry, target.op == "embedding")
    return entries


def _reached(key: str, entry: LowRank, stored: Sequence[Target]) -> Sequence[Target]:
    """The copies that an update is for: all of them, or the lookup's, or the head's."""
    _, use_of_key = split_use(key)
    use = entry.use or use_of_key
    if not use:
        origin = entry.origin
        only_lookups = all(target.op == "embedding" for target in stored)
        if origin.tied and origin.op != "embedding" and only_lookups:
            raise LoraFxError(
                f"the update of {key!r} is for a lookup and for another product ({origin.op}), "
                "but under this name the file has only the lookup",
                "fold the adapter first: lora-fx export MODEL ADAPTER -o X.onnx",
            )
        return stored
    op = use if use.startswith("op:") else f"op:{entry.origin.op}"
    reached: list[Target] = []
    for target in stored:
        reached += _of_lookups(target, lookups=op == "op:embedding")
    if use != "op:embedding" and sum(len(target.sites) for target in reached) != 1:
        readers = [f"{target.key} ({len(target.sites)} uses)" for target in stored]
        raise LoraFxError(  # which of the file's nodes is that use, nothing tells
            f"the update of {key!r} is for its use {use!r}, but the file reads the tensor as "
            f"{', '.join(readers)}",
            "fold the adapter first: lora-fx export MODEL ADAPTER -o X.onnx",
        )
    return reached


def _of_lookups(target: Target, *, lookups: bool) -> list[Target]:
    """The target with only its uses that are lookups, or only its other uses."""
    sites = [site for site in target.sites if (site.op == "embedding") == lookups]
    targets: list[Target] = []
    for key in target.keys_of(sites):
        if key == target.key:
            targets.append(target)
            continue
        _, use = split_use(key)
        of_use = target.of_use(use)
        if of_use is not None:
            targets.append(of_use)
    return targets


def as_lookup(entry: LowRank) -> bool:
    """True if in of an update is the rows of a table; a bound one may have the head's layout."""
    if entry.origin.op != "embedding":
        return False
    return entry.layout is None or entry.layout.in_ == (0,)


def op_of(entry: LowRank) -> str:
    """The op of an update, if the op still tells the direction of the update."""
    if entry.origin.op == "embedding" and not as_lookup(entry):
        return ""
    return entry.origin.op


def _turned(entry: LowRank, lookup: bool) -> LowRank:
    """The update as a copy's op reads it: a lookup's in and out are the head's swapped."""
    origin = replace(entry.origin, tied=False, twins=())
    of_copy = replace(entry, use="", layout=None, origin=origin)
    if lookup == as_lookup(entry):
        return of_copy
    if variant_of(entry).reads_weight:
        raise LoraFxError(
            f"a {name_of(entry)} update cannot serve both the lookup and the head of a tied "
            "tensor, whose rows are the columns of the other",
            "give the update to only one of them",
        )
    swapped = variant_of(entry).turned(of_copy, "")
    op = "embedding" if lookup else "linear"
    return replace(swapped, origin=replace(origin, op=op))
