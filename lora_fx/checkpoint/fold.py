"""The fold of a block of rows: W + Σ s·BA in fp32 (fp64 for fp64 weights), rounded once.

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
from lora_fx.adapter.updates import Rotation
from lora_fx.checkpoint.fold_stats import SAMPLED, Stats, measured
from lora_fx.checkpoint.rectangles import Matrix, Rectangle
from lora_fx.checkpoint.stored_rows import Space, read_block
from lora_fx.dtypes import Array, Floating, all_finite, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo

CAST_AT_ONCE = 2048
"""The elements that numpy casts at once. With its default of 8192, a fold took a tenth longer."""


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
        """Fold a block of rows; return the new rows and their statistics.

        Args:
            stored: Rows low ≤ i < low + len(stored) as stored, [n, columns].
            low: The first row.
            dtype: The dtype of the result.
            space: The calling thread's; the result lies in it.

        Raises:
            LoraFxError: A value that is no number, or beyond the range of the dtype.
        """
        result = space.array("result", stored.shape, numpy_dtype(dtype))
        with np.errstate(all="ignore"):  # what is no number is looked for below, and named
            delta = self._fold_into(result, stored, low, space)
            stats = measured(stored, delta, result, self._sampled_rows(low), space)
            if not all_finite(result) or not np.isfinite(stats.along + stats.weight + stats.delta):
                weight = stored.astype(arithmetic(stored.dtype.name, dtype))
                folded, _ = self.sum(weight, low, Space())
                raise self.error(weight, folded, result, low)
        return result, stats

    def _fold_into(self, result: Array, stored: Array, low: int, space: Space) -> Array:
        """Write the new rows into `result`; return Δ.

        Args:
            result: An array of the new rows' dtype.
            stored: Rows low ≤ i < low + len(stored) as stored.
            low: The first row.
            space: The calling thread's.
        """
        wide = np.dtype(arithmetic(stored.dtype.name, result.dtype.name))
        rectangle = self._only_rectangle(low, low + len(stored))
        if rectangle is not None and not isinstance(rectangle.change, Rotation):
            room = space.array("delta", stored.shape, wide)
            delta = rectangle.delta(low, low + len(stored), room)
            # One call: numpy widens, adds and rounds so many elements at a time, and they stay in
            # the first cache. Three calls would read and write the block in fp32 three times.
            np.setbufsize(CAST_AT_ONCE)  # until np.errstate ends
            np.add(stored, delta, out=result, dtype=wide, casting="unsafe")
            return delta

        weight = space.array("weight", stored.shape, wide)
        np.copyto(weight, stored)
        folded, delta = self.sum(weight, low, space)
        np.copyto(result, folded, casting="unsafe")
        return delta

    def _only_rectangle(self, low: int, high: int) -> Rectangle | None:
        """Return the rectangle whose ΔW is all that is added to rows low ≤ i < high, if one is."""
        if self.rows or self.residuals:
            return None
        rectangles = self._rectangles(low, high)
        if len(rectangles) != 1:
            return None
        _, rectangle = rectangles[0]
        if not _adds_to_all(rectangle, low, high, self.matrix.columns):
            return None
        return rectangle

    def _rectangles(self, low: int, high: int) -> list[tuple[int, Rectangle]]:
        """Return the rectangles that have some of the rows low ≤ i < high, with their numbers."""
        return [
            (i, rectangle)
            for i, rectangle in enumerate(self.matrix.rectangles)
            if rectangle.top < high and low < rectangle.bottom
        ]

    def _sampled_rows(self, low: int) -> slice | None:
        """Return which rows of a block from row `low` on are measured; None for all.

        A tensor of one block is measured in full.
        """
        if self.matrix.rows <= self.matrix.rows_per_block:
            return None
        return slice(-low % SAMPLED, None, SAMPLED)

    def sum(self, weight: Array, low: int, space: Space) -> tuple[Array, Array]:
        """Return W + Δ and Δ, for rows from `low` on, in the dtype of `weight`."""
        high = low + len(weight)
        folded = space.array("new", weight.shape, weight.dtype)
        rectangle = self._only_rectangle(low, high)
        if rectangle is not None:
            room = space.array("delta", weight.shape, weight.dtype)
            delta = rectangle.delta(low, high, room, weight)
            return np.add(weight, delta, out=folded), delta

        np.copyto(folded, weight)
        for i, rectangle in self._rectangles(low, high):
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
        """Return the factor of W + ΔW, shaped to multiply rows low ≤ i < high."""
        if rectangle.transposed:
            return self.columns[i][None, :]
        rows = slice(low - rectangle.top, high - rectangle.top)
        return rectangle.row_factors(rows, squares(sums), f"tensor {self.name!r}")[:, None]

    def error(self, weight: Array, folded: Array, result: Array, low: int) -> LoraFxError:
        """Return the error for the first non-finite value: in the base, the sum or the result."""
        for what, array, values, hint in (
            ("the base has", weight, weight, "check that the checkpoint is not damaged"),
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
                "pass --dtype bfloat16 or float32, which can hold it",
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
            "check the adapter's scale and its weight (ADAPTER:W); or pass --dtype float64, "
            "which can hold the norm",
        )


def _adds_to_all(rectangle: Rectangle, low: int, high: int, columns: int) -> bool:
    """Whether a rectangle is a plain sum that covers rows low ≤ i < high completely."""
    has_all_rows = rectangle.top <= low and high <= rectangle.bottom
    has_all_columns = rectangle.right - rectangle.left == columns
    return has_all_rows and has_all_columns and not rectangle.reads_weight


def arithmetic(source: str, dtype: str) -> Floating:
    """Return the dtype of the arithmetic: fp64 if the source or result is float64, else fp32."""
    return np.float64 if "float64" in (source, dtype) else np.float32


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """A block with one BLAS thread, because the merge itself uses threads."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def prepared(fold: TensorFold, source: TensorInfo) -> TensorFold:
    """Compute what needs the whole tensor: column factors, and base weights that an init changed.

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
    """Return W without the part that the update's init subtracted, in W's stored shape."""
    assert isinstance(rectangle.change, LowRank)
    rows = read_block(source, rectangle.top, rectangle.bottom, fold.matrix.columns)
    weight = rows[:, rectangle.left : rectangle.right]
    where = f"tensor {fold.name!r}"
    if rectangle.transposed:
        return residual(weight.T, rectangle.change, where).T
    return residual(weight, rectangle.change, where)


def _column_squares(fold: TensorFold, i: int, rectangle: Rectangle, source: TensorInfo) -> Array:
    """Return the sums of squares along the columns of W + ΔW, in fp64."""
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
