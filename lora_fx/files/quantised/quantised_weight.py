"""A quantised weight in a checkpoint: functions to read it and to quantise it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.ir.quantised import Quantised

ALL = slice(None)
"""All rows."""


class Read(Protocol):
    """Reads rows of a weight, the first and the last of them at a multiple of its `step`."""

    def __call__(self, rows: slice = ALL) -> Quantised:
        """The value of these rows."""


@dataclass(frozen=True)
class Written:
    """New content of a range of a tensor.

    Attributes:
        name: The tensor.
        data: What the range holds.
        low: Where the range begins along the axis.
        axis: The axis of the range; None where its bytes are counted.
        matrix: The matrix of a stack that has the range; None for a tensor that is no stack.
    """

    name: str
    data: Array
    low: int
    axis: int | None = 0
    matrix: int | None = None


Recoded = tuple[Quantised, list[Written]]


Recode = Callable[[Quantised, slice, Array, Array], Recoded]
"""Quantises rows anew, and tells what is stored then, and where.

Its arguments are the rows as they were read, which rows they are, as `read` takes them, their new
values in fp32, and what was added to the values.
"""


class Recoding(NamedTuple):
    """The way to quantise a weight again.

    Attributes:
        recode: Quantises rows anew.
        recoded: The tensors that `recode` writes, the codes first.
        scales: Whether `recode` makes new scales, or rounds to the nearest by the stored ones.
    """

    recode: Recode
    recoded: tuple[str, ...]
    scales: Literal["stored", "new"] = "stored"


class _Piece(NamedTuple):
    """Rows of one matrix whose codes were read, by their places in the weight.

    Attributes:
        start: The first row that was read, at a multiple of the weight's step.
        low: The first row that is wanted.
        high: The end of the rows that are wanted.
        codes: The rows from `start` on.
    """

    start: int
    low: int
    high: int
    codes: Quantised

    def rows(self, low: int, high: int) -> Array:
        """Rows low ≤ i < high, as far as they lie in this piece, in fp32."""
        first = max(low, self.low) - self.start
        end = min(high, self.high) - self.start
        return self.codes.dequantise(rows=slice(first, end))


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight in a checkpoint.

    Attributes:
        format: Its format, for people.
        bits: The bits of a code; 0 where they are not known.
        shape: The weight's shape, as its model has it; empty where that is not known.
        read: Reads the weight or some of its rows, which are those of [∏ shape[:-1], shape[-1]].
            Rows of a stack that are read at once lie in one matrix.
        step: Rows can be read from each multiple of this on.
        anew: How the weight is quantised anew; None where that is not done.
    """

    format: str
    bits: int
    shape: tuple[int, ...]
    read: Read
    step: int = 1
    anew: Recoding | None = None

    def rows(self, low: int, high: int) -> Array:
        """Rows low ≤ i < high of the weight, as `read` counts them, in fp32."""
        return self.window(low, high)(low, high)

    def window(self, low: int, high: int) -> Callable[[int, int], Array]:
        """A function that gives rows within low ≤ i < high, in fp32; their codes are read now."""
        pieces: list[_Piece] = []
        while low < high:
            piece = self._read_piece(low, high)
            pieces.append(piece)
            low = piece.high

        def rows(low: int, high: int) -> Array:
            arrays = [
                piece.rows(low, high) for piece in pieces if piece.low < high and low < piece.high
            ]
            if len(arrays) == 1:
                return arrays[0]
            return np.concatenate(arrays)

        return rows

    def _read_piece(self, low: int, high: int) -> _Piece:
        """Read rows low ≤ i < high, or as many of them as the first one's matrix has."""
        rows_of_matrix = math.prod(self.shape[-2:-1])
        top = low - low % rows_of_matrix  # the matrix's first row
        bottom = top + rows_of_matrix
        start = low - (low - top) % self.step
        high = min(high, bottom)
        steps = -(-(high - start) // self.step)
        stop = min(bottom, start + steps * self.step)
        return _Piece(start, low, high, self.read(slice(start, stop)))

    def spans(self, most: int, low: int = 0, high: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of about `most` rows that can be quantised for themselves, in one matrix each.

        They cover rows low ≤ i < high; all rows from `low` on where `high` is None.
        """
        rows_of_matrix = self.shape[-2]
        if high is None:
            high = math.prod(self.shape[:-1])
        rows_of_span = max(self.step, most // self.step * self.step)
        while low < high:
            end_of_matrix = low - low % rows_of_matrix + rows_of_matrix
            stop = min(high, end_of_matrix, low + rows_of_span)
            yield low, stop
            low = stop
