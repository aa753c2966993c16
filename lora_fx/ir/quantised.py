"""A quantised weight as one value, whatever file or graph it comes from.

    W[i] = (codes[i] - zero[b(i)]) · scale[b(i)]        where the codes are numbers
    W[i] = levels[codes[i]] · scale[b(i)]               where they are places of a table

b(i) is the block that element i lies in. Products are made in float32, as the formats' own packages
make them, and rounded once to the dtype that is asked for. A package that keeps its weights in the
dtype of their scales has its own bits at `dequantise` of that dtype. Every format is a constructor
of this value: see lora_fx/files/quantised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lora_fx.dtypes import Array, NumpyDtype, finfo, numpy_dtype, values_of


@dataclass(frozen=True)
class Quantised:
    """Codes of a weight and what they stand for.

    Attributes:
        codes: Integers, or floats of 8 bits, in the shape of the weight, one an element.
        scale: What one step of the codes, or level 1, is worth; one a block, in any float dtype.
        zero: The code of 0, in the shape of `scale`, integers or floats; None where 0 is 0.
        block: How many elements of each axis share a scale, so that `scale` has the same number of
            axes; the last block of an axis may be shorter. One number alone counts along the
            flattened weight, whose blocks go on from row to row, and `scale` has one axis.
        levels: The values of the codes, where these are places of a table; there is no zero then.
        unit: A factor of the whole weight, multiplied last and rounded apart: the 1/127 of
            bitsandbytes' int8, 1 for all others.
        order: Column j of a matrix of codes is column order[j] of the weight; None where it is j.
    """

    codes: Array
    scale: Array
    zero: Array | None
    block: tuple[int, ...]
    levels: Array | None = None
    unit: float = 1.0
    order: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.codes.shape

    @property
    def flat(self) -> bool:
        """True when blocks go on from row to row."""
        return len(self.block) == 1 and len(self.shape) > 1

    @np.errstate(all="ignore")  # infinite values are found, and named, by who folds
    def dequantise(self, dtype: str = "float32", rows: slice = slice(None)) -> Array:
        """The weight, or some of its rows along the first axis, in a dtype."""
        codes = self.codes[rows]
        if self.levels is not None:
            weight = np.take(self.levels.astype(np.float32), codes)
        elif codes.dtype.itemsize == 1 and codes.dtype.name.startswith("float8"):
            weight = np.take(values_of(codes.dtype), codes.view(np.uint8))
        else:
            weight = codes.astype(np.float32)
        if self.zero is not None and self.levels is None:
            self._each(np.subtract, weight, self.zero, rows)
        self._each(np.multiply, weight, self.scale, rows)
        if self.unit != 1:
            weight *= np.float32(self.unit)
        if self.order is not None:
            weight = weight[:, np.argsort(self.order)]
        return np.asarray(weight).astype(numpy_dtype(dtype), copy=False)

    def nearest(self, weight: Array, bits: int) -> Quantised:
        """The same scales and zero points with the codes that are nearest to a weight's values."""
        scaled = np.array(weight, np.float32) / np.float32(self.unit)
        if self.order is not None:
            scaled = np.ascontiguousarray(scaled[:, self.order])
        every = slice(None)
        self._each(np.divide, scaled, np.where(self.scale == 0, 1, self.scale), every)
        kind = self.codes.dtype
        if self.levels is not None:
            order = np.argsort(self.levels, kind="stable")
            levels = self.levels.astype(np.float32)[order]
            places = np.zeros(scaled.shape, np.uint8)
            for middle in (levels[1:] + levels[:-1]) / 2:  # a tenth of the time of searchsorted
                np.add(places, scaled > middle, out=places)
            found = np.take(order.astype(np.uint8), places)
            if not np.diff(levels).all():  # 0 and -0: the one that is there stays
                same = np.take(self.levels, found) == np.take(self.levels, self.codes)
                found = np.where(same, self.codes, found)
            return replace(self, codes=found)
        if kind.kind not in "iu":
            halves = np.ascontiguousarray(scaled, "<f4").view("<u2").reshape(*scaled.shape, 2)
            # seven bits of the mantissa, the last also for what follows, round as all of it
            upper = halves[..., 1] | (halves[..., 0] != 0)
            return replace(self, codes=np.take(_narrowed(kind), upper))
        if self.zero is not None:
            self._each(np.add, scaled, self.zero, every)
        low = 0 if kind.kind == "u" else -(2 ** (bits - 1))
        codes = np.clip(np.rint(scaled, out=scaled), low, low + 2**bits - 1, out=scaled)
        return replace(self, codes=codes.astype(kind))

    def rescaled(
        self, stored: Array, weight: Array, delta: Array, rule: Callable[[Array], Array]
    ) -> Array:
        """Scales as a file has them, new ones for the blocks that an update changes.

        Args:
            stored: The scales before, [blocks of the two axes].
            weight: The new values, [rows, columns].
            delta: How much of them is new.
            rule: Largest value of a block, fp32 → its scale as a file has it.
        """
        moved = np.count_nonzero(delta) == delta.size or self._largest(delta) > 0
        largest = self._largest(weight)
        new = rule(np.where(largest > 0, largest, 1)).astype(stored.dtype).reshape(stored.shape)
        return np.where((moved & (largest > 0)).reshape(stored.shape), new, stored)

    def _largest(self, weight: Array) -> Array:
        """Of |values| in each block of rows and columns."""
        (rows, columns), (high, wide) = weight.shape, self.block
        pads = [(0, -rows % high), (0, -columns % wide)]
        whole = np.pad(np.abs(weight), pads) if any(p[1] for p in pads) else np.abs(weight)
        blocks = whole.reshape(len(whole), whole.shape[1] // wide, wide)
        while blocks.shape[2] % 2 == 0:  # halves: numpy is slow along short axes
            half = blocks.shape[2] // 2
            blocks = np.maximum(blocks[..., :half], blocks[..., half:])
        rows = blocks.max(2)
        return np.asarray(rows.reshape(len(rows) // high, high, -1).max(1))

    def in_place(self) -> Array:
        """The codes in the order of the weight's columns."""
        return self.codes if self.order is None else self.codes[:, np.argsort(self.order)]

    def cut(self, rows: slice) -> Quantised:
        """Some of its rows, which begin and end where blocks do."""
        low, high = rows.start, min(rows.stop, len(self.codes))
        width = math.prod(self.shape[1:]) if self.flat else 1
        first, last = low * width // self.block[0], -(-high * width // self.block[0])
        single = self.block[0] >= len(self.codes) and not self.flat
        some = slice(None) if single else slice(first, last)
        zero = None if self.zero is None else self.zero[some]
        block = (high - low, *self.block[1:]) if single else self.block
        return replace(
            self, codes=self.codes[low:high], scale=self.scale[some], zero=zero, block=block
        )

    def _each(self, op: np.ufunc, weight: Array, value: Array, rows: slice) -> None:
        """Some rows of the weight, changed in place by a number a block."""
        start, stop, _ = rows.indices(self.shape[0])
        value = value.astype(np.float32)
        if self.flat:
            width, block = math.prod(self.shape[1:]), self.block[0]
            first, last = start * width, stop * width
            low = first // block
            value = value[low : -(-last // block)]
            if first % block or last % block:
                flat, value = weight.reshape(-1), np.repeat(value, block)
                op(flat, value[first - low * block : last - low * block], out=flat)
            else:
                blocks = weight.reshape(-1, block)
                op(blocks, value[:, None], out=blocks)
            return
        for axis, (size, block) in enumerate(zip(self.shape, self.block, strict=True)):
            if axis == 0:
                picked = np.arange(start, stop) // block
                value = value[picked] if block < size or start else value
            elif 1 < block < size and axis == len(self.shape) - 1 and not size % block:
                blocks = weight.reshape(*weight.shape[:-1], size // block, block)
                op(blocks, value[..., None], out=blocks)
                return
            elif 1 < block < size:
                value = np.take(value, np.arange(size) // block, axis)
        op(weight, value, out=weight)


@dataclass(frozen=True)
class ZeroPoints:
    """Scales and zeros of a matrix of codes whose reader takes floats for zeros.

    W[o, i] = (codes[o, i] − zero[o, b]) · scale[o, b], b = i // block: what is added to W and is
    constant in each block goes into the zeros, and no code changes.

    Attributes:
        scale: [rows, blocks], floats.
        zero: The same, floats or codes.
        block: How many codes of a row share one.
    """

    scale: Array
    zero: Array
    block: int

    def same(self, other: ZeroPoints) -> bool:
        """True where both stand for the same numbers."""
        equal = np.array_equal(self.scale, other.scale) and np.array_equal(self.zero, other.zero)
        return equal and self.block == other.block

    def moved(self, delta: Array) -> Array:
        """The zeros of W + Δ, Δ [rows, blocks], in the dtype of the scales.

        They are infinite where Δ is not 0 and the scale is.
        """
        scale = self.scale.astype(np.float64)
        with np.errstate(divide="ignore", over="ignore"):
            step = np.divide(delta, scale, out=np.zeros(delta.shape), where=delta != 0)
            return np.asarray((self.zero.astype(np.float64) - step).astype(self.scale.dtype))

    def change(self, zero: Array) -> Array:
        """What other zeros add to the weight, [rows, blocks] in fp64."""
        wide = (self.zero.astype(np.float64) - zero.astype(np.float64)) * self.scale
        return np.asarray(wide, np.float64)


def no_fold(kind: str) -> str:
    """Why W + s·b·a is not stored in the place of a quantised weight."""
    return f"the weight is quantised ({kind})"


def blocks_in(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a weight.

    >>> blocks_in((4, 100), (1, 64)), blocks_in((4, 100), (64,)), blocks_in((4, 100), (4, 100))
    ((4, 2), (7,), (1, 1))
    """
    if len(block) == 1 and len(shape) > 1:
        return (-(-math.prod(shape) // block[0]),)
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


@functools.cache
def _narrowed(dtype: NumpyDtype) -> Array:
    """The code of every float of 16 bits, the upper half of one of 32, in a dtype of 8 bits."""
    with np.errstate(all="ignore"):
        every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
        top = float(finfo(dtype).max)
        return np.clip(every, -top, top).astype(dtype)


NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The 16 levels of NormalFloat (Dettmers and others, 2023, QLoRA, appendix E)."""

_HALF = [0, 1 / 16, 8, 12, 4, 6, 2, 3]
FP4 = (np.array([*_HALF, *(-x for x in _HALF)]) / 12 + 0.0).astype(np.float32)
"""The levels of bitsandbytes' floats of 4 bits, whose second zero is 0 and not -0."""


def quantise(weight: Array, kind: str) -> Quantised:
    """A float matrix [out, in] as codes, symmetric, each block by its largest value.

    Args:
        weight: Finite numbers.
        kind: nf4 (blocks of 64 along the flattened weight), int4 or int8 (blocks of 32 of a row).
    """
    w = np.asarray(weight, np.float32)
    if kind == "nf4":
        flat = np.pad(w.reshape(-1), (0, -w.size % 64)).reshape(-1, 64)
        scale = np.abs(flat).max(1)
        unit = flat / np.where(scale, scale, 1)[:, None]
        middle = (NF4[1:] + NF4[:-1]) / 2
        codes = np.searchsorted(middle, unit).astype(np.uint8)
        return Quantised(codes.reshape(-1)[: w.size].reshape(w.shape), scale, None, (64,), NF4)
    bits = {"int4": 4, "int8": 8}[kind]
    middle_code = 2 ** (bits - 1)
    blocks = np.pad(w, ((0, 0), (0, -w.shape[1] % 32))).reshape(len(w), -1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)[..., 0]
    # the end of the codes that is one longer, -2^(bits-1), is the largest value's: as llama.cpp
    # and ONNX Runtime's quantiser do, it keeps one code more in use
    scale = (largest / -middle_code).astype(np.float32)
    steps = np.rint(blocks / np.where(scale, scale, 1)[..., None])
    codes = np.clip(steps, -middle_code, middle_code - 1) + middle_code
    codes = codes.astype(np.uint8).reshape(len(w), -1)[:, : w.shape[1]]
    return Quantised(codes, scale, np.full(scale.shape, middle_code, np.uint8), (1, 32))
