"""find: every use of a frozen weight, grouped into targets.

A use is y = x · view(W), with W [*batch, out, in] in some order of its stored axes. Tracking the
axes of W through the view gives the region that the use reads and the Layout of an update of it:

    region(W)  --view, kind-->  [*batch, out, in]        ΔW = s · b @ a in those axes

A weight that ops compute from parameters is a target of its own, `PATH.weight~`: the update is one
of the effective weight. What is refused by default only (depthwise) is a target too, out of the
default plan.

Uses whose regions agree make one target. Where two uses read overlapping regions, or a view
mixes axes (an interleaved reshape), the whole parameter is the target, and ΔW reaches each use
through its view (weight form). The layout is that of the first use that is no lookup, so a tied
embedding and head are one target, and the lookup reads b·a transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_fx.ir.emitter import V
from lora_fx.ir.graph import Graph, Parameter, Site
from lora_fx.ir.layout import Layout, layout_of, plain_layout
from lora_fx.ir.view import Opaque, Region, region_of, track
from lora_fx.targets.found import Found, Refusal, Unreached
from lora_fx.targets.keys import make_key
from lora_fx.targets.plan import default_plan
from lora_fx.targets.regions import overlap
from lora_fx.targets.target import Target
from lora_fx.targets.target_roles import role_of
from lora_fx.text import by_key

ODD = "its name is the key of a part (w[0]) or a use (w@v) of another tensor: rename it"

ROUNDED = "folding would round the update away"


def find(graph: Graph[V]) -> Found:
    """Targets, refusals and unreached parameters of a graph, in definition order.

    The answer is kept on the graph, and on its clones, until one of them is edited.
    """
    return graph.kept("found", lambda: _search(graph), by_name=True)


def _search(graph: Graph[V]) -> Found:
    parameters = {p.name: p for p in graph.parameters()}
    odd = {n for n in parameters if n.endswith("]") or "@" in n}  # see base_name
    uses: dict[str, list[_Use]] = {}
    refusals, seen = [], set()
    for site in graph.sites():
        seen |= {site.parameter, *site.behind}
        if 0 in site.operand:
            site = replace(site, refusal="the weight has no elements", allowed=False)
        if site.parameter in odd:
            site = replace(site, refusal=ODD, allowed=False)
        if site.refusal:
            refusal = Refusal(site.parameter, site.op, site.refusal, site.flops)
            if site.allowed:  # a branch can stand beside it
                refusal = replace(refusal, verbs=("fold", "merge") if site.no_fold else ())
            refusals.append(refusal)
        elif site.no_fold:
            why = f"{site.no_fold}: {ROUNDED}"
            refusals.append(Refusal(site.parameter, site.op, why, verbs=("fold", "merge", "load")))
        if not site.refusal or site.allowed:
            uses.setdefault(site.parameter, []).append(_use(site, parameters[site.parameter]))
    # the shapes of the lookup tables: a matmul of the same shape is an output head
    lookups = [u.layout for group in uses.values() for u in group if u.site.op == "embedding"]
    tables = [(layout.in_size, layout.out_size) for layout in lookups if layout is not None]
    readers: dict[str, list[tuple[str, Region]]] = {}
    for r in (r for r in graph.other_readers() if r.parameter in parameters):
        shape = parameters[r.parameter].shape if r.parameter in uses else ()
        region = region_of(shape, r.view.steps) if shape else ()
        readers.setdefault(r.parameter, []).append((r.op, region))
    targets: list[Target] = []
    optional: list[Target] = []
    for name, p in parameters.items():
        for region, group in _regions(p, uses.get(name, [])).items():
            target = _target(p, region, group, tables)
            others = [op for op, read in readers.get(name, ()) if overlap(read, region)]
            target = replace(target, other_readers=tuple(dict.fromkeys(others)))
            (optional if all(u.site.refusal for u in group) else targets).append(target)
    gathered = graph.gathered_flops()
    unreached = [
        Unreached(
            p.name,
            p.shape,
            _unreached([op for op, _ in readers.get(p.name, ())]),
            gathered.get(p.name, 0),
        )
        for p in parameters.values()
        if len(p.shape) >= 2 and p.name not in seen
    ]
    return Found(
        default_plan(targets),
        tuple(_merge(refusals)),
        tuple(unreached),
        graph.data_flops() + sum(gathered.values()) - sum(u.flops for u in unreached),
        optional=tuple(replace(t, default=False, why_not=t.sites[0].refusal) for t in optional),
        shapes={n: p.shape for p in parameters.values() for n in p.names},
        first_names={n: p.name for p in parameters.values() for n in p.names},
    )


def _unreached(readers: Sequence[str]) -> str:
    ops = " and ".join(dict.fromkeys(readers))
    return "no weight matmul uses it; " + (f"it is read by {ops}" if ops else "nothing reads it")


@dataclass(frozen=True)
class _Use:
    site: Site
    region: Region
    layout: Layout | None  # None: the view mixes axes


def _use(site: Site, p: Parameter) -> _Use:
    whole = tuple((0, n) for n in p.shape)
    return _Use(site, *(site_layout(site, p.shape) or (whole, None)))


def site_layout(site: Site, shape: tuple[int, ...]) -> tuple[Region, Layout] | None:
    """The region and Layout that a use reads, or None where its view mixes stored axes."""
    axes = site.kind.axes(site.operand)
    try:
        tracked = track(shape, site.view.steps + axes.steps)
        return tracked.region, layout_of(tracked, axes.batch, axes.out, axes.in_)
    except Opaque:
        return None


def _regions(p: Parameter, uses: Sequence[_Use]) -> Mapping[Region, list[_Use]]:
    """Uses by region; all under the whole parameter where regions overlap."""
    groups = by_key((use.region, use) for use in uses)
    regions = list(groups)
    # One update of overlapping parts would have two values where they overlap.
    if any(overlap(r, s) for i, r in enumerate(regions) for s in regions[:i]):
        return {tuple((0, n) for n in p.shape): list(uses)}
    return dict(sorted(groups.items()))


def _target(
    p: Parameter, region: Region, uses: Sequence[_Use], tables: Sequence[tuple[int, int]]
) -> Target:
    stored = tuple(hi - lo for lo, hi in region)
    lead = next((u for u in uses if u.site.op != "embedding"), uses[0])
    layout = (lead.layout if lead.region == region else None) or plain_layout(stored)
    sites = tuple(u.site for u in uses)
    names = [n.removesuffix(".weight") for n in p.names]
    role = role_of(names, sites, layout, tables)
    key = make_key(p.name, region, p.shape)
    parts = _parts(p, region, layout, uses)
    if len(parts) == 1:
        role, parts = parts[0][0] or role, ()  # what the data flow proves, before a name
    return Target(key, p, region, layout, lead.site.op, sites, role, parts=parts)


def _parts(
    p: Parameter, region: Region, layout: Layout, uses: Sequence[_Use]
) -> tuple[tuple[str, str], ...]:
    """The parts along out that every use agrees on, each as (role, key)."""
    seen = {u.site.parts for u in uses}
    # a part is a region only where every use cuts the weight in the same places
    if len(seen) != 1 or any(u.layout != layout or u.region != region for u in uses):
        return ()
    (parts,) = seen
    if len(layout.out) != 1 or layout.shape[layout.out[0]] != layout.out_size:
        return tuple((r, "") for r, _, _ in parts if len(parts) == 1)
    axis = _stored_axis(layout, layout.out[0])
    if axis is None:
        return ()
    result = []
    for role, lo, hi in parts:
        first = region[axis][0]
        bounds = [*region[:axis], (first + lo, first + hi), *region[axis + 1 :]]
        result.append((role, make_key(p.name, tuple(bounds), p.shape)))
    return tuple(result)


def _stored_axis(layout: Layout, axis: int) -> int | None:
    """The stored axis that one axis of a layout is the whole of."""
    return next((i for i, own in enumerate(layout.split()) if [*own] == [axis]), None)


def _merge(refusals: Sequence[Refusal]) -> list[Refusal]:
    """Refusals of one parameter for one reason, once, with their FLOPs added."""
    merged: dict[tuple[str, str, str], Refusal] = {}
    for r in refusals:
        old = merged.get((r.key, r.op, r.reason))
        merged[(r.key, r.op, r.reason)] = replace(r, flops=r.flops + (old.flops if old else 0))
    return list(merged.values())
