"""Weights in 8-bit floats with scales.

    weight              float8_e4m3fn [out, in]
    weight_scale_inv    float [⌈out/B⌉, ⌈in/B⌉], blocks of B×B, 128 where config.json names no
                        weight_block_size: DeepSeek-V3 (`weight_dequant`, inference/kernel.py) and
                        transformers' FineGrainedFP8; also float8_e8m0fnu
    weight_scale        float [], [1] or [out, 1]: vLLM's and ModelOpt's FP8, fbgemm_fp8
    weight_scale        uint8 or float8_e8m0fnu [out, in/32], the exponents 127 + e of 2^e: MXFP8
                        (OCP Microscaling Formats 1.0, 5.2; 255 is no number)

W = weight · scale, whatever its name says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from lora_fx.dtypes import FLOATING
from lora_fx.files.quantised.float_scales import (
    EXPONENTS,
    exponents,
    largest_to_top,
    power_above,
    powers,
)
from lora_fx.files.quantised.packed_words import packed_range
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import FLOAT8, Parts
from lora_fx.ir.quantised import Quantised
from lora_fx.text import JsonView, is_whole

BLOCK = 128
"""Rows and columns of a block where config.json does not say."""


def fp8_blocks(parts: Parts, quantisation: JsonView) -> QuantisedWeight:
    """A weight with a scale for each square block.

    Args:
        parts: The module's.
        quantisation: The quantization_config.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    shape = parts.shape("weight", FLOAT8, None, None)
    n_rows, n_columns = shape
    block = quantisation.get("weight_block_size") or [BLOCK, BLOCK]
    if not _are_two_sizes(block):
        raise parts.wrong("weight", f"has blocks of {block!r} in config.json", "two sizes")
    # A block that is larger than the weight is one block, however large it is said to be.
    block_rows = min(block[0], max(n_rows, BLOCK))
    block_columns = min(block[1], max(n_columns, BLOCK))
    n_blocks = (-(-n_rows // block_rows), -(-n_columns // block_columns))
    parts.shape("weight_scale_inv", (*FLOATING, "float8_e8m0fnu"), *n_blocks)

    def read(rows: slice = ALL) -> Quantised:
        codes = parts.read("weight", rows)
        scale = parts.read("weight_scale_inv", packed_range(rows, block_rows))
        q = Quantised(codes, scale.astype(np.float32), None, (block_rows, block_columns))
        return parts.checked(q)

    stores_exponents = parts.dtype("weight_scale_inv") == "float8_e8m0fnu"
    if stores_exponents or quantisation.get("scale_fmt") == "ue8m0":
        rule = power_above(parts.dtype("weight"))
    else:
        rule = largest_to_top(parts.dtype("weight"))
    recoding = parts.rescaling(("weight", "weight_scale_inv"), block_rows, rule)
    name = f"FP8 in blocks of {block_rows}×{block_columns}"
    return QuantisedWeight(name, 8, shape, read, block_rows, recoding)


def _are_two_sizes(value: Any) -> bool:
    """True for a list of two whole numbers from 1 up."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(is_whole(size) and size > 0 for size in value)


def fp8(parts: Parts) -> QuantisedWeight:
    """A weight with one scale, one an output, or one a run of inputs: FP8 and MXFP8.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    out, length = parts.shape("weight", FLOAT8, None, None)
    if parts.dtype("weight_scale") in EXPONENTS:
        return _mxfp8(parts, out, length)
    sizes = parts.shape("weight_scale", FLOATING, any_axes=True)
    has_one_scale = sizes in ((), (1,), (1, 1))
    if not has_one_scale and sizes != (out,):
        parts.shape("weight_scale", FLOATING, out, 1)

    def read(rows: slice = ALL) -> Quantised:
        codes = parts.read("weight", rows)
        if has_one_scale:
            scale = parts.read("weight_scale")
            block = codes.shape
        else:
            scale = parts.read("weight_scale", rows)
            block = (1, length)
        return parts.checked(Quantised(codes, scale.reshape(-1, 1), None, block))

    if has_one_scale:
        recoding = parts.by_stored_scales("weight", 8)
    else:
        rule = largest_to_top(parts.dtype("weight"))
        recoding = parts.rescaling(("weight", "weight_scale"), 1, rule)
    return QuantisedWeight("FP8", 8, (out, length), read, 1, recoding)


def _mxfp8(parts: Parts, out: int, length: int) -> QuantisedWeight:
    """A weight [out, length] with an exponent for each run of 32 inputs."""
    parts.shape("weight_scale", EXPONENTS, out, -(-length // 32))

    def read(rows: slice = ALL) -> Quantised:
        codes = parts.read("weight", rows)
        scale = powers(parts, parts.read("weight_scale", rows))
        return parts.checked(Quantised(codes, scale, None, (1, 32)))

    names = ("weight", "weight_scale")
    recoding = parts.rescaling(names, 1, exponents(8), partial(powers, parts))
    return QuantisedWeight("MXFP8", 8, (out, length), read, 1, recoding)
