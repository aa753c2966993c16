"""Parts of a target: a region of its tensor as a target of its own.

A fused weight (q, k, v in one matrix; gate and up; a stack of experts) is one target unless a
selector, a plan or an adapter asks for its parts. The part's factors are the whole's with zeros
around them, so every op that serves the whole serves a part:

    ΔW[part] = s·b·a   ⇔   ΔW = s·pad(b)·pad(a)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lora_fx.errors import LoraFxError
from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Emitter
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region
from lora_fx.target import Target, base_name, make_key, split_key
from lora_fx.uses import disjoint


def overlap(r: Region, s: Region) -> bool:
    """True when two regions of one tensor share an element."""
    return all(a < d and c < b for (a, b), (c, d) in zip(r, s, strict=True))


def contains(outer: Region, inner: Region) -> bool:
    """True when a region lies within another."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))


def relative(inner: Region, outer: Region) -> Region:
    """The bounds of a region within another."""
    return tuple((c - a, d - a) for (a, _), (c, d) in zip(outer, inner, strict=True))


def part(t: Target, key: str, role: str = "") -> Target | None:
    """The target of a key that names a region within `t`; None where it is no such region."""
    if base_name(key) not in (t.parameter.name, *t.parameter.aliases) or key == base_name(key):
        return None
    try:
        _, region = split_key(key, t.parameter.shape)
    except ValueError:
        return None
    if len(region) != len(t.region) or not contains(t.region, region):
        return None
    layout = t.layout.narrow(relative(region, t.region))
    if layout is None:
        return None
    name = make_key(t.parameter.name, region, t.parameter.shape)
    found = role or next((r for r, k in t.parts if k == name), t.role)
    return replace(t, key=name, region=region, layout=layout, role=found, parts=())


def rest(t: Target, taken: Iterable[str]) -> list[str]:
    """Keys of a target's parts without those that are taken."""
    gone = set(taken)
    return [k for _, k in t.parts if k not in gone]


def check_disjoint(targets: Iterable[Target]) -> None:
    """Raise where two regions of one tensor overlap at one of its uses."""
    by_name: dict[str, list[Target]] = {}
    for t in targets:
        for other in by_name.setdefault(t.parameter.name, []):
            apart = t.sites and disjoint((t, other))
            if overlap(t.region, other.region) and not apart:
                raise LoraFxError(
                    f"{other.key!r} and {t.key!r} share elements of one tensor",
                    "regions of one parameter, and its uses, must not overlap",
                )
        by_name[t.parameter.name].append(t)


def widen(
    e: Emitter[V], whole: Layout, narrow: Layout, start: tuple[int, ...], a: V, b: V, rank: int
) -> tuple[V, V]:
    """Factors of a part with zeros around them, as factors of the whole.

    Args:
        whole: Layout of the whole target.
        narrow: That of the part.
        start: Where the part begins, per axis of the layouts' `shape`.
        a: [*batch, rank, in] of the part.
        b: [*batch, out, rank] of the part.
        rank: Their rank.
    """
    lead = len(whole.batch)

    def spread(x: V, axes: tuple[int, ...], *, rank_first: bool) -> V:
        order = (*whole.batch, *axes)
        if all(whole.shape[i] == narrow.shape[i] for i in order):
            return x
        at = lead if rank_first else len(order)
        before, after, split = [], [], []
        for i in order:
            before.append(start[i])
            after.append(whole.shape[i] - narrow.shape[i] - start[i])
            split.append(narrow.shape[i])
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
