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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

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

ODD = (
    "its name looks like the key of a part (w[0]) or of one use (w@v) of another tensor: rename it"
)

ROUNDED = "folding would round the update away"


def find(graph: Graph[V]) -> Found:
    """Targets, refusals and unreached parameters of a graph, in definition order.

    The answer is kept on the graph, and on its clones, until one of them is edited.
    """
    return graph.kept("found", lambda: _search(graph), by_name=True)


def _search(graph: Graph[V]) -> Found:
    """Compute the answer of find."""
    parameters = {parameter.name: parameter for parameter in graph.parameters()}
    sites = [_checked(site, parameters) for site in graph.sites()]
    uses = _uses_by_parameter(sites, parameters)
    readers = _other_readers(graph, parameters, uses)
    targets, optional = _targets(parameters, uses, readers)

    gathered_flops = graph.gathered_flops()
    unreached = _unreached(parameters, sites, readers, gathered_flops)
    unreached_flops = sum(parameter.flops for parameter in unreached)
    shapes: dict[str, tuple[int, ...]] = {}
    first_names: dict[str, str] = {}
    for parameter in parameters.values():
        shapes |= dict.fromkeys(parameter.names, parameter.shape)
        first_names |= dict.fromkeys(parameter.names, parameter.name)
    return Found(
        default_plan(targets),
        tuple(_merged(_refusals(sites))),
        tuple(unreached),
        graph.data_flops() + sum(gathered_flops.values()) - unreached_flops,
        optional=tuple(_out_of_default_plan(target) for target in optional),
        shapes=shapes,
        first_names=first_names,
    )


def _checked(site: Site, parameters: Mapping[str, Parameter]) -> Site:
    """A site, refused where no update of its parameter can have a key or a product."""
    name = site.parameter
    if name in parameters and (name.endswith("]") or "@" in name):  # see base_name
        return replace(site, refusal=ODD, allowed=False)
    if 0 in site.operand:
        return replace(site, refusal="the weight has no elements", allowed=False)
    return site


def _refusals(sites: Sequence[Site]) -> Iterator[Refusal]:
    """The refused sites with their reasons, for all verbs or for some."""
    for site in sites:
        if site.refusal:
            refusal = Refusal(site.parameter, site.op, site.refusal, site.flops)
            if site.allowed:  # a branch can stand beside it
                verbs = ("fold", "merge") if site.no_fold else ()
                refusal = replace(refusal, verbs=verbs)
            yield refusal
        elif site.no_fold:
            why = f"{site.no_fold}: {ROUNDED}"
            yield Refusal(site.parameter, site.op, why, verbs=("fold", "merge", "load"))


def _merged(refusals: Iterable[Refusal]) -> list[Refusal]:
    """Refusals of one parameter for one reason, once, with their FLOPs added."""
    merged: dict[tuple[str, str, str], Refusal] = {}
    for refusal in refusals:
        identity = (refusal.key, refusal.op, refusal.reason)
        flops = refusal.flops
        if identity in merged:
            flops += merged[identity].flops
        merged[identity] = replace(refusal, flops=flops)
    return list(merged.values())


@dataclass(frozen=True)
class _Use:
    """A site, and the part of its parameter that it reads; no layout where its view mixes axes."""

    site: Site
    region: Region
    layout: Layout | None


def _uses_by_parameter(
    sites: Sequence[Site], parameters: Mapping[str, Parameter]
) -> dict[str, list[_Use]]:
    """The uses that a target may have, by the name of the parameter."""
    return by_key(
        (site.parameter, _use(site, parameters[site.parameter]))
        for site in sites
        if not site.refusal or site.allowed
    )


def _use(site: Site, parameter: Parameter) -> _Use:
    read = site_layout(site, parameter.shape)
    if read is None:
        return _Use(site, _whole(parameter), None)
    return _Use(site, *read)


def _whole(parameter: Parameter) -> Region:
    """The region that is all of a parameter."""
    return tuple((0, size) for size in parameter.shape)


def site_layout(site: Site, shape: tuple[int, ...]) -> tuple[Region, Layout] | None:
    """The region and Layout that a use reads, or None where its view mixes stored axes."""
    axes = site.kind.axes(site.operand)
    try:
        tracked = track(shape, site.view.steps + axes.steps)
        return tracked.region, layout_of(tracked, axes.batch, axes.out, axes.in_)
    except Opaque:
        return None


Readers = Mapping[str, Sequence[tuple[str, Region]]]
"""Parameter → the ops that read it for more than products, each with the region that it reads."""


def _other_readers(
    graph: Graph[V], parameters: Mapping[str, Parameter], uses: Mapping[str, list[_Use]]
) -> Readers:
    """The ops that read parameters for more than products.

    The region is empty where the parameter has no uses, and so no targets.
    """
    readers: dict[str, list[tuple[str, Region]]] = {}
    for reader in graph.other_readers():
        if reader.parameter not in parameters:
            continue
        region: Region = ()
        shape = parameters[reader.parameter].shape
        if shape and reader.parameter in uses:
            region = region_of(shape, reader.view.steps)
        readers.setdefault(reader.parameter, []).append((reader.op, region))
    return readers


def _targets(
    parameters: Mapping[str, Parameter], uses: Mapping[str, list[_Use]], readers: Readers
) -> tuple[list[Target], list[Target]]:
    """The targets, and those whose every use is refused by default."""
    tables = _lookup_tables(uses)
    targets: list[Target] = []
    optional: list[Target] = []
    for name, parameter in parameters.items():
        for region, group in _regions(parameter, uses.get(name, [])).items():
            target = _target(parameter, region, group, tables)
            overlapping = [op for op, read in readers.get(name, ()) if overlap(read, region)]
            target = replace(target, other_readers=tuple(dict.fromkeys(overlapping)))
            if all(use.site.refusal for use in group):
                optional.append(target)
            else:
                targets.append(target)
    return targets, optional


def _lookup_tables(uses: Mapping[str, list[_Use]]) -> list[tuple[int, int]]:
    """The shapes of the lookup tables: a matmul of the same shape is an output head."""
    tables: list[tuple[int, int]] = []
    for group in uses.values():
        for use in group:
            if use.site.op == "embedding" and use.layout is not None:
                tables.append((use.layout.in_size, use.layout.out_size))
    return tables


def _out_of_default_plan(target: Target) -> Target:
    return replace(target, default=False, why_not=target.sites[0].refusal)


def _unreached(
    parameters: Mapping[str, Parameter],
    sites: Sequence[Site],
    readers: Readers,
    gathered_flops: Mapping[str, int],
) -> list[Unreached]:
    """The parameters of two or more dimensions that no site reads, even through other values."""
    reached: set[str] = set()
    for site in sites:
        reached |= {site.parameter, *site.behind}
    unreached: list[Unreached] = []
    for name, parameter in parameters.items():
        if len(parameter.shape) >= 2 and name not in reached:
            ops = [op for op, _ in readers.get(name, ())]
            flops = gathered_flops.get(name, 0)
            unreached.append(Unreached(name, parameter.shape, _why_unreached(ops), flops))
    return unreached


def _why_unreached(ops: Sequence[str]) -> str:
    if not ops:
        return "no weight matmul uses it; nothing reads it"
    return f"no weight matmul uses it; it is read by {' and '.join(dict.fromkeys(ops))}"


def _regions(parameter: Parameter, uses: Sequence[_Use]) -> Mapping[Region, list[_Use]]:
    """Uses by region; all under the whole parameter where regions overlap."""
    groups = by_key((use.region, use) for use in uses)
    # One update of overlapping parts would have two values where they overlap.
    if any(overlap(one, other) for one, other in combinations(groups, 2)):
        return {_whole(parameter): list(uses)}
    return dict(sorted(groups.items()))


def _target(
    parameter: Parameter,
    region: Region,
    uses: Sequence[_Use],
    tables: Sequence[tuple[int, int]],
) -> Target:
    """The target of the uses of one region.

    Its layout and its op are those of the first use that is no lookup.
    """
    lead = next((use for use in uses if use.site.op != "embedding"), uses[0])
    layout = lead.layout
    if layout is None or lead.region != region:
        layout = plain_layout(tuple(hi - lo for lo, hi in region))

    names = [name.removesuffix(".weight") for name in parameter.names]
    sites = tuple(use.site for use in uses)
    role = role_of(names, sites, layout, tables)
    parts = _parts(parameter, region, layout, uses)
    if len(parts) == 1:
        role_by_flow, _ = parts[0]
        role = role_by_flow or role  # what the data flow proves, before a name
        parts = ()
    key = make_key(parameter.name, region, parameter.shape)
    return Target(key, parameter, region, layout, lead.site.op, sites, role, parts=parts)


def _parts(
    parameter: Parameter, region: Region, layout: Layout, uses: Sequence[_Use]
) -> tuple[tuple[str, str], ...]:
    """The parts along out that every use agrees on, each as (role, key)."""
    # a part is a region only where every use cuts the weight in the same places
    parts = uses[0].site.parts
    for use in uses:
        if use.site.parts != parts or use.layout != layout or use.region != region:
            return ()

    if len(layout.out) != 1 or layout.shape[layout.out[0]] != layout.out_size:
        if len(parts) != 1:
            return ()
        role, _, _ = parts[0]
        return ((role, ""),)
    axis = _stored_axis(layout, layout.out[0])
    if axis is None:
        return ()
    first, _ = region[axis]
    keyed_parts = []
    for role, lo, hi in parts:
        bounds = [*region[:axis], (first + lo, first + hi), *region[axis + 1 :]]
        keyed_parts.append((role, make_key(parameter.name, tuple(bounds), parameter.shape)))
    return tuple(keyed_parts)


def _stored_axis(layout: Layout, axis: int) -> int | None:
    """The stored axis that one axis of a layout is the whole of."""
    for stored_axis, axes in enumerate(layout.split()):
        if [*axes] == [axis]:
            return stored_axis
    return None
