"""A stored tensor as a matrix of rows, and the rectangles of it that an adapter changes.

Merging streams a tensor block of rows by block of rows, so ΔW must be had for any rows alone:

    stored [*batch, out, in]   rows = batch · out, columns = in    block = s·b[rows]·a
    stored [*batch, in, out]   rows = batch · in, columns = out    block = (s·b·a[:, rows])ᵀ

A region of a tensor is a smaller rectangle. A layout that is neither of the two (an einsum's, a
group of a transposed convolution) has its ΔW computed whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Change, Dense
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.ir.view import Region

WINDOW = 16
"""Rows that a product is computed for at least: BLAS sums few rows in another order than many."""


@dataclass(frozen=True)
class Rectangle:
    """Rows top ≤ i < bottom and columns left ≤ j < right of a tensor, and their ΔW.

    Attributes:
        change: What is added.
        batch: Which matrix of the change's batch.
        transposed: ΔW's rows run along the tensor's columns.
        magnitude: [out] of DoRA, or None.
    """

    change: Change
    top: int
    bottom: int
    left: int
    right: int
    batch: int = 0
    transposed: bool = False
    magnitude: Array | None = None

    def delta(self, low: int, high: int, out: Array | None = None) -> Array:
        """ΔW of the tensor's rows low ≤ i < high, all within the rectangle, in the factors' dtype.

        `out` may be an array of that shape to compute in.
        """
        first = max(self.top, high - WINDOW)
        if first < low:
            return self.delta(first, high)[low - first :]
        rows, every = slice(low - self.top, high - self.top), slice(None)
        if self.transposed:
            return self.change.block(self.batch, every, rows).T
        if isinstance(self.change, LowRank):
            return self.change.block(self.batch, rows, every, out)
        return self.change.block(self.batch, rows, every)


@dataclass(frozen=True)
class Matrix:
    """A tensor as [rows, columns] and the rectangles that change, in the order of the adapters."""

    rows: int
    columns: int
    parts: tuple[Rectangle, ...]


def whole(shape: tuple[int, ...], change: Change) -> Matrix:
    """One change of a whole tensor of this shape."""
    layout = change.layout
    assert layout is not None
    nb, no, ni = len(layout.batch), len(layout.out), len(layout.in_)
    straight = (*layout.batch, *layout.out, *layout.in_) == tuple(range(nb + no + ni))
    turned = (*layout.batch, *layout.in_, *layout.out) == tuple(range(nb + no + ni))
    magnitude = change.magnitude if isinstance(change, LowRank) else None
    count = math.prod(layout.batch_shape)
    if straight or turned:
        rows, columns = layout.out_size, layout.in_size
        if not straight:
            rows, columns = columns, rows
        parts = (
            Rectangle(change, i * rows, (i + 1) * rows, 0, columns, i, not straight, magnitude)
            for i in range(count)
        )
        return Matrix(count * rows, columns, tuple(parts))
    return _materialised(shape, change)


def _materialised(shape: tuple[int, ...], change: Change) -> Matrix:
    """ΔW computed at once, in the stored order."""
    if not isinstance(change, LowRank) or change.magnitude is not None:
        raise LoraFxError(
            f"an update of kind {type(change).__name__} lies in {list(shape)} in an order that "
            "cannot be merged",
            "only lora and rslora can take such an order",
        )
    layout = change.layout
    assert layout is not None
    count = math.prod(layout.batch_shape)
    every = slice(None)
    matrices = np.stack([change.block(i, every, every) for i in range(count)])
    delta = matrices.reshape(*layout.batch_shape, layout.out_size, layout.in_size)
    stored = layout.to_stored(NumpyEmitter(), delta).reshape(shape[0], -1)
    dense = Dense(stored)
    part = Rectangle(dense, 0, shape[0], 0, stored.shape[1])
    return Matrix(shape[0], stored.shape[1], (part,))


def region(shape: tuple[int, ...], bounds: Region, change: Change) -> Matrix:
    """One change of a region of a tensor: `bounds` half-open, per stored axis.

    Raises:
        LoraFxError: The region is no rectangle of rows and columns.
    """
    if all(b == (0, n) for b, n in zip(bounds, shape, strict=True)):
        return whole(shape, change)
    inner = whole(tuple(hi - lo for lo, hi in bounds), change)
    for split in range(1, len(shape) + 1):
        rows = _run(shape[:split], bounds[:split])
        columns = _run(shape[split:], bounds[split:])
        if rows is None or columns is None:
            continue
        if (rows[1] - rows[0], columns[1] - columns[0]) != (inner.rows, inner.columns):
            continue
        parts = tuple(
            Rectangle(
                p.change,
                p.top + rows[0],
                p.bottom + rows[0],
                p.left + columns[0],
                p.right + columns[0],
                p.batch,
                p.transposed,
                p.magnitude,
            )
            for p in inner.parts
        )
        return Matrix(math.prod(shape[:split]), math.prod(shape[split:]), parts)
    raise LoraFxError(
        f"the region {list(bounds)} of a tensor {list(shape)} is no rectangle of rows and columns",
        "lora-fx fold and export can apply it to the model itself",
    )


def _run(shape: Sequence[int], bounds: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The flat range that bounds take of axes; None where it has gaps."""
    low, high = 0, 1
    open_ = True  # every axis so far is a single index
    for (lo, hi), n in zip(bounds, shape, strict=True):
        if open_:
            low, high = low * n + lo, low * n + hi  # so far one index, or none
            open_ = hi - lo == 1
        elif (lo, hi) != (0, n):
            return None
        else:
            low, high = low * n, high * n
    return low, high


def joined(name: str, matrices: Sequence[Matrix]) -> Matrix:
    """Several changes of one tensor, which must all see the same rows and columns."""
    sizes = {(m.rows, m.columns) for m in matrices}
    if len(sizes) == 1:
        return Matrix(
            matrices[0].rows, matrices[0].columns, tuple(p for m in matrices for p in m.parts)
        )
    raise LoraFxError(
        f"the changes of {name!r} take its axes in different ways: {sorted(sizes)}",
        "merge one adapter after the other",
    )


def in_dtype(matrix: Matrix, dtype: type[np.floating[Any]]) -> Matrix:
    """The same with every factor in `dtype`, which is what ΔW is then computed in."""
    parts = tuple(
        replace(p, change=_cast(p.change, dtype), magnitude=_array(p.magnitude, dtype))
        for p in matrix.parts
    )
    return Matrix(matrix.rows, matrix.columns, parts)


def _cast(change: Any, dtype: type[np.floating[Any]]) -> Any:
    arrays = {f.name: getattr(change, f.name) for f in fields(change)}
    wide = {k: _array(v, dtype) for k, v in arrays.items() if isinstance(v, np.ndarray)}
    return replace(change, **wide) if any(wide[k] is not arrays[k] for k in wide) else change


def _array(array: Array | None, dtype: type[np.floating[Any]]) -> Array | None:
    return None if array is None else array.astype(dtype, copy=False)
