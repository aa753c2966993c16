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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lora_fx.adapter.dora import squares
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.residual import residual
from lora_fx.checkpoint.fold_stats import Stats, measured
from lora_fx.checkpoint.rectangles import Matrix, Rectangle
from lora_fx.checkpoint.stored_rows import Space, read_block
from lora_fx.dtypes import Array, Floating, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo


@dataclass(frozen=True)
class TensorFold:
    """The fold of one stored tensor: its rectangles and replaced rows.

    Attributes:
        name: The tensor's name.
        matrix: Its rows, columns and rectangles.
        rows: Row → its new values: PEFT's trainable tokens.
        columns: By rectangle that reads a transposed weight: what its columns are multiplied by.
        residuals: By rectangle, for an update of a changed base: its rows instead of W's.
    """

    name: str
    matrix: Matrix
    rows: Mapping[int, Array] = field(default_factory=dict)
    columns: Mapping[int, Array] = field(default_factory=dict)
    residuals: Mapping[int, Array] = field(default_factory=dict)

    def block(self, stored: Array, low: int, dtype: str, space: Space) -> tuple[Array, Stats]:
        """Fold a block of rows; returns the new rows and their sums.

        Args:
            stored: Rows low ≤ i < low + len(stored) as stored, [n, columns].
            low: The first row.
            dtype: The dtype of the result.
            space: The calling thread's; the result lies in it.

        Raises:
            LoraFxError: A value that is no number, or beyond the range of the dtype.
        """
        wide = np.dtype(arithmetic(stored.dtype.name, dtype))
        weight = space.array("weight", stored.shape, wide)
        np.copyto(weight, stored)
        result = space.array("result", stored.shape, numpy_dtype(dtype))
        with np.errstate(all="ignore"):  # what is no number is looked for below, and named
            folded, delta = self.sum(weight, low, space)
            np.copyto(result, folded, casting="unsafe")
            stats = measured(stored, weight, delta, result, space)
            if not np.isfinite(stats.along + stats.weight):
                weight = stored.astype(wide)
                folded, _ = self.sum(weight, low, Space())  # measured() has overwritten the first
                raise self.error(weight, folded, result, low)
        return result, stats

    def sum(self, weight: Array, low: int, space: Space) -> tuple[Array, Array]:
        """W + Δ and Δ of rows from `low` on, in the dtype of `weight`."""
        high = low + len(weight)
        folded = space.array("new", weight.shape, weight.dtype)
        rectangles = [
            (i, rectangle)
            for i, rectangle in enumerate(self.matrix.rectangles)
            if rectangle.top < high and low < rectangle.bottom
        ]
        if len(rectangles) == 1 and not self.rows and not self.residuals:
            _, rectangle = rectangles[0]
            if _adds_to_all(rectangle, low, high, weight.shape[1]):
                room = space.array("delta", weight.shape, weight.dtype)
                delta = rectangle.delta(low, high, room, weight)
                return np.add(weight, delta, out=folded), delta

        np.copyto(folded, weight)
        for i, rectangle in rectangles:
            first = max(low, rectangle.top)
            behind_last = min(high, rectangle.bottom)
            view = folded[first - low : behind_last - low, rectangle.left : rectangle.right]
            if i in self.residuals:
                view[...] = self.residuals[i][first - rectangle.top : behind_last - rectangle.top]
            view += rectangle.delta(first, behind_last, None, view)
            if rectangle.reads_weight:
                view *= self.factor(i, rectangle, view, first, behind_last)
        for row, value in self.rows.items():
            if low <= row < high:
                folded[row - low] = value.reshape(-1)
        return folded, folded - weight

    def factor(self, i: int, rectangle: Rectangle, sums: Array, low: int, high: int) -> Array:
        """The factor of W + ΔW, shaped to multiply rows low ≤ i < high."""
        if rectangle.transposed:
            return self.columns[i][None, :]
        rows = slice(low - rectangle.top, high - rectangle.top)
        return rectangle.row_factors(rows, squares(sums), f"tensor {self.name!r}")[:, None]

    def error(self, weight: Array, folded: Array, result: Array, low: int) -> LoraFxError:
        """The error for the first value that is not finite: in the base, the sum or the result."""
        for what, array, values, hint in (
            ("the base has", weight, weight, "is the checkpoint damaged?"),
            (
                "the fold gives",
                folded,
                folded,
                "check the adapter's scale and its weight (ADAPTER:W)",
            ),
            (
                f"{result.dtype} cannot hold",
                result,
                folded,
                "--dtype bfloat16 or float32 can hold it",
            ),
        ):
            places = np.argwhere(~np.isfinite(array.astype(np.float64)))
            if len(places):
                row, column = (int(index) for index in places[0])
                return LoraFxError(
                    f"tensor {self.name!r}: {what} {values[row, column]} at row {row + low}, "
                    f"column {column}; expected finite numbers",
                    hint,
                )
        return LoraFxError(
            f"tensor {self.name!r}: the norm of W or of its update is beyond the range of fp32",
            "check the adapter's scale and its weight (ADAPTER:W); --dtype float64 can hold the "
            "norm",
        )


def _adds_to_all(rectangle: Rectangle, low: int, high: int, columns: int) -> bool:
    """Whether a rectangle only adds, and to all of rows low ≤ i < high."""
    has_all_rows = rectangle.top <= low and high <= rectangle.bottom
    has_all_columns = rectangle.right - rectangle.left == columns
    return has_all_rows and has_all_columns and not rectangle.reads_weight


def arithmetic(source: str, dtype: str) -> Floating:
    """The dtype that a tensor is folded in: fp32, or fp64 where it is or will be stored so."""
    return np.float64 if "float64" in (source, dtype) else np.float32


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run a block with one BLAS thread, because the merge itself uses threads."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def prepared(fold: TensorFold, source: TensorInfo) -> TensorFold:
    """Prepare what needs the whole tensor: factors of columns, and changed bases.

    A base that an initialisation changed is held whole; the norms are summed up block by block.
    """
    residuals: dict[int, Array] = {}
    for i, rectangle in enumerate(fold.matrix.rectangles):
        if rectangle.mutated:
            residuals[i] = _residual(fold, rectangle, source)
    fold = replace(fold, residuals=residuals)

    columns: dict[int, Array] = {}
    for i, rectangle in enumerate(fold.matrix.rectangles):
        if rectangle.reads_weight and rectangle.transposed:
            sums = _column_squares(fold, i, rectangle, source)
            columns[i] = rectangle.row_factors(slice(None), sums, f"tensor {fold.name!r}")
    return replace(fold, columns=columns)


def _residual(fold: TensorFold, rectangle: Rectangle, source: TensorInfo) -> Array:
    """W without the part that the update started from, as stored."""
    assert isinstance(rectangle.change, LowRank)
    rows = read_block(source, rectangle.top, rectangle.bottom, fold.matrix.columns)
    weight = rows[:, rectangle.left : rectangle.right]
    where = f"tensor {fold.name!r}"
    if rectangle.transposed:
        return residual(weight.T, rectangle.change, where).T
    return residual(weight, rectangle.change, where)


def _column_squares(fold: TensorFold, i: int, rectangle: Rectangle, source: TensorInfo) -> Array:
    """Sums of squares of W + ΔW along its columns, fp64."""
    sums = np.zeros(rectangle.right - rectangle.left, np.float64)
    step = fold.matrix.rows_per_block
    for low in range(rectangle.top, rectangle.bottom, step):
        high = min(low + step, rectangle.bottom)
        delta = rectangle.delta(low, high)
        weight = read_block(source, low, high, fold.matrix.columns)[
            :, rectangle.left : rectangle.right
        ]
        if i in fold.residuals:
            weight = fold.residuals[i][low - rectangle.top : high - rectangle.top]
        sums += squares((weight.astype(delta.dtype) + delta).T)
    return sums
