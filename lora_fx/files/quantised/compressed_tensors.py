"""Weights that compressed-tensors (llm-compressor, vLLM) has quantised.

    pack-quantized    weight_packed int32 [out, in · bits/32], code + 2^(bits−1), the first input in
                      the lowest bits, codes of 3, 5, 6, 7 bits running on from word to word;
                      weight_shape int64 [2]; weight_zero_point int32 packed along the outputs, in
                      the same way, or int8 of one number
    int-quantized     weight int8 [out, in]; weight_zero_point int8
    float-quantized   weight float8_e4m3fn [out, in]
    all               weight_scale [1], [out, 1] or [out, groups]; weight_g_idx int32 [in], the
                      group of each input, or -1 everywhere (versions before 0.20)

W = (code − zero point) · scale, in the dtype of the scale: compressors/pack_quantized and
naive_quantized, quantization/lifecycle/forward.py, 0.20.
"""

from __future__ import annotations

import math

import numpy as np

from lora_fx.dtypes import FLOATING, Array
from lora_fx.files.quantised.float_scales import largest_to_top
from lora_fx.files.quantised.matrices import grouped
from lora_fx.files.quantised.packed_words import bits_of, packed_range
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.ir.bit_packing import unpacked, words_of
from lora_fx.ir.quantised import Quantised
from lora_fx.text import JsonView

INTEGERS = ("int8", "int32", "int64")


def altered(config: JsonView) -> str:
    """Why a quantization_config stores other weights than the model's; empty if it does not."""
    for name in ("transform_config", "sparsity_config"):
        if config.get(name):
            return f"config.json has a {name}, so the stored weights are not the model's weights"
    return ""


def compressed(parts: Parts) -> QuantisedWeight:
    """A weight [out, in].

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    if parts.has("weight_global_scale"):
        raise parts.wrong("weight_global_scale", "exists", "one level of scales, so no NVFP4")
    if parts.has("weight_packed"):
        return _packed(parts)
    return _plain(parts)


def _plain(parts: Parts) -> QuantisedWeight:
    """A weight of int8 or float8."""
    shape = parts.shape("weight", ("int8", "float8_e4m3fn"), None, None)
    is_int8 = parts.dtype("weight") == "int8"

    def read(rows: slice = ALL) -> Quantised:
        return _with_scales(parts, shape, 8, parts.read("weight", rows), rows)

    sizes_of_scale = parts.shape("weight_scale", FLOATING, any_axes=True)
    if is_int8 or math.prod(sizes_of_scale) == 1:
        recoding = parts.by_stored_scales("weight", 8)
    else:
        rule = largest_to_top("float8_e4m3fn")
        recoding = parts.rescaling(("weight", "weight_scale"), 1, rule)
    kind = "int8" if is_int8 else "fp8"
    return QuantisedWeight(f"compressed-tensors {kind}", 8, shape, read, 32, recoding)


def _packed(parts: Parts) -> QuantisedWeight:
    """A weight whose codes are packed into words."""
    rows, words = parts.shape("weight_packed", ("int32",), None, None)
    parts.shape("weight_shape", INTEGERS, 2)
    out, length = map(int, parts.read("weight_shape"))
    bits = 0
    if length > 0:
        bits = bits_of(length, words)
    if out != rows or not bits:
        problem = f"is {[rows, words]} for a weight of {[out, length]}"
        raise parts.wrong("weight_packed", problem, "whole rows of codes of 2 to 8 bits")

    def read(rows: slice = ALL) -> Quantised:
        codes = _signed(unpacked(parts.read("weight_packed", rows), bits)[:, :length], bits)
        return _with_scales(parts, (out, length), bits, codes, rows)

    def pack(codes: Array) -> Array:
        return words_of(codes.astype(np.int16) + 2 ** (bits - 1), bits)[:, :words]

    recoding = parts.by_stored_scales("weight_packed", bits, pack)
    return QuantisedWeight("compressed-tensors packed", bits, (out, length), read, 32, recoding)


def _signed(codes: Array, bits: int) -> Array:
    """Unsigned codes minus 2^(bits−1)."""
    return np.asarray(codes.astype(np.int16) - 2 ** (bits - 1), np.int8)


def _with_scales(
    parts: Parts, shape: tuple[int, ...], bits: int, codes: Array, rows: slice
) -> Quantised:
    """Codes of rows with their scales, zero points and groups of columns.

    Args:
        parts: The module's.
        shape: [out, in] of the whole weight.
        bits: The bits of a code.
        codes: The codes of the rows.
        rows: Which rows they are.
    """
    out, length = shape
    sizes = parts.shape("weight_scale", FLOATING, any_axes=True)
    has_one_scale = math.prod(sizes) == 1
    if has_one_scale:
        rows_of_scales = ALL
        block: tuple[int, ...] = codes.shape
        n_blocks = (1, 1)
    else:
        rows_of_scales = rows
        _out, groups = parts.shape("weight_scale", FLOATING, out, None)
        block = (1, parts.evenly("weight_scale", length, groups))
        n_blocks = (out, groups)
    scale = parts.read("weight_scale", rows_of_scales)
    zero: Array | None = None
    if parts.has("weight_zero_point"):
        zero = _zero_points(parts, n_blocks, bits, rows_of_scales)
        if parts.dtype("weight_zero_point") == "int32":
            zero = zero[: 1 if has_one_scale else len(codes)]
    q = parts.checked(Quantised(codes, scale, zero, block))

    groups_of_inputs = np.full(1, -1)
    if parts.has("weight_g_idx"):
        groups_of_inputs = parts.read("weight_g_idx")
    if (groups_of_inputs == -1).all():  # written, and not used
        return q
    parts.shape("weight_g_idx", INTEGERS, length)
    low = groups_of_inputs.min()
    high = groups_of_inputs.max()
    if low < 0 or high >= n_blocks[1] or has_one_scale:
        raise parts.wrong(
            "weight_g_idx", f"names groups {low} to {high}", f"0 to {n_blocks[1] - 1}"
        )
    return grouped(codes, q.scale, q.zero, groups_of_inputs)


def _zero_points(parts: Parts, n_blocks: tuple[int, int], bits: int, rows: slice) -> Array:
    """The zero points of rows, or of the words that hold them where they are packed."""
    if parts.dtype("weight_zero_point") != "int32":
        return parts.read("weight_zero_point", rows)
    n_words = -(-n_blocks[0] * bits // 32)
    parts.shape("weight_zero_point", INTEGERS, n_words, n_blocks[1])
    words = parts.read("weight_zero_point", packed_range(rows, 32, bits))
    return _signed(unpacked(words, bits, 0), bits)
