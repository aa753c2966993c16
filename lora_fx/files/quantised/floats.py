"""Weights in floats of 8 bits and of 4, with scales beside them; first those of 8.

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
from dataclasses import replace
from functools import partial

import numpy as np

from lora_fx.dtypes import FLOATING, Array, finfo
from lora_fx.files.quantised.base import (
    ALL,
    FLOAT8,
    Parts,
    QuantisedWeight,
    Recoded,
    Recoding,
    Written,
    packed_range,
)
from lora_fx.ir.bit_packing import packed, unpacked
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


# Floats of 4 bits, E2M1: MXFP4 and NVFP4. The low half of a byte is the first code.
#
#     gpt-oss        NAME_blocks uint8 [experts, out, in/32, 16], NAME_scales uint8 [experts, out,
#                    in/32], exponents 127 + e; the model's parameter is [experts, in, out]
#                    (`convert_moe_packed_tensors`, transformers/integrations/mxfp4.py)
#     compressed-tensors, mxfp4-pack-quantized
#                    weight_packed uint8 [out, in/2], weight_scale uint8 [out, in/32], exponents
#     compressed-tensors, nvfp4-pack-quantized
#                    weight_packed uint8 [out, in/2], weight_scale float8_e4m3fn [out, in/16],
#                    weight_global_scale float32 [1]: scale = weight_scale / weight_global_scale
#     ModelOpt, NVFP4
#                    weight uint8 [out, in/2], weight_scale float8_e4m3fn [out, in/16],
#                    weight_scale_2 float32 []: scale = weight_scale · weight_scale_2
#                    (`NVFP4QTensor.dequantize`, quantization/qtensor/nvfp4_tensor.py of modelopt)
#
# W = level · scale. All layouts are those of files: what programs shuffle for a GPU, they shuffle
# when they load.


_HALF = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = np.array([*_HALF, *(-x for x in _HALF)], np.float32)
"""The 16 levels (OCP Microscaling Formats 1.0, 5.3.3)."""


def mxfp4(parts: Parts) -> QuantisedWeight:
    """A weight [out, in] of compressed-tensors.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    out, half = parts.shape("weight_packed", ("uint8",), None, None)
    parts.shape("weight_scale", EXPONENTS, out, -(-half // 16))

    def read(rows: slice = ALL) -> Quantised:
        codes = unpacked(parts.read("weight_packed", rows), 4)
        scale = powers(parts, parts.read("weight_scale", rows))
        return parts.checked(Quantised(codes, scale, None, (1, 32), E2M1))

    names = "weight_packed", "weight_scale"
    anew = parts.rescaling(names, 1, exponents(2), partial(powers, parts), _pack)
    return QuantisedWeight("MXFP4", 4, (out, half * 2), read, 1, anew)


_pack = partial(packed, bits=4)


def nvfp4(parts: Parts) -> QuantisedWeight:
    """A weight [out, in] of compressed-tensors or of ModelOpt.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    divides = parts.has("weight_packed")
    name, second = (
        ("weight_packed", "weight_global_scale") if divides else ("weight", "weight_scale_2")
    )
    out, half = parts.shape(name, ("uint8",), None, None)
    parts.shape("weight_scale", ("float8_e4m3fn",), out, -(-half // 8))
    if parts.shape(second, ("float32",), any_axes=True) not in ((), (1,)):
        raise parts.wrong(second, "has several numbers", "one")

    def whole() -> Array:
        one = parts.read(second).reshape(())
        if divides and not one:
            raise parts.wrong(second, "is 0", "another number")
        return one

    def scale_of(stored: Array) -> Array:
        steps = stored.astype(np.float32)
        return np.asarray(steps / whole() if divides else steps * whole())

    def rule(largest: Array) -> Array:
        largest = largest / np.float32(6)
        return np.clip(largest * whole() if divides else largest / whole(), 0, TOP)

    def read(rows: slice = ALL) -> Quantised:
        scale = scale_of(parts.read("weight_scale", rows))
        codes = unpacked(parts.read(name, rows), 4)
        return parts.checked(Quantised(codes, scale, None, (1, 16), E2M1))

    anew = parts.rescaling((name, "weight_scale"), 1, rule, scale_of, _pack)
    return QuantisedWeight("NVFP4", 4, (out, half * 2), read, 1, anew)


def mxfp4_stack(parts: Parts, name: str) -> QuantisedWeight:
    """The experts [experts, in, out] of a gpt-oss, whose file has them as [experts, out, in].

    Args:
        parts: Of the module.
        name: The parameter's last name.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    experts, out, groups, _ = parts.shape(blocks, ("uint8",), None, None, None, 16)
    parts.shape(scales, EXPONENTS, experts, out, groups)
    length = groups * 32

    def matrix(part: str, expert: int, columns: slice) -> Array:
        name = f"{parts.module}.{part}"
        one = replace(parts, tensors={name: parts.tensors[name][expert]})
        return one.read(part, columns, 1)

    def place(rows: slice) -> tuple[int, slice]:
        """The expert, and the groups of its inputs."""
        expert, low = divmod(rows.start, length)
        return expert, packed_range(slice(low, low + rows.stop - rows.start), 32)

    def read(rows: slice = ALL) -> Quantised:
        if rows == ALL:
            each = [read(slice(e * length, (e + 1) * length)) for e in range(experts)]
            codes = np.stack([q.codes for q in each])
            return Quantised(codes, np.stack([q.scale for q in each]), None, (1, 32, 1), E2M1)
        expert, some = place(rows)
        words = matrix(blocks, expert, some)
        codes = unpacked(words.reshape(out, -1), 4).T
        scale = powers(parts, matrix(scales, expert, some), scales).T
        return parts.checked(Quantised(codes, scale, None, (32, 1), E2M1), name)

    def recode(q: Quantised, rows: slice, weight: Array, delta: Array) -> Recoded:
        expert, groups = place(rows)
        before = matrix(scales, expert, groups).T
        after = q.rescaled(before, weight, delta, exponents(2))
        new = replace(q, scale=powers(parts, after, scales)).nearest(weight, 4)
        words = _pack(np.ascontiguousarray(new.codes.T)).reshape(out, -1, 16)
        return new, [
            Written(f"{parts.module}.{blocks}", words, groups.start, 1, expert),
            Written(f"{parts.module}.{scales}", after.T, groups.start, 1, expert),
        ]

    anew = Recoding(recode, tuple(f"{parts.module}.{n}" for n in (blocks, scales)), "new")
    return QuantisedWeight("MXFP4", 4, (experts, length, out), read, 32, anew)
