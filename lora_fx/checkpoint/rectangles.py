"""A stored tensor as a matrix of rows, and the rectangles of it that an adapter changes.

Merging streams a tensor block of rows by block of rows, so ΔW must be had for any rows alone:

    stored [*batch, out, in]   rows = batch · out, columns = in    block = s·b[rows]·a
    stored [*batch, in, out]   rows = batch · in, columns = out    block = (s·b·a[:, rows])ᵀ

A region of a tensor is a smaller rectangle. A layout that is neither of the two (an einsum's, a
group of a transposed convolution) has its ΔW computed whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Change, Dense, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import Array, Floating
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.ir.view import Region

BLOCK = 1 << 19
"""The elements of a block. Fewer fit a core's cache better, but threads then wait for Python's lock
after every few microseconds: with 2¹⁶ two threads were no faster than one."""


WINDOW = 16
"""The least number of rows in a product: BLAS sums fewer rows in another order."""


@dataclass(frozen=True)
class Rectangle:
    """Rows top ≤ i < bottom and columns left ≤ j < right of a tensor, with their ΔW.

    Attributes:
        change: What is added.
        batch: Which matrix of the change's batch.
        transposed: ΔW's rows run along the tensor's columns.
    """

    change: Change
    top: int
    bottom: int
    left: int
    right: int
    batch: int = 0
    transposed: bool = False

    @functools.cached_property  # asked for every block
    def reads_weight(self) -> bool:
        """Whether rows of W + ΔW are rescaled by factors that depend on W, as in DoRA."""
        return isinstance(self.change, LowRank) and variant_of(self.change).reads_weight

    def row_factors(self, rows: slice, squares: Array, where: str) -> Array:
        """Return the factors of these rows of W + ΔW; see `Variant.row_factors`."""
        assert isinstance(self.change, LowRank)
        return variant_of(self.change).row_factors(self.change, rows, squares, where)

    @property
    def mutated(self) -> str:
        """The init that subtracted a part from the base (pissa …); empty if there is none."""
        if not isinstance(self.change, LowRank):
            return ""
        return self.change.mutated

    def moved(self, down: int, along: int) -> Rectangle:
        """Return the rectangle moved by this many rows and columns."""
        return replace(
            self,
            top=self.top + down,
            bottom=self.bottom + down,
            left=self.left + along,
            right=self.right + along,
        )

    def delta(
        self, low: int, high: int, out: Array | None = None, weight: Array | None = None
    ) -> Array:
        """Return ΔW for the tensor's rows low ≤ i < high, all within the rectangle.

        Args:
            low: The first row.
            high: The row behind the last.
            out: An array of that shape to compute in; may be left out.
            weight: W of these rows, which a rotation needs.
        """
        if isinstance(self.change, Rotation):
            assert weight is not None
            return self.change.of(weight)
        first = max(self.top, high - WINDOW)
        if first < low:
            return self.delta(first, high)[low - first :]
        rows = slice(low - self.top, high - self.top)
        columns = slice(None)
        if self.transposed:
            return self.change.block(self.batch, columns, rows).T
        if isinstance(self.change, LowRank):
            return self.change.block(self.batch, rows, columns, out)
        return self.change.block(self.batch, rows, columns)


@dataclass(frozen=True)
class Matrix:
    """A tensor as [rows, columns], and its changed rectangles in the order of the adapters."""

    rows: int
    columns: int
    rectangles: tuple[Rectangle, ...]

    @property
    def rows_per_block(self) -> int:
        """The rows in a block of about BLOCK elements: a multiple of WINDOW."""
        return max(1, BLOCK // max(1, self.columns * WINDOW)) * WINDOW


def whole(shape: tuple[int, ...], change: Change) -> Matrix:
    """Return the matrix with one change of a whole tensor of this shape.

    The first of these that holds decides:
    1. stored [*batch, out, in]: one rectangle for each matrix of the batch;
    2. stored [*batch, in, out]: the same, transposed;
    3. another order: ΔW is computed whole.
    """
    layout = change.layout
    assert layout is not None
    out_in = (*layout.batch, *layout.out, *layout.in_)
    in_out = (*layout.batch, *layout.in_, *layout.out)
    as_stored = tuple(range(len(out_in)))
    if as_stored == out_in:
        return _stacked(change, layout, layout.out_size, layout.in_size, transposed=False)
    if as_stored == in_out:
        return _stacked(change, layout, layout.in_size, layout.out_size, transposed=True)
    return _materialised(shape, change, layout)


def _stacked(
    change: Change, layout: Layout, rows: int, columns: int, *, transposed: bool
) -> Matrix:
    """Return the matrices of a change stacked along the rows, each [rows, columns]."""
    count = math.prod(layout.batch_shape)
    rectangles = []
    for i in range(count):
        top = i * rows
        rectangles.append(Rectangle(change, top, top + rows, 0, columns, i, transposed))
    return Matrix(count * rows, columns, tuple(rectangles))


def _materialised(shape: tuple[int, ...], change: Change, layout: Layout) -> Matrix:
    """Return the matrix with ΔW computed at once, in the stored order."""
    if not isinstance(change, LowRank) or variant_of(change).reads_weight:
        raise LoraFxError(
            f"an update of kind {type(change).__name__} uses the axes of {list(shape)} in an "
            "order that cannot be merged",
            "use lora or rslora updates, which can have such an order of axes",
        )
    count = math.prod(layout.batch_shape)
    every = slice(None)
    matrices = np.stack([change.block(i, every, every) for i in range(count)])
    delta = matrices.reshape(*layout.batch_shape, layout.out_size, layout.in_size)
    stored = layout.to_stored(NumpyEmitter(), delta).reshape(shape[0], -1)
    rectangle = Rectangle(Dense(stored), 0, shape[0], 0, stored.shape[1])
    return Matrix(shape[0], stored.shape[1], (rectangle,))


def region(shape: tuple[int, ...], bounds: Region, change: Change) -> Matrix:
    """Return the matrix with one change of a region; `bounds` are half-open, per stored axis.

    Raises:
        LoraFxError: The region is no rectangle of rows and columns.
    """
    if all(bound == (0, size) for bound, size in zip(bounds, shape, strict=True)):
        return whole(shape, change)

    inner = whole(tuple(high - low for low, high in bounds), change)
    for split in range(1, len(shape) + 1):
        rows = _flat_range(shape[:split], bounds[:split])
        columns = _flat_range(shape[split:], bounds[split:])
        if not rows or not columns:
            continue
        if (len(rows), len(columns)) == (inner.rows, inner.columns):
            rectangles = tuple(
                rectangle.moved(rows.start, columns.start) for rectangle in inner.rectangles
            )
            return Matrix(math.prod(shape[:split]), math.prod(shape[split:]), rectangles)
    raise LoraFxError(
        f"the region {list(bounds)} of a tensor {list(shape)} is not a rectangle of rows and "
        "columns",
        "apply it to the model itself with lora_fx.fold or lora-fx export",
    )


def _flat_range(shape: Sequence[int], bounds: Sequence[tuple[int, int]]) -> range | None:
    """Return the range of flat indices inside the bounds; None if they are not contiguous."""
    first = 0
    behind_last = 1
    for (low, high), size in zip(bounds, shape, strict=True):
        if behind_last - first > 1 and (low, high) != (0, size):
            return None
        first = first * size + low
        behind_last = (behind_last - 1) * size + high
    return range(first, behind_last)


def joined(name: str, matrices: Sequence[Matrix]) -> Matrix:
    """Combine several changes of one tensor, which must all have the same rows and columns."""
    sizes = {(matrix.rows, matrix.columns) for matrix in matrices}
    if len(sizes) != 1:
        raise LoraFxError(
            f"the updates of {name!r} split its axes into rows and columns differently: "
            f"{sorted(sizes)}",
            "merge one adapter after the other",
        )
    rectangles: list[Rectangle] = []
    for matrix in matrices:
        rectangles += matrix.rectangles
    return replace(matrices[0], rectangles=tuple(rectangles))


def in_dtype(matrix: Matrix, dtype: Floating) -> Matrix:
    """Return the matrix with every factor in `dtype`, so that ΔW is computed in `dtype`."""
    rectangles = tuple(
        replace(rectangle, change=_cast(rectangle.change, dtype)) for rectangle in matrix.rectangles
    )
    return replace(matrix, rectangles=rectangles)


def _cast(change: Change, dtype: Floating) -> Change:
    """Return a change with all its arrays cast to `dtype`, without copies if possible."""
    arrays: dict[str, Any] = {}
    for name, value in vars(change).items():
        if isinstance(value, np.ndarray):
            arrays[name] = value.astype(dtype, copy=False)
    return replace(change, **arrays)
