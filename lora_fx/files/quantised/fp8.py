"""Weights in floats of 8 bits, with scales beside them.

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


def fp8_blocks(parts: Parts, said: JsonView) -> QuantisedWeight:
    """A weight with a scale a square block.

    Args:
        parts: Of the module.
        said: The quantization_config.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    shape = parts.shape("weight", FLOAT8, None, None)
    told = said.get("weight_block_size") or [BLOCK, BLOCK]
    if not isinstance(told, list) or len(told) != 2 or not all(is_whole(n) and n > 0 for n in told):
        raise parts.wrong("weight", f"has blocks of {told!r}, as config.json says", "two sizes")
    # A block that is larger than the weight is one block, however large it is said to be.
    high, wide = (min(n, max(size, BLOCK)) for n, size in zip(told, shape, strict=True))
    blocks = -(-shape[0] // high), -(-shape[1] // wide)
    parts.shape("weight_scale_inv", (*FLOATING, "float8_e8m0fnu"), *blocks)

    def read(rows: slice = ALL) -> Quantised:
        codes = parts.read("weight", rows)
        scale = parts.read("weight_scale_inv", packed_range(rows, high))
        return parts.checked(Quantised(codes, scale.astype(np.float32), None, (high, wide)))

    power = parts.dtype("weight_scale_inv") == "float8_e8m0fnu" or said.get("scale_fmt") == "ue8m0"
    rule = (power_above if power else largest_to_top)(parts.dtype("weight"))
    anew = parts.rescaling(("weight", "weight_scale_inv"), high, rule)
    return QuantisedWeight(f"FP8 in blocks of {high}×{wide}", 8, shape, read, high, anew)


def fp8(parts: Parts) -> QuantisedWeight:
    """A weight with one scale, one an output, or one a run of inputs: FP8 and MXFP8.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    out, length = parts.shape("weight", FLOAT8, None, None)
    if parts.dtype("weight_scale") in EXPONENTS:
        parts.shape("weight_scale", EXPONENTS, out, -(-length // 32))
        kind, block = "MXFP8", 32
    else:
        found = parts.shape("weight_scale", FLOATING, any_axes=True)
        single = found in ((), (1,), (1, 1))
        if not single and found != (out,):
            parts.shape("weight_scale", FLOATING, out, 1)
        kind, block = "FP8", 0 if single else length

    def read(rows: slice = ALL) -> Quantised:
        codes = parts.read("weight", rows)
        scale = parts.read("weight_scale", rows if block else ALL)
        scale = powers(parts, scale) if kind == "MXFP8" else scale.reshape(-1, 1)
        q = Quantised(codes, scale, None, (1, block) if block else codes.shape)
        return parts.checked(q)

    names = "weight", "weight_scale"
    if not block:
        anew = parts.by_stored_scales("weight", 8)
    elif kind == "MXFP8":
        anew = parts.rescaling(names, 1, exponents(8), partial(powers, parts))
    else:
        anew = parts.rescaling(names, 1, largest_to_top(parts.dtype("weight")))
    return QuantisedWeight(kind, 8, (out, length), read, 1, anew)
