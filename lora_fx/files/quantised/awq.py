"""Weights in the layout of AWQ's GEMM kernels, version "gemm" of AutoAWQ and llm-awq.

    qweight   int32 [in, out/8], outputs 0 2 4 6 1 3 5 7 of eight from the lowest bits up
    qzeros    int32 [groups, out/8] in the same order
    scales    float [groups, out]

W[o, i] = (code − z[g, o]) · scales[g, o], g = i // (in/groups); 4 bits
(`pack_awq` and `dequantize_gemm`, awq/utils/packing_utils.py, autoawq 0.2.9 and GPTQModel 7.7).
"""

from __future__ import annotations

import numpy as np

from lora_fx.dtypes import FLOATING, Array
from lora_fx.files.quantised.packed_words import packed_range
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.ir.quantised import Quantised

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""The positions of outputs 0 to 7 in a word, in codes from the lowest bits."""


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
        columns = packed_range(rows, 8)
        codes = _unpack(parts.read("qweight", columns, 1))
        zero = _unpack(parts.read("qzeros", columns, 1))
        scale = parts.read("scales", rows, 1).T
        return parts.checked(Quantised(codes, scale, zero, (1, block)))

    def pack(codes: Array) -> Array:
        eights = codes.reshape(-1, 8, length).astype(np.uint32)
        fields = [eights[:, i] << 4 * place for i, place in enumerate(PLACES)]
        return np.asarray(np.bitwise_or.reduce(fields)).T.view(np.int32)

    recoding = parts.by_stored_scales("qweight", 4, pack, 1, lambda row: row // 8)
    return QuantisedWeight("AWQ", 4, (out, length), read, 8, recoding)


def _unpack(words: Array) -> Array:
    """The codes [out, n] of words [n, out/8]."""
    n, n_eights = words.shape
    bytes_of_words = np.ascontiguousarray(words.T).astype("<i4", copy=False).view(np.uint8)
    bytes_of_words = bytes_of_words.reshape(n_eights, n, 4)
    codes = np.empty((n_eights, 8, n), np.uint8)
    for i, place in enumerate(PLACES):
        byte = bytes_of_words[..., place // 2]
        if place % 2:
            codes[:, i] = byte >> 4
        else:
            codes[:, i] = byte & 15
    return codes.reshape(-1, n)
