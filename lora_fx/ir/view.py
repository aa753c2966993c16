"""How a stored parameter becomes the operand of an op: steps that can be replayed and tracked.

`View.replay` runs the steps on any value of any IR. `track` follows every stored axis through
them, so that the axes of the operand can be named in terms of the stored tensor: that gives the
`Layout` of a low-rank update and the region of the parameter that the op reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_fx.ir.emitter import Ops, V


@dataclass(frozen=True)
class Permute:
    """A transpose: axis i of the result is axis dims[i] of the input."""

    dims: tuple[int, ...]


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
            if isinstance(step, Permute):
                value = emitter.op("transpose", value, perm=step.dims)
            elif isinstance(step, Reshape):
                value = emitter.op("reshape", value, shape=step.shape)
            elif isinstance(step, Slice):
                value = emitter.op("slice", value, axis=step.axis, start=step.start, stop=step.stop)
            elif isinstance(step, Gather):
                if ids is None:
                    raise Opaque("what is gathered depends on data")
                value = emitter.op("gather", value, ids)
            else:
                value = emitter.op("cast", value, dtype=step.dtype)
        return value

    @property
    def picked(self) -> int | None:
        """The axis of the operand along which data picks; -1 where it is cut up, None for none."""
        axis = None
        for step in self.steps:
            if isinstance(step, Gather):
                axis = step.axis if axis is None else -1
            elif axis not in (None, -1) and not isinstance(step, Cast):
                axis = step.dims.index(axis) if isinstance(step, Permute) else -1
        return axis


@dataclass(frozen=True)
class Tracked:
    """Where the axes of an operand lie in the stored tensor.

    An atom is a run of one stored axis that the steps kept together; `stored[i]` lists the atoms
    of stored axis i, major first, `axes[j]` those of operand axis j, `size` their lengths.
    """

    region: Region
    stored: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[int, ...], ...]
    size: dict[int, int]


def track(shape: tuple[int, ...], steps: tuple[Step, ...]) -> Tracked:
    """Follow the axes of a stored tensor of `shape` through `steps`.

    Raises:
        Opaque: A reshape or slice cuts across stored axes.
    """
    size = dict(enumerate(shape))
    stored = [[i] for i in range(len(shape))]
    axes = [[i] for i in range(len(shape))]
    region = [(0, n) for n in shape]
    for step in steps:
        if isinstance(step, Permute):
            axes = [axes[d] for d in step.dims]
        elif isinstance(step, Reshape):
            axes = _regroup(axes, step.shape, size, stored)
        elif isinstance(step, Slice):
            _narrow(axes[step.axis], step, size, stored, region)
    return Tracked(tuple(region), tuple(map(tuple, stored)), tuple(map(tuple, axes)), size)


def _regroup(
    axes: list[list[int]], shape: tuple[int, ...], size: dict[int, int], stored: list[list[int]]
) -> list[list[int]]:
    # Axes of size 1 hold nothing, and could belong to either neighbour: they are left out.
    queue = [atom for axis in axes for atom in axis if size[atom] != 1]
    result = []
    for want in shape:
        group: list[int] = []
        while want > 1:
            if not queue:
                raise Opaque("reshape to more elements")
            atom = queue.pop(0)
            have = size[atom]
            if have > want:  # split it: the rest belongs to the next axis
                if have % want:
                    raise Opaque("reshape across stored axes")
                minor = max(size) + 1
                size[atom], size[minor] = want, have // want
                home = next(row for row in stored if atom in row)
                home.insert(home.index(atom) + 1, minor)
                queue.insert(0, minor)
                have = want
            if want % have:
                raise Opaque("reshape across stored axes")
            want //= have
            group.append(atom)
        result.append(group)
    if queue:
        raise Opaque("reshape to fewer elements")
    return result


def _narrow(
    axis: list[int],
    step: Slice,
    size: dict[int, int],
    stored: list[list[int]],
    region: list[tuple[int, int]],
) -> None:
    whole = math.prod(size[a] for a in axis)
    if (step.start, step.stop) == (0, whole):
        return
    if len(axis) != 1:
        raise Opaque("slice of an axis that joins several stored axes")
    atom = axis[0]
    home = next(i for i, row in enumerate(stored) if atom in row)
    if stored[home][0] != atom:
        raise Opaque("slice inside a stored axis that is not contiguous")
    inner = math.prod(size[a] for a in stored[home][1:])
    first = region[home][0]
    region[home] = (first + step.start * inner, first + step.stop * inner)
    size[atom] = step.stop - step.start
