"""Floats of 4 bits, E2M1: MXFP4 and NVFP4. The low half of a byte is the first code.

    gpt-oss        NAME_blocks uint8 [experts, out, in/32, 16], NAME_scales uint8 [experts, out,
                   in/32], exponents 127 + e; the model's parameter is [experts, in, out]
                   (`convert_moe_packed_tensors`, transformers/integrations/mxfp4.py)
    compressed-tensors, mxfp4-pack-quantized
                   weight_packed uint8 [out, in/2], weight_scale uint8 [out, in/32], exponents
    compressed-tensors, nvfp4-pack-quantized
                   weight_packed uint8 [out, in/2], weight_scale float8_e4m3fn [out, in/16],
                   weight_global_scale float32 [1]: scale = weight_scale / weight_global_scale
    ModelOpt, NVFP4
                   weight uint8 [out, in/2], weight_scale float8_e4m3fn [out, in/16],
                   weight_scale_2 float32 []: scale = weight_scale · weight_scale_2
                   (`NVFP4QTensor.dequantize`, quantization/qtensor/nvfp4_tensor.py of modelopt)

W = level · scale. All layouts are those of files: what programs shuffle for a GPU, they shuffle
when they load.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.files.quantised.float_scales import EXPONENTS, TOP, exponents, powers
from lora_fx.files.quantised.packed_words import packed_range
from lora_fx.files.quantised.quantised_weight import (
    ALL,
    QuantisedWeight,
    Recoded,
    Recoding,
    Written,
)
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.ir.bit_packing import packed, unpacked
from lora_fx.ir.quantised import Quantised

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
