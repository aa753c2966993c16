"""Updates of stacks of experts: at a base that has them one by one, and in another layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.fused import ExpertLayout, experts_of, family_of, laid, place
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry, name_of
from lora_fx.checkpoint.loaded_names import Stack
from lora_fx.checkpoint.placed import Placed, region_of, with_layout
from lora_fx.checkpoint.releases import stacked_experts
from lora_fx.checkpoint.renaming import Renaming, renaming
from lora_fx.checkpoint.storage_order import model_types
from lora_fx.checkpoint.tensor_uses import config_of
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint, text_config
from lora_fx.ir.layout import plain_layout
from lora_fx.targets.target import base_name
from lora_fx.text import JsonView


def stacked(adapter: Adapter, rename: Renaming) -> Adapter:
    """An adapter with its updates of expert stacks under their own names; see adapter/fused.py."""
    turned = stacks_turned(adapter, rename.config)
    entries = place(adapter.entries, rename.shape, turned=turned)
    return replace(adapter, entries=entries)


EXPERT_NAME = re.compile(r"\.experts(\.|$)")


_NTH = re.compile(r"\.experts\.(\d+)\.")


def laid_for(adapter: Adapter, layout: ExpertLayout, base: str | None, kind: str | None) -> Adapter:
    """An adapter with its experts in a layout; the base, or its model_type, says how they lie."""
    types = frozenset({kind} if kind else ())
    if base:
        config = config_of(base)
        types = types or model_types(config) or frozenset({""})  # of no family
        if any(low.origin.op == "experts" for low in adapter.lowrank.values()):
            rename = renaming(adapter, open_checkpoint(base).tensors, config, [])
            # parameters that are one matrix, such as routers, stay as PEFT has them
            sizes = {k: rename.shape(k) or () for k in adapter.entries}
            flat = {k: e for k, e in adapter.entries.items() if len(sizes[k]) == 2}
            rest = {k: e for k, e in adapter.entries.items() if k not in flat}
            placed = stacked(replace(adapter, entries=rest), rename)
            adapter = replace(adapter, entries={**flat, **placed.entries})
        count = experts_of({**config, **text_config(config)})
        there = [int(n) for key in adapter.entries for n in _NTH.findall(key)]
        if there and not layout.apart and max(there) + 1 < count:
            raise LoraFxError(
                f"the adapter has experts 0 to {max(there)}, and {base} has {count}; a stack has "
                "an update of each",
                "--format per-expert keeps them one by one",
            )
    entries = laid(adapter.entries, layout, family_of(types), saved_by(adapter))
    facts = {**adapter.metadata.get("peft", {}), "peft_version": layout.version}
    metadata = {**adapter.metadata, "peft": facts}
    if not types and not layout.apart and any(EXPERT_NAME.search(key) for key in entries):
        said = "without --base or --model-type stacks are taken to lie as all models' but Llama 4's"
        metadata["notes"] = [*metadata.get("notes", []), said]
    return replace(adapter, entries=entries, metadata=metadata)


def placed_in_stack(key: str, entry: Entry, stack: Stack) -> Iterator[Placed]:
    """An entry of a stack, or of a region of one, at the tensors that hold its matrices.

    ΔW [E, out, in] of the stack is s·b[e]·a[e] for expert e; a tensor that is rows low ≤ i < high
    of expert e gets s·b[e, low:high]·a[e]. So every part has the rank and the scale of the whole.

    Raises:
        LoraFxError: An update that is not low-rank, or whose axes cannot be taken apart.
    """
    bounds = region_of(key, stack.info)
    bound = with_layout(key, entry, stack.info, bounds, turned=False)
    (first, last), (top, bottom), columns = bounds
    for part in stack.parts:
        low, high = max(top, part.low), min(bottom, part.high)
        if first <= part.expert < last and low < high:
            piece = _piece(key, bound, part.expert - first, slice(low - top, high - top), stack)
            region = ((low - part.low, high - part.low), columns)
            name = f"{base_name(key)}[{part.expert}, {low}:{high}]"
            yield Placed(name, part.tensor, region, piece)


def _piece(key: str, entry: Entry, expert: int, rows: slice, stack: Stack) -> Entry:
    """Some rows of one expert of an entry, as an entry of a tensor of their own."""
    if isinstance(entry, Full):
        return Full(np.ascontiguousarray(entry.value[expert, rows]))
    layout = entry.layout if isinstance(entry, LowRank) else None
    axes = (layout.batch, layout.out, layout.in_) if layout else ()
    straight = axes == ((0,), (1,), (2,))
    if not isinstance(entry, LowRank) or not (straight or axes == ((0,), (2,), (1,))):
        raise LoraFxError(
            f"{stack.info.file}: the adapter's {key!r} is {name_of(entry)} of a stack that the "
            "file has as one tensor an expert; expected lora, rslora or a whole tensor",
            "save the base as the model has it: save_pretrained(…, save_original_format=False)",
        )
    a, b = entry.a[expert], entry.b[expert]
    if straight:
        b = b[rows]
        layout = plain_layout((len(b), a.shape[1]))
    else:
        a = a[:, rows]
        layout = plain_layout((a.shape[1], len(b))).transposed()
    return replace(entry, a=a, b=b, layout=layout, origin=replace(entry.origin, op=""))


def stacks_turned(adapter: Adapter, config: JsonView) -> bool | None:
    """How PEFT took the stacks of experts of a model, where its type says; see `Family`.

    PEFT writes in and out but not which of the two comes first in [E, …, …].

    Returns:
        True for [E, in, out], False for [E, out, in], None where it is not known.
    """
    family = family_of(kinds := model_types(config))
    if family is None or not (stacked_experts(kinds) or family.listed):
        return None
    return family.peft_turns(saved_by(adapter))


def saved_by(adapter: Adapter) -> str:
    """The release of PEFT that wrote an adapter's file; empty where it does not say."""
    facts = adapter.metadata.get("peft")
    return str(facts.get("peft_version") or "") if isinstance(facts, Mapping) else ""
