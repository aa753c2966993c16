"""Parts of a target: a region of its tensor as a separate target.

A fused weight (q, k, v in one matrix; gate and up; a stack of experts) is one target unless a
selector, a plan or an adapter asks for its parts. The part's factors are the whole's with zeros
around them, so every op that serves the whole serves a part:

    ΔW[part] = s·b·a   ⇔   ΔW = s·pad(b)·pad(a)
"""

from __future__ import annotations

from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region


def overlap(region: Region, other: Region) -> bool:
    """Whether two regions of one tensor share an element."""
    for (first, end), (other_first, other_end) in zip(region, other, strict=True):
        if first >= other_end or other_first >= end:
            return False
    return True


def contains(outer: Region, inner: Region) -> bool:
    """Whether a region lies within another."""
    for (outer_first, outer_end), (first, end) in zip(outer, inner, strict=True):
        if first < outer_first or end > outer_end:
            return False
    return True


def relative(inner: Region, outer: Region) -> Region:
    """Return the bounds of a region relative to another region."""
    pairs = zip(inner, outer, strict=True)
    return tuple((first - start, end - start) for (first, end), (start, _) in pairs)


def widen(
    e: Ops[V], whole: Layout, narrow: Layout, start: tuple[int, ...], a: V, b: V, rank: int
) -> tuple[V, V]:
    """Return the factors of a part padded with zeros to factors of the whole.

    Args:
        whole: Layout of the whole target.
        narrow: Layout of the part.
        start: Where the part begins, for each axis of the layouts' `shape`.
        a: The factor [*batch, rank, in] of the part.
        b: The factor [*batch, out, rank] of the part.
        rank: The rank of both.
    """
    wide_a = _widen_side(e, whole, narrow, start, a, rank, rank_first=True)
    return wide_a, widen_rows(e, whole, narrow, start, b, rank)


def widen_rows(
    e: Ops[V], whole: Layout, narrow: Layout, start: tuple[int, ...], b: V, rank: int
) -> V:
    """Return the factor [*batch, out, rank] of a part padded with zeros; see `widen`."""
    return _widen_side(e, whole, narrow, start, b, rank, rank_first=False)


def _widen_side(
    e: Ops[V],
    whole: Layout,
    narrow: Layout,
    start: tuple[int, ...],
    x: V,
    rank: int,
    *,
    rank_first: bool,
) -> V:
    """Return one factor padded: a, whose rank stands before its side, or b."""
    lead = len(whole.batch)
    side = whole.in_ if rank_first else whole.out
    axes = (*whole.batch, *side)
    if all(whole.shape[axis] == narrow.shape[axis] for axis in axes):
        return x
    split = [narrow.shape[axis] for axis in axes]
    before = [start[axis] for axis in axes]
    after = [whole.shape[axis] - narrow.shape[axis] - start[axis] for axis in axes]
    rank_axis = lead if rank_first else len(axes)
    split.insert(rank_axis, rank)
    before.insert(rank_axis, 0)
    after.insert(rank_axis, 0)

    # A side of several axes is split for the padding, and joined again.
    has_one_axis = len(side) == 1
    if not has_one_axis:
        x = e.op("reshape", x, shape=tuple(split))
    x = e.op("pad", x, before=tuple(before), after=tuple(after))
    if has_one_axis:
        return x
    matrix = (rank, whole.in_size) if rank_first else (whole.out_size, rank)
    return e.op("reshape", x, shape=(*whole.batch_shape, *matrix))
