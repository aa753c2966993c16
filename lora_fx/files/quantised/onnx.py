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
    """The scales and zero points of a MatMulNBits, which take an update constant in its blocks.

    ONNX Runtime 1.31's kernels take floats for zeros beside codes of 2 and 4 bits, not of 8.

    Args:
        where: The name of the weight, for messages.
        scales: One of each block.
        zero: Packed, or floats; None for the middle of the codes.
        shape: N, K.
        bits: The bits of a code.
        block: Codes that share a scale.
    """
    blocks = (shape[0], -(-shape[1] // block))
    scales = shaped(where, "scales", scales, blocks)
    zero = zeros_of(where, zero, bits, blocks)
    return ZeroPoints(scales, shaped(where, "zero points", zero, blocks), block)


def zeros_of(where: str, zero: Array | None, bits: int, shape: tuple[int, ...]) -> Array:
    """Zero points, unpacked, in the shape of the scales."""
    if zero is None:
        return np.full(shape, 2 ** (bits - 1), np.uint8)
    if zero.dtype != np.uint8:
        return zero
    packed_shape = (*shape[:-1], -(-shape[-1] * bits // 8))
    packed_zeros = shaped(where, "zero points", zero, packed_shape)
    return unpacked(packed_zeros, bits)[..., : shape[-1]]


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
    if not _is_matrix_of_integers(q):
        problem = f"codes {q.codes.dtype} {list(q.shape)} in blocks of {list(q.block)}"
        raise _unfit(where, problem, "a matrix of integers in blocks along its rows")
    if strict and q.order is not None:
        raise _unfit(where, "its columns in another order", "columns in the order of the weight")
    rows, length = q.shape
    block_rows, block_columns = q.block
    shift, bits = _shift_and_bits(where, q.codes)
    size = _block_size(block_columns, length)
    if size < 16:
        if strict or block_columns * bits % 8 or block_columns == 1:
            raise _unfit(where, f"blocks of {block_columns} inputs", "a multiple of 16")
        size = block_columns

    n_blocks = -(-length // size)
    old_rows = np.arange(rows) // block_rows
    old_columns = np.arange(n_blocks) * size // block_columns
    blocks = np.ix_(old_rows, old_columns)
    scales = q.scale[blocks].astype(np.float32) * np.float32(q.unit)
    zero = np.zeros_like(scales)
    if q.zero is not None:
        zero = q.zero[blocks].astype(np.float32)
    zero_points = _zero_points(where, zero, shift, bits)

    padding = n_blocks * size - length
    codes = np.pad(q.codes.astype(np.int32) + shift, ((0, 0), (0, padding)))
    packed_codes = packed(codes.reshape(rows, n_blocks, size), bits)
    return MatMulNBits(packed_codes, scales, zero_points, bits, size)


def _is_matrix_of_integers(q: Quantised) -> bool:
    """True for a matrix of integer codes in blocks along its rows."""
    if len(q.shape) != 2 or q.flat:
        return False
    return q.levels is None and q.codes.dtype.kind in "iu"


def _shift_and_bits(where: str, codes: Array) -> tuple[int, int]:
    """What makes codes unsigned when it is added, and the fewest bits that hold them then.

    Raises:
        LoraFxError: They need more than 8 bits.
    """
    low = int(codes.min())
    high = int(codes.max())
    is_signed = codes.dtype.kind == "i"
    largest = high
    if is_signed:  # a signed code c needs the bits of an unsigned one of 2 · max(c, −c − 1) + 1
        largest = 2 * max(high, -low - 1) + 1
    for bits in BITS:
        if largest < 2**bits:
            return 2 ** (bits - 1) if is_signed else 0, bits
    raise _unfit(where, f"codes from {low} to {high}", "codes of 8 bits")


def _block_size(block_columns: int, length: int) -> int:
    """The largest size of a block, up to LARGEST, that blocks of a row can be cut to.

    A block as long as the row may be cut anywhere, and others at powers of two that divide them.
    """
    if block_columns >= length:
        power_of_two = 1 << (length - 1).bit_length()
        return min(LARGEST, max(16, power_of_two))
    return min(LARGEST, block_columns & -block_columns)


def _zero_points(where: str, zero: Array, shift: int, bits: int) -> Array | None:
    """Zero points of shifted codes: None for their middle, packed where they are codes, or floats.

    Args:
        where: The name of the weight, for messages.
        zero: Zero points of the codes before they were shifted, fp32.
        shift: What was added to the codes.
        bits: The bits of a code.

    Raises:
        LoraFxError: The operator cannot hold them.
    """
    shifted = zero + shift
    if (shifted == 2 ** (bits - 1)).all():
        return None
    are_whole = (shifted == np.rint(shifted)).all()
    if are_whole and shifted.min() >= 0 and shifted.max() < 2**bits:
        return packed(shifted.astype(np.uint8), bits)
    if bits == 8 or (shifted - shift != zero).any():
        problem = f"zero points from {zero.min()} to {zero.max()} of codes of {bits} bits"
        raise _unfit(where, problem, "codes, or floats of at most 4 bits")
    return np.asarray(shifted)


def _unfit(where: str, found: str, expected: str) -> LoraFxError:
    """The error of a weight that the operator cannot hold."""
    return wrong(where, f"has {found}", f"{expected}, as the operator requires", "dequantise it")
