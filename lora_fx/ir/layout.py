"""The layout of an update's matrices in a stored tensor: which axes are batch, out and in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lora_fx.ir.emitter import Ops, V
from lora_fx.ir.view import Opaque, Region, Tracked


@dataclass(frozen=True)
class Layout:
    """The layout of [*batch, out, in] in a stored tensor (or a region of one).

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
        return self._sizes(self.batch)

    @property
    def out_size(self) -> int:
        """Rows of one matrix: the product of its out axes."""
        return math.prod(self._sizes(self.out))

    @property
    def in_size(self) -> int:
        """Columns of one matrix: the product of its in axes."""
        return math.prod(self._sizes(self.in_))

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    @property
    def max_rank(self) -> int:
        """The smaller side of one matrix: no update has a higher rank."""
        return min(self.out_size, self.in_size)

    def parameters(self, rank: int) -> int:
        """Number of elements in a and b together."""
        return math.prod(self.batch_shape) * rank * (self.out_size + self.in_size)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a, [*batch, rank, in], and of b, [*batch, out, rank]."""
        a_shape = (*self.batch_shape, rank, self.in_size)
        b_shape = (*self.batch_shape, self.out_size, rank)
        return a_shape, b_shape

    def transposed(self) -> Layout:
        """The layout of a use that reads the tensor the other way round."""
        return Layout(self.shape, self.batch, self.in_, self.out, self.stored)

    def narrow(self, bounds: Region) -> Layout | None:
        """The layout of a part of the stored tensor; None where it cuts an axis that is split.

        Args:
            bounds: Half-open, per stored axis of this layout.
        """
        shape = list(self.shape)
        for axes, (start, stop), size in zip(self.split(), bounds, self.stored, strict=True):
            if (start, stop) == (0, size):
                continue
            if len(axes) != 1 or not 0 <= start < stop <= size:
                return None
            shape[axes[0]] = stop - start
        stored = tuple(stop - start for start, stop in bounds)
        return Layout(tuple(shape), self.batch, self.out, self.in_, stored)

    def starts(self, bounds: Region) -> tuple[int, ...]:
        """The start of a part that `narrow` allows, for each axis of `shape`."""
        starts = [0] * len(self.shape)
        for axes, (start, _) in zip(self.split(), bounds, strict=True):
            if axes:
                starts[axes[0]] = start
        return tuple(starts)

    def split(self) -> list[range]:
        """The axes of `shape` that each stored axis is split into."""
        groups = []
        stop = 0
        for size in self.stored:
            start = stop
            stop = min(start + 1, len(self.shape))
            while stop < len(self.shape) and math.prod(self.shape[start:stop]) < size:
                stop += 1
            groups.append(range(start, stop))
        return groups

    @property
    def _matrix_axes(self) -> tuple[int, ...]:
        """The axes of `shape` in the order of [*batch, out, in]."""
        return self.batch + self.out + self.in_

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, self.out_size, self.in_size)

    def from_stored(self, e: Ops[V], value: V) -> V:
        """Bring a value from the stored shape to [*batch, out, in], in any IR."""
        axes = self._matrix_axes
        split = _reshaped(e, value, self.stored, self.shape)
        permuted = _permuted(e, split, axes)
        return _reshaped(e, permuted, self._sizes(axes), self._matrix_shape)

    def to_stored(self, e: Ops[V], delta: V) -> V:
        """Bring a value from [*batch, out, in] to the stored shape, in any IR."""
        axes = self._matrix_axes
        inverse = tuple(axes.index(axis) for axis in range(len(axes)))
        split = _reshaped(e, delta, self._matrix_shape, self._sizes(axes))
        permuted = _permuted(e, split, inverse)
        return _reshaped(e, permuted, self.shape, self.stored)

    def to_json(self) -> dict[str, list[int]]:
        """The five fields as plain lists, for manifests and file headers."""
        names = ("shape", "batch", "out", "in_", "stored")
        return {name: list(getattr(self, name)) for name in names}

    @classmethod
    def from_json(cls, data: dict[str, list[int]]) -> Layout:
        """The Layout that `to_json` wrote."""
        return cls(**{name: tuple(axes) for name, axes in data.items()})


def _reshaped(e: Ops[V], value: V, before: tuple[int, ...], shape: tuple[int, ...]) -> V:
    """The value under another shape; itself where that is the shape before."""
    if before == shape:
        return value
    return e.op("reshape", value, shape=shape)


def _permuted(e: Ops[V], value: V, perm: tuple[int, ...]) -> V:
    """The value with its axes permuted; itself where they stay in their order."""
    if perm == tuple(range(len(perm))):
        return value
    return e.op("transpose", value, perm=perm)


def plain_layout(shape: tuple[int, ...]) -> Layout:
    """Axis 0 is out and the rest is in, as nn.Linear and an ungrouped convolution store it."""
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
    # A size of 1 says nothing about the order of axes, and two uses may place it differently.
    place = {}
    for side, axes in enumerate((batch, out, in_)):
        for position, atom in enumerate(_large_atoms(tracked, axes)):
            place[atom] = _Place(side, position)

    runs: list[list[int]] = []
    for atoms in tracked.stored:
        large = [atom for atom in atoms if tracked.size[atom] != 1]
        if any(atom not in place for atom in large):
            raise Opaque("one of the stored axes is not read")
        runs += _runs(large, place)

    sides: tuple[list[int], list[int], list[int]] = ([], [], [])
    for axis, run in enumerate(runs):
        if run:
            sides[place[run[0]].side].append(axis)
    for axes_of_side in sides:
        axes_of_side.sort(key=lambda axis: place[runs[axis][0]].position)
    batch_axes, out_axes, in_axes = sides
    for axis, run in enumerate(runs):
        if not run:  # a stored axis of size 1 is out if there is no out yet, else in
            target_side = in_axes if out_axes else out_axes
            target_side.append(axis)

    shape = tuple(math.prod(tracked.size[atom] for atom in run) for run in runs)
    stored = tuple(stop - start for start, stop in tracked.region)
    return Layout(shape, tuple(batch_axes), tuple(out_axes), tuple(in_axes), stored)


class _Place(NamedTuple):
    """The place of an atom in [*batch, out, in]."""

    side: int  # 0 batch, 1 out, 2 in
    position: int  # among the atoms of that side


def _large_atoms(tracked: Tracked, axes: tuple[int, ...]) -> list[int]:
    """The atoms of some axes of the operand, in their order, without those of size 1."""
    atoms: list[int] = []
    for axis in axes:
        atoms += [atom for atom in tracked.axes[axis] if tracked.size[atom] != 1]
    return atoms


def _runs(atoms: list[int], place: dict[int, _Place]) -> list[list[int]]:
    """The atoms of one stored axis in runs; one empty run for an axis of size 1.

    Atoms are joined that follow each other in out or in too. Batch axes stay as they are split.
    """
    if not atoms:
        return [[]]
    runs: list[list[int]] = []
    for atom in atoms:
        side, position = place[atom]
        if runs and side > 0 and place[runs[-1][-1]] == (side, position - 1):
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return runs
