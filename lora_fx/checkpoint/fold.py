"""Fold a block of rows: W + Σ s·BA in fp32 (fp64 for fp64 weights), rounded once, and measured.

The order is PEFT's: the fp32 product, times s, plus W. Its numbers are therefore bit for bit
PEFT's wherever the two matrix products sum in the same order. Then, where a variant asks for it,
rows are rescaled; then single rows are replaced; then one rounding to the stored dtype.

The fold of a graph (`lora_fx.passes.fold`) is another, and stays so. There an update lies in any
order of axes and may be complex, and a variant computes its change through an Emitter from whole
regions. Here every block of rows is had alone, from at least WINDOW rows a product since BLAS sums
fewer in another order than PEFT's, and changes may be of other kinds than low rank. Both measure
what rounding kept by `Applied`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lora_fx.adapter.applied import Applied
from lora_fx.adapter.dora import squares
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.residual import residual
from lora_fx.adapter.updates import Change, Dense, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import Array, Floating, NumpyDtype, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.copying import read_into
from lora_fx.files.quantised.dequantise import CodesInfo
from lora_fx.files.read import open_input
from lora_fx.files.safetensors import TensorInfo
from lora_fx.ir.layout import Layout
from lora_fx.ir.numpy_emitter import NumpyEmitter
from lora_fx.ir.view import Region

BLOCK = 1 << 19
"""Elements of a block. Fewer fit a core's cache better, but threads then meet at Python's lock
after every few microseconds: with 2¹⁶ two threads were no faster than one."""


@dataclass
class Stats(Applied):
    """What a fold did to the elements it went over; sums, so that blocks can be added up.

    Attributes:
        elements: How many.
        still: Those that did not move.
        weight: ‖W‖².
        error: ‖W + Δ − W_new‖² of a weight that is quantised anew.
        own: What quantising W itself is taken to have cost, squared: step²/12 an element.
    """

    elements: int = 0
    still: int = 0
    weight: float = 0.0
    error: float = 0.0
    own: float = 0.0

    def add(self, other: Stats) -> None:
        """Add another block's."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def ratio(self) -> float:
        """‖Δ‖/‖W‖; 0 where there is no Δ."""
        if not self.delta:
            return 0.0
        return float(np.sqrt(self.delta / self.weight)) if self.weight else float("inf")

    @property
    def missed(self) -> float | None:
        """‖W + Δ − W_new‖/‖Δ‖ of a weight that is quantised anew; None where there is no Δ."""
        return float(np.sqrt(self.error / self.delta)) if self.delta else None

    @property
    def coarse(self) -> float | None:
        """What quantising W itself is taken to have missed, over ‖W‖; None for a W of zeros."""
        return float(np.sqrt(self.own / self.weight)) if self.weight else None

    @property
    def lost(self) -> float:
        """Share of elements that did not move."""
        return self.still / self.elements if self.elements else 0.0


class Space:
    """Arrays that one thread uses again for block after block: allocating costs page faults."""

    def __init__(self) -> None:
        self._bytes: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: NumpyDtype) -> Array:
        """An array with any content; the next of this name takes its place."""
        size = math.prod(shape) * dtype.itemsize
        have = self._bytes.get(name)
        if have is None or len(have) < size:
            have = self._bytes[name] = np.empty(size, np.uint8)
        return have[:size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class TensorFold:
    """What happens to one stored tensor.

    Attributes:
        name: The tensor's name.
        matrix: Its rows, columns and rectangles.
        rows: Row → its new values: PEFT's trainable tokens.
        columns: By part that reads a transposed weight: what its columns are multiplied by.
        residuals: By part, for an update of a changed base: its rows instead of W's.
    """

    name: str
    matrix: Matrix
    rows: Mapping[int, Array] = field(default_factory=dict)
    columns: Mapping[int, Array] = field(default_factory=dict)
    residuals: Mapping[int, Array] = field(default_factory=dict)

    def block(self, old: Array, low: int, dtype: str, space: Space) -> tuple[Array, Stats]:
        """New rows and what changed.

        Args:
            old: Rows low ≤ i < low + len(old) as stored, [n, columns].
            low: The first row.
            dtype: The dtype of the result.
            space: The calling thread's; the result lies in it.

        Raises:
            LoraFxError: A value that is no number, or beyond the range of the dtype.
        """
        wide = np.dtype(arithmetic(old.dtype.name, dtype))
        weight = space.array("weight", old.shape, wide)
        np.copyto(weight, old)
        result = space.array("result", old.shape, numpy_dtype(dtype))
        with np.errstate(all="ignore"):  # what is no number is looked for below, and named
            new, delta = self.sum(weight, low, space)
            np.copyto(result, new, casting="unsafe")
            stats = _measured(old, weight, delta, result, space)
            if not np.isfinite(stats.along + stats.weight):
                weight = old.astype(wide)
                raise self.error(weight, self.sum(weight, low, Space())[0], result, low)
        return result, stats

    def sum(self, weight: Array, low: int, space: Space) -> tuple[Array, Array]:
        """W + Δ and Δ of rows from `low` on, in the dtype of `weight`."""
        high = low + len(weight)
        new = space.array("new", weight.shape, weight.dtype)
        parts = [(i, p) for i, p in enumerate(self.matrix.parts) if p.top < high and low < p.bottom]
        if len(parts) == 1 and not self.rows and not self.residuals:
            i, p = parts[0]
            whole = p.top <= low and high <= p.bottom and p.right - p.left == weight.shape[1]
            if whole and not p.reads_weight:
                delta = p.delta(low, high, space.array("delta", weight.shape, weight.dtype), weight)
                return np.add(weight, delta, out=new), delta
        np.copyto(new, weight)
        for i, p in parts:
            lo, hi = max(low, p.top), min(high, p.bottom)
            view = new[lo - low : hi - low, p.left : p.right]
            if i in self.residuals:
                view[...] = self.residuals[i][lo - p.top : hi - p.top]
            view += p.delta(lo, hi, None, view)
            if p.reads_weight:
                view *= self.factor(i, p, view, lo, hi)
        for row, value in self.rows.items():
            if low <= row < high:
                new[row - low] = value.reshape(-1)
        return new, new - weight

    def factor(self, i: int, p: Rectangle, sums: Array, lo: int, hi: int) -> Array:
        """What W + ΔW is multiplied by, shaped to multiply rows lo ≤ i < hi."""
        if p.transposed:
            return self.columns[i][None, :]
        rows = slice(lo - p.top, hi - p.top)
        return p.row_factors(rows, squares(sums), f"tensor {self.name!r}")[:, None]

    def error(self, weight: Array, new: Array, result: Array, low: int) -> LoraFxError:
        """Which value is no number: of the base, of the sum, or of what is stored."""
        for what, array, hint in (
            ("the base has", weight, "is the checkpoint damaged?"),
            ("the fold gives", new, "is the adapter's scale right, and its weight (ADAPTER:W)?"),
            (f"{result.dtype} cannot hold", result, "--dtype bfloat16 or float32 can"),
        ):
            bad = np.argwhere(~np.isfinite(array.astype(np.float64)))
            if len(bad):
                row, column = (int(n) for n in bad[0])
                value = (new if array is result else array)[row, column]
                return LoraFxError(
                    f"tensor {self.name!r}: {what} {value} at row {row + low}, column {column}; "
                    "expected finite numbers",
                    hint,
                )
        return LoraFxError(
            f"tensor {self.name!r}: the norm of W or of its update is beyond fp32's range",
            "is the adapter's scale right, and its weight (ADAPTER:W)? --dtype float64 can hold it",
        )


def _measured(old: Array, weight: Array, delta: Array, result: Array, space: Space) -> Stats:
    applied = space.array("new", weight.shape, weight.dtype)  # W + Δ is not needed any more
    np.copyto(applied, result)
    differs = space.array("differs", weight.shape, np.dtype(bool))
    if old.dtype == result.dtype and old.dtype.itemsize == 2:
        np.not_equal(old.view(np.uint16), result.view(np.uint16), out=differs)
    else:
        np.not_equal(weight, applied, out=differs)
    np.subtract(applied, weight, out=applied)
    return stats_of(weight, delta, applied, int(old.size - np.count_nonzero(differs)))


def stats_of(weight: Array, delta: Array, moved: Array, still: int) -> Stats:
    """The sums of a block: W, Δ, W_new − W, and how many elements did not move."""
    stats = Stats(elements=weight.size, still=still, weight=float(np.vdot(weight, weight)))
    stats.count(moved, np.ascontiguousarray(delta))
    return stats


def arithmetic(source: str, dtype: str) -> Floating:
    """What a tensor is folded in: fp32, or fp64 where it is stored so before or after."""
    return np.float64 if "float64" in (source, dtype) else np.float32


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """The threads here are the parallel ones; BLAS's own would wait for each other."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


# Rows of a stored tensor, and what must be known of all of them before the first is folded.


def prepared(fold: TensorFold, source: TensorInfo) -> TensorFold:
    """The fold with what needs the whole tensor: factors of columns, and changed bases.

    A base that an initialisation changed is held whole; the norms are summed up block by block.
    """
    parts = [*enumerate(fold.matrix.parts)]
    fold = replace(fold, residuals={i: _residual(fold, p, source) for i, p in parts if p.mutated})
    columns = {
        i: p.row_factors(slice(None), _column_squares(fold, i, p, source), f"tensor {fold.name!r}")
        for i, p in parts
        if p.reads_weight and p.transposed
    }
    return replace(fold, columns=columns)


def _residual(fold: TensorFold, p: Rectangle, source: TensorInfo) -> Array:
    """What is left of W when the part that the update started from is taken off, as stored."""
    assert isinstance(p.change, LowRank)
    old = read_block(source, p.top, p.bottom, fold.matrix.columns)
    weight = old[:, p.left : p.right]
    left = residual(weight.T if p.transposed else weight, p.change, f"tensor {fold.name!r}")
    return left.T if p.transposed else left


def _column_squares(fold: TensorFold, i: int, p: Rectangle, source: TensorInfo) -> Array:
    """Sums of squares of W + ΔW along its columns, fp64."""
    sums = np.zeros(p.right - p.left, np.float64)
    step = fold.matrix.rows_per_block
    for low in range(p.top, p.bottom, step):
        high = min(low + step, p.bottom)
        delta = p.delta(low, high)
        old = read_block(source, low, high, fold.matrix.columns)[:, p.left : p.right]
        if i in fold.residuals:
            old = fold.residuals[i][low - p.top : high - p.top]
        sums += squares((old.astype(delta.dtype) + delta).T)
    return sums


def read_rows(
    fd: int, info: TensorInfo, low: int, high: int, columns: int, space: Space | None = None
) -> Array:
    """Rows low ≤ i < high of a stored tensor that is seen with `columns` columns."""
    if isinstance(info, CodesInfo):
        return info.weight.rows(low, high)
    old = (space or Space()).array("old", (high - low, columns), numpy_dtype(info.dtype))
    row = old.itemsize * columns
    try:
        read_into(fd, old.view(np.uint8).reshape(-1).data, info.start + low * row)
    except OSError as error:  # says which file, as a descriptor cannot
        error.filename = str(info.file)
        raise
    return old


def read_block(info: TensorInfo, low: int, high: int, columns: int) -> Array:
    """Rows low ≤ i < high of a stored tensor, as `read_rows` gives them; its file is opened."""
    with open_input(info.file) as f:
        return read_rows(f.fileno(), info, low, high, columns)


# A stored tensor as a matrix of rows, and the rectangles of it that an adapter changes.
#
# Merging streams a tensor block of rows by block of rows, so ΔW must be had for any rows alone:
#
#     stored [*batch, out, in]   rows = batch · out, columns = in    block = s·b[rows]·a
#     stored [*batch, in, out]   rows = batch · in, columns = out    block = (s·b·a[:, rows])ᵀ
#
# A region of a tensor is a smaller rectangle. A layout that is neither of the two (an einsum's, a
# group of a transposed convolution) has its ΔW computed whole.


WINDOW = 16
"""Rows that a product is computed for at least: BLAS sums few rows in another order than many."""


@dataclass(frozen=True)
class Rectangle:
    """Rows top ≤ i < bottom and columns left ≤ j < right of a tensor, and their ΔW.

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

    @property
    def reads_weight(self) -> bool:
        """True where rows of W + ΔW are then multiplied by what W makes of them, as in DoRA."""
        return isinstance(self.change, LowRank) and variant_of(self.change).reads_weight

    def row_factors(self, rows: slice, squares: Array, where: str) -> Array:
        """What those rows of W + ΔW are multiplied by; see `Variant.row_factors`."""
        assert isinstance(self.change, LowRank)
        return variant_of(self.change).row_factors(self.change, rows, squares, where)

    @property
    def mutated(self) -> str:
        """The start that took a part off the base which the change is for; else empty."""
        return self.change.mutated if isinstance(self.change, LowRank) else ""

    def moved(self, down: int, along: int) -> Rectangle:
        """The same so many rows and columns further."""
        top, bottom, left, right = self.top + down, self.bottom + down, self.left, self.right
        return replace(self, top=top, bottom=bottom, left=left + along, right=right + along)

    def delta(
        self, low: int, high: int, out: Array | None = None, weight: Array | None = None
    ) -> Array:
        """ΔW of the tensor's rows low ≤ i < high, all within the rectangle, in the factors' dtype.

        `out` may be an array of that shape to compute in; a rotation needs W's, `weight`.
        """
        if isinstance(self.change, Rotation):
            assert weight is not None
            return self.change.of(weight)
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

    @property
    def rows_per_block(self) -> int:
        """For a block of about BLOCK elements; more of very wide tensors, never below WINDOW."""
        return max(1, BLOCK // max(1, self.columns * WINDOW)) * WINDOW


def whole(shape: tuple[int, ...], change: Change) -> Matrix:
    """One change of a whole tensor of this shape."""
    layout = change.layout
    assert layout is not None
    straight = (*layout.batch, *layout.out, *layout.in_)
    turned = (*layout.batch, *layout.in_, *layout.out)
    as_stored = tuple(range(len(straight)))
    if as_stored not in (straight, turned):
        return _materialised(shape, change, layout)
    transposed = as_stored != straight
    rows, columns = layout.out_size, layout.in_size
    if transposed:
        rows, columns = columns, rows
    count = math.prod(layout.batch_shape)
    parts = (
        Rectangle(change, i * rows, (i + 1) * rows, 0, columns, i, transposed) for i in range(count)
    )
    return Matrix(count * rows, columns, tuple(parts))


def _materialised(shape: tuple[int, ...], change: Change, layout: Layout) -> Matrix:
    """ΔW computed at once, in the stored order."""
    if not isinstance(change, LowRank) or variant_of(change).reads_weight:
        raise LoraFxError(
            f"an update of kind {type(change).__name__} lies in {list(shape)} in an order that "
            "cannot be merged",
            "only lora and rslora can take such an order",
        )
    count = math.prod(layout.batch_shape)
    every = slice(None)
    matrices = np.stack([change.block(i, every, every) for i in range(count)])
    delta = matrices.reshape(*layout.batch_shape, layout.out_size, layout.in_size)
    stored = layout.to_stored(NumpyEmitter(), delta).reshape(shape[0], -1)
    part = Rectangle(Dense(stored), 0, shape[0], 0, stored.shape[1])
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
        rows, columns = _run(shape[:split], bounds[:split]), _run(shape[split:], bounds[split:])
        if rows and columns and (len(rows), len(columns)) == (inner.rows, inner.columns):
            parts = tuple(p.moved(rows.start, columns.start) for p in inner.parts)
            return Matrix(math.prod(shape[:split]), math.prod(shape[split:]), parts)
    raise LoraFxError(
        f"the region {list(bounds)} of a tensor {list(shape)} is no rectangle of rows and columns",
        "lora-fx fold and export can apply it to the model itself",
    )


def _run(shape: Sequence[int], bounds: Sequence[tuple[int, int]]) -> range | None:
    """The flat range that bounds take of axes; None where it has gaps."""
    low, high = 0, 1
    for (lo, hi), n in zip(bounds, shape, strict=True):
        if high - low > 1 and (lo, hi) != (0, n):
            return None
        low, high = low * n + lo, (high - 1) * n + hi
    return range(low, high)


def joined(name: str, matrices: Sequence[Matrix]) -> Matrix:
    """Several changes of one tensor, which must all see the same rows and columns."""
    sizes = {(m.rows, m.columns) for m in matrices}
    if len(sizes) == 1:
        return replace(matrices[0], parts=tuple(p for m in matrices for p in m.parts))
    raise LoraFxError(
        f"the changes of {name!r} take its axes in different ways: {sorted(sizes)}",
        "merge one adapter after the other",
    )


def in_dtype(matrix: Matrix, dtype: Floating) -> Matrix:
    """The matrix with every factor in `dtype`, which is what ΔW is then computed in."""
    parts = tuple(replace(p, change=_cast(p.change, dtype)) for p in matrix.parts)
    return replace(matrix, parts=parts)


def _cast(change: Change, dtype: Floating) -> Change:
    arrays = ((k, v) for k, v in vars(change).items() if isinstance(v, np.ndarray))
    cast: dict[str, Any] = {k: v.astype(dtype, copy=False) for k, v in arrays}
    return replace(change, **cast)
