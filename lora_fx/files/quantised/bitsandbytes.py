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
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from lora_fx.dtypes import FLOATING, Array
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.files.strict_json import json_object
from lora_fx.ir.bit_packing import packed, unpacked
from lora_fx.ir.quantised import FP4, NF4, Quantised
from lora_fx.text import is_number, is_whole

STATE = "weight.quant_state.bitsandbytes__"
STORAGE = ("uint8", "int8", *FLOATING)
INT8_UNIT = 7.874015718698502e-3
"""1/127 in the digits of bitsandbytes."""


@dataclass(frozen=True)
class _State:
    """The fields of a weight's quant_state.

    Attributes:
        kind: nf4 or fp4.
        shape: The weight's shape.
        block: Elements that share a scale, along the flattened weight.
        nested_block: Scales that share a scale of theirs, where they are quantised; unchecked.
        nested_offset: What is added to the scales then; unchecked.
    """

    kind: str
    shape: tuple[int, ...]
    block: int
    nested_block: Any
    nested_offset: Any


def four_bits(parts: Parts) -> QuantisedWeight:
    """NF4 or FP4.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    state = _read_state(parts)
    shape = state.shape
    block = state.block
    columns = shape[-1]
    size = math.prod(shape)
    parts.shape("weight", STORAGE, any_axes=True)
    parts.shape("weight.absmax", (*FLOATING, "uint8"), -(-size // block))

    def read(rows: slice = ALL) -> Quantised:
        if rows == ALL:
            sizes = shape
            low = 0
            high = size
        else:
            sizes = (rows.stop - rows.start, columns)
            low = rows.start * columns
            high = rows.stop * columns
        codes = _codes(parts, shape, low, high).reshape(sizes)
        blocks = slice(low // block, -(-high // block))
        if parts.dtype("weight.absmax") == "uint8":
            scale = _nested_scales(parts, blocks, state)
        else:
            scale = parts.read("weight.absmax", blocks)
        levels = NF4 if state.kind == "nf4" else FP4
        return parts.checked(Quantised(codes, scale, None, (block,), levels))

    def pack(codes: Array) -> Array:
        return packed(codes.reshape(-1), 4, high=True)

    elements_of_step = math.lcm(block, 2)  # whole blocks in whole bytes
    step = elements_of_step // math.gcd(elements_of_step, columns)
    recoding = parts.by_stored_scales("weight", 4, pack, None, lambda row: row * columns // 2)
    return QuantisedWeight(f"bitsandbytes {state.kind}", 4, shape, read, step, recoding)


def _read_state(parts: Parts) -> _State:
    """The quant_state of a weight, checked but for nested scales."""
    kind = "nf4" if parts.has(f"{STATE}nf4") else "fp4"
    name = STATE + kind
    parts.shape(name, ("uint8",), None)
    state = json_object(parts.read(name).tobytes(), f"tensor '{parts.module}.{name}'")
    shape = state.get("shape")
    block = state.get("blocksize")
    if state.get("quant_type") != kind or not is_whole(block) or block < 1:
        problem = f"has {state.get('quant_type')!r} in blocks of {block!r}"
        raise parts.wrong(name, problem, f"{kind!r} in blocks of 1 or more")
    if not _is_shape(shape):
        raise parts.wrong(name, f"has the shape {shape!r}", "sizes of 1 or more")
    nested_block = state.get("nested_blocksize")
    return _State(kind, tuple(shape), block, nested_block, state.get("nested_offset"))


def _is_shape(value: object) -> TypeGuard[list[int]]:
    """True for a list of whole numbers from 1 up, which is not empty."""
    if not isinstance(value, list) or not value:
        return False
    return all(is_whole(size) and size > 0 for size in value)


def _codes(parts: Parts, shape: tuple[int, ...], low: int, high: int) -> Array:
    """The codes of elements low ≤ i < high of the flattened weight; low is even."""
    size = math.prod(shape)
    low_byte = low // 2
    high_byte = -(-high // 2)
    # To the end of the part where the weight ends, so that bytes behind it are found.
    data = parts.bytes("weight", low_byte, high_byte if high < size else sys.maxsize)
    if len(data) != high_byte - low_byte:
        problem = f"has {low_byte + len(data)} bytes"
        raise parts.wrong("weight", problem, f"{-(-size // 2)} for {list(shape)}")
    return unpacked(data, 4, high=True)[: high - low]


def _nested_scales(parts: Parts, blocks: slice, state: _State) -> Array:
    """Scales of some blocks that are stored quantised themselves."""
    block = state.nested_block
    offset = state.nested_offset
    if not is_whole(block) or block < 1 or not is_number(offset):
        problem = f"has nested scales in blocks of {block!r} with the offset {offset!r}"
        raise parts.wrong("weight.absmax", problem, "blocks of 1 or more and a number")
    (count,) = parts.shape("weight.absmax", ("uint8",), None)
    parts.shape("weight.nested_absmax", FLOATING, -(-count // block))
    parts.shape("weight.nested_quant_map", FLOATING, 256)

    start = blocks.start // block * block  # codes are read in whole blocks
    codes = parts.read("weight.absmax", slice(start, blocks.stop))
    nested_blocks = slice(start // block, -(-blocks.stop // block))
    scale = parts.read("weight.nested_absmax", nested_blocks)
    levels = parts.read("weight.nested_quant_map")
    nested = parts.checked(Quantised(codes, scale, None, (block,), levels), "weight.nested_absmax")
    scales = nested.dequantise() + np.float32(offset)
    return np.asarray(scales[blocks.start - start :])


def int8(parts: Parts) -> QuantisedWeight:
    """LLM.int8.

    Raises:
        LoraFxError: A part is malformed, or the codes lie in an order for GPUs.
    """
    out, length = parts.shape("weight", ("int8",), None, None)
    parts.shape("SCB", FLOATING, out)

    def read(rows: slice = ALL) -> Quantised:
        if parts.has("weight_format"):
            order = parts.read("weight_format").reshape(-1)
            if order.any():
                raise parts.wrong(
                    "weight_format", f"is {order}, an element order for GPUs", "0, row by row"
                )
        codes = parts.read("weight", rows)
        scale = parts.read("SCB", rows)
        return parts.checked(Quantised(codes, scale, None, (1, length), None, INT8_UNIT))

    return QuantisedWeight("bitsandbytes int8", 8, (out, length), read)
