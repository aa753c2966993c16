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
    byte_order = words.dtype.newbyteorder(">" if high else "<")
    octets = words.astype(byte_order, copy=False).view(np.uint8)
    if 8 % bits == 0:
        codes = np.take(_codes_of_bytes(bits, high), octets).view(np.uint8)
        return np.moveaxis(codes, -1, axis)

    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    n_codes = stream.shape[-1] // bits
    bits_of_codes = stream[..., : n_codes * bits].reshape(*stream.shape[:-1], n_codes, bits)
    codes = np.packbits(bits_of_codes, axis=-1, bitorder="little")[..., 0]
    return np.moveaxis(codes, -1, axis)


@functools.cache
def _codes_of_bytes(bits: int, high: bool) -> Array:
    """The codes of every byte, as one number of as many bytes."""
    shifts = np.arange(0, 8, bits)
    if high:
        shifts = shifts[::-1]
    codes = (np.arange(256)[:, None] >> shifts) & (2**bits - 1)
    return np.asarray(codes.astype(np.uint8).view(f"u{8 // bits}")[:, 0])


def packed(codes: Array, bits: int, *, high: bool = False) -> Array:
    """Codes of the last axis in bytes; the axis is filled with zeros to whole bytes."""
    codes_per_byte = 8 // bits
    codes = _padded(codes, codes_per_byte)
    octets = np.zeros((*codes.shape[:-1], codes.shape[-1] // codes_per_byte), np.uint8)
    for place in range(codes_per_byte):
        shift = bits * place
        if high:
            shift = bits * (codes_per_byte - 1 - place)
        octets |= codes[..., place::codes_per_byte] << shift
    return octets


def words_of(codes: Array, bits: int) -> Array:
    """Pack codes of the last axis into 32-bit words, the first in the lowest bits, as int32."""
    codes = _padded(codes, 32)
    if 8 % bits == 0:
        octets = packed(codes, bits)
    else:
        bits_of_codes = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
        stream = bits_of_codes.reshape(*codes.shape[:-1], -1)
        octets = np.packbits(stream, axis=-1, bitorder="little")
    return np.ascontiguousarray(octets).view("<i4").astype(np.int32, copy=False)


def _padded(codes: Array, multiple: int) -> Array:
    """The codes as uint8, the last axis filled with zeros to a multiple."""
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % multiple)]
    return np.pad(codes, padding).astype(np.uint8)
