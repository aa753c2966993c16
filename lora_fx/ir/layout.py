"""How the matrices of an update lie in a stored tensor: which axes are batch, out and in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.view import Opaque, Region, Tracked


@dataclass(frozen=True)
class Layout:
    """How [*batch, out, in] lies in a stored tensor (or a region of one).

    Attributes:
        shape: The stored shape, with an axis split where only a part of it is batch, out or in.
        batch: Axes of `shape` that are batch (experts of a stack, groups of a convolution).
        out: Axes of `shape` that make up out, major first.
        in_: Axes of `shape` that make up in, major first.
        stored: The stored shape itself.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    out: tuple[int, ...]
    in_: tuple[int, ...]
    stored: tuple[int, ...]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes; empty for a plain matrix."""
        return tuple(self.shape[i] for i in self.batch)

    @property
    def out_size(self) -> int:
        """Rows of one matrix: the product of its out axes."""
        return math.prod(self.shape[i] for i in self.out)

    @property
    def in_size(self) -> int:
        """Columns of one matrix: the product of its in axes."""
        return math.prod(self.shape[i] for i in self.in_)

    @property
    def max_rank(self) -> int:
        """The smaller side of one matrix: no update has a higher rank."""
        return min(self.out_size, self.in_size)

    def parameters(self, rank: int) -> int:
        """Number of elements in a and b together."""
        return math.prod(self.batch_shape) * rank * (self.out_size + self.in_size)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a, [*batch, rank, in], and of b, [*batch, out, rank]."""
        return (*self.batch_shape, rank, self.in_size), (*self.batch_shape, self.out_size, rank)

    def transposed(self) -> Layout:
        """The layout of a use that reads the tensor the other way round."""
        return Layout(self.shape, self.batch, self.in_, self.out, self.stored)

    def narrow(self, bounds: Region) -> Layout | None:
        """The layout of a part of the stored tensor; None where it cuts an axis that is split.

        Args:
            bounds: Half-open, per stored axis of this layout.
        """
        shape = list(self.shape)
        for axes, (lo, hi), n in zip(self.split(), bounds, self.stored, strict=True):
            if (lo, hi) != (0, n):
                if len(axes) != 1 or not 0 <= lo < hi <= n:
                    return None
                shape[axes[0]] = hi - lo
        stored = tuple(hi - lo for lo, hi in bounds)
        return Layout(tuple(shape), self.batch, self.out, self.in_, stored)

    def starts(self, bounds: Region) -> tuple[int, ...]:
        """Where a part that `narrow` allows begins, per axis of `shape`."""
        first = {axes[0]: lo for axes, (lo, _) in zip(self.split(), bounds, strict=True) if axes}
        return tuple(first.get(axis, 0) for axis in range(len(self.shape)))

    def split(self) -> list[range]:
        """The axes of `shape` that each stored axis is split into."""
        result, at = [], 0
        for n in self.stored:
            first = at
            while at < len(self.shape) and (at == first or math.prod(self.shape[first:at]) < n):
                at += 1
            result.append(range(first, at))
        return result

    def _matrix(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes of `shape` as [*batch, out, in] has them, their sizes, and its own shape."""
        order = self.batch + self.out + self.in_
        whole = (*self.batch_shape, self.out_size, self.in_size)
        return order, tuple(self.shape[i] for i in order), whole

    def from_stored(self, e: Ops[V], value: V) -> V:
        """Bring a value from the stored shape to [*batch, out, in], in any IR."""
        order, split, whole = self._matrix()
        value = _reshaped(e, value, self.stored, self.shape)
        return _reshaped(e, _permuted(e, value, order), split, whole)

    def to_stored(self, e: Ops[V], delta: V) -> V:
        """Bring a value from [*batch, out, in] to the stored shape, in any IR."""
        order, split, whole = self._matrix()
        inverse = tuple(order.index(i) for i in range(len(order)))
        delta = _permuted(e, _reshaped(e, delta, whole, split), inverse)
        return _reshaped(e, delta, self.shape, self.stored)

    def to_json(self) -> dict[str, list[int]]:
        """The five fields as plain lists, for manifests and file headers."""
        return {k: list(getattr(self, k)) for k in ("shape", "batch", "out", "in_", "stored")}

    @classmethod
    def from_json(cls, data: dict[str, list[int]]) -> Layout:
        """The Layout that `to_json` wrote."""
        return cls(**{k: tuple(v) for k, v in data.items()})


def _reshaped(e: Ops[V], value: V, have: tuple[int, ...], want: tuple[int, ...]) -> V:
    return value if have == want else e.op("reshape", value, shape=want)


def _permuted(e: Ops[V], value: V, perm: tuple[int, ...]) -> V:
    return value if perm == tuple(range(len(perm))) else e.op("transpose", value, perm=perm)


def plain_layout(shape: tuple[int, ...]) -> Layout:
    """Axis 0 is out and the rest is in: what nn.Linear and an ungrouped convolution store."""
    return Layout(shape, (), (0,), tuple(range(1, len(shape))), shape)


def layout_of(
    tracked: Tracked, batch: tuple[int, ...], out: tuple[int, ...], in_: tuple[int, ...]
) -> Layout:
    """The Layout of an operand whose axes play these parts.

    Runs of one stored axis that stayed neighbours in the same part are joined again, so that two
    uses of a tensor compare equal however they split it.

    Raises:
        Opaque: An operand axis is read by no part.
    """
    parts = [[a for axis in axes for a in tracked.axes[axis]] for axes in (batch, out, in_)]
    # A size of 1 says nothing about the order of axes, and two uses may place it differently.
    parts = [[a for a in part if tracked.size[a] != 1] for part in parts]
    place = {a: (p, i) for p, part in enumerate(parts) for i, a in enumerate(part)}
    runs: list[tuple[int, list[int]]] = []  # (part, atoms), in stored order
    for row in tracked.stored:
        fresh = True
        for atom in (a for a in row if tracked.size[a] != 1):
            if atom not in place:
                raise Opaque("a stored axis is not read")
            part, i = place[atom]
            if part and not fresh and place[runs[-1][1][-1]] == (part, i - 1):
                runs[-1][1].append(atom)
            else:
                runs.append((part, [atom]))
            fresh = False
        if fresh:  # an axis of size 1: keep it, as out if out is empty, else as in
            runs.append((-1, []))
    sides = [[i for i, (p, _) in enumerate(runs) if p == part] for part in range(3)]
    for side in sides:
        side.sort(key=lambda i: place[runs[i][1][0]])
    for i, (part, _) in enumerate(runs):
        if part < 0:
            sides[1 if not sides[1] else 2].append(i)
    shape = tuple(math.prod(tracked.size[a] for a in atoms) for _, atoms in runs)
    stored = tuple(hi - lo for lo, hi in tracked.region)
    return Layout(shape, tuple(sides[0]), tuple(sides[1]), tuple(sides[2]), stored)
