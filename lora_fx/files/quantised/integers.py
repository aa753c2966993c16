"""Weights in integer codes with scales beside them, as their quantisers lay them out; first GPTQ's.

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

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from lora_fx.dtypes import FLOATING, Array
from lora_fx.files.quantised.base import (
    ALL,
    Parts,
    QuantisedWeight,
    bits_of,
    by_stored_scales,
    checked,
    evenly,
    grouped,
    packed_range,
    rescaling,
)
from lora_fx.files.quantised.floats import largest_to_top
from lora_fx.ir.quantised import Quantised, blocks_in, unpacked, words_of
from lora_fx.text import JsonView

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
        return checked(f"{parts.module}.weight", grouped(codes, scale, zero, given))

    def pack(codes: Array) -> Array:
        return words_of(codes, bits)[:, : -(-length * bits // 32)].T

    anew = by_stored_scales(parts, "qweight", bits, pack, 1)
    return QuantisedWeight("GPTQ", bits, (out, length), read, 32, anew)


def _groups(parts: Parts, length: int, groups: int) -> Array:
    """The group of each input."""
    if not parts.has("g_idx"):
        return np.arange(length) // evenly(parts, "scales", length, groups)
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
    block = evenly(parts, "scales", length, groups)

    def read(rows: slice = ALL) -> Quantised:
        eights = packed_range(rows, 8)
        codes, zero = (_outputs(parts.read(n, eights, 1)) for n in ("qweight", "qzeros"))
        q = Quantised(codes, parts.read("scales", rows, 1).T, zero, (1, block))
        return checked(f"{parts.module}.weight", q)

    def pack(codes: Array) -> Array:
        eights = codes.reshape(-1, 8, length).astype(np.uint32)
        words = [eights[:, i] << 4 * place for i, place in enumerate(PLACES)]
        return np.asarray(np.bitwise_or.reduce(words)).T.view(np.int32)

    anew = by_stored_scales(parts, "qweight", 4, pack, 1, lambda row: row // 8)
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


# compressed-tensors (llm-compressor, vLLM).
#
#   pack-quantized    weight_packed int32 [out, in · bits/32], code + 2^(bits−1), the first input in
#                     the lowest bits, codes of 3, 5, 6, 7 bits running on from word to word;
#                     weight_shape int64 [2]; weight_zero_point int32 packed along the outputs, in
#                     the same way, or int8 of one number
#   int-quantized     weight int8 [out, in]; weight_zero_point int8
#   float-quantized   weight float8_e4m3fn [out, in]
#   all               weight_scale [1], [out, 1] or [out, groups]; weight_g_idx int32 [in], the
#                     group of each input, or -1 everywhere (versions before 0.20)
#
# W = (code − zero point) · scale, in the dtype of the scale: compressors/pack_quantized and
# naive_quantized, quantization/lifecycle/forward.py, 0.20.


INTEGERS = ("int8", "int32", "int64")


def altered(config: JsonView) -> str:
    """Why the weights of a quantization_config are not those of the model; empty where they are."""
    names = [n for n in ("transform_config", "sparsity_config") if config.get(n)]
    return f"config.json has a {names[0]}: its weights are not the model's" if names else ""


def compressed(parts: Parts) -> QuantisedWeight:
    """A weight [out, in].

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    if parts.has("weight_global_scale"):
        raise parts.wrong("weight_global_scale", "is there", "one level of scales: no NVFP4")
    if not parts.has("weight_packed"):
        shape = parts.shape("weight", ("int8", "float8_e4m3fn"), None, None)
        kind = "int8" if parts.dtype("weight") == "int8" else "fp8"
        read = partial(_affine, parts, shape, 8, lambda rows: parts.read("weight", rows))
        single = math.prod(parts.shape("weight_scale", FLOATING, any_axes=True)) == 1
        anew = by_stored_scales(parts, "weight", 8)
        if kind == "fp8" and not single:
            anew = rescaling(parts, ("weight", "weight_scale"), 1, largest_to_top("float8_e4m3fn"))
        return QuantisedWeight(f"compressed-tensors {kind}", 8, shape, read, 32, anew)
    rows, words = parts.shape("weight_packed", ("int32",), None, None)
    parts.shape("weight_shape", INTEGERS, 2)
    out, length = map(int, parts.read("weight_shape"))
    bits = bits_of(length, words) if length > 0 else 0
    if out != rows or not bits:
        found = f"is {[rows, words]} for a weight of {[out, length]}"
        raise parts.wrong("weight_packed", found, "whole rows of codes of 2 to 8 bits")

    def codes(rows: slice) -> Array:
        return _signed(unpacked(parts.read("weight_packed", rows), bits)[:, :length], bits)

    def pack(codes: Array) -> Array:
        return words_of(codes.astype(np.int16) + 2 ** (bits - 1), bits)[:, :words]

    read = partial(_affine, parts, (out, length), bits, codes)
    anew = by_stored_scales(parts, "weight_packed", bits, pack)
    return QuantisedWeight("compressed-tensors packed", bits, (out, length), read, 32, anew)


def _signed(codes: Array, bits: int) -> Array:
    return np.asarray(codes.astype(np.int16) - 2 ** (bits - 1), np.int8)


def _affine(
    parts: Parts,
    whole: tuple[int, ...],
    bits: int,
    codes_of: Callable[[slice], Array],
    rows: slice = ALL,
) -> Quantised:
    """Codes of rows with the scales and zero points beside them."""
    (out, length), shape = whole, parts.shape("weight_scale", FLOATING, any_axes=True)
    codes = codes_of(rows)
    single = math.prod(shape) == 1
    some = ALL if single else rows
    if single:
        block: tuple[int, ...] = codes.shape
    else:
        _, groups = parts.shape("weight_scale", FLOATING, out, None)
        block = (1, evenly(parts, "weight_scale", length, groups))
    blocks = blocks_in((out, length), (out, length) if single else block)
    scale, zero = parts.read("weight_scale", some), None
    if parts.has("weight_zero_point"):
        if parts.dtype("weight_zero_point") == "int32":
            parts.shape("weight_zero_point", INTEGERS, -(-blocks[0] * bits // 32), blocks[1])
            zero = unpacked(parts.read("weight_zero_point", packed_range(some, 32, bits)), bits, 0)
            zero = _signed(zero[: 1 if single else len(codes)], bits)
        else:
            zero = parts.read("weight_zero_point", some)
    q = checked(f"{parts.module}.weight", Quantised(codes, scale, zero, block))
    order = parts.read("weight_g_idx") if parts.has("weight_g_idx") else np.full(1, -1)
    if (order == -1).all():  # written, and not used
        return q
    parts.shape("weight_g_idx", INTEGERS, length)
    if order.min() < 0 or order.max() >= blocks[1] or single:
        found = f"names groups {order.min()} to {order.max()}"
        raise parts.wrong("weight_g_idx", found, f"0 to {blocks[1] - 1}")
    return grouped(codes, q.scale, q.zero, order)


# LLM.int8 of bitsandbytes (`int8_vectorwise_dequant`, bitsandbytes/_ops.py): weight int8 [out, in],
# SCB float32 [out], W = codes · SCB · (1/127), rounded to float32 twice. weight_format other than 0
# is an order for GPUs, which no bitsandbytes writes any more.


INT8_UNIT = 7.874015718698502e-3
"""1/127 in the digits of bitsandbytes."""


def int8(parts: Parts) -> QuantisedWeight:
    """LLM.int8.

    Raises:
        LoraFxError: A part is malformed, or the codes lie in an order for GPUs.
    """
    rows, columns = parts.shape("weight", ("int8",), None, None)
    parts.shape("SCB", FLOATING, rows)

    def read(rows: slice = ALL) -> Quantised:
        order = parts.read("weight_format").reshape(-1) if parts.has("weight_format") else None
        if order is not None and order.any():
            raise parts.wrong("weight_format", f"is {order}, an order for GPUs", "0, row by row")
        block = (1, columns)
        codes, scale = parts.read("weight", rows), parts.read("SCB", rows)
        q = Quantised(codes, scale, None, block, None, INT8_UNIT)
        return checked(f"{parts.module}.weight", q)

    return QuantisedWeight("bitsandbytes int8", 8, (rows, columns), read)
