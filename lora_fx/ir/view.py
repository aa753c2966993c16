"""How a stored tensor becomes the operand of an op: a chain of steps.

`View.replay` runs the steps from the tensor to the operand on any value of any IR. `track` follows
every stored axis through them, so that the axes of the operand can be named in terms of the stored
tensor: that gives the region of the parameter that the op reads, and the `Layout` of an update.
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
