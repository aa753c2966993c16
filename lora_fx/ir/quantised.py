"""A quantised weight as one value, whatever file or graph it comes from.

    W[i] = (codes[i] - zero[b(i)]) · scale[b(i)]        where the codes are numbers
    W[i] = levels[codes[i]] · scale[b(i)]               where they are places of a table

b(i) is the block that element i lies in. Products are made in float32, as the formats' own packages
make them, and rounded once to the dtype that is asked for. A package that keeps its weights in the
dtype of their scales has its own bits at `dequantise` of that dtype. Every format is a constructor
of this value: see lora_fx/files/quantised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import Array, numpy_dtype


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

    def dequantise(self, dtype: str = "float32", rows: slice = slice(None)) -> Array:
        """The weight, or some of its rows along the first axis, in a dtype."""
        codes = self.codes[rows]
        scale = self._along(self.scale, rows).astype(np.float32)
        if self.levels is not None:
            values = self.levels.astype(np.float32)[codes]
        elif self.zero is None:
            values = codes.astype(np.float32)
        else:
            values = codes.astype(np.float32) - self._along(self.zero, rows).astype(np.float32)
        weight = values * scale
        if self.unit != 1:
            weight = weight * np.float32(self.unit)
        if self.order is not None:
            weight = weight[:, np.argsort(self.order)]
        return np.asarray(weight).astype(numpy_dtype(dtype))

    def _along(self, value: Array, rows: slice) -> Array:
        """A number a block as a number an element of some rows, or an array that broadcasts."""
        start, stop, _ = rows.indices(self.shape[0])
        if self.flat:
            width, block = math.prod(self.shape[1:]), self.block[0]
            first, last = start * width, stop * width
            low = first // block
            spread = np.repeat(value[low : -(-last // block)], block)
            part = spread[first - low * block : last - low * block]
            return np.asarray(part.reshape(stop - start, *self.shape[1:]))
        for axis, (size, block) in enumerate(zip(self.shape, self.block, strict=True)):
            if axis == 0:
                picked = np.arange(start, stop) // block
                value = value[picked] if block < size or start else value
            elif block < size:
                value = np.take(value, np.arange(size) // block, axis)
        return value


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


# Codes of fewer than 8 bits lie in bytes or words, the first code in the lowest bits or, where
# `high` says so, in the highest.


def unpacked(words: Array, bits: int, axis: int = -1, *, high: bool = False) -> Array:
    """The codes in unsigned words, as uint8, along an axis that gets longer.

    Codes of 3, 5, 6 or 7 bits run on from word to word.
    """
    width = words.dtype.itemsize * 8
    words = words.view(f"u{words.dtype.itemsize}")
    if width % bits:
        last = np.ascontiguousarray(np.moveaxis(words, axis, -1)).astype(f"<u{width // 8}")
        stream = np.unpackbits(last.view(np.uint8), axis=-1, bitorder="little")
        whole = stream.shape[-1] // bits * bits
        each = stream[..., :whole].reshape(*stream.shape[:-1], -1, bits)
        return np.moveaxis(np.packbits(each, axis=-1, bitorder="little")[..., 0], -1, axis)
    shifts = range(0, width, bits)
    order = reversed(shifts) if high else shifts
    parts = [((words >> s) & (2**bits - 1)).astype(np.uint8) for s in order]
    axis %= words.ndim
    joined = np.stack(parts, axis + 1)
    shape = (*words.shape[:axis], words.shape[axis] * len(parts), *words.shape[axis + 1 :])
    return joined.reshape(shape)


def packed(codes: Array, bits: int, *, high: bool = False) -> Array:
    """Codes of the last axis in bytes; the axis is filled with zeros to whole bytes."""
    each = 8 // bits
    pad = -codes.shape[-1] % each
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)]).astype(np.uint8)
    parts = codes.reshape(*codes.shape[:-1], -1, each)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    shifts = shifts[::-1] if high else shifts
    return np.asarray(np.bitwise_or.reduce(parts << shifts, axis=-1))


# Quantising: codes of a float weight.

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
