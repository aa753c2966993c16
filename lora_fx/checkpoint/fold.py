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
from lora_fx.adapter.variant import residual
from lora_fx.checkpoint.fold_stats import Stats, measured
from lora_fx.checkpoint.rectangles import Matrix, Rectangle
from lora_fx.checkpoint.stored_rows import Space, read_block
from lora_fx.dtypes import Array, Floating, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo


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
            stats = measured(old, weight, delta, result, space)
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
