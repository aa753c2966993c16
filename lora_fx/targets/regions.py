"""Parts of a target: a region of its tensor as a target of its own.

A fused weight (q, k, v in one matrix; gate and up; a stack of experts) is one target unless a
selector, a plan or an adapter asks for its parts. The part's factors are the whole's with zeros
around them, so every op that serves the whole serves a part:

    ΔW[part] = s·b·a   ⇔   ΔW = s·pad(b)·pad(a)
"""

from __future__ import annotations

from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region


def overlap(r: Region, s: Region) -> bool:
    """True when two regions of one tensor share an element."""
    return all(a < d and c < b for (a, b), (c, d) in zip(r, s, strict=True))


def contains(outer: Region, inner: Region) -> bool:
    """True when a region lies within another."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))


def relative(inner: Region, outer: Region) -> Region:
    """The bounds of a region within another."""
    return tuple((c - a, d - a) for (a, _), (c, d) in zip(outer, inner, strict=True))


def widen(
    e: Ops[V], whole: Layout, narrow: Layout, start: tuple[int, ...], a: V, b: V, rank: int
) -> tuple[V, V]:
    """Factors of a part with zeros around them, as factors of the whole.

    Args:
        whole: Layout of the whole target.
        narrow: Layout of the part.
        start: Where the part begins, for each axis of the layouts' `shape`.
        a: The factor [*batch, rank, in] of the part.
        b: The factor [*batch, out, rank] of the part.
        rank: The rank of both.
    """
    lead = len(whole.batch)

    def spread(x: V, axes: tuple[int, ...], *, rank_first: bool) -> V:
        order = (*whole.batch, *axes)
        if all(whole.shape[i] == narrow.shape[i] for i in order):
            return x
        at = lead if rank_first else len(order)
        before = [start[i] for i in order]
        split = [narrow.shape[i] for i in order]
        after = [whole.shape[i] - narrow.shape[i] - start[i] for i in order]
        for values, filler in ((before, 0), (after, 0), (split, rank)):
            values.insert(at, filler)
        if len(axes) != 1:
            x = e.op("reshape", x, shape=tuple(split))
        x = e.op("pad", x, before=tuple(before), after=tuple(after))
        if len(axes) != 1:
            size = whole.in_size if rank_first else whole.out_size
            side = (rank, size) if rank_first else (size, rank)
            x = e.op("reshape", x, shape=(*whole.batch_shape, *side))
        return x

    return spread(a, whole.in_, rank_first=True), spread(b, whole.out, rank_first=False)
