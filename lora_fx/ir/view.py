"""The chain of steps that turns a stored tensor into the operand of an op.

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
                raise Opaque("the gathered indices depend on data")
            else:
                value = emitter.op("gather", value, ids)
        return value

    @property
    def picked(self) -> int | None:
        """The axis of the operand along which data picks; -1 where it is cut up, None for none."""
        axis: int | None = None
        for step in self.steps:
            if isinstance(step, Gather):
                if axis is not None:
                    return -1
                axis = step.axis
            elif axis is None or isinstance(step, Cast):
                continue
            elif isinstance(step, Permute):
                axis = step.perm.index(axis)
            else:
                return -1
        return axis


@dataclass
class Tracked:
    """The axes of an operand in the stored tensor, after the steps so far.

    An atom is a run of one stored axis that the steps kept together; `stored[i]` lists the atoms
    of stored axis i, major first, `axes[j]` those of operand axis j, `size` their lengths.
    """

    region: Region
    stored: list[list[int]]
    axes: list[list[int]]
    size: dict[int, int]

    def regroup(self, shape: tuple[int, ...]) -> None:
        """Follow a reshape: the same atoms, and pieces of them, make up other axes."""
        # Axes of size 1 hold nothing, and could belong to either neighbour: they are left out.
        queue: list[int] = []
        for axis in self.axes:
            queue += [atom for atom in axis if self.size[atom] != 1]

        self.axes = [self._next_atoms(queue, size) for size in shape]
        if queue:
            raise Opaque("reshape to fewer elements")

    def _next_atoms(self, queue: list[int], size: int) -> list[int]:
        """Take the atoms of an axis of this size from the queue; the last one may be split."""
        atoms: list[int] = []
        missing = size
        while missing > 1:
            if not queue:
                raise Opaque("reshape to more elements")
            atom = queue.pop(0)
            if self.size[atom] > missing:
                queue.insert(0, self._split(atom, missing))
            if missing % self.size[atom]:
                raise Opaque("reshape across stored axes")
            missing //= self.size[atom]
            atoms.append(atom)
        return atoms

    def _split(self, atom: int, major_size: int) -> int:
        """Cut an atom in two: it keeps its major elements, the atom of the minor is returned."""
        if self.size[atom] % major_size:
            raise Opaque("reshape across stored axes")
        minor = max(self.size) + 1
        self.size[minor] = self.size[atom] // major_size
        self.size[atom] = major_size
        row = self.stored[self._stored_axis(atom)]
        row.insert(row.index(atom) + 1, minor)
        return minor

    def _stored_axis(self, atom: int) -> int:
        return next(axis for axis, atoms in enumerate(self.stored) if atom in atoms)

    def narrow(self, step: Slice) -> None:
        """Follow a slice: less of one stored axis is read."""
        atoms = self.axes[step.axis]
        if (step.start, step.stop) == (0, math.prod(self.size[atom] for atom in atoms)):
            return
        if len(atoms) != 1:
            raise Opaque("slice of an axis that joins several stored axes")
        atom = atoms[0]
        stored_axis = self._stored_axis(atom)
        major, *minor = self.stored[stored_axis]
        if major != atom:
            raise Opaque("slice inside a stored axis that is not contiguous")

        elements = math.prod(self.size[minor_atom] for minor_atom in minor)
        first, _ = self.region[stored_axis]
        region = list(self.region)
        region[stored_axis] = (first + step.start * elements, first + step.stop * elements)
        self.region = tuple(region)
        self.size[atom] = step.stop - step.start


def track(shape: tuple[int, ...], steps: tuple[Step, ...]) -> Tracked:
    """Follow the axes of a stored tensor of `shape` through `steps`.

    Raises:
        Opaque: A reshape or slice cuts across stored axes.
    """
    tracked = Tracked(
        region=_all_of(shape),
        stored=[[axis] for axis in range(len(shape))],
        axes=[[axis] for axis in range(len(shape))],
        size=dict(enumerate(shape)),
    )
    for step in steps:
        if isinstance(step, Permute):
            tracked.axes = [tracked.axes[axis] for axis in step.perm]
        elif isinstance(step, Reshape):
            tracked.regroup(step.shape)
        elif isinstance(step, Slice):
            tracked.narrow(step)
    return tracked


def region_of(shape: tuple[int, ...], steps: tuple[Step, ...]) -> Region:
    """The part of a parameter that a view shows: all of it where the view mixes its axes."""
    try:
        return track(shape, steps).region
    except Opaque:
        return _all_of(shape)


def _all_of(shape: tuple[int, ...]) -> Region:
    return tuple((0, size) for size in shape)
