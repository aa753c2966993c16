"""Updates of a stack of experts for a checkpoint that has its matrices apart.

ΔW [E, out, in] of the stack is s·b[e]·a[e] for expert e; a tensor that is rows low ≤ i < high of
expert e gets s·b[e, low:high]·a[e]. So every part has the rank and the scale of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Entry, name_of
from lora_fx.checkpoint.loaded import Part, Stack
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region

Piece = tuple[Part, Region, Entry]
"""(the tensor, the region of it that changes, what is done to that)."""


def apart(key: str, entry: Entry, bounds: Region, stack: Stack) -> Iterator[Piece]:
    """What an entry of a stack, or of a region of one, is for each tensor that it reaches.

    Args:
        key: Of the adapter, for messages.
        entry: With its layout.
        bounds: The region of the stack.
        stack: Where its matrices lie.

    Raises:
        LoraFxError: An update that is not low-rank, or whose axes cannot be taken apart.
    """
    (first, last), (top, bottom), columns = bounds
    for part in stack.parts:
        low, high = max(top, part.low), min(bottom, part.high)
        if first <= part.expert < last and low < high:
            rows = slice(low - top, high - top)
            region = ((low - part.low, high - part.low), columns)
            yield part, region, _piece(key, entry, part.expert - first, rows, stack)


def _piece(key: str, entry: Entry, expert: int, rows: slice, stack: Stack) -> Entry:
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
        shape, out, in_ = (len(b), a.shape[1]), (0,), (1,)
    else:
        a = a[:, rows]
        shape, out, in_ = (a.shape[1], len(b)), (1,), (0,)
    extra = {k: v for k, v in entry.extra.items() if k != "op"}
    return replace(entry, a=a, b=b, layout=Layout(shape, (), out, in_, shape), extra=extra)
