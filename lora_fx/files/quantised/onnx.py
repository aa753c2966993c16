"""Weights as ONNX's and ONNX Runtime's quantised operators hold them, without a graph library.

    DequantizeLinear      x of any shape, scale one number, [n] along an axis, or as many axes as x
                          with blocks along one; W = (x − zero point) · scale
    MatMulNBits           B uint8 [out, blocks, block · bits/8], the first input in the lowest bits;
                          scales [out, blocks]; zero points packed in the same way, each row in
                          bytes of its own, or floats, or none: 2^(bits−1)
    MatMulBnb4            B uint8 [(out · in + 1)/2] as bitsandbytes has it, the first code in the
                          high half; absmax along the flattened weight; quant_type 0 FP4, 1 NF4
    GatherBlockQuantized  a table [rows, width] with blocks along quantize_axis; uint8 holds
                          unsigned codes of `bits`, packed along the last axis, their zero is
                          2^(bits−1) where none is given; that of int4 and uint4 is 0

Operators.md and the schemas of com.microsoft, ONNX Runtime 1.32. `as_matmul_nbits` goes the other
way, and loses nothing; the bytes of MatMulBnb4 are those of lora_fx.fx.codes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.base import FLOAT8, checked, shaped, wrong
from lora_fx.ir.quantised import FP4, NF4, Quantised, ZeroPoints, packed, unpacked

QUANT_TYPES = (FP4, NF4)
"""The levels of MatMulBnb4, at the number of its quant_type."""
BITS = (2, 4, 8)
NARROW = {"int2": np.int8, "int4": np.int8, "uint2": np.uint8, "uint4": np.uint8}
CODES = (*NARROW, "int8", "uint8", "int16", "uint16", "int32", *FLOAT8, "float4_e2m1fn")
LARGEST = 128
"""Blocks are cut to this, a size that every kernel of MatMulNBits takes."""


def dequantize_linear(
    where: str, x: Array, scale: Array, zero: Array | None, axis: int = 1, block: int = 0
) -> Quantised:
    """The input of a DequantizeLinear, in its own axes.

    Args:
        where: The name of the weight, for messages.
        x: Codes.
        scale: See the top.
        zero: In the shape of `scale`; None for none.
        axis: What `scale` counts along; negative from the end.
        block: Elements that share a scale along the axis; 0 where it has one number an element.

    Raises:
        LoraFxError: Arrays that do not fit each other.
    """
    whole = scale.size == 1 and not block
    at = 0 if whole else _axis(where, x, axis)
    along, others = (block, (1,) * x.ndim) if block else (1, x.shape)
    blocks = x.shape if whole else (*others[:at], along, *others[at + 1 :])
    return _affine(where, x, scale.reshape(1) if whole else scale, zero, blocks)


def matmul_nbits(
    where: str, b: Array, scales: Array, zero: Array | None, shape: tuple[int, int], bits: int
) -> Quantised:
    """The weight [N, K] of a MatMulNBits, whose block_size is that of `b`.

    Args:
        where: The name of the weight, for messages.
        b: Codes, [N, blocks, block · bits/8].
        scales: A number a block.
        zero: Packed, or floats; None for the middle of the codes.
        shape: N, K.
        bits: Of a code.

    Raises:
        LoraFxError: Arrays that do not fit each other.
    """
    rows, length = shape
    block = b.shape[-1] * 8 // bits if b.ndim == 3 and bits in BITS else 0
    _check_block(where, bits, block)
    count = -(-length // block)
    b = shaped(where, "B", b, (rows, count, block * bits // 8))
    codes = unpacked(b.reshape(rows, -1), bits)[:, :length]
    zero = _zeros(where, zero, bits, (rows, count))
    return _affine(where, codes, scales, zero, (1, block))


def nbits_zero_points(
    where: str, scales: Array, zero: Array | None, shape: tuple[int, int], bits: int, block: int
) -> ZeroPoints:
    """What of a MatMulNBits takes an update that is constant in its blocks; see `matmul_nbits`.

    ONNX Runtime 1.31's kernels take floats for zeros beside codes of 2 and 4 bits, not of 8.
    """
    blocks = (shape[0], -(-shape[1] // block))
    scales = shaped(where, "scales", scales, blocks)
    zero = _zeros(where, zero, bits, blocks)
    return ZeroPoints(scales, shaped(where, "zero points", zero, blocks), block)


def matmul_bnb4(
    where: str, b: Array, absmax: Array, shape: tuple[int, int], quant_type: int, block: int
) -> Quantised:
    """The weight [N, K] of a MatMulBnb4; see `matmul_nbits`."""
    _check_block(where, 4, block)
    if quant_type not in (0, 1):
        raise wrong(where, f"has quant_type {quant_type}", "0, FP4, or 1, NF4")
    size = math.prod(shape)
    b = shaped(where, "B", b, (-(-size // 2),))
    codes = unpacked(b, 4, high=True)[:size].reshape(shape)
    return checked(where, Quantised(codes, absmax, None, (block,), QUANT_TYPES[quant_type]))


def gather_block_quantized(
    where: str,
    data: Array,
    scales: Array,
    zero: Array | None,
    axis: int = 1,
    bits: int = 4,
    block: int = 128,
) -> Quantised:
    """The table of a GatherBlockQuantized.

    Args:
        where: The name of the weight, for messages.
        data: Codes.
        scales: A number a block.
        zero: As `data`; None for the operator's default.
        axis: quantize_axis.
        bits: Of a code, where `data` is uint8.
        block: Elements of a block.

    Raises:
        LoraFxError: Arrays that do not fit each other.
    """
    at = _axis(where, data, axis)
    _check_block(where, bits, block)
    if data.dtype == np.uint8:
        data, zero = unpacked(data, bits), _zeros(where, zero, bits, scales.shape)
    blocks = tuple(block if i == at else 1 for i in range(data.ndim))
    return _affine(where, data, scales, zero, blocks)


def _axis(where: str, x: Array, axis: int) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise wrong(where, f"of {x.ndim} axes has scales along axis {axis}", "one of its axes")
    return axis % x.ndim


def _check_block(where: str, bits: int, block: int) -> None:
    if bits not in BITS or block < 16 or block & (block - 1):
        found = f"has {bits} bits in blocks of {block}"
        raise wrong(where, found, "2, 4 or 8 bits, and a power of two from 16 up")


def _zeros(where: str, zero: Array | None, bits: int, shape: tuple[int, ...]) -> Array:
    """Zero points in the shape of the scales."""
    if zero is None:
        return np.full(shape, 2 ** (bits - 1), np.uint8)
    if zero.dtype != np.uint8:
        return zero
    stored = (*shape[:-1], -(-shape[-1] * bits // 8))
    return unpacked(shaped(where, "zero points", zero, stored), bits)[..., : shape[-1]]


def _affine(
    where: str, codes: Array, scale: Array, zero: Array | None, block: tuple[int, ...]
) -> Quantised:
    """Codes and zero points in dtypes that numpy counts with."""
    if str(codes.dtype) not in CODES:
        raise wrong(where, f"has codes of {codes.dtype}", f"one of {', '.join(CODES)}")
    codes = codes.astype(NARROW.get(str(codes.dtype), codes.dtype), copy=False)
    if zero is not None:
        zero = zero.astype(NARROW.get(str(zero.dtype), zero.dtype), copy=False)
        zero = zero.reshape(1) if zero.size == 1 else zero
    return checked(where, Quantised(codes, scale, zero, block))


# The other way: a weight as an operator that multiplies by it.


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
