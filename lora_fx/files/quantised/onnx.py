"""Quantised weights as ONNX Runtime's MatMulNBits holds them, without a graph library.

    MatMulNBits    B uint8 [out, blocks, block · bits/8], the first input in the lowest bits; scales
                   [out, blocks]; zero points packed in the same way, each row in bytes of its own,
                   or floats, or none: 2^(bits−1)

The schemas of com.microsoft, ONNX Runtime 1.32; the bytes of MatMulBnb4 are those of
lora_fx.fx.codes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.consistency import shaped, wrong
from lora_fx.ir.bit_packing import packed, unpacked
from lora_fx.ir.quantised import Quantised, ZeroPoints

BITS = (2, 4, 8)
LARGEST = 128
"""Blocks are cut to this, a size that every kernel of MatMulNBits takes."""


def nbits_zero_points(
    where: str, scales: Array, zero: Array | None, shape: tuple[int, int], bits: int, block: int
) -> ZeroPoints:
    """What of a MatMulNBits takes an update that is constant in its blocks.

    ONNX Runtime 1.31's kernels take floats for zeros beside codes of 2 and 4 bits, not of 8.

    Args:
        where: The name of the weight, for messages.
        scales: A number a block.
        zero: Packed, or floats; None for the middle of the codes.
        shape: N, K.
        bits: Of a code.
        block: Codes that share a scale.
    """
    blocks = (shape[0], -(-shape[1] // block))
    scales = shaped(where, "scales", scales, blocks)
    zero = zeros_of(where, zero, bits, blocks)
    return ZeroPoints(scales, shaped(where, "zero points", zero, blocks), block)


def zeros_of(where: str, zero: Array | None, bits: int, shape: tuple[int, ...]) -> Array:
    """Zero points in the shape of the scales."""
    if zero is None:
        return np.full(shape, 2 ** (bits - 1), np.uint8)
    if zero.dtype != np.uint8:
        return zero
    stored = (*shape[:-1], -(-shape[-1] * bits // 8))
    return unpacked(shaped(where, "zero points", zero, stored), bits)[..., : shape[-1]]


class MatMulNBits(NamedTuple):
    """Inputs and attributes of the operator; `zero_points` None: the middle of the codes."""

    b: Array
    scales: Array
    zero_points: Array | None
    bits: int
    block_size: int


def as_matmul_nbits(where: str, q: Quantised, *, strict: bool = True) -> MatMulNBits:
    """A matrix [out, in] of integer codes.

    Blocks are cut where the operator has no such size, and scales repeated: one a row or a matrix
    stands for every block. Codes take the fewest bits that hold them.

    Args:
        where: The name of the weight, for messages.
        q: The weight.
        strict: False for codes in this layout in blocks that the operator has not, and for columns
            in another order, which is left to the caller.

    Raises:
        LoraFxError: The operator cannot hold it; the message says why.
    """
    if len(q.shape) != 2 or q.flat or q.levels is not None or q.codes.dtype.kind not in "iu":
        found = f"codes {q.codes.dtype} {list(q.shape)} in blocks of {list(q.block)}"
        raise _unfit(where, found, "a matrix of integers in blocks along its rows")
    if strict and q.order is not None:
        raise _unfit(where, "its columns in another order", "columns in their own places")
    (rows, length), (tall, wide) = q.shape, q.block
    # a block as long as the row may be cut anywhere, and else at powers of two that divide it
    size = 1 << (length - 1).bit_length() if wide >= length else wide & -wide
    size = min(LARGEST, max(16, size) if wide >= length else size)
    signed, low, high = q.codes.dtype.kind == "i", int(q.codes.min()), int(q.codes.max())
    # a signed code c needs the bits of an unsigned one of 2 · max(c, −c − 1) + 1
    largest = 2 * max(high, -low - 1) + 1 if signed else high
    bits = next((b for b in BITS if largest < 2**b), 0)
    if not bits:
        raise _unfit(where, f"codes from {low} to {high}", "codes of 8 bits")
    if size < 16 and (strict or wide * bits % 8 or wide == 1):
        raise _unfit(where, f"blocks of {wide} inputs", "a multiple of 16")
    size = wide if size < 16 else size
    shift = 2 ** (bits - 1) if signed else 0
    count = -(-length // size)
    at = np.ix_(np.arange(rows) // tall, np.arange(count) * size // wide)
    scales = q.scale[at].astype(np.float32) * np.float32(q.unit)
    zero = np.zeros_like(scales) if q.zero is None else q.zero[at].astype(np.float32)
    codes = np.pad(q.codes.astype(np.int32) + shift, ((0, 0), (0, count * size - length)))
    b = packed(codes.reshape(rows, count, size), bits)
    return MatMulNBits(b, scales, _zero_points(where, zero, shift, bits), bits, size)


def _zero_points(where: str, zero: Array, shift: int, bits: int) -> Array | None:
    """Packed where they are codes themselves, else floats."""
    moved = zero + shift
    if (moved == 2 ** (bits - 1)).all():
        return None
    if (moved == np.rint(moved)).all() and moved.min() >= 0 and moved.max() < 2**bits:
        return packed(moved.astype(np.uint8), bits)
    if bits == 8 or (moved - shift != zero).any():
        found = f"zero points from {zero.min()} to {zero.max()} of codes of {bits} bits"
        raise _unfit(where, found, "codes, or floats of at most 4 bits")
    return np.asarray(moved)


def _unfit(where: str, found: str, expected: str) -> LoraFxError:
    return wrong(where, f"has {found}", f"what the operator holds, {expected}", "dequantise it")
