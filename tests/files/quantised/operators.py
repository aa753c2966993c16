"""What ONNX's and ONNX Runtime's quantised operators make of their inputs, by their documentation.

    DequantizeLinear      x of any shape, scale one number, [n] along an axis, or as many axes as x
                          with blocks along one; W = (x − zero point) · scale
    MatMulNBits           see lora_fx.files.quantised.onnx
    MatMulBnb4            B uint8 [(out · in + 1)/2] as bitsandbytes has it, the first code in the
                          high half; absmax along the flattened weight; quant_type 0 FP4, 1 NF4
    GatherBlockQuantized  a table [rows, width] with blocks along quantize_axis; uint8 holds
                          unsigned codes of `bits`, packed along the last axis, their zero is
                          2^(bits−1) where none is given; that of int4 and uint4 is 0

Operators.md and the schemas of com.microsoft, ONNX Runtime 1.32.
"""

from __future__ import annotations

import math

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.files.quantised.consistency import checked, shaped, wrong
from lora_fx.files.quantised.onnx import BITS, zeros_of
from lora_fx.files.quantised.weight_parts import FLOAT8
from lora_fx.ir.bit_packing import unpacked
from lora_fx.ir.quantised import FP4, NF4, Quantised

QUANT_TYPES = (FP4, NF4)
"""The levels of MatMulBnb4, at the number of its quant_type."""
NARROW = {"int2": np.int8, "int4": np.int8, "uint2": np.uint8, "uint4": np.uint8}
CODES = (*NARROW, "int8", "uint8", "int16", "uint16", "int32", *FLOAT8, "float4_e2m1fn")


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
    zero = zeros_of(where, zero, bits, (rows, count))
    return _affine(where, codes, scales, zero, (1, block))


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
        data, zero = unpacked(data, bits), zeros_of(where, zero, bits, scales.shape)
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
