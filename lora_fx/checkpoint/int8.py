"""Weights stored as codes of 8 bits with a scale a row, and an update folded into them.

    W[i, j] = codes[i, j] · scales[i] / unit        unit 127: bitsandbytes' LLM.int8, whose scales
                                                    are the rows' largest values; 1: others

W + Δ is quantised anew, row by row: the largest value of a row becomes code ±127, all others are
rounded to the nearest code, ties to even. A row with no update, or of zeros, keeps its scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_fx.checkpoint.blocks import Fold, Space, Stats
from lora_fx.checkpoint.rows import read_rows
from lora_fx.dtypes import Array, finfo, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.safetensors import TensorInfo

TOP = 127
"""The largest code that is written; -128 is read, but has no positive twin."""


@dataclass(frozen=True)
class Int8:
    """How a weight [rows, columns] of int8 codes is stored.

    Attributes:
        scheme: For people.
        name: Of the tensor of scales.
        scales: Where that lies in the base; one number a row.
        unit: What the scales are divided by.
    """

    scheme: str
    name: str
    scales: TensorInfo
    unit: float

    def read(self, fd: int, scales: TensorInfo, low: int, count: int) -> Array:
        """Scales of rows low ≤ i < low + count as stored, [count, 1]."""
        return read_rows(fd, scales, low, count, 1)

    def rms(self, codes: TensorInfo, count: int = 16) -> float:
        """Root mean square of W, from rows at its start, middle and end."""
        rows, columns = codes.shape
        n, squares = min(count, rows), 0.0
        with open(codes.file, "rb") as f, open(self.scales.file, "rb") as g:
            for low in (0, (rows - n) // 2, rows - n):
                step = self.steps(self.read(g.fileno(), self.scales, low, n))
                weight = read_rows(f.fileno(), codes, low, n, columns) * step
                squares += float(np.sum(weight**2))
        return math.sqrt(squares / (3 * n * columns))

    def steps(self, scales: Array) -> Array:
        """What one code is worth, [rows, 1] fp64."""
        return np.asarray(scales.astype(np.float64) / self.unit)

    def scale(self, largest: Array) -> Array:
        """The scales, in fp64, that make the largest value of a row code 127."""
        return np.asarray(largest.astype(np.float64) * self.unit / TOP)

    def stored(self, exact: Array) -> Array:
        """Scales in the dtype of the base's; one that is not zero does not become zero."""
        narrow = exact.astype(self.dtype)
        return np.where((narrow == 0) & (exact != 0), np.array(self.tiny, self.dtype), narrow)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the scales."""
        return numpy_dtype(self.scales.dtype)

    @property
    def tiny(self) -> float:
        """The smallest scale that is not zero."""
        return float(finfo(self.dtype).smallest_subnormal)

    def block(
        self, fold: Fold, codes: Array, scales: Array, low: int, space: Space
    ) -> tuple[Array, Array, Stats]:
        """New codes and scales of rows, and what changed.

        Args:
            fold: What is added.
            codes: Rows low ≤ i < low + len(codes) as stored, [n, columns].
            scales: Theirs, [n, 1].
            low: The first row.
            space: Of the calling thread; the codes lie in it.

        Raises:
            LoraFxError: A value that is no number, or a scale beyond the range of its dtype.
        """
        shape, single = codes.shape, np.dtype(np.float32)
        weight = space.array("weight", shape, single)
        with np.errstate(all="ignore"):  # what is no number is looked for below, and named
            old = self.steps(scales)
            np.multiply(codes, old, out=weight)
            new, delta = fold.sum(weight, low, space)
            largest = np.maximum(new.max(axis=1, keepdims=True), -new.min(axis=1, keepdims=True))
            if not np.isfinite(largest).all():
                raise fold.error(weight, new, new, low)
            keep = ~np.any(delta, axis=1, keepdims=True)
            moved = np.where(keep | (largest == 0), scales, self.stored(self.scale(largest)))
            self._check(moved, largest, low)
            steps = self.steps(moved)
            quotient = space.array("quotient", shape, np.dtype(np.float64))
            np.divide(new, np.where(steps == 0, 1.0, steps), out=quotient)
            np.clip(np.rint(quotient, out=quotient), -TOP, TOP, out=quotient)
            result = space.array("result", shape, np.dtype(np.int8))
            np.copyto(result, quotient, casting="unsafe")
            np.copyto(result, codes, where=keep)
            stats = _measured(weight, new, delta, result, steps, space)
            stats.own = float(np.sum(old**2)) * shape[1] / 12
            if not math.isfinite(stats.along + stats.weight + stats.error):
                raise fold.error(weight, new, new, low)
        return result, moved, stats

    def _check(self, scales: Array, largest: Array, low: int) -> None:
        bad = np.flatnonzero(~np.isfinite(scales.astype(np.float64)))
        if bad.size:
            raise LoraFxError(
                f"tensor {self.name!r}: {self.scales.dtype} cannot hold the scale of row "
                f"{low + int(bad[0])}, whose largest value is {float(largest[bad[0], 0]):g}",
                "the adapter or its scale is broken",
            )


def _measured(
    weight: Array, new: Array, delta: Array, codes: Array, steps: Array, space: Space
) -> Stats:
    """What arrived, by value: a code that stays has moved where its scale did."""
    there = space.array("there", weight.shape, weight.dtype)
    np.multiply(codes, steps, out=there)
    still = int(np.count_nonzero(there == weight))
    missed = (new - there).reshape(-1)
    there -= weight
    flat, d = weight.reshape(-1), np.ascontiguousarray(delta).reshape(-1)
    return Stats(
        weight.size,
        still,
        float(np.dot(flat, flat)),
        float(np.dot(d, d)),
        float(np.dot(there.reshape(-1), d)),
        float(np.dot(missed, missed)),
    )
