"""Updates of stacks of experts: at a base that has them one by one, and in another layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.expert_families import experts_of, family_of
from lora_fx.adapter.expert_layouts import ExpertLayout, laid
from lora_fx.adapter.expert_stacks import place
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
from lora_fx.targets.keys import base_name
from lora_fx.text import JsonView


def stacked(adapter: Adapter, rename: Renaming) -> Adapter:
    """An adapter with its updates of expert stacks under their own names; see adapter/fused.py."""
    turned = stacks_turned(adapter, rename.config)
    entries = place(adapter.entries, rename.shape, turned=turned)
    return replace(adapter, entries=entries)


EXPERT_NAME = re.compile(r"\.experts(\.|$)")
_EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


def laid_for(
    adapter: Adapter, layout: ExpertLayout, base: str | None, model_type: str | None
) -> Adapter:
    """An adapter with its experts in a layout.

    Args:
        adapter: Its updates of experts, in any layout.
        layout: The layout to write.
        base: The checkpoint that says how its stacks lie, and how many experts they have.
        model_type: The same by a model's type; it goes before that of the base.

    Raises:
        LoraFxError: A stack of which some experts have no update.
    """
    types = frozenset({model_type} if model_type else ())
    if base:
        config = config_of(base)
        types = types or model_types(config) or frozenset({""})  # of no family
        if any(low.origin.op == "experts" for low in adapter.lowrank.values()):
            adapter = _stacked_by_base(adapter, base, config)
        _check_every_expert(adapter, layout, base, config)

    entries = laid(adapter.entries, layout, family_of(types), saved_by(adapter))
    peft = {**adapter.metadata.get("peft", {}), "peft_version": layout.version}
    metadata = {**adapter.metadata, "peft": peft}
    if not types and not layout.apart and any(EXPERT_NAME.search(key) for key in entries):
        note = (
            "without --base or --model-type, stacks are read in the layout of all models except "
            "Llama 4"
        )
        metadata["notes"] = [*metadata.get("notes", []), note]
    return replace(adapter, entries=entries, metadata=metadata)


def _stacked_by_base(adapter: Adapter, base: str, config: JsonView) -> Adapter:
    """An adapter with its updates of the base's stacks under their own names.

    Parameters that are one matrix, such as routers, stay as PEFT has them.
    """
    rename = renaming(adapter, open_checkpoint(base).tensors, config, [])
    matrices: dict[str, Entry] = {}
    others: dict[str, Entry] = {}
    for key, entry in adapter.entries.items():
        is_matrix = len(rename.shape(key) or ()) == 2
        group = matrices if is_matrix else others
        group[key] = entry
    stacks = stacked(replace(adapter, entries=others), rename)
    return replace(adapter, entries={**matrices, **stacks.entries})


def _check_every_expert(
    adapter: Adapter, layout: ExpertLayout, base: str, config: JsonView
) -> None:
    """Raise if a layout stacks the experts and the adapter lacks the last ones of the base."""
    count = experts_of({**config, **text_config(config)})
    numbers: list[int] = []
    for key in adapter.entries:
        numbers += map(int, _EXPERT_NUMBER.findall(key))
    if numbers and not layout.apart and max(numbers) + 1 < count:
        raise LoraFxError(
            f"the adapter has experts 0 to {max(numbers)}, and {base} has {count}; a stack needs "
            "an update for each expert",
            "--format per-expert keeps them one by one",
        )


def placed_in_stack(key: str, entry: Entry, stack: Stack) -> Iterator[Placed]:
    """An entry of a stack, or of a region of one, at the tensors that hold its matrices.

    ΔW [E, out, in] of the stack is s·b[e]·a[e] for expert e; a tensor that is rows low ≤ i < high
    of expert e gets s·b[e, low:high]·a[e]. So every part has the rank and the scale of the whole.

    Raises:
        LoraFxError: An update that is not low-rank, or whose axes cannot be taken apart.
    """
    bounds = region_of(key, stack.info)
    laid_entry = with_layout(key, entry, stack.info, bounds, in_out=False)
    (first, last), (top, bottom), columns = bounds
    for matrix in stack.parts:
        low = max(top, matrix.low)
        high = min(bottom, matrix.high)
        if first <= matrix.expert < last and low < high:
            rows = slice(low - top, high - top)
            piece = _expert_rows(key, laid_entry, matrix.expert - first, rows, stack)
            region = ((low - matrix.low, high - matrix.low), columns)
            name = f"{base_name(key)}[{matrix.expert}, {low}:{high}]"
            yield Placed(name, matrix.tensor, region, piece)


def _expert_rows(key: str, entry: Entry, expert: int, rows: slice, stack: Stack) -> Entry:
    """Some rows of one expert of an entry, as an entry for a separate tensor."""
    if isinstance(entry, Full):
        return Full(np.ascontiguousarray(entry.value[expert, rows]))

    axes: tuple[tuple[int, ...], ...] = ()
    if isinstance(entry, LowRank) and entry.layout is not None:
        axes = (entry.layout.batch, entry.layout.out, entry.layout.in_)
    is_out_in = axes == ((0,), (1,), (2,))
    is_in_out = axes == ((0,), (2,), (1,))
    if not isinstance(entry, LowRank) or not (is_out_in or is_in_out):
        raise LoraFxError(
            f"{stack.info.file}: the adapter's {key!r} is {name_of(entry)} of a stack, but the "
            "file has one tensor for each expert; expected lora, rslora or a whole tensor",
            "save the base with the stacks of the loaded model: save_pretrained(…, "
            "save_original_format=False)",
        )

    a = entry.a[expert]
    b = entry.b[expert]
    if is_out_in:
        b = b[rows]
        layout = plain_layout((len(b), a.shape[1]))
    else:
        a = a[:, rows]
        layout = plain_layout((a.shape[1], len(b))).transposed()
    return replace(entry, a=a, b=b, layout=layout, origin=replace(entry.origin, op=""))


def stacks_turned(adapter: Adapter, config: JsonView) -> bool | None:
    """How PEFT reads the stacks of experts of a model type; see `Family`.

    PEFT writes in and out but not which of the two comes first in [E, …, …].

    Returns:
        True for [E, in, out], False for [E, out, in], None where it is not known.
    """
    types = model_types(config)
    family = family_of(types)
    if family is None or not (stacked_experts(types) or family.listed):
        return None
    return family.peft_turns(saved_by(adapter))


def saved_by(adapter: Adapter) -> str:
    """The release of PEFT that wrote an adapter's file; empty if the file does not record it."""
    peft = adapter.metadata.get("peft")
    if not isinstance(peft, Mapping):
        return ""
    return str(peft.get("peft_version") or "")
