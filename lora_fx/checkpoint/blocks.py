"""Fold a block of rows: W + Σ s·BA in fp32 (fp64 for fp64 weights), rounded once, and measured.

The order is PEFT's: the fp32 product, times s, plus W. Its numbers are therefore bit for bit
PEFT's wherever the two matrix products sum in the same order. Then, where DoRA asks for it, rows
are rescaled; then single rows are replaced; then one rounding to the stored dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_fx.adapter.variant import factors, squares
from lora_fx.checkpoint.rectangles import WINDOW, Matrix, Rectangle
from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError

BLOCK = 1 << 19
"""Elements of a block. Fewer fit a core's cache better, but threads then meet at Python's lock
after every few microseconds: with 2¹⁶ two threads were no faster than one."""


@dataclass
class Stats:
    """What a fold did to the elements it went over; sums, so that blocks can be added up.

    Attributes:
        elements: How many.
        still: Those that did not move.
        weight: ‖W‖².
        delta: ‖Δ‖², Δ = what should have been added.
        along: ⟨W_new − W, Δ⟩; over `delta` it is the gain: 1 where all of Δ arrived.
        error: ‖W + Δ − W_new‖² of a weight that is quantised anew.
        own: What quantising W itself is taken to have cost, squared: step²/12 an element.
    """

    elements: int = 0
    still: int = 0
    weight: float = 0.0
    delta: float = 0.0
    along: float = 0.0
    error: float = 0.0
    own: float = 0.0

    def add(self, other: Stats) -> None:
        """Add another block's."""
        self.elements += other.elements
        self.still += other.still
        self.weight += other.weight
        self.delta += other.delta
        self.along += other.along
        self.error += other.error
        self.own += other.own

    @property
    def ratio(self) -> float:
        """‖Δ‖/‖W‖; 0 where there is no Δ."""
        if not self.delta:
            return 0.0
        return float(np.sqrt(self.delta / self.weight)) if self.weight else float("inf")

    @property
    def gain(self) -> float:
        """⟨applied, Δ⟩/⟨Δ, Δ⟩; 1 where there is no Δ."""
        return self.along / self.delta if self.delta else 1.0

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

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array with any content; the next of this name takes its place."""
        size = math.prod(shape) * dtype.itemsize
        have = self._bytes.get(name)
        if have is None or len(have) < size:
            have = self._bytes[name] = np.empty(size, np.uint8)
        return have[:size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Fold:
    """What happens to one stored tensor.

    Attributes:
        name: Of the tensor.
        matrix: Its rows, columns and rectangles.
        rows: Row → its new values: PEFT's trainable tokens.
        columns: By part, for DoRA of a transposed weight: what its columns are multiplied by.
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
            dtype: Of the result.
            space: Of the calling thread; the result lies in it.

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
            if whole and p.magnitude is None:
                delta = p.delta(low, high, space.array("delta", weight.shape, weight.dtype))
                return np.add(weight, delta, out=new), delta
        np.copyto(new, weight)
        for i, p in parts:
            lo, hi = max(low, p.top), min(high, p.bottom)
            view = new[lo - low : hi - low, p.left : p.right]
            if i in self.residuals:
                view[...] = self.residuals[i][lo - p.top : hi - p.top]
            view += p.delta(lo, hi)
            if p.magnitude is not None:
                view *= self.factor(i, p, view, lo, hi)
        for row, value in self.rows.items():
            if low <= row < high:
                new[row - low] = value.reshape(-1)
        return new, new - weight

    def factor(self, i: int, p: Rectangle, sums: Array, lo: int, hi: int) -> Array:
        """DoRA's magnitude / ‖W + ΔW‖, shaped to multiply rows lo ≤ i < hi."""
        assert p.magnitude is not None
        if p.transposed:
            return self.columns[i][None, :]
        magnitude = p.magnitude[lo - p.top : hi - p.top]
        return factors(magnitude, squares(sums), f"tensor {self.name!r}")[:, None]

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
    flat, d = weight.reshape(-1), np.ascontiguousarray(delta).reshape(-1)
    return Stats(
        old.size,
        int(old.size - np.count_nonzero(differs)),
        float(np.dot(flat, flat)),
        float(np.dot(d, d)),
        float(np.dot(applied.reshape(-1), d)),
    )


def rows_per_block(columns: int) -> int:
    """Rows of a block of about BLOCK elements; more for very wide tensors, never below WINDOW."""
    return max(1, BLOCK // max(1, columns * WINDOW)) * WINDOW


def arithmetic(source: str, dtype: str) -> type[np.floating[Any]]:
    """What a tensor is folded in: fp32, or fp64 where it is stored so before or after."""
    return np.float64 if "float64" in (source, dtype) else np.float32


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """The threads here are the parallel ones; BLAS's own would wait for each other."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield
