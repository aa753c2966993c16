"""Weights of int8 codes with a scale a row, which are quantised anew without being asked.

    W[i, j] = codes[i, j] · scales[i] / unit        unit 127: bitsandbytes' LLM.int8, whose scales
                                                    are the rows' largest values; 1: others

W + Δ is quantised anew, row by row: the largest value of a row becomes code ±127, all others are
rounded to the nearest code, ties to even. A row with no update, or of zeros, keeps its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_fx.checkpoint.rectangles import Matrix
from lora_fx.dtypes import FLOATING, Array, finfo
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.base import ALL, Parts, QuantisedWeight
from lora_fx.files.quantised.compressed_tensors import altered
from lora_fx.files.safetensors import TensorInfo, stored_bytes
from lora_fx.ir.quantised import Quantised

TOP = 127
"""The code of the largest value of a row."""


@dataclass(frozen=True)
class Int8:
    """How a weight [rows, columns] of int8 codes is stored.

    Attributes:
        scheme: How it is quantised, for people.
        name: The name of the tensor of scales.
        scales: Where that lies; one number a row.
        unit: What the scales are divided by.
    """

    scheme: str
    name: str
    scales: TensorInfo
    unit: int

    @property
    def top(self) -> np.float32:
        """The largest value of a row over its scale."""
        return np.float32(TOP / self.unit)

    def scale(self, largest: Array) -> Array:
        """The scales that make the largest value of a row code 127; none of them is zero."""
        tiny = float(finfo(self.scales.dtype).smallest_subnormal)
        return np.asarray(np.maximum(largest / self.top, largest.dtype.type(tiny)))

    def check(self, name: str, info: TensorInfo, matrix: Matrix) -> None:
        """Raise for updates whose rows are not the codes' rows, or that need the float original."""
        for p in matrix.parts:
            why = ""
            if p.transposed or (matrix.rows, matrix.columns) != info.shape:
                why = "the update is for a weight stored [in, out]; int8 codes are stored [out, in]"
            elif p.mutated:
                why = f"the update is for a base that {p.mutated} changed before"
            if why:
                raise LoraFxError(f"{info.file}: tensor {name!r} is int8: {why}", HINT)

    def weight(self, codes: TensorInfo) -> QuantisedWeight:
        """The weight whose codes lie there."""
        module, _, part = self.name.rpartition(".")
        parts = Parts(module, {f"{module}.weight": codes, self.name: self.scales})

        def read(rows: slice = ALL) -> Quantised:
            scale = parts.read(part, rows).reshape(-1, 1)
            block = 1, codes.shape[1]
            return Quantised(parts.read("weight", rows), scale, None, block, unit=1 / self.unit)

        anew = parts.rescaling(("weight", part), 1, self.scale)
        return QuantisedWeight(self.scheme, 8, codes.shape, read, 1, anew)


HINT = (
    "merge into the unquantised original and quantise after, or keep the adapter as a branch "
    "of its own"
)


def int8_of(name: str, base: Checkpoint) -> Int8 | None:
    """The layout of a weight's int8 codes, where it is one of those above."""
    info = base.tensors.get(name)
    return (
        int8_or_reason(name, info, base)[0] if info is not None and info.dtype == "int8" else None
    )


def int8_or_reason(name: str, info: TensorInfo, base: Checkpoint) -> tuple[Int8 | None, str]:
    """The layout of int8 codes, or why it is none of those that are taken."""
    module, tensors = name.removesuffix(".weight"), base.tensors
    found = [part for part in ("SCB", "weight_scale") if f"{module}.{part}" in tensors]
    if len(found) != 1 or not name.endswith(".weight"):
        return None, "its scales are not there as SCB or weight_scale"
    if len(info.shape) != 2:
        return None, f"its shape is {list(info.shape)}; expected [out, in]"
    scales, rows, why = tensors[f"{module}.{found[0]}"], info.shape[0], ""
    if found == ["SCB"]:
        scheme, unit, shape, expected = "bitsandbytes", TOP, [rows], f"float32 [{rows}]"
        form = tensors.get(f"{module}.weight_format")
        order = stored_bytes(form, 0, 1)[0] if form is not None and form.stop > form.start else 0
        if order:
            why = f"weight_format is {order}, an order for GPUs; expected 0, row by row"
    else:
        scheme, unit, shape = "compressed-tensors", 1, [rows, 1]
        expected = f"a float a row, [{rows}, 1]"
        config = base.config().get("quantization_config")
        if not isinstance(config, dict) or config.get("quant_method") != scheme:
            why = f"config.json does not say that weight_scale is that of {scheme}"
        else:
            why = altered(config)
        for other in ("weight_zero_point", "weight_g_idx", "weight_global_scale"):
            if f"{module}.{other}" in tensors:
                why = f"{other} beside it: only symmetric codes with a scale a row are taken"
    if not why and ([*scales.shape] != shape or scales.dtype not in FLOATING):
        why = f"{found[0]} is {scales.dtype} {list(scales.shape)}; expected {expected}"
    made = Int8(f"{scheme} int8", f"{module}.{found[0]}", scales, unit)
    return (None, why) if why else (made, "")
