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
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.graph import Site
from lora_fx.ir.layout import Layout, Region
from lora_fx.targets.target import Target, base_name, make_key, split_key, split_use


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


def check_disjoint(targets: Iterable[Target]) -> None:
    """Raise where two regions of one tensor overlap at one of its uses."""
    by_name: dict[str, list[Target]] = {}
    for t in targets:
        for other in by_name.setdefault(t.parameter.name, []):
            common = {s.id for s in t.sites} & {s.id for s in other.sites}
            if overlap(t.region, other.region) and (common or not t.sites):
                raise LoraFxError(
                    f"{other.key!r} and {t.key!r} share elements of one tensor",
                    "regions of one parameter, and its uses, must not overlap",
                )
        by_name[t.parameter.name].append(t)


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


# Which uses of a tied, shared or repeated tensor an update reaches.
#
# A tensor has one key, and by default one update for all its uses. A use is named by
#
# ==========  ===================================================================
# alias       a name of the parameter: the uses inside that name's module
# op:NAME     the uses by that op
# call:N      the N-th use in execution order, from 0
# ==========  ===================================================================
#
# A key without `@` is an update of all uses, and `NAME@USE` one of these uses alone, so that
# another use of the tensor can have an update of its own. `LowRank.use` says the same where an
# update is not bound to a model: there a key is a file's name of a module.


def tied(t: Target) -> bool:
    """True when a lookup shares the tensor with another op."""
    return "embedding" in t.uses and len(t.uses) > 1


def of_several(t: Target) -> bool:
    """True for one update of all uses, where a lookup or several modules share the tensor.

    No file of another tool can say that.
    """
    return not split_use(t.key)[1] and (tied(t) or len(modules(t)) > 1)


def named_use(t: Target, name: str, *, lookup: bool) -> str:
    """The use that one name of a tied tensor means: its own module's, else the matmul's.

    Of an update of a lookup it is the lookup, whatever the name.
    """
    scope = name.rpartition(".")[0]
    if not lookup and any(s.scope == scope for s in t.sites):
        return name
    op = ""
    for site in (s for s in t.sites if (s.op == "embedding") == lookup):
        for known in (t.parameter.name, *t.parameter.aliases):
            if site.scope and known.rpartition(".")[0] == site.scope:
                return known
        op = op or f"op:{site.op}"
    return op


def applies(use: str, site: Site) -> bool:
    """True when an update with this `use` reaches a site of its target."""
    if not use or use.startswith("call:"):  # a call is in the key, and its target has no other site
        return True
    if use.startswith("op:"):
        return site.op == use[3:]
    return site.scope == use.rpartition(".")[0]


def of_use(t: Target, use: str) -> Target | None:
    """The target with some of its uses only, under the key `NAME@USE`; None where it has none."""
    known = use.startswith(("op:", "call:")) or use in (t.parameter.name, *t.parameter.aliases)
    if use.startswith("call:"):
        sites = tuple(s for i, s in enumerate(t.sites) if use == f"call:{i}")
    else:
        sites = tuple(s for s in t.sites if known and applies(use, s))
    if not sites:
        return None
    name, bracket, region = t.key.partition("[")
    op = next((s.op for s in sites if s.op != "embedding"), "embedding")
    return replace(t, key=f"{name}@{use}{bracket}{region}", sites=sites, op=op, parts=())


def each_use(t: Target) -> tuple[str, ...]:
    """A name for every use of a target: its alias or op where that is its alone, else the call."""
    names = (t.parameter.name, *t.parameter.aliases)
    result = []
    for i, site in enumerate(t.sites):
        own = [n for n in names if site.scope and n.rpartition(".")[0] == site.scope]
        options = [*own, f"op:{site.op}"]
        alone = (u for u in options if [s.id for s in t.sites if applies(u, s)] == [site.id])
        result.append(next(alone, f"call:{i}"))
    return tuple(result)


def own_use(key: str) -> str:
    """What `LowRank.use` says of a key's use: nothing of a call, which no other place can tell."""
    use = split_use(key)[1]
    return "" if use.startswith("call:") else use


def keys_of(t: Target, sites: Iterable[Site]) -> tuple[str, ...]:
    """Keys of the updates that reach some uses of a target and no other; its own for all uses."""
    left = {s.id for s in sites}
    if all(s.id in left for s in t.sites):
        return (t.key,)
    names = (*modules(t), *(f"op:{o}" for o in t.uses), *(f"call:{i}" for i in range(len(t.sites))))
    known = [one for n in names if (one := of_use(t, n)) is not None]
    reached = [(one.key, {s.id for s in one.sites}) for one in known]
    result = [key for key, ids in reached if ids == left][:1]
    for key, ids in reached if not result else ():
        if ids <= left:
            result.append(key)
            left -= ids
    return tuple(result)


def modules(t: Target) -> tuple[str, ...]:
    """The names of a tensor in whose modules it is used."""
    names = (t.parameter.name, *t.parameter.aliases)
    scopes = {s.scope for s in t.sites if s.scope}
    return tuple(n for n in names if n.rpartition(".")[0] in scopes)
