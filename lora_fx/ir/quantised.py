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
    """Codes of a weight and their meaning.

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
            self._apply_by_block(np.subtract, weight, self.zero, rows)
        self._apply_by_block(np.multiply, weight, self.scale, rows)
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
        divisor = np.where(self.scale == 0, 1, self.scale)
        self._apply_by_block(np.divide, scaled, divisor, slice(None))

        if self.levels is not None:
            return replace(self, codes=self._nearest_levels(scaled, self.levels))
        if self.codes.dtype.kind not in "iu":
            return replace(self, codes=_nearest_narrow_floats(scaled, self.codes.dtype))
        if self.zero is not None:
            self._apply_by_block(np.add, scaled, self.zero, slice(None))
        return replace(self, codes=self._nearest_integers(scaled, bits))

    def _nearest_levels(self, scaled: Array, levels: Array) -> Array:
        """The indices in `levels` of the levels nearest to the scaled weight."""
        order = np.argsort(levels, kind="stable")
        ascending = levels.astype(np.float32)[order]
        places = np.zeros(scaled.shape, np.uint8)
        for middle in (ascending[1:] + ascending[:-1]) / 2:  # a tenth of the time of searchsorted
            np.add(places, scaled > middle, out=places)
        codes = np.take(order.astype(np.uint8), places)

        if np.diff(ascending).all():
            return codes
        # 0 and -0 are both levels: a code that already stands for the value stays
        unchanged = np.take(levels, codes) == np.take(levels, self.codes)
        return np.where(unchanged, self.codes, codes)

    def _nearest_integers(self, scaled: Array, bits: int) -> Array:
        """The scaled weight, which is overwritten, rounded to the integers of so many bits."""
        lowest = 0
        if self.codes.dtype.kind != "u":
            lowest = -(2 ** (bits - 1))
        np.rint(scaled, out=scaled)
        np.clip(scaled, lowest, lowest + 2**bits - 1, out=scaled)
        return np.asarray(scaled.astype(self.codes.dtype))

    def rescaled(
        self, stored: Array, weight: Array, delta: Array, rule: Callable[[Array], Array]
    ) -> Array:
        """Scales as a file stores them, recomputed for the blocks that an update changes.

        Args:
            stored: The scales before, [blocks of the two axes].
            weight: The updated values, [rows, columns].
            delta: What the update added to them.
            rule: Largest value of a block, fp32 → its scale as a file has it.
        """
        largest = self._largest_by_block(weight)
        changed = largest > 0
        if np.count_nonzero(delta) < delta.size:
            changed &= self._largest_by_block(delta) > 0

        scales = rule(np.where(largest > 0, largest, 1)).astype(stored.dtype)
        return np.where(changed.reshape(stored.shape), scales.reshape(stored.shape), stored)

    def _largest_by_block(self, weight: Array) -> Array:
        """The largest |value| in each block of rows and columns."""
        n_rows, n_columns = weight.shape
        block_rows, block_columns = self.block
        magnitudes = np.abs(weight)
        row_padding = -n_rows % block_rows
        column_padding = -n_columns % block_columns
        if row_padding or column_padding:
            magnitudes = np.pad(magnitudes, [(0, row_padding), (0, column_padding)])

        rows, columns = magnitudes.shape
        blocks = magnitudes.reshape(rows, columns // block_columns, block_columns)
        while blocks.shape[2] % 2 == 0:  # halves: numpy is slow along short axes
            half = blocks.shape[2] // 2
            blocks = np.maximum(blocks[..., :half], blocks[..., half:])
        largest_of_rows = blocks.max(2)
        return np.asarray(largest_of_rows.reshape(rows // block_rows, block_rows, -1).max(1))

    def in_place(self) -> Array:
        """The codes in the order of the weight's columns."""
        if self.order is None:
            return self.codes
        return self.codes[:, np.argsort(self.order)]

    def cut(self, rows: slice) -> Quantised:
        """Some of its rows, which begin and end where blocks do."""
        start = rows.start
        stop = min(rows.stop, len(self.codes))
        codes = self.codes[start:stop]
        if self.block[0] >= len(self.codes) and not self.flat:
            return replace(self, codes=codes, block=(stop - start, *self.block[1:]))

        elements_of_row = math.prod(self.shape[1:]) if self.flat else 1
        first_block = start * elements_of_row // self.block[0]
        end_block = -(-stop * elements_of_row // self.block[0])
        blocks = slice(first_block, end_block)
        zero = self.zero
        if zero is not None:
            zero = zero[blocks]
        return replace(self, codes=codes, scale=self.scale[blocks], zero=zero)

    def _apply_by_block(self, op: np.ufunc, weight: Array, value: Array, rows: slice) -> None:
        """Change some rows of the weight in place by a number a block, which `op` takes second."""
        start, stop, _ = rows.indices(self.shape[0])
        value = value.astype(np.float32)
        if self.flat:
            self._apply_by_flat_block(op, weight, value, start, stop)
            return

        last_axis = len(self.shape) - 1
        for axis, (size, block) in enumerate(zip(self.shape, self.block, strict=True)):
            if axis == 0:
                if block < size or start:
                    value = value[np.arange(start, stop) // block]
            elif 1 < block < size:
                if axis == last_axis and size % block == 0:
                    blocks = weight.reshape(*weight.shape[:-1], size // block, block)
                    op(blocks, value[..., None], out=blocks)
                    return
                value = np.take(value, np.arange(size) // block, axis)
        op(weight, value, out=weight)

    def _apply_by_flat_block(
        self, op: np.ufunc, weight: Array, value: Array, start: int, stop: int
    ) -> None:
        """The same for blocks that go on from row to row: rows from start up to stop."""
        elements_of_row = math.prod(self.shape[1:])
        block = self.block[0]
        first = start * elements_of_row
        end = stop * elements_of_row
        first_block = first // block
        value = value[first_block : -(-end // block)]
        if first % block == 0 and end % block == 0:
            blocks = weight.reshape(-1, block)
            op(blocks, value[:, None], out=blocks)
            return

        # the rows begin or end inside a block: one number an element
        elements = weight.reshape(-1)
        skipped = first_block * block
        op(elements, np.repeat(value, block)[first - skipped : end - skipped], out=elements)


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
        """True if both mean the same numbers."""
        return (
            self.block == other.block
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero, other.zero)
        )

    def moved(self, delta: Array) -> Array:
        """The zeros of W + Δ, Δ [rows, blocks], in the dtype of the scales.

        They are infinite where Δ is not 0 and the scale is.
        """
        scale = self.scale.astype(np.float64)
        zero = self.zero.astype(np.float64)
        with np.errstate(divide="ignore", over="ignore"):
            steps = np.divide(delta, scale, out=np.zeros(delta.shape), where=delta != 0)
            return np.asarray((zero - steps).astype(self.scale.dtype))

    def change(self, zero: Array) -> Array:
        """The change of the weight by new zero points, [rows, blocks] in fp64."""
        steps = self.zero.astype(np.float64) - zero.astype(np.float64)
        return np.asarray(steps * self.scale, np.float64)


def no_fold(kind: str) -> str:
    """The reason why W + s·b·a cannot be stored in the place of a quantised weight."""
    return f"the weight is quantised ({kind})"


def blocks_in(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a weight.

    >>> blocks_in((4, 100), (1, 64)), blocks_in((4, 100), (64,)), blocks_in((4, 100), (4, 100))
    ((4, 2), (7,), (1, 1))
    """
    if len(block) == 1 and len(shape) > 1:
        return (-(-math.prod(shape) // block[0]),)
    return tuple(-(-size // length) for size, length in zip(shape, block, strict=True))


def _nearest_narrow_floats(scaled: Array, dtype: NumpyDtype) -> Array:
    """The scaled weight in a float dtype of 8 bits."""
    halves = np.ascontiguousarray(scaled, "<f4").view("<u2").reshape(*scaled.shape, 2)
    lower = halves[..., 0]
    upper = halves[..., 1]
    # seven bits of the mantissa, the last also for what follows, round as all of it
    return np.asarray(np.take(_narrow_floats(dtype), upper | (lower != 0)))


@functools.cache
def _narrow_floats(dtype: NumpyDtype) -> Array:
    """The code of every float of 16 bits, the upper half of one of 32, in a dtype of 8 bits."""
    with np.errstate(all="ignore"):
        upper_halves = np.arange(1 << 16, dtype=np.uint32)
        floats = (upper_halves << 16).view(np.float32)
        largest = float(finfo(dtype).max)
        return np.clip(floats, -largest, largest).astype(dtype)


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

_TWELFTHS = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3])
FP4 = (np.concatenate([_TWELFTHS, -_TWELFTHS]) / 12 + 0.0).astype(np.float32)
"""The levels of bitsandbytes' floats of 4 bits, whose second zero is 0 and not -0."""


def quantise(weight: Array, kind: str) -> Quantised:
    """A float matrix [out, in] as codes, symmetric, each block by its largest value.

    Args:
        weight: Finite numbers.
        kind: nf4 (blocks of 64 along the flattened weight), int4 or int8 (blocks of 32 of a row).
    """
    weight = np.asarray(weight, np.float32)
    if kind == "nf4":
        return _in_normal_floats(weight)
    return _in_integers(weight, {"int4": 4, "int8": 8}[kind])


def _in_normal_floats(weight: Array) -> Quantised:
    """A matrix as NF4 codes, in blocks of 64 along the flattened weight."""
    padding = -weight.size % 64
    blocks = np.pad(weight.reshape(-1), (0, padding)).reshape(-1, 64)
    scale = np.abs(blocks).max(1)
    in_units = blocks / np.where(scale, scale, 1)[:, None]

    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = np.searchsorted(middles, in_units).astype(np.uint8)
    codes = codes.reshape(-1)[: weight.size].reshape(weight.shape)
    return Quantised(codes, scale, None, (64,), NF4)


def _in_integers(weight: Array, bits: int) -> Quantised:
    """A matrix as unsigned codes around a zero in their middle, in blocks of 32 of a row."""
    rows, columns = weight.shape
    middle_code = 2 ** (bits - 1)
    blocks = np.pad(weight, ((0, 0), (0, -columns % 32))).reshape(rows, -1, 32)
    places = np.abs(blocks).argmax(2)[..., None]
    largest = np.take_along_axis(blocks, places, 2)[..., 0]

    # the end of the codes that is one longer, -2^(bits-1), is the largest value's: as llama.cpp
    # and ONNX Runtime's quantiser do, it keeps one code more in use
    scale = (largest / -middle_code).astype(np.float32)
    steps = np.rint(blocks / np.where(scale, scale, 1)[..., None])
    shifted = np.clip(steps, -middle_code, middle_code - 1) + middle_code
    codes = shifted.astype(np.uint8).reshape(rows, -1)[:, :columns]
    zero = np.full(scale.shape, middle_code, np.uint8)
    return Quantised(codes, scale, zero, (1, 32))
