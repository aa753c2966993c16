"""fold: W + s·b·a into the constants, per site.

    W'[region] = W[region] + cast(s · (b @ a)),   b @ a, then s, then + W in fp32, rounded once

The new weight of DoRA is m/‖V‖ · V, where V is that sum.

Uses of a parameter that take the same updates share one constant. When these are all uses of the
parameter (or, in a graph alone with its constants, the rest read none of the regions that change)
its own constant is replaced; tied uses that differ get a constant of their own, so an update of a
head never reaches the embedding that shares its tensor.

A weight of codes takes no sum, but for an update that is constant in each of its blocks (QA-LoRA,
Xu et al. 2023, arXiv:2309.14717), where the reader takes floats for zero points:

    zero' = zero − s · (b @ a)[:, block] / scale        the codes stay, and nothing is rounded off
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from lora_fx.adapter.applied import Applied
from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.qalora import pooled
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.graph import Deferred, Graph, Site
from lora_fx.ir.kinds import delta
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.ir.quantised import ZeroPoints
from lora_fx.ir.view import Region
from lora_fx.passes.base import PassResult
from lora_fx.passes.find import ROUNDED, find
from lora_fx.passes.insert import Pair, reached
from lora_fx.targets.found import Found
from lora_fx.targets.regions import overlap
from lora_fx.targets.target import Target, not_storable
from lora_fx.text import by_key


@dataclass(frozen=True)
class Folded:
    """A change of one parameter: where its value went, and how much of it rounding lost.

    Attributes:
        parameter: The parameter.
        stored_as: The name that holds the new value; another one where tied uses differ.
        keys: The updates that are in it.
        kept: ⟨applied, Δ⟩/⟨Δ, Δ⟩: 1 when the stored dtype holds the whole change, 0 when
            rounding swallowed it.
        grew: Bytes of a constant that had to be added.
        other_readers: Ops that read the parameter for more than products: they have the old value.
        zeros: The update is in the zero points of codes.
    """

    parameter: str
    stored_as: str
    keys: tuple[str, ...]
    kept: float
    grew: int = 0
    other_readers: tuple[str, ...] = ()
    zeros: bool = False

    @property
    def said(self) -> str:
        """A note on the ops that still read the old value; empty if there are none."""
        if not self.other_readers:
            return ""
        ops = ", ".join(self.other_readers)
        return f"{self.parameter}: {ops} also read this tensor, and get it without the update"


def said_of_zeros(changes: Sequence[Folded]) -> list[str]:
    """A note on the cost of floats for zero points, measured in ONNX Runtime 1.31.

    The numbers are in docs/quantised.md.
    """
    count = sum(change.zeros for change in changes)
    if not count:
        return []
    why = "ONNX Runtime on the CPU dequantises them in every run; --mode switch is faster"
    return [f"{count} quantised weights have zero points in floating point: {why}"]


@dataclass(frozen=True)
class Fold:
    """Fold `updates` (key → LowRank, bound) into a graph's constants.

    Attributes:
        updates: The updates to fold.
        lazy: Compute values when the graph is written. The report is filled in then, and does
            not tell a value in place from one that was added.
        report: Receives a Folded for each constant.
        applied: Receives where each group of updates went, for other graphs over the same
            tensors.
        moved: Receives, of each update that goes into zero points, these as they were and
            what it adds to the weight [rows, blocks].
        unrounded: Receives, of each weight of 16 bits, what gives the sum in fp32, by the name that
            holds it: a file may be wider than the model.
    """

    updates: Updates
    lazy: bool = False
    report: list[Folded] = field(default_factory=list, compare=False)
    applied: dict[str, str] = field(default_factory=dict, compare=False)
    moved: dict[str, tuple[ZeroPoints, Array]] = field(default_factory=dict, compare=False)
    unrounded: dict[str, Callable[[], Array]] = field(default_factory=dict, compare=False)

    def __call__(self, graph: Graph[V]) -> PassResult[V]:
        """Edit the graph's constants; this pass folds each update only once."""
        found = find(graph)
        hint = "fold with these arguments as the example"
        uses = {key: update.use for key, update in self.updates.items()}
        targets, sites = reached(found, uses, required=not self.applied, hint=hint)
        self._find_zero_points(graph, targets)

        sites_by_updates = by_key(((site.parameter, tuple(keys)), site) for site, keys in sites)
        modified = False
        for (name, keys), members in sites_by_updates.items():
            if keys[0] in self.moved:  # of a whole weight, and so the only one
                modified |= self._move(graph, name, keys, members)
                continue
            pairs = [(targets[key], self.updates[key]) for key in keys]
            # Uses of other regions find their numbers in the new constant too, so it can take the
            # old one's place. Where programs share tensors, another may still read the old one.
            readers = list(members)
            if graph.alone:
                readers += _elsewhere(found, name, [target.region for target, _ in pairs])
            ident = _ident(name, keys)
            if ident in self.applied:  # another graph over the same constants
                modified |= self._again(graph, name, members, readers, self.applied[ident])
                continue
            replaced_sites = readers if graph.covers(name, readers) else members
            self._replace(graph, name, keys, pairs, replaced_sites)
            modified = True
        return PassResult(graph, modified)

    def _find_zero_points(self, graph: Graph[V], targets: Mapping[str, Target]) -> None:
        """Note updates that go into zero points; raise for one that a stored weight cannot hold."""
        for key, target in targets.items():
            if target.no_fold and key not in self.moved:
                zero_points = exact(graph, target, self.updates[key])
                if isinstance(zero_points, str):
                    raise not_storable(target, zero_points)
                self.moved[key] = zero_points

    def _replace(
        self,
        graph: Graph[V],
        name: str,
        keys: tuple[str, ...],
        pairs: list[Pair],
        sites: list[Site],
    ) -> None:
        """Let sites read a constant with updates in it."""
        read = graph.reader(name)
        value = self._value(name, keys, read, pairs)
        stored_as = graph.replace_parameter(name, sites, value)
        self.applied[_ident(name, keys)] = stored_as
        if self.lazy:
            return
        read_wide = self.unrounded.get(name, read)  # other regions may be folded already
        self.unrounded[stored_as] = partial(fold_wide, read_wide, pairs)
        grew = self.report[-1].grew
        if stored_as == name:
            grew = 0
        self.report[-1] = replace(self.report[-1], stored_as=stored_as, grew=grew)

    def _value(
        self, name: str, keys: tuple[str, ...], read: Callable[[], Array], pairs: list[Pair]
    ) -> Array | Deferred:
        """The folded tensor, or how to compute it; either way the report gets its line."""

        def compute() -> Array:
            value, kept_share = fold_value(read(), pairs)
            # a deferred value may be computed twice
            if not any(line.parameter == name and line.keys == keys for line in self.report):
                other_readers: dict[str, None] = {}
                for target, _ in pairs:
                    other_readers |= dict.fromkeys(target.other_readers)
                self.report.append(
                    Folded(name, name, keys, kept_share, value.nbytes, tuple(other_readers))
                )
            return value

        if not self.lazy:
            return compute()
        parameter = pairs[0][0].parameter
        return Deferred(parameter.shape, parameter.dtype, compute)

    def _move(self, graph: Graph[V], name: str, keys: tuple[str, ...], members: list[Site]) -> bool:
        """Put an update into the zero points that its sites read; other uses keep theirs."""
        zero_points, delta = self.moved[keys[0]]
        zero = zero_points.moved(delta)
        if not np.isfinite(zero).all():
            raise LoraFxError(
                f"{name!r}: a block of its codes has scale 0, so its zero point cannot hold the "
                "update",
                "export with --mode switch, which adds a branch instead",
            )
        stored_as = name
        if delta.any():
            stored_as = graph.put_zeros(members, zero)
        ident = _ident(name, keys)
        if ident not in self.applied:
            self.applied[ident] = stored_as
            applied = Applied()
            applied.count(zero_points.change(zero), delta)
            self.report.append(Folded(name, stored_as, keys, applied.gain, zero.nbytes, zeros=True))
        return stored_as != name

    def _again(
        self, graph: Graph[V], name: str, members: list[Site], readers: list[Site], stored_as: str
    ) -> bool:
        """Let sites of another graph read a constant that is folded already."""
        if stored_as != name:
            graph.repoint(members, stored_as)
            return True
        if not graph.covers(name, readers):
            raise LoraFxError(
                f"{name!r} was folded in place, and this graph has another use of it",
                "fold again with these arguments as the example",
            )
        return False


def _ident(name: str, keys: Sequence[str]) -> str:
    """The name of a parameter with some updates in it, in `applied`."""
    return f"{name}|{'|'.join(keys)}"


def exact(graph: Graph[V], target: Target, low: LowRank) -> tuple[ZeroPoints, Array] | str:
    """The zero points of a quantised weight, and the change of them for an update [rows, blocks].

    Instead the reason why they cannot hold it.
    """
    variant = variant_of(low)
    group = variant.constant_over
    zero_points = _one_zero_points(graph, target)
    if zero_points is None or not _changes_all_rows(target, low):
        if group:
            return "the weight has no zero points that may be floats"
        return ROUNDED

    a = pooled(low.a, min(zero_points.block, low.a.shape[-1]))
    if a is not None:
        delta = low.scale * (low.b.astype(np.float64) @ a.astype(np.float64))
        return zero_points, delta
    if group:
        blocks = f"whole blocks of {zero_points.block} codes"
        return f"{variant.title}'s groups of {group} inputs are not {blocks}"
    return ROUNDED


def _one_zero_points(graph: Graph[V], target: Target) -> ZeroPoints | None:
    """The zero points of a weight; None where a site has none, or others."""
    first, *others = (graph.zero_points(site) for site in target.sites)
    if first is None:
        return None
    for zero_points in others:
        if zero_points is None or not zero_points.same(first):
            return None
    return first


def _changes_all_rows(target: Target, low: LowRank) -> bool:
    """True for an update s·b·a of a whole matrix [out, in], whose rows are out."""
    layout = low.layout or target.layout
    if variant_of(low).reads_weight or layout.out != (0,):
        return False
    return len(target.region) == 2 and _is_whole(target.region, target.parameter.shape)


def _is_whole(region: Region, shape: tuple[int, ...]) -> bool:
    return region == tuple((0, size) for size in shape)


def _elsewhere(found: Found, name: str, regions: list[Region]) -> list[Site]:
    """The uses of a parameter that read nothing of these regions of it."""
    sites: list[Site] = []
    for target in (*found.targets, *found.optional):
        if target.parameter.name != name:
            continue
        if not any(overlap(target.region, region) for region in regions):
            sites += target.sites
    return sites


ROWS = 1 << 20
"""So many elements of a tensor are folded at a time: a wide copy of them is in memory."""


def fold_value(base: Array, updates: list[Pair]) -> tuple[Array, float]:
    """The stored tensor with its updates added, rounded once, and the share that was kept."""
    # Never in 16 bits: the sum would be rounded twice, and W would be added to a rounded Δ.
    work = np.result_type(base.dtype, np.float32)  # fp64 and complex numbers stay what they are
    value = np.empty_like(base)
    applied = Applied()
    for rows, updates_of_rows in _blocks(base, updates):
        before: Array = base[rows].astype(work, copy=False)
        wide: Array = np.array(before)
        _add(wide, updates_of_rows)
        value[rows] = wide.astype(base.dtype, copy=False)
        if base.dtype == work:
            continue  # the sum as it is: nothing is rounded away
        applied.count(value[rows].astype(work) - before, wide - before)
    return value, applied.gain


def fold_wide(read: Callable[[], Array], updates: list[Pair]) -> Array:
    """The stored tensor with its updates added, in fp32 where it is narrower, and not rounded."""
    base = read()
    wide = base.astype(np.result_type(base.dtype, np.float32), copy=False)
    value, _ = fold_value(wide, updates)
    return value


def fold_rows(base: Array, updates: list[Pair], rows: slice) -> Array:
    """Some rows of W + s·b·a in fp64, unrounded; all rows where they cannot be had apart."""
    work = np.result_type(base.dtype, np.float64)
    if not _is_by_rows(base, updates):
        wide = base.astype(work)
        _add(wide, updates)
        return np.asarray(wide[rows])
    # a matrix: other rows need not be computed
    wide = base[rows].astype(work)
    _add(wide, [_narrowed(target, low, rows, base.shape[1]) for target, low in updates])
    return np.asarray(wide)


def _add(wide: Array, updates: list[Pair]) -> None:
    """Put each update into its region of W, in the dtype that W has here."""
    e: Ops[Array] = NumpyEmitter()
    work = wide.dtype
    for target, low in updates:
        part = wide[tuple(slice(lo, hi) for lo, hi in target.region)]
        layout = low.layout or target.layout
        change = delta(e, layout, low.a.astype(work), low.b.astype(work), float(low.scale))
        variant = variant_of(low)
        beside = {field: value.astype(work) for field, value in variant.beside(low).items()}
        part[...] = part + variant.change(e, layout, part, change, beside.__getitem__)


def _is_by_rows(base: Array, updates: list[Pair]) -> bool:
    """True for updates of a whole matrix, whose rows can be had one by one."""
    if base.ndim != 2:
        return False
    for target, low in updates:
        layout = low.layout or target.layout
        if layout.shape != base.shape or not _is_whole(target.region, base.shape):
            return False
        variant = variant_of(low)
        # the change of some stored rows may need all of W
        if variant.reads_weight and not (variant.by_rows and layout.out == (0,)):
            return False
    return True


def _blocks(base: Array, updates: list[Pair]) -> Iterator[tuple[slice, list[Pair]]]:
    """Some rows of a matrix with the change by its updates; a tensor of another shape at once."""
    if not _is_by_rows(base, updates):
        yield slice(None), updates
        return
    n_rows, n_columns = base.shape
    step = max(1, ROWS // n_columns)
    for first in range(0, n_rows, step):
        rows = slice(first, min(n_rows, first + step))
        yield rows, [_narrowed(target, low, rows, n_columns) for target, low in updates]


def _narrowed(target: Target, low: LowRank, rows: slice, columns: int) -> Pair:
    """A target and its update in some rows of the stored matrix."""
    region = ((0, rows.stop - rows.start), (0, columns))
    layout = (low.layout or target.layout).narrow(((rows.start, rows.stop), (0, columns)))
    assert layout is not None  # one axis is out, the other in
    if layout.out == (0,):
        narrowed = replace(variant_of(low).rows(low, rows), layout=layout)
    else:
        narrowed = replace(low, a=low.a[:, rows], layout=layout)
    return replace(target, region=region), narrowed
