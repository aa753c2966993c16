"""Weights in the GPTQ layouts that AutoGPTQ, GPTQModel and AutoRound write.

    qweight   int32 [in · bits/32, out], the first input in the lowest bits
    qzeros    int32 [groups, out · bits/32], the first output in the lowest bits
    scales    float [groups, out]
    g_idx     int32 [in], the group of each input

W[o, i] = scales[g, o] · (code − z[g, o]), g = g_idx[i]. Codes of 3 bits run on from word to word.

Version 1 (`checkpoint_format` gptq or absent) stores z − 1, version 2 (gptq_v2) z. GPTQModel takes
the 1 off whole words, so that a z of 0 borrows from its neighbour, and puts it back on whole words
(`convert_gptq_v1_to_v2_format_module`, gptqmodel/utils/model.py, 7.7); for 3 bits it does so field
by field. That is done here, too: for the z from 1 up that all others can write, it is the same.

Where inputs of a group are not neighbours (`desc_act`), they are put together.
"""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import FLOATING, Array
from lora_fx.files.quantised.matrices import grouped
from lora_fx.files.quantised.packed_words import bits_of, packed_range
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.ir.bit_packing import unpacked, words_of
from lora_fx.ir.quantised import Quantised

BITS = (2, 3, 4, 8)


def gptq(parts: Parts, version: int = 1) -> QuantisedWeight:
    """Read a weight [out, in].

    Args:
        parts: The module's.
        version: 1 where qzeros holds z − 1, 2 where it holds z.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    words, out = parts.shape("qweight", ("int32",), None, None)
    groups, _out = parts.shape("scales", FLOATING, None, out)
    _groups_of_zeros, words_of_zeros = parts.shape("qzeros", ("int32",), groups, None)
    bits = bits_of(out, words_of_zeros)
    if bits not in BITS:
        problem = f"has {words_of_zeros} words for {out} outputs"
        raise parts.wrong("qzeros", problem, "2, 3, 4 or 8 bits")
    length = words * 32 // bits
    if parts.has("g_idx"):
        (length,) = parts.shape("g_idx", ("int32", "int64"), None)
    words = -(-length * bits // 32)
    parts.shape("qweight", ("int32",), words, out)

    def read(rows: slice = ALL) -> Quantised:
        codes = unpacked(parts.read("qweight", rows, 1), bits, 0)[:length].T
        packed_zeros = parts.read("qzeros", packed_range(rows, 32, bits), 1)
        zero = _zero_points(packed_zeros, bits, version)[:, : len(codes)].T
        scale = parts.read("scales", rows, 1).T
        groups_of_inputs = _groups(parts, length, groups)
        return parts.checked(grouped(codes, scale, zero, groups_of_inputs))

    def pack(codes: Array) -> Array:
        return words_of(codes, bits)[:, :words].T

    recoding = parts.by_stored_scales("qweight", bits, pack, 1)
    return QuantisedWeight("GPTQ", bits, (out, length), read, 32, recoding)


def _zero_points(packed_zeros: Array, bits: int, version: int) -> Array:
    """Return zero points z [groups, outputs] from the words of qzeros; see the module."""
    words = np.ascontiguousarray(packed_zeros)
    if version == 1 and bits == 3:
        return (unpacked(words, bits) + 1) & 7
    if version == 1:
        one_in_each_field = np.uint32(0xFFFFFFFF // (2**bits - 1))
        words = words.view(np.uint32) + one_in_each_field
    return unpacked(words, bits)


def _groups(parts: Parts, length: int, groups: int) -> Array:
    """Return the group number of each input."""
    if not parts.has("g_idx"):
        return np.arange(length) // parts.evenly("scales", length, groups)
    groups_of_inputs = parts.read("g_idx")
    low = groups_of_inputs.min()
    high = groups_of_inputs.max()
    if low < 0 or high >= groups:
        raise parts.wrong("g_idx", f"names groups {low} to {high}", f"0 to {groups - 1}")
    return groups_of_inputs
