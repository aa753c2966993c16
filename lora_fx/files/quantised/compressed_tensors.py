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
from collections.abc import Callable
from functools import partial

import numpy as np

from lora_fx.dtypes import FLOATING, Array
from lora_fx.files.quantised.float_scales import largest_to_top
from lora_fx.files.quantised.matrices import grouped
from lora_fx.files.quantised.packed_words import bits_of, packed_range
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.ir.bit_packing import unpacked, words_of
from lora_fx.ir.quantised import Quantised, blocks_in
from lora_fx.text import JsonView

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
        anew = parts.by_stored_scales("weight", 8)
        if kind == "fp8" and not single:
            anew = parts.rescaling(("weight", "weight_scale"), 1, largest_to_top("float8_e4m3fn"))
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
    anew = parts.by_stored_scales("weight_packed", bits, pack)
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
        block = (1, parts.evenly("weight_scale", length, groups))
    blocks = blocks_in((out, length), (out, length) if single else block)
    scale, zero = parts.read("weight_scale", some), None
    if parts.has("weight_zero_point"):
        if parts.dtype("weight_zero_point") == "int32":
            parts.shape("weight_zero_point", INTEGERS, -(-blocks[0] * bits // 32), blocks[1])
            zero = unpacked(parts.read("weight_zero_point", packed_range(some, 32, bits)), bits, 0)
            zero = _signed(zero[: 1 if single else len(codes)], bits)
        else:
            zero = parts.read("weight_zero_point", some)
    q = parts.checked(Quantised(codes, scale, zero, block))
    order = parts.read("weight_g_idx") if parts.has("weight_g_idx") else np.full(1, -1)
    if (order == -1).all():  # written, and not used
        return q
    parts.shape("weight_g_idx", INTEGERS, length)
    if order.min() < 0 or order.max() >= blocks[1] or single:
        found = f"names groups {order.min()} to {order.max()}"
        raise parts.wrong("weight_g_idx", found, f"0 to {blocks[1] - 1}")
    return grouped(codes, q.scale, q.zero, order)
