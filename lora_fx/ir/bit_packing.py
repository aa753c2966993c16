"""Codes of a few bits each in bytes and words.

The first code lies in the lowest bits or, where `high` says so, in the highest.
"""

from __future__ import annotations

import functools

import numpy as np

from lora_fx.dtypes import Array


def unpacked(words: Array, bits: int, axis: int = -1, *, high: bool = False) -> Array:
    """The codes in unsigned words, as uint8, along an axis that gets longer.

    Codes of 3, 5, 6 or 7 bits run on from word to word.
    """
    words = np.ascontiguousarray(np.moveaxis(words, axis, -1))
    order = words.dtype.newbyteorder(">" if high else "<")
    words = words.astype(order, copy=False).view(np.uint8)
    if 8 % bits:
        stream = np.unpackbits(words, axis=-1, bitorder="little")
        whole = stream.shape[-1] // bits * bits
        each = stream[..., :whole].reshape(*stream.shape[:-1], -1, bits)
        codes = np.packbits(each, axis=-1, bitorder="little")[..., 0]
    else:
        codes = np.take(_bytes(bits, high), words).view(np.uint8)
    return np.moveaxis(codes, -1, axis)


@functools.cache
def _bytes(bits: int, high: bool) -> Array:
    """The codes of every byte, as one number of as many bytes."""
    shifts = np.arange(0, 8, bits)
    codes = (np.arange(256)[:, None] >> (shifts[::-1] if high else shifts)) & (2**bits - 1)
    return np.asarray(codes.astype(np.uint8).view(f"u{8 // bits}")[:, 0])


def packed(codes: Array, bits: int, *, high: bool = False) -> Array:
    """Codes of the last axis in bytes; the axis is filled with zeros to whole bytes."""
    each = 8 // bits
    pad = -codes.shape[-1] % each
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)]).astype(np.uint8)
    result = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint8)
    for i in range(each):
        result |= codes[..., i::each] << bits * (each - 1 - i if high else i)
    return result


def words_of(codes: Array, bits: int) -> Array:
    """Codes of the last axis in words of 32 bits, the first in the lowest bits, as int32."""
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 32)]
    codes = np.pad(codes, pad).astype(np.uint8)
    if 8 % bits == 0:
        whole = packed(codes, bits)
    else:
        each = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
        whole = np.packbits(each.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(whole).view("<i4").astype(np.int32, copy=False)
