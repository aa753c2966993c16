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

from collections.abc import Callable, Iterator, Sequence
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
from lora_fx.ir.layout import Layout
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
    """What fold did to one parameter: where the value went and what rounding lost.

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
        """What still reads the old value, for people; empty where nothing does."""
        ops = ", ".join(self.other_readers)
        return f"{self.parameter}: read by {ops} too, without the update" if ops else ""


def said_of_zeros(changes: Sequence[Folded]) -> list[str]:
    """What floats for zero points cost: measured in ONNX Runtime 1.31, in docs/quantised.md."""
    count = sum(f.zeros for f in changes)
    why = "ONNX Runtime's CPU makes all of them floats in every run; --mode switch is faster"
    return [f"{count} weights of codes have floats for zero points: {why}"] if count else []


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
        """Edit the graph's constants; what this pass has folded once it does not fold again."""
        found = find(graph)
        hint = "fold with these arguments as the example"
        uses = {key: update.use for key, update in self.updates.items()}
        targets, sites = reached(found, uses, required=not self.applied, hint=hint)
        for key, target in targets.items():
            if target.no_fold and key not in self.moved:
                into = exact(graph, target, self.updates[key])
                if isinstance(into, str):
                    raise not_storable(target, into)
                self.moved[key] = into
        groups = by_key(((site.parameter, tuple(keys)), site) for site, keys in sites)
        modified = False
        for (name, folded), members in groups.items():
            ident = f"{name}|{'|'.join(folded)}"
            pairs = [(targets[k], self.updates[k]) for k in folded]
            if folded[0] in self.moved:  # of a whole weight, and so the only one
                modified |= self._move(graph, name, folded, members)
                continue
            # Uses of other regions find their numbers in the new constant too, so it can take the
            # old one's place. Where programs share tensors, another may still read the old one.
            readers = list(members)
            if graph.alone:
                readers += _elsewhere(found, name, [t.region for t, _ in pairs])
            if ident in self.applied:  # another graph over the same constants
                modified |= self._again(graph, name, members, readers, self.applied[ident])
                continue
            alone = readers if graph.covers(name, readers) else members
            read = graph.reader(name)
            stored = graph.replace_parameter(name, alone, self._value(name, folded, read, pairs))
            self.applied[ident] = stored
            if not self.lazy:
                wide = self.unrounded.get(name, read)  # other regions may be folded already
                self.unrounded[stored] = partial(fold_wide, wide, pairs)
                last = self.report[-1]
                grew = 0 if stored == name else last.grew
                self.report[-1] = replace(last, stored_as=stored, grew=grew)
            modified = True
        return PassResult(graph, modified)

    def _value(
        self, name: str, keys: tuple[str, ...], read: Callable[[], Array], pairs: list[Pair]
    ) -> Array | Deferred:
        """The folded tensor, or how to compute it; either way the report gets its line."""

        def compute() -> Array:
            value, kept = fold_value(read(), pairs)
            known = {(f.parameter, f.keys) for f in self.report}
            if (name, keys) not in known:  # a deferred value may be wanted twice
                others = tuple(dict.fromkeys(op for t, _ in pairs for op in t.other_readers))
                self.report.append(Folded(name, name, keys, kept, value.nbytes, others))
            return value

        whole = pairs[0][0].parameter
        return Deferred(whole.shape, whole.dtype, compute) if self.lazy else compute()

    def _move(self, graph: Graph[V], name: str, keys: tuple[str, ...], members: list[Site]) -> bool:
        """Put an update into the zero points that its sites read; other uses keep theirs."""
        ident, (old, delta) = f"{name}|{'|'.join(keys)}", self.moved[keys[0]]
        zero = old.moved(delta)
        if not np.isfinite(zero).all():
            raise LoraFxError(
                f"{name!r}: a block of its codes has scale 0, so that no zero point moves it",
                "export --mode switch has a branch beside it",
            )
        stored = name if not delta.any() else graph.put_zeros(members, zero)
        if ident not in self.applied:
            self.applied[ident] = stored
            applied = Applied()
            applied.count(old.change(zero), delta)
            self.report.append(Folded(name, stored, keys, applied.gain, zero.nbytes, zeros=True))
        return stored != name

    def _again(
        self, graph: Graph[V], name: str, members: list[Site], readers: list[Site], stored: str
    ) -> bool:
        if stored != name:
            graph.repoint(members, stored)
            return True
        if not graph.covers(name, readers):
            raise LoraFxError(
                f"{name!r} was folded in place, and this graph has another use of it",
                "fold again with these arguments as the example",
            )
        return False


def exact(graph: Graph[V], target: Target, low: LowRank) -> tuple[ZeroPoints, Array] | str:
    """The zero points of a weight of codes, and what they can hold of an update [rows, blocks].

    Instead the reason why they cannot hold it.
    """
    (old, *more), whole = (graph.zero_points(s) for s in target.sites), len(target.region) == 2
    whole &= target.region == tuple((0, n) for n in target.parameter.shape)
    variant = variant_of(low)
    group = variant.constant_over
    fits = whole and not variant.reads_weight and (low.layout or target.layout).out == (0,)
    if old is None or not fits or not all(z is not None and z.same(old) for z in more):
        return "no zero points that may be floats are there" if group else ROUNDED
    a = pooled(low.a, min(old.block, low.a.shape[-1]))
    if a is None and group:
        blocks = f"whole blocks of {old.block} codes"
        return f"{variant.title}'s groups of {group} inputs are not {blocks}"
    if a is None:
        return ROUNDED
    return old, low.scale * (low.b.astype(np.float64) @ a.astype(np.float64))


def _elsewhere(found: Found, name: str, regions: list[Region]) -> list[Site]:
    """The uses of a parameter that read nothing of these regions of it."""
    own = (t for t in (*found.targets, *found.optional) if t.parameter.name == name)
    return [s for t in own if not any(overlap(t.region, r) for r in regions) for s in t.sites]


ROWS = 1 << 20
"""So many elements of a tensor are folded at a time: a wide copy of them is in memory."""


def fold_value(base: Array, updates: list[Pair]) -> tuple[Array, float]:
    """The stored tensor with its updates added, rounded once, and the share that was kept."""
    # Never in 16 bits: the sum would be rounded twice, and W would be added to a rounded Δ.
    work = np.result_type(base.dtype, np.float32)  # fp64 and complex numbers stay what they are
    value = np.empty_like(base)
    applied = Applied()
    for rows, block in _blocks(base, updates):
        before: Array = base[rows].astype(work, copy=False)
        wide: Array = np.array(before)
        _add(wide, block)
        value[rows] = wide.astype(base.dtype, copy=False)
        if base.dtype == work:
            continue  # the sum as it is: nothing is rounded away
        applied.count(value[rows].astype(work) - before, wide - before)
    return value, applied.gain


def fold_wide(read: Callable[[], Array], updates: list[Pair]) -> Array:
    """The stored tensor with its updates added, in fp32 where it is narrower, and not rounded."""
    base = read()
    return fold_value(base.astype(np.result_type(base.dtype, np.float32), copy=False), updates)[0]


def fold_rows(base: Array, updates: list[Pair], rows: slice) -> Array:
    """Some rows of W + s·b·a in fp64, unrounded; all rows where they cannot be had apart."""
    # a matrix: other rows need not be computed
    if _flat(base, updates):
        updates = [_narrowed(t, low, rows, base.shape[1]) for t, low in updates]
        base, rows = base[rows], slice(None)
    wide = base.astype(np.result_type(base.dtype, np.float64))
    _add(wide, updates)
    return np.asarray(wide[rows])


def _add(wide: Array, updates: list[Pair]) -> None:
    """Put each update into its region of W, in the dtype that W has here."""
    e: Ops[Array] = NumpyEmitter()
    for target, low in updates:
        part = wide[tuple(slice(lo, hi) for lo, hi in target.region)]
        layout, work = low.layout or target.layout, wide.dtype
        change = delta(e, layout, low.a.astype(work), low.b.astype(work), float(low.scale))
        variant = variant_of(low)
        beside = {field: value.astype(work) for field, value in variant.beside(low).items()}
        part[...] = part + variant.change(e, layout, part, change, beside.__getitem__)


def _flat(base: Array, updates: list[Pair]) -> bool:
    """True for updates of a whole matrix, whose rows can be had one by one."""
    return base.ndim == 2 and all(
        (low.layout or t.layout).shape == base.shape
        and t.region == tuple((0, n) for n in base.shape)
        and _by_rows(low, low.layout or t.layout)
        for t, low in updates
    )


def _by_rows(low: LowRank, layout: Layout) -> bool:
    """True where the change of some stored rows needs no others."""
    variant = variant_of(low)
    return not variant.reads_weight or (variant.by_rows and layout.out == (0,))


def _blocks(base: Array, updates: list[Pair]) -> Iterator[tuple[slice, list[Pair]]]:
    """Some rows of a matrix and what its updates do there; a tensor of other shape in one go."""
    if not _flat(base, updates):
        yield slice(None), updates
        return
    step = max(1, ROWS // base.shape[1])
    for first in range(0, base.shape[0], step):
        rows = slice(first, min(base.shape[0], first + step))
        yield rows, [_narrowed(t, low, rows, base.shape[1]) for t, low in updates]


def _narrowed(t: Target, low: LowRank, rows: slice, columns: int) -> Pair:
    """A target and its update in some rows of the stored matrix."""
    region = ((0, rows.stop - rows.start), (0, columns))
    layout = (low.layout or t.layout).narrow(((rows.start, rows.stop), (0, columns)))
    assert layout is not None  # one axis is out, the other in
    if layout.out == (0,):
        part = replace(variant_of(low).rows(low, rows), layout=layout)
    else:
        part = replace(low, a=low.a[:, rows], layout=layout)
    return replace(t, region=region), part
