"""Weights in 4-bit floats (E2M1), MXFP4 and NVFP4; the low half of a byte is the first code.

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

from dataclasses import dataclass, replace
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

_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = np.array([*_POSITIVE, *(-level for level in _POSITIVE)], np.float32)
"""The 16 values of E2M1 (OCP Microscaling Formats 1.0, 5.3.3)."""
_EXPONENT_OF_TOP = 2
"""The exponent of the largest value, 6."""
_pack = partial(packed, bits=4)


def mxfp4(parts: Parts) -> QuantisedWeight:
    """Read a weight [out, in] of compressed-tensors.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    out, bytes_of_row = parts.shape("weight_packed", ("uint8",), None, None)
    parts.shape("weight_scale", EXPONENTS, out, -(-bytes_of_row // 16))

    def read(rows: slice = ALL) -> Quantised:
        codes = unpacked(parts.read("weight_packed", rows), 4)
        scale = powers(parts, parts.read("weight_scale", rows))
        return parts.checked(Quantised(codes, scale, None, (1, 32), E2M1))

    names = ("weight_packed", "weight_scale")
    rule = exponents(_EXPONENT_OF_TOP)
    recoding = parts.rescaling(names, 1, rule, partial(powers, parts), _pack)
    return QuantisedWeight("MXFP4", 4, (out, bytes_of_row * 2), read, 1, recoding)


def nvfp4(parts: Parts) -> QuantisedWeight:
    """Read a weight [out, in] of compressed-tensors or of ModelOpt.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    if parts.has("weight_packed"):
        codes_part = "weight_packed"
        scale = _GlobalScale(parts, "weight_global_scale", divides=True)
    else:
        codes_part = "weight"
        scale = _GlobalScale(parts, "weight_scale_2", divides=False)
    out, bytes_of_row = parts.shape(codes_part, ("uint8",), None, None)
    parts.shape("weight_scale", ("float8_e4m3fn",), out, -(-bytes_of_row // 8))
    if parts.shape(scale.part, ("float32",), any_axes=True) not in ((), (1,)):
        raise parts.wrong(scale.part, "has several numbers", "one")

    def read(rows: slice = ALL) -> Quantised:
        steps = scale.applied_to(parts.read("weight_scale", rows))
        codes = unpacked(parts.read(codes_part, rows), 4)
        return parts.checked(Quantised(codes, steps, None, (1, 16), E2M1))

    names = (codes_part, "weight_scale")
    recoding = parts.rescaling(names, 1, scale.of_largest, scale.applied_to, _pack)
    return QuantisedWeight("NVFP4", 4, (out, bytes_of_row * 2), read, 1, recoding)


@dataclass(frozen=True)
class _GlobalScale:
    """The global scale of NVFP4: one number for the whole weight.

    Attributes:
        parts: The module's.
        part: The part that holds the number.
        divides: Whether scales of blocks are divided by it, or multiplied with it.
    """

    parts: Parts
    part: str
    divides: bool

    def read(self) -> Array:
        """Read the number; raise if it is a divisor and 0."""
        number = self.parts.read(self.part).reshape(())
        if self.divides and not number:
            raise self.parts.wrong(self.part, "is 0", "another number")
        return number

    def applied_to(self, block_scales: Array) -> Array:
        """Return the step of each block's codes in fp32, from the stored block scales."""
        steps = block_scales.astype(np.float32)
        if self.divides:
            return np.asarray(steps / self.read())
        return np.asarray(steps * self.read())

    def of_largest(self, largest: Array) -> Array:
        """Return the block scales to store, from the largest values of the blocks."""
        steps = largest / np.float32(_POSITIVE[-1])
        if self.divides:
            return np.clip(steps * self.read(), 0, TOP)
        return np.clip(steps / self.read(), 0, TOP)


def mxfp4_stack(parts: Parts, name: str) -> QuantisedWeight:
    """Read the experts of gpt-oss as [experts, in, out]; the file has [experts, out, in].

    Args:
        parts: The module's.
        name: The parameter's last name.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    blocks = f"{name}_blocks"
    scales = f"{name}_scales"
    n_experts, out, groups, _bytes = parts.shape(blocks, ("uint8",), None, None, None, 16)
    parts.shape(scales, EXPONENTS, n_experts, out, groups)
    length = groups * 32

    def read_expert(part: str, expert: int, groups_of_inputs: slice) -> Array:
        """Read some input groups of one expert: [out, groups] or [out, groups, 16]."""
        full_name = f"{parts.module}.{part}"
        expert_parts = replace(parts, tensors={full_name: parts.tensors[full_name][expert]})
        return expert_parts.read(part, groups_of_inputs, 1)

    def place(rows: slice) -> tuple[int, slice]:
        """Return the expert and the input groups that rows of the weight belong to."""
        expert, low = divmod(rows.start, length)
        return expert, packed_range(slice(low, low + rows.stop - rows.start), 32)

    def read(rows: slice = ALL) -> Quantised:
        if rows == ALL:
            return read_all()
        expert, groups_of_inputs = place(rows)
        packed_codes = read_expert(blocks, expert, groups_of_inputs)
        codes = unpacked(packed_codes.reshape(out, -1), 4).T
        scale = powers(parts, read_expert(scales, expert, groups_of_inputs), scales).T
        return parts.checked(Quantised(codes, scale, None, (32, 1), E2M1), name)

    def read_all() -> Quantised:
        experts = [read(slice(i * length, (i + 1) * length)) for i in range(n_experts)]
        codes = np.stack([expert.codes for expert in experts])
        scale = np.stack([expert.scale for expert in experts])
        return Quantised(codes, scale, None, (1, 32, 1), E2M1)

    def recode(q: Quantised, rows: slice, weight: Array, delta: Array) -> Recoded:
        expert, groups_of_inputs = place(rows)
        scales_before = read_expert(scales, expert, groups_of_inputs).T
        new_scales = q.rescaled(scales_before, weight, delta, exponents(_EXPONENT_OF_TOP))
        recoded = replace(q, scale=powers(parts, new_scales, scales)).nearest(weight, 4)
        packed_codes = _pack(np.ascontiguousarray(recoded.codes.T)).reshape(out, -1, 16)
        low = groups_of_inputs.start
        return recoded, [
            Written(blocks_name, packed_codes, low, 1, expert),
            Written(scales_name, new_scales.T, low, 1, expert),
        ]

    blocks_name = f"{parts.module}.{blocks}"
    scales_name = f"{parts.module}.{scales}"
    recoding = Recoding(recode, (blocks_name, scales_name), "new")
    return QuantisedWeight("MXFP4", 4, (n_experts, length, out), read, 32, recoding)
