"""How a stored tensor becomes the operand of an op, and how an update's matrices lie in it.

`View.replay` runs the steps from the tensor to the operand on any value of any IR. `track` follows
every stored axis through them, so that the axes of the operand can be named in terms of the stored
tensor: that gives the region of the parameter that the op reads, and the `Layout` of an update,
which says which axes are batch, out and in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_fx.ir.emitter import Ops, V


@dataclass(frozen=True)
class Permute:
    """A transpose: axis i of the result is axis perm[i] of the input."""

    perm: tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    """The same elements, in row-major order, under another shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """The elements start ≤ i < stop of one axis."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Cast:
    """The same numbers in another dtype, named as numpy and torch both do, such as bfloat16."""

    dtype: str


@dataclass(frozen=True)
class Gather:
    """The entries of one axis that data picks, as a router picks experts."""

    axis: int


Step = Permute | Reshape | Slice | Cast | Gather
_PRIMS = {Permute: "transpose", Reshape: "reshape", Slice: "slice", Cast: "cast"}
"""Step → the primitive of `Ops` that it is; its fields are the attributes."""
Region = tuple[tuple[int, int], ...]
"""Half-open bounds per stored axis."""


class Opaque(Exception):
    """The steps mix stored axes in a way that no region and no axis permutation describes."""


@dataclass(frozen=True)
class View:
    """The chain of steps from a stored parameter to the operand of an op."""

    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> View:
        """This view followed by more steps."""
        return View(self.steps + steps)

    def replay(self, emitter: Ops[V], value: V, ids: V | None = None) -> V:
        """Run the steps on a value of the emitter's IR that has the stored shape.

        `ids` are what a Gather picks, in a list.
        """
        for step in self.steps:
            if not isinstance(step, Gather):
                value = emitter.op(_PRIMS[type(step)], value, **vars(step))
            elif ids is None:
                raise Opaque("what is gathered depends on data")
            else:
                value = emitter.op("gather", value, ids)
        return value

    @property
    def picked(self) -> int | None:
        """The axis of the operand along which data picks; -1 where it is cut up, None for none."""
        axis = None
        for step in self.steps:
            if isinstance(step, Gather):
                axis = step.axis if axis is None else -1
            elif axis not in (None, -1) and not isinstance(step, Cast):
                axis = step.perm.index(axis) if isinstance(step, Permute) else -1
        return axis


@dataclass
class Tracked:
    """Where the axes of an operand lie in the stored tensor, after the steps so far.

    An atom is a run of one stored axis that the steps kept together; `stored[i]` lists the atoms
    of stored axis i, major first, `axes[j]` those of operand axis j, `size` their lengths.
    """

    region: Region
    stored: list[list[int]]
    axes: list[list[int]]
    size: dict[int, int]

    def regroup(self, shape: tuple[int, ...]) -> None:
        """Follow a reshape: the same atoms, and parts of them, make up other axes."""
        # Axes of size 1 hold nothing, and could belong to either neighbour: they are left out.
        queue = [atom for axis in self.axes for atom in axis if self.size[atom] != 1]
        self.axes = []
        for want in shape:
            group: list[int] = []
            while want > 1:
                if not queue:
                    raise Opaque("reshape to more elements")
                atom = queue.pop(0)
                have = self.size[atom]
                if have > want:  # split it: the rest belongs to the next axis
                    if have % want:
                        raise Opaque("reshape across stored axes")
                    minor = max(self.size) + 1
                    self.size[atom], self.size[minor] = want, have // want
                    home = next(row for row in self.stored if atom in row)
                    home.insert(home.index(atom) + 1, minor)
                    queue.insert(0, minor)
                    have = want
                if want % have:
                    raise Opaque("reshape across stored axes")
                want //= have
                group.append(atom)
            self.axes.append(group)
        if queue:
            raise Opaque("reshape to fewer elements")

    def narrow(self, step: Slice) -> None:
        """Follow a slice: less of one stored axis is read."""
        axis = self.axes[step.axis]
        if (step.start, step.stop) == (0, math.prod(self.size[a] for a in axis)):
            return
        if len(axis) != 1:
            raise Opaque("slice of an axis that joins several stored axes")
        atom = axis[0]
        home = next(i for i, row in enumerate(self.stored) if atom in row)
        if self.stored[home][0] != atom:
            raise Opaque("slice inside a stored axis that is not contiguous")
        inner = math.prod(self.size[a] for a in self.stored[home][1:])
        first, read = self.region[home][0], self.region
        bounds = (first + step.start * inner, first + step.stop * inner)
        self.region = (*read[:home], bounds, *read[home + 1 :])
        self.size[atom] = step.stop - step.start


def track(shape: tuple[int, ...], steps: tuple[Step, ...]) -> Tracked:
    """Follow the axes of a stored tensor of `shape` through `steps`.

    Raises:
        Opaque: A reshape or slice cuts across stored axes.
    """
    atoms = range(len(shape))
    region = tuple((0, n) for n in shape)
    found = Tracked(region, [[i] for i in atoms], [[i] for i in atoms], dict(enumerate(shape)))
    for step in steps:
        if isinstance(step, Permute):
            found.axes = [found.axes[d] for d in step.perm]
        elif isinstance(step, Reshape):
            found.regroup(step.shape)
        elif isinstance(step, Slice):
            found.narrow(step)
    return found


def region_of(shape: tuple[int, ...], steps: tuple[Step, ...]) -> Region:
    """The part of a parameter that a view shows: all of it where the view mixes its axes."""
    try:
        return track(shape, steps).region
    except Opaque:
        return tuple((0, n) for n in shape)


# The layout of an update.


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
