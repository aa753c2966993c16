"""Weights that bitsandbytes has quantised: NF4 and FP4, and LLM.int8.

Four bits (`QuantState.as_dict`, bitsandbytes/functional.py, 0.50). The blocks, of `blocksize`
elements, go on through the flattened weight, and their scales are the blocks' largest values:

    weight             uint8 [n/2, 1], the first code in the high half; in the bytes of another
                       dtype where it was saved with `bnb_4bit_quant_storage`
    weight.absmax      float32 [blocks]; or uint8, codes of nested_quant_map in blocks of
                       nested_blocksize with scales nested_absmax, and nested_offset is added
    weight.quant_state.bitsandbytes__nf4 (or fp4)    uint8, a JSON text: quant_type, blocksize,
                       dtype, shape, nested_blocksize, nested_offset
    weight.quant_map   the 16 levels, which the kernels know by heart and do not read

int8 (`int8_vectorwise_dequant`, bitsandbytes/_ops.py): weight int8 [out, in], SCB float32 [out],
W = codes · SCB · (1/127), rounded to float32 twice. weight_format other than 0 is an order for
GPUs, which no bitsandbytes writes any more.
"""

from __future__ import annotations

import math
import sys

import numpy as np

from lora_fx.dtypes import FLOATING, Array
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.files.strict_json import json_object
from lora_fx.ir.bit_packing import packed, unpacked
from lora_fx.ir.quantised import FP4, NF4, Quantised
from lora_fx.text import JsonView, is_number, is_whole

STATE = "weight.quant_state.bitsandbytes__"
STORAGE = ("uint8", "int8", *FLOATING)
INT8_UNIT = 7.874015718698502e-3
"""1/127 in the digits of bitsandbytes."""


def four_bits(parts: Parts) -> QuantisedWeight:
    """NF4 or FP4.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    kind = "nf4" if parts.has(f"{STATE}nf4") else "fp4"
    name = STATE + kind
    parts.shape(name, ("uint8",), None)
    state = json_object(parts.read(name).tobytes(), f"tensor '{parts.module}.{name}'")
    shape, block = state.get("shape"), state.get("blocksize")
    if state.get("quant_type") != kind or not is_whole(block) or block < 1:
        found = f"says {state.get('quant_type')!r} in blocks of {block!r}"
        raise parts.wrong(name, found, f"{kind!r} in blocks of 1 or more")
    if not isinstance(shape, list) or not shape or not all(is_whole(n) and n > 0 for n in shape):
        raise parts.wrong(name, f"says the shape {shape!r}", "sizes from 1 up")
    size = math.prod(shape)
    parts.shape("weight", STORAGE, any_axes=True)
    parts.shape("weight.absmax", (*FLOATING, "uint8"), -(-size // block))

    def read(rows: slice = ALL) -> Quantised:
        low, high = (0, size) if rows == ALL else (rows.start * shape[-1], rows.stop * shape[-1])
        codes = parts.bytes("weight", low // 2, -(-high // 2) if high < size else sys.maxsize)
        if len(codes) != -(-high // 2) - low // 2:
            found = f"has {low // 2 + len(codes)} bytes"
            raise parts.wrong("weight", found, f"{-(-size // 2)} for {shape}")
        blocks = slice(low // block, -(-high // block))
        nested = parts.dtype("weight.absmax") == "uint8"
        scale = _nested(parts, blocks, state) if nested else parts.read("weight.absmax", blocks)
        sizes = shape if rows == ALL else (rows.stop - rows.start, shape[-1])
        whole = unpacked(codes, 4, high=True)[: high - low].reshape(sizes)
        q = Quantised(whole, scale, None, (block,), NF4 if kind == "nf4" else FP4)
        return parts.checked(q)

    def pack(codes: Array) -> Array:
        return packed(codes.reshape(-1), 4, high=True)

    step = math.lcm(block, 2) // math.gcd(math.lcm(block, 2), shape[-1])
    anew = parts.by_stored_scales("weight", 4, pack, None, lambda row: row * shape[-1] // 2)
    return QuantisedWeight(f"bitsandbytes {kind}", 4, tuple(shape), read, step, anew)


def _nested(parts: Parts, blocks: slice, state: JsonView) -> Array:
    """Scales of blocks that are stored quantised themselves."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not is_whole(block) or block < 1 or not is_number(offset):
        found = f"has nested scales in blocks of {block!r} with the offset {offset!r}"
        raise parts.wrong("weight.absmax", found, "blocks of 1 or more and a number")
    (count,) = parts.shape("weight.absmax", ("uint8",), None)
    parts.shape("weight.nested_absmax", FLOATING, -(-count // block))
    parts.shape("weight.nested_quant_map", FLOATING, 256)
    start = blocks.start // block * block
    codes = parts.read("weight.absmax", slice(start, blocks.stop))
    scale = parts.read("weight.nested_absmax", slice(start // block, -(-blocks.stop // block)))
    inner = Quantised(codes, scale, None, (block,), parts.read("weight.nested_quant_map"))
    every = parts.checked(inner, "weight.nested_absmax").dequantise() + np.float32(offset)
    return np.asarray(every[blocks.start - start :])


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
        codes, scale = parts.read("weight", rows), parts.read("SCB", rows)
        return parts.checked(Quantised(codes, scale, None, (1, columns), None, INT8_UNIT))

    return QuantisedWeight("bitsandbytes int8", 8, (rows, columns), read)
