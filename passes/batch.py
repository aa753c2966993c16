"""batch: one graph whose rows use different adapters.

    y[b] = x[b] · W + (x[b] @ A[ids[b]]) @ B[ids[b]]

A [n+1, in, r] and B [n+1, r, out] stack the factors of n adapters; entry 0 is zeros, so the id 0
is the base. Ranks are padded with zeros to the largest, which changes no product; the scale is in
B. An adapter with several updates of one use (parts of a fused weight) takes them side by side:
Σ bᵢ·aᵢ = [b₁ b₂ …] · [a₁; a₂; …].

This pass has to know which axis of an activation holds the rows of the batch. The walk that tells
(`lora_fx.onnx.row_axis.provenance`) is one over ONNX ops, so the pass runs on ONNX only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError, stamp
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.layout import Layout, layout_of
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.ir.view import Opaque, Permute, Region, Step, region_of, track
from lora_fx.onnx import row_axis, row_branches, row_guards
from lora_fx.onnx.batch_inputs import add_inputs, batch_symbol
from lora_fx.onnx.flat_rows import FlatRows
from lora_fx.onnx.graph.coded_weights import shares_ranges
from lora_fx.onnx.graph.values import dtype_name
from lora_fx.onnx.manifest import PROPERTY
from lora_fx.passes.base import PassResult
from lora_fx.targets.target import applies, base_name, overlap, split_key, split_use, widen
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx_ir as ir

    from lora_fx.onnx.graph.graph import OnnxGraph

Pair = tuple[Array, Array]


@dataclass(frozen=True)
class StoredWeight:
    """A parameter that adapters update, as the adapters see it.

    Attributes:
        shape: The shape that it has for the adapters; the graph may hold it transposed.
        turned: True when the graph's tensor of this name is the transpose.
        keys: Of a copy that some uses read, the keys of single uses that reach it, regions left
            out; updates of all uses do anyway.
        calls: Id of a site → the `call:N` that it is, where the graph's order tells.
    """

    shape: tuple[int, ...]
    turned: bool = False
    keys: tuple[str, ...] = ()
    calls: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Add the branches of every adapter to an OnnxGraph.

    Attributes:
        adapters: name → {key: LowRank}, bound; ids are 1, 2, … in this order.
        sources: Name of a stored tensor of the graph → (the parameter that it is, StoredWeight).
        scales: Add the input `adapter_scales`, a weight for each row.
        targets: Receives what the manifest says of each target.
    """

    adapters: Mapping[str, Updates]
    sources: Mapping[str, tuple[str, StoredWeight]]
    scales: bool = False
    targets: dict[str, Json] = field(default_factory=dict, compare=False)
    _stems: dict[str, object] = field(default_factory=dict, init=False, compare=False)

    def __call__(self, graph: OnnxGraph) -> PassResult[ir.Value]:
        """Edit the graph; one that has the branches already is left alone."""
        if PROPERTY in graph.model.metadata_props:
            return PassResult(graph, False)
        dtypes = {p.name: p.dtype for p in graph.parameters()}
        reached = {s.id: self._reaching(s) for s in graph.sites()}
        sites = [s for s in graph.sites() if any(reached[s.id])]
        wanted = {k for updates in self.adapters.values() for k in updates}
        missing = wanted - {k for keys in reached.values() for each in keys for k in each}
        if missing:
            raise LoraFxError(
                f"{min(missing)!r}: no matmul of the exported graph uses it",
                "exclude the target from the adapters",
            )
        symbol = batch_symbol(graph.model)
        states = row_axis.provenance(graph.model, symbol, {graph.activation(s) for s in sites})
        rows = [states.get(graph.activation(s), row_axis.SAME) for s in sites]
        forms = [row_branches.form_of(graph.at(s), r) for s, r in zip(sites, rows, strict=True)]
        for value in graph.model.graph.outputs:
            first = str(value.shape[0]) if value.shape else ""
            if first != symbol and states.get(value, row_axis.SAME) != row_axis.RowAxis(0):
                raise LoraFxError(
                    f"output {value.name!r} has no row for every row of the batch",
                    "batch mode serves models whose outputs keep the batch dimension",
                )
        if shares_ranges(graph.model):
            self._refuse_mixing(graph, symbol, sites)
        own = add_inputs(graph, symbol, len(self.adapters) + 1, scales=self.scales)
        uses = []
        alike: dict[object, list[ir.Value]] = {}  # A of the uses that read one value
        for site, row, form in zip(sites, rows, forms, strict=True):
            a, b = self._stacks(graph, site, dtypes[site.parameter], form, reached[site.id])
            read = graph.at(site).node.graph, graph.activation(site)
            beside = alike.setdefault((*read, row, str(a.shape), a.dtype), [])
            beside.append(a)
            uses.append((site, row, form, a, b, beside))
        for site, row, form, a, b, beside in uses:
            e = row_branches.BatchEmitter(graph, site, own, row)
            x, y = graph.activation(site), graph.output(site)
            graph.replace_output(site, e.op("add", y, e.branch(form, x, a, b, y, beside)))
        FlatRows(graph).flatten_layers()
        row_guards.guard_outputs(graph, own.outside)
        content = {**stamp(), "mode": "batch", "adapters": list(self.adapters)}
        graph.model.metadata_props[PROPERTY] = json.dumps({**content, "targets": self.targets})
        return PassResult(graph, bool(sites))

    def _refuse_mixing(self, graph: OnnxGraph, symbol: str, sites: Sequence[Site]) -> None:
        """Raise where an output has rows that were mixed after a branch.

        Other models are proven by comparing every row with the row alone. Where activations have
        one range over all rows, a row alone is another row, so the graph itself has to tell.
        """
        activations = {graph.activation(s) for s in sites}
        changed = {graph.output(s) for s in sites}
        states = row_axis.provenance(graph.model, symbol, activations, changed)
        for value in graph.model.graph.outputs:
            if lost := states.get(value, row_axis.SAME).lost:
                raise LoraFxError(
                    f"output {value.name!r}: {lost}, and an adapter of one would reach others",
                    "use mode merged or switch",
                )

    def _reaching(self, site: Site) -> list[list[str]]:
        """Of each adapter, the keys of the updates that reach a use."""
        if site.parameter not in self.sources:
            return [[] for _ in self.adapters]
        name, source = self.sources[site.parameter]
        read = region_of(source.shape, _steps(site, source))

        def reaches(key: str, update: LowRank) -> bool:
            use = split_use(key)[1] or update.use
            if base_name(key) != base_name(name):
                return False
            if source.keys:
                here = not use or f"{base_name(key)}@{use}" in source.keys
            elif use.startswith("call:"):
                here = use == source.calls.get(site.id)
            else:
                here = applies(use, site)
            return here and overlap(split_key(key, source.shape)[1], read)

        return [
            [k for k, u in updates.items() if reaches(k, u)] for updates in self.adapters.values()
        ]

    def _stacks(
        self, graph: OnnxGraph, site: Site, dtype: str, form: str, keys: Sequence[Sequence[str]]
    ) -> tuple[ir.Value, ir.Value]:
        """A and B of all adapters for a use, as initialisers; `keys` are what reaches it."""
        key, source = self.sources[site.parameter]
        region, layout = read_layout(site, source)
        work = numpy_dtype(dtype_name(graph.output(site)) or dtype)
        pairs = [
            _joined({k: u[k] for k in mine}, source.shape, region, layout, site.gain)
            for u, mine in zip(self.adapters.values(), keys, strict=True)
        ]
        stacks = row_branches.stack(pairs, form, work)
        stem = key if form == "last" else f"{key}.{form}"
        same = (region, layout, site.gain, keys)
        if self._stems.setdefault(stem, same) != same:
            stem = f"{stem}@{site.id}"
        names = (f"{stem}.batch_A", f"{stem}.batch_B")
        rank = max(a.shape[0] for a, _ in filter(None, pairs))
        self.targets[stem] = {
            "a": names[0], "b": names[1], "rank": rank, "form": form,
            "layout": [layout.to_json(), site.gain],
        }  # fmt: skip
        e = graph.emit(site)
        a, b = (e.parameter(n, v, Role.FROZEN) for n, v in zip(names, stacks, strict=True))
        return a, b


def _steps(site: Site, source: StoredWeight) -> tuple[Step, ...]:
    """From the parameter as adapters know it to the operand."""
    return (*((Permute((1, 0)),) if source.turned else ()), *site.view.steps)


def read_layout(site: Site, source: StoredWeight) -> tuple[Region, Layout]:
    """Which part of the parameter a use reads, and how its [out, in] lies in that part.

    Raises:
        LoraFxError: The use mixes the axes of the parameter.
    """
    axes = site.kind.axes(site.operand)
    try:
        tracked = track(source.shape, (*_steps(site, source), *axes.steps))
        layout = layout_of(tracked, axes.batch, axes.out, axes.in_)
    except Opaque as e:
        raise LoraFxError(f"{site.parameter!r}: {e}", "use mode merged or switch") from e
    return tracked.region, layout


def _joined(
    updates: Updates, shape: tuple[int, ...], region: Region, layout: Layout, gain: float
) -> Pair | None:
    """All updates that an adapter has of one use as its [rank, in], [out, rank]."""
    if not updates:
        return None
    pairs = (_whole(k, low, shape, region, layout, gain) for k, low in updates.items())
    all_a, all_b = zip(*pairs, strict=True)
    return np.concatenate(all_a), np.concatenate(all_b, axis=1)


def _whole(
    key: str, low: LowRank, shape: tuple[int, ...], region: Region, layout: Layout, gain: float
) -> Pair:
    """One update as factors of what a use reads, in the direction of the use, scale in b."""
    mine = low.layout
    assert mine is not None
    _, part = split_key(key, shape)
    part = tuple((lo - at, hi - at) for (lo, hi), (at, _) in zip(part, region, strict=True))
    for read, flip in ((layout, False), (layout.transposed(), True)):
        if read.narrow(part) == mine:
            a, b = widen(NumpyEmitter(), read, mine, read.starts(part), low.a, low.b, low.rank)
            a, b = (b.T, a.T) if flip else (a, b)
            scale = np.float32(low.scale * gain)
            return np.asarray(a, np.float32), np.asarray(b, np.float32) * scale
    raise LoraFxError(
        f"{key!r}: the exported graph reads the tensor in another layout than the adapter's",
        "use mode merged",
    )
