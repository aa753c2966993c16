"""A quantised weight that lies in a checkpoint: how it is read, and how it is quantised anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.ir.quantised import Quantised

ALL = slice(None)


class Read(Protocol):
    """Reads rows of a weight, the first and the last of them at a multiple of its `step`."""

    def __call__(self, rows: slice = ALL) -> Quantised:
        """The value of these rows."""


@dataclass(frozen=True)
class Written:
    """New content of a range of a tensor.

    Attributes:
        name: The tensor.
        data: What it holds there.
        low: Where the range begins along the axis.
        axis: Which; None: the bytes of the tensor.
        matrix: Which matrix of a stack has the range; None for what is no stack.
    """

    name: str
    data: Array
    low: int
    axis: int | None = 0
    matrix: int | None = None


Recoded = tuple[Quantised, list[Written]]


Recode = Callable[[Quantised, slice, Array, Array], Recoded]
"""Quantises rows that were read anew: what is stored then, and where.

It is given the rows as they were, which rows, as `read` takes them, their new values in fp32, and
how much of them is new.
"""


class Recoding(NamedTuple):
    """How a weight is quantised anew.

    Attributes:
        recode: Quantises rows anew.
        recoded: The tensors that it writes, the codes first.
        scales: Whether it makes new scales, or rounds to the nearest by those that are stored.
    """

    recode: Recode
    recoded: tuple[str, ...]
    scales: Literal["stored", "new"] = "stored"


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight that lies in a checkpoint.

    Attributes:
        format: Its format, for people.
        bits: Of a code; 0 where that is not known.
        shape: Of the weight, as its model has it; empty where that is not known.
        read: Reads it, or some of its rows: those of [∏ shape[:-1], shape[-1]], and of a stack
            those of one of its matrices.
        step: Rows can be read from each multiple of this on.
        anew: How it is quantised anew; None where that is not done.
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
        """What gives rows within low ≤ i < high, in fp32; their codes are read at once."""
        matrix, pieces = math.prod(self.shape[-2:-1]), []
        while low < high:
            first = low - low % matrix  # of its matrix in a stack
            start = low - (low - first) % self.step
            end = min(high, first + matrix)
            stop = min(first + matrix, start + -(-(end - start) // self.step) * self.step)
            pieces.append((start, low, end, self.read(slice(start, stop))))
            low = end

        def rows(low: int, high: int) -> Array:
            found = [
                q.dequantise(rows=slice(max(low, first) - start, min(high, end) - start))
                for start, first, end, q in pieces
                if first < high and low < end
            ]
            return found[0] if len(found) == 1 else np.concatenate(found)

        return rows

    def spans(self, most: int, low: int = 0, high: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of about `most` rows that can be quantised for themselves, in one matrix each."""
        matrix = self.shape[-2]
        high = math.prod(self.shape[:-1]) if high is None else high
        each = max(self.step, most // self.step * self.step)
        while low < high:
            stop = min(high, low - low % matrix + matrix, low + each)
            yield low, stop
            low = stop
