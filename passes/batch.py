"""batch: one graph whose rows use different adapters.

    y[b] = x[b] · W + (x[b] @ A[ids[b]]) @ B[ids[b]]

A [n+1, in, r] and B [n+1, r, out] stack the factors of n adapters; entry 0 is zeros, so the id 0
is the base. Ranks are padded with zeros to the largest, which changes no product; the scale is in
B. An adapter with several updates of one use (parts of a fused weight) takes them side by side:
Σ bᵢ·aᵢ = [b₁ b₂ …] · [a₁; a₂; …]. Tensors that adapters hold whole are tables, of which each row
takes its own entry (lora_fx.onnx.whole_rows).

Where an adapter is DoRA, evaluated on the base (lora_fx.adapter.scaled_rows), D [n+1, out] stacks
the factors of rows, zeros for every other adapter, and + D[ids[b]]·(y − bias) comes to the sum. A
weight of `adapter_scales` multiplies both, so that it is one of W' − W for every adapter.

This pass has to know which axis of an activation holds the rows of the batch. The walk that tells
(`lora_fx.onnx.row_axis.provenance`) is one over ONNX ops, so the pass runs on ONNX only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.scaled_rows import GAINS, has_gains
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
from lora_fx.onnx.made_for import CPU
from lora_fx.onnx.manifest import PROPERTY
from lora_fx.onnx.row_starts import Starts
from lora_fx.onnx.starts_mask import StartsMask
from lora_fx.onnx.whole_rows import Replacements, choose_by_row
from lora_fx.passes.base import PassResult
from lora_fx.targets.keys import applies, base_name, split_key, split_use
from lora_fx.targets.regions import overlap, relative, widen, widen_rows
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx_ir as ir

    from lora_fx.onnx.graph.graph import OnnxGraph
    from lora_fx.onnx.row_adapters import RowAdapters

Pair = tuple[Array, Array]
OWN_FACTORS = "each row's own"
"""What the manifest of a file for a device says of its factors; on the CPU rows may share them."""


@dataclass(frozen=True)
class StoredWeight:
    """A parameter that adapters update, with the shape that the adapters use.

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
        made_for: The target that the file is made for, which decides the form of layers.
        whole: The tensors that adapters replace; the graph has them as they lie in the model.
        starts: The input of token ids and the invocation tokens of the adapters, if one is an
            aLoRA: each row's branch acts from its `adapter_starts` on.
        targets: Receives what the manifest says of each target.
        made: Receives the starts, with the input that tells the size of the past.
    """

    adapters: Mapping[str, Updates]
    sources: Mapping[str, tuple[str, StoredWeight]]
    scales: bool = False
    made_for: str = CPU
    whole: Sequence[Replacements] = ()
    starts: Starts | None = None
    targets: dict[str, Json] = field(default_factory=dict, compare=False)
    made: list[Starts] = field(default_factory=list, compare=False)
    _stems: dict[str, object] = field(default_factory=dict, init=False, compare=False)

    def __call__(self, graph: OnnxGraph) -> PassResult[ir.Value]:
        """Add the branches to the graph; a graph that already has them is not changed."""
        if PROPERTY in graph.model.metadata_props:
            return PassResult(graph, False)
        dtypes = {parameter.name: parameter.dtype for parameter in graph.parameters()}
        keys_by_site = {site.id: self._reaching(site) for site in graph.sites()}
        sites = [site for site in graph.sites() if any(keys_by_site[site.id])]
        self._check_reached(keys_by_site.values())
        symbol = batch_symbol(graph.model)
        activations = {graph.activation(site) for site in sites}
        states = row_axis.provenance(graph.model, symbol, activations)
        rows = [states.get(graph.activation(site), row_axis.SAME) for site in sites]
        forms = [
            row_branches.form_of(graph.at(site), axis, self.made_for)
            for site, axis in zip(sites, rows, strict=True)
        ]
        _check_outputs(graph.model, symbol, states)
        if shares_ranges(graph.model):
            _refuse_mixing(graph, symbol, sites)

        inputs = add_inputs(
            graph, symbol, len(self.adapters) + 1, scales=self.scales, target=self.made_for
        )
        mask = StartsMask(graph, self.starts) if self.starts else None
        branches: list[_Branch] = []
        # A of the uses that read one value
        factors_of_value: dict[object, list[ir.Value]] = {}
        for site, axis, form in zip(sites, rows, forms, strict=True):
            keys = keys_by_site[site.id]
            a, b, d = self._stacks(graph, site, dtypes[site.parameter], form, keys)
            scope = graph.at(site).node.graph
            identity = (scope, graph.activation(site), axis, str(a.shape), a.dtype)
            beside = factors_of_value.setdefault(identity, [])
            beside.append(a)
            branches.append(_Branch(site, axis, form, a, b, beside, d))

        for branch in branches:
            e = row_branches.BatchEmitter(graph, branch.site, inputs, branch.rows)
            x = graph.activation(branch.site)
            y = graph.output(branch.site)
            update = e.branch(branch.form, x, branch.a, branch.b, y, branch.beside)
            total = e.op("add", y, update)
            if branch.d is not None:
                product = _product(graph, branch.site, branch.form, e)
                total = e.op("add", total, e.scaled_rows(branch.form, product, branch.d, y))
            if mask is not None:
                total = e.op("where", mask.of(graph, branch.site), total, y)
            graph.replace_output(branch.site, total)
            states[total] = states.get(y, row_axis.SAME)
        if self.whole:
            self._choose_whole(graph, inputs, states)
        FlatRows(graph).flatten_layers()
        row_guards.guard_outputs(graph, inputs.outside)
        self._write_manifest(graph.model, mask)
        return PassResult(graph, bool(sites or self.whole))

    def _choose_whole(
        self,
        graph: OnnxGraph,
        inputs: RowAdapters,
        states: dict[ir.Value, row_axis.RowAxis],
    ) -> None:
        """Let every row read the whole tensors of its adapter.

        Raises:
            LoraFxError: A use that has no form by row, or activations with one range over all rows.
        """
        if shares_ranges(graph.model):
            raise LoraFxError(
                f"{self.whole[0].name!r} is a whole tensor of an adapter, but activations have one "
                "range over all rows, so that one row would change others",
                "use mode merged or switch",
            )
        choose_by_row(graph, self.whole, inputs, states)

    def _write_manifest(self, model: ir.Model, mask: StartsMask | None) -> None:
        manifest: Json = {
            **stamp(),
            "mode": "batch",
            "adapters": list(self.adapters),
            "targets": self.targets,
        }
        if self.whole:
            manifest["whole"] = [tensor.name for tensor in self.whole]
        if self.made_for != CPU:
            manifest["factors"] = OWN_FACTORS
        if mask is not None:
            manifest["starts"] = mask.starts.to_json()
            self.made.append(mask.starts)
        model.metadata_props[PROPERTY] = json.dumps(manifest)

    def _check_reached(self, keys_of_sites: Iterable[list[list[str]]]) -> None:
        """Raise for an update that no use of the graph takes."""
        unused: set[str] = set()
        for updates in self.adapters.values():
            unused |= updates.keys()
        for keys_of_adapters in keys_of_sites:
            unused = unused.difference(*keys_of_adapters)
        if unused:
            raise LoraFxError(
                f"{min(unused)!r}: no matmul of the exported graph uses it",
                "exclude the target from the adapters",
            )

    def _reaching(self, site: Site) -> list[list[str]]:
        """Return, for each adapter, the keys of its updates that reach a use."""
        if site.parameter not in self.sources:
            return [[] for _ in self.adapters]
        name, source = self.sources[site.parameter]
        read = region_of(source.shape, _steps(site, source))
        return [
            [key for key, low in updates.items() if _reaches(key, low, site, name, source, read)]
            for updates in self.adapters.values()
        ]

    def _stacks(
        self, graph: OnnxGraph, site: Site, dtype: str, form: str, keys: Sequence[Sequence[str]]
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Store A, B and any D of all adapters for one use as initialisers.

        Args:
            graph: The graph.
            site: The use.
            dtype: That of the weight.
            form: See lora_fx.onnx.row_branches.
            keys: The keys that reach the use, of each adapter.
        """
        key, source = self.sources[site.parameter]
        region, layout = read_layout(site, source)
        pairs: list[Pair | None] = []
        gains: list[Array | None] = []
        for updates, keys_of_adapter in zip(self.adapters.values(), keys, strict=True):
            reaching = {k: updates[k] for k in keys_of_adapter}
            pairs.append(_joined(reaching, source.shape, region, layout, site.gain))
            gains.append(_joined_gains(reaching, source.shape, region, layout))
        dtype_of_product = numpy_dtype(dtype_name(graph.output(site)) or dtype)
        a, b = row_branches.stack(pairs, form, dtype_of_product)

        stem = key if form in ("last", "own") else f"{key}.{form}"
        content = (region, layout, site.gain, keys)
        if self._stems.setdefault(stem, content) != content:
            stem = f"{stem}@{site.id}"
        name_of_a = f"{stem}.batch_A"
        name_of_b = f"{stem}.batch_B"
        self.targets[stem] = {
            "a": name_of_a,
            "b": name_of_b,
            "rank": max(pair[0].shape[-2] for pair in pairs if pair),
            "form": form,
            "layout": [layout.to_json(), site.gain],
        }
        e = graph.emit(site)
        d: ir.Value | None = None
        if any(of_adapter is not None for of_adapter in gains):
            name_of_d = f"{stem}.batch_D"
            self.targets[stem]["d"] = name_of_d
            stack = row_branches.stack_gains(gains, dtype_of_product)
            d = e.parameter(name_of_d, stack, Role.FROZEN)
        factors = (name_of_a, a), (name_of_b, b)
        value_of_a, value_of_b = (e.parameter(name, x, Role.FROZEN) for name, x in factors)
        return value_of_a, value_of_b, d


@dataclass(frozen=True)
class _Branch:
    """The branch of one use, before it is emitted.

    Attributes:
        site: The use.
        rows: The axis of its activation that holds the rows of the batch.
        form: See lora_fx.onnx.row_branches.
        a: A of all adapters.
        b: B of all adapters.
        beside: A of every use that reads the same value, this one's among them.
        d: The factors of rows of all adapters; None where no adapter has any.
    """

    site: Site
    rows: row_axis.RowAxis
    form: str
    a: ir.Value
    b: ir.Value
    beside: list[ir.Value]
    d: ir.Value | None = None


def _product(graph: OnnxGraph, site: Site, form: str, e: row_branches.BatchEmitter) -> ir.Value:
    """Return the product of a use without its bias.

    Raises:
        LoraFxError: Its result cannot be multiplied by one number for each row of W.
    """
    reason = f"{site.op} does more than to add a bias to the product"
    if form == "spread":
        reason = "a transposed convolution adds up what several rows of its weight give"
    else:
        product = graph.product(site, e)
        if product is not None:
            return product
    raise LoraFxError(
        f"{site.parameter!r}: DoRA cannot be chosen row by row here: {reason}",
        "use mode merged, switch or load; or leave the target out with --exclude",
    )


def _check_outputs(
    model: ir.Model, symbol: str, states: Mapping[ir.Value, row_axis.RowAxis]
) -> None:
    """Raise for an output that has no row for every row of the batch."""
    for value in model.graph.outputs:
        first = str(value.shape[0]) if value.shape else ""
        if first == symbol:
            continue
        if states.get(value, row_axis.SAME) != row_axis.RowAxis(0):
            raise LoraFxError(
                f"output {value.name!r} does not have one row for each row of the batch",
                "use mode merged or switch; mode batch needs outputs that keep the batch dimension",
            )


def _refuse_mixing(graph: OnnxGraph, symbol: str, sites: Sequence[Site]) -> None:
    """Raise if rows are mixed after a branch on the way to an output.

    Other models are proven by comparing every row with the row alone. Where activations have
    one range over all rows, a row alone is another row, so the graph itself has to tell.
    """
    activations = {graph.activation(site) for site in sites}
    changed = {graph.output(site) for site in sites}
    states = row_axis.provenance(graph.model, symbol, activations, changed)
    for value in graph.model.graph.outputs:
        lost = states.get(value, row_axis.SAME).lost
        if lost:
            raise LoraFxError(
                f"output {value.name!r}: {lost}, so the adapter of one row would change other rows",
                "use mode merged or switch",
            )


def _reaches(
    key: str, low: LowRank, site: Site, name: str, source: StoredWeight, read: Region
) -> bool:
    """Whether an update reaches a use.

    Args:
        key: The key of the update.
        low: The update.
        site: The use.
        name: The parameter that the use reads.
        source: The parameter, as adapters see it.
        read: The region of it that the use reads.
    """
    if base_name(key) != base_name(name):
        return False
    use = split_use(key)[1] or low.use
    if source.keys:
        is_for_site = not use or f"{base_name(key)}@{use}" in source.keys
    elif use.startswith("call:"):
        is_for_site = use == source.calls.get(site.id)
    else:
        is_for_site = applies(use, site)
    if not is_for_site:
        return False
    _, region = split_key(key, source.shape)
    return overlap(region, read)


def _steps(site: Site, source: StoredWeight) -> tuple[Step, ...]:
    """Return the steps from the parameter, as adapters see it, to the operand of a use."""
    if source.turned:
        return (Permute((1, 0)), *site.view.steps)
    return tuple(site.view.steps)


def read_layout(site: Site, source: StoredWeight) -> tuple[Region, Layout]:
    """Return the region of the parameter that a use reads, and the layout of [out, in] in it.

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
    """Join an adapter's updates of one use into one pair: A [rank, in] and B [out, rank].

    Of the experts of a stack, or the groups of a convolution, they are stacks.
    """
    if not updates:
        return None
    all_a: list[Array] = []
    all_b: list[Array] = []
    for key, low in updates.items():
        a, b = _in_direction_of_use(key, low, shape, region, layout, gain)
        all_a.append(a)
        all_b.append(b)
    return np.concatenate(all_a, axis=-2), np.concatenate(all_b, axis=-1)


def _joined_gains(
    updates: Updates, shape: tuple[int, ...], region: Region, layout: Layout
) -> Array | None:
    """Return the factors of rows [*batch, out] of an adapter's updates; None without any.

    Raises:
        LoraFxError: The use reads the rows as columns, or an update is of parts of rows.
    """
    e = NumpyEmitter()
    total: Array | None = None
    for key, low in updates.items():
        if not has_gains(low):
            continue
        assert low.layout is not None
        _, region_of_key = split_key(key, shape)
        part = relative(region_of_key, region)
        if layout.narrow(part) != low.layout or low.layout.in_size != layout.in_size:
            raise LoraFxError(
                f"{key!r}: DoRA multiplies rows of the weight, but the graph reads these as "
                "columns, or only a part of each",
                "use mode merged",
            )
        column = low.variant_tensors[GAINS][..., None]
        wide = widen_rows(e, layout, low.layout, layout.starts(part), column, 1)[..., 0]
        total = wide if total is None else total + wide
    return total


def _in_direction_of_use(
    key: str, low: LowRank, shape: tuple[int, ...], region: Region, layout: Layout, gain: float
) -> Pair:
    """Return an update's factors in the direction in which a use reads the tensor, the scale in b.

    Args:
        key: The key of the update.
        low: The update, bound.
        shape: The shape of the parameter.
        region: What the use reads of it.
        layout: How that lies in the parameter.
        gain: The factor by which the op multiplies its product.
    """
    assert low.layout is not None
    _, region_of_key = split_key(key, shape)
    part = relative(region_of_key, region)
    scale = np.float32(low.scale * gain)
    e = NumpyEmitter()
    if layout.narrow(part) == low.layout:
        a, b = widen(e, layout, low.layout, layout.starts(part), low.a, low.b, low.rank)
        return np.asarray(a, np.float32), np.asarray(b, np.float32) * scale

    transposed = layout.transposed()
    if transposed.narrow(part) == low.layout:
        starts = transposed.starts(part)
        a, b = widen(e, transposed, low.layout, starts, low.a, low.b, low.rank)
        a_of_use = np.swapaxes(np.asarray(b, np.float32), -1, -2)
        return a_of_use, np.swapaxes(np.asarray(a, np.float32), -1, -2) * scale
    raise LoraFxError(
        f"{key!r}: the exported graph reads the tensor in a layout that is not the adapter's",
        "use mode merged",
    )
