"""The kinds of contraction, without an IR: their axes, low-rank branches and weight forms.

A Kind knows which axes of the weight operand are batch, out and in, and how to compute the low-rank
part of the output without the product b·a (`branch`), where such a form exists. The weight form
W + s·b·a needs no Kind: `delta`. Products stand in `einsum`, convolutions in `convolution`; these
also run the op on other operands, from primitives (`apply`).
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.graph import Axes, Emitter, Factors, Site
from lora_fx.ir.layout import Layout
from lora_fx.ir.view import Region


def delta(e: Ops[V], layout: Layout, a: V, b: V, scale: float) -> V:
    """Emit s·b·a in the stored shape: b @ a first, then the scale, as PEFT does."""
    return layout.to_stored(e, e.op("mul", e.op("matmul", b, a), scale))


def pad_region(e: Ops[V], value: V, region: Region, shape: tuple[int, ...]) -> V:
    """Emit a region's value padded with zeros to the whole stored shape."""
    before = tuple(start for start, _ in region)
    after = tuple(size - stop for size, (_, stop) in zip(shape, region, strict=True))
    if not any(before + after):
        return value
    return e.op("pad", value, before=before, after=after)


FREE = -1
"""The rank in a shape if it is free: inputs of a file may have another rank in every run."""


def swap_last(n_batch: int) -> tuple[int, ...]:
    """Return the permutation that transposes the matrices of a stack."""
    return (*range(n_batch), n_batch + 1, n_batch)


class Apart:
    """A Kind whose result has no axis for the rows of W, so that DoRA needs the weight form."""

    def along_out(self, site: Site, out: int) -> tuple[int, ...]:
        """See `Kind.along_out`."""
        return ()


class Lookup:
    """A Kind that selects rows of w [in, out] by ids; in is the number of rows.

    A lookup is a matmul with a one-hot x, and costs no FLOPs.
    """

    name = "embedding"

    @property
    def has_branch(self) -> bool:
        """See `Kind.has_branch`."""
        return True

    def along_out(self, site: Site, out: int) -> tuple[int, ...]:
        """Return the shape of one number a feature; empty where the rows are no vectors."""
        if self.has_branch and len(site.operand) == 2:
            return (out,)
        return ()

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """Return the axes: the rows are in, all others are out."""
        return Axes((), tuple(range(1, len(operand))), (0,))

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """Emit aᵀ[ids] bᵀ; the site's own op looks up the rows of aᵀ."""
        rows = e.like(site, x, e.op("transpose", f.a, perm=(1, 0)))
        return e.op("matmul", rows, e.op("transpose", f.b, perm=(1, 0)))


@dataclass(frozen=True)
class Embedding(Lookup):
    """A gather of rows."""


@dataclass(frozen=True)
class EmbeddingBag(Lookup):
    """Rows that are gathered by ids and reduced for each bag by sum, mean or max."""

    mode: str = "sum"

    @property
    def has_branch(self) -> bool:
        """True for sum and mean, which are linear, so that bag(aᵀ) bᵀ is exact; False for max."""
        return self.mode != "max"


@dataclass(frozen=True)
class Grouped(Apart):
    """Sorted rows of x [n, in], each group times its own matrix of w [groups, in, out]."""

    name = "grouped"  # as the experts of a mixture are
    has_branch = True

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """Return the axes: the experts are batch."""
        return Axes((0,), (2,), (1,))

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """Emit the site's own op twice, with aᵀ and with bᵀ."""
        a = f.a
        b = f.b
        padding = -f.rank % int(site.attrs.get("rank_multiple", 1))
        if padding:
            # the kernel wants aligned rows: ranks of zeros fill them up, and add exact zeros
            a = e.op("pad", a, before=(0, 0, 0), after=(0, padding, 0))
            b = e.op("pad", b, before=(0, 0, 0), after=(0, 0, padding))

        # the offsets of the groups come with the node, so both products are sorted alike
        hidden = e.like(site, x, e.op("transpose", a, perm=(0, 2, 1)))
        return e.like(site, hidden, e.op("transpose", b, perm=(0, 2, 1)))


@dataclass(frozen=True)
class WeightForm(Apart):
    """A contraction that needs W + s·b·a, because no branch can be added to its output.

    The gates of a recurrent op (the low-rank part would have to run at every step inside it), a
    product that broadcasts its weight, an op inside the body of a higher-order op.
    """

    name: str
    parts: Axes
    has_branch = False

    def axes(self, operand: tuple[int, ...]) -> Axes:
        """Return the axes in the op table's row, for any operand."""
        return self.parts

    def branch(self, e: Emitter[V], site: Site, x: V, f: Factors[V]) -> V:
        """Raise: there is no branch, because the op reads W + s·b·a."""
        raise NotImplementedError(f"{self.name} has no branch")


RECURRENT = WeightForm("recurrent", Axes((), (0,), (1,)))
"""A weight [gates·hidden, in] of an LSTM, GRU or RNN: one matrix for all gates."""
