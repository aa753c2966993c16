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

from collections.abc import Callable
from functools import partial

import numpy as np

from lora_fx.dtypes import FLOATING, Array, finfo
from lora_fx.files.quantised.base import (
    ALL,
    FLOAT8,
    Parts,
    QuantisedWeight,
    by_stored_scales,
    checked,
    rescaling,
)
from lora_fx.ir.quantised import Quantised
from lora_fx.text import JsonView, is_whole

EXPONENTS = ("uint8", "float8_e8m0fnu")
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
    high, wide = told
    blocks = -(-shape[0] // high), -(-shape[1] // wide)
    parts.shape("weight_scale_inv", (*FLOATING, "float8_e8m0fnu"), *blocks)

    def read(rows: slice = ALL) -> Quantised:
        some = ALL if rows == ALL else slice(rows.start // high, -(-rows.stop // high))
        codes, scale = parts.read("weight", rows), parts.read("weight_scale_inv", some)
        q = Quantised(codes, scale.astype(np.float32), None, (high, wide))
        return checked(f"{parts.module}.weight", q)

    power = parts.dtype("weight_scale_inv") == "float8_e8m0fnu" or said.get("scale_fmt") == "ue8m0"
    rule = (power_above if power else largest_to_top)(parts.dtype("weight"))
    recode = rescaling(parts, ("weight", "weight_scale_inv"), high, rule)
    names = f"{parts.module}.weight", f"{parts.module}.weight_scale_inv"
    form = f"FP8 in blocks of {high}×{wide}"
    return QuantisedWeight(form, 8, shape, read, high, recode, names, "new")


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
        return checked(f"{parts.module}.weight", q)

    name, scales = f"{parts.module}.weight", f"{parts.module}.weight_scale"
    if not block:
        recode = by_stored_scales(name, 8, lambda codes: codes)
        return QuantisedWeight(kind, 8, (out, length), read, 1, recode, (name,))
    rule, scale_of = (
        (exponents(8), partial(powers, parts))
        if kind == "MXFP8"
        else (largest_to_top(parts.dtype("weight")), lambda stored: stored.astype(np.float32))
    )
    recode = rescaling(parts, ("weight", "weight_scale"), 1, rule, scale_of)
    return QuantisedWeight(kind, 8, (out, length), read, 1, recode, (name, scales), "new")


TOP = 448.0
"""The largest value of float8_e4m3fn."""


def largest_to_top(dtype: str) -> Callable[[Array], Array]:
    """The rule of scales that make the largest value of a block the largest of its dtype."""
    return lambda largest: largest / np.float32(finfo(dtype).max)


def power_above(dtype: str) -> Callable[[Array], Array]:
    """The same, rounded up to a power of two, as DeepSeek-V3.1 has them."""
    exact = largest_to_top(dtype)
    return lambda largest: np.exp2(np.ceil(np.log2(exact(largest))))


def exponents(top: int) -> Callable[[Array], Array]:
    """The rule of microscaling formats (6.3): 127 + ⌊log2 largest⌋ − the exponent of the top."""
    return lambda largest: np.clip(np.frexp(largest)[1] - 1 - top + 127, 0, 254)


def powers(parts: Parts, exponents: Array, name: str = "weight_scale") -> Array:
    """Scales of microscaling formats, fp32.

    Raises:
        LoraFxError: One that is no number.
    """
    raw = exponents.view(np.uint8)
    if (raw == 255).any():
        raise parts.wrong(name, "has an exponent of 255, which is no number", "0 to 254")
    return np.ldexp(np.float32(1), raw.astype(np.int32) - 127)
