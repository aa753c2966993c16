"""Weights in the layouts of GPTQ, as AutoGPTQ, GPTQModel and AutoRound write it, and of AWQ.

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
from lora_fx.files.quantised.base import ALL, Parts, QuantisedWeight, bits_of, grouped, packed_range
from lora_fx.ir.bit_packing import unpacked, words_of
from lora_fx.ir.quantised import Quantised

BITS = (2, 3, 4, 8)


def gptq(parts: Parts, version: int = 1) -> QuantisedWeight:
    """A weight [out, in].

    Args:
        parts: Of the module.
        version: 1 where qzeros holds z − 1, 2 where it holds z.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    words, out = parts.shape("qweight", ("int32",), None, None)
    groups, _ = parts.shape("scales", FLOATING, None, out)
    _, zeros = parts.shape("qzeros", ("int32",), groups, None)
    bits = bits_of(out, zeros)
    if bits not in BITS:
        raise parts.wrong("qzeros", f"has {zeros} words for {out} outputs", "2, 3, 4 or 8 bits")
    length = parts.shape("g_idx", ("int32", "int64"), None)[0] if parts.has("g_idx") else 0
    length = length or words * 32 // bits
    parts.shape("qweight", ("int32",), -(-length * bits // 32), out)

    def read(rows: slice = ALL) -> Quantised:
        codes = unpacked(parts.read("qweight", rows, 1), bits, 0)[:length].T
        stored = np.ascontiguousarray(parts.read("qzeros", packed_range(rows, 32, bits), 1))
        if version == 1 and bits != 3:
            stored = stored.view(np.uint32) + np.uint32(0xFFFFFFFF // (2**bits - 1))
        zero = unpacked(stored, bits)[:, : len(codes)].T
        zero = (zero + 1) & 7 if version == 1 and bits == 3 else zero
        scale, given = parts.read("scales", rows, 1).T, _groups(parts, length, groups)
        return parts.checked(grouped(codes, scale, zero, given))

    def pack(codes: Array) -> Array:
        return words_of(codes, bits)[:, : -(-length * bits // 32)].T

    anew = parts.by_stored_scales("qweight", bits, pack, 1)
    return QuantisedWeight("GPTQ", bits, (out, length), read, 32, anew)


def _groups(parts: Parts, length: int, groups: int) -> Array:
    """The group of each input."""
    if not parts.has("g_idx"):
        return np.arange(length) // parts.evenly("scales", length, groups)
    order = parts.read("g_idx")
    if order.min() < 0 or order.max() >= groups:
        found = f"names groups {order.min()} to {order.max()}"
        raise parts.wrong("g_idx", found, f"0 to {groups - 1}")
    return order


# AWQ: the layout of its GEMM kernels, version "gemm" of AutoAWQ and llm-awq.
#
#     qweight   int32 [in, out/8], outputs 0 2 4 6 1 3 5 7 of eight from the lowest bits up
#     qzeros    int32 [groups, out/8] in the same order
#     scales    float [groups, out]
#
# W[o, i] = (code − z[g, o]) · scales[g, o], g = i // (in/groups); 4 bits
# (`pack_awq` and `dequantize_gemm`, awq/utils/packing_utils.py, autoawq 0.2.9 and GPTQModel 7.7).


PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where outputs 0 to 7 lie in a word, in codes from the lowest bits."""


def awq(parts: Parts) -> QuantisedWeight:
    """A weight [out, in].

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    length, words = parts.shape("qweight", ("int32",), None, None)
    groups, out = parts.shape("scales", FLOATING, None, words * 8)
    parts.shape("qzeros", ("int32",), groups, words)
    block = parts.evenly("scales", length, groups)

    def read(rows: slice = ALL) -> Quantised:
        eights = packed_range(rows, 8)
        codes, zero = (_outputs(parts.read(n, eights, 1)) for n in ("qweight", "qzeros"))
        q = Quantised(codes, parts.read("scales", rows, 1).T, zero, (1, block))
        return parts.checked(q)

    def pack(codes: Array) -> Array:
        eights = codes.reshape(-1, 8, length).astype(np.uint32)
        words = [eights[:, i] << 4 * place for i, place in enumerate(PLACES)]
        return np.asarray(np.bitwise_or.reduce(words)).T.view(np.int32)

    anew = parts.by_stored_scales("qweight", 4, pack, 1, lambda row: row // 8)
    return QuantisedWeight("AWQ", 4, (out, length), read, 8, anew)


def _outputs(words: Array) -> Array:
    """Codes [out, rows] of words [rows, out/8]."""
    each = np.ascontiguousarray(words.T).astype("<i4", copy=False).view(np.uint8)
    each = each.reshape(words.shape[1], len(words), 4)
    codes = np.empty((len(each), 8, len(words)), np.uint8)
    for i, place in enumerate(PLACES):
        byte = each[..., place // 2]
        codes[:, i] = byte >> 4 if place % 2 else byte & 15
    return codes.reshape(-1, len(words))
