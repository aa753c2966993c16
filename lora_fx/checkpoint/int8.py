"""Weights of int8 codes with one scale for each row, which a merge quantises again by default.

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
from lora_fx.files.quantised.compressed_tensors import altered
from lora_fx.files.quantised.quantised_weight import ALL, QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored_bytes
from lora_fx.ir.quantised import Quantised

TOP = 127
"""The code of the largest value of a row."""
HINT = (
    "merge into the unquantised original and quantise the result, or keep the adapter as a "
    "separate branch"
)
"""The hint for codes that cannot take an update."""


@dataclass(frozen=True)
class Int8:
    """The layout of a weight [rows, columns] of int8 codes.

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
        """Raise for updates with other rows than the codes, or that need the float original."""
        for rectangle in matrix.rectangles:
            if rectangle.transposed or (matrix.rows, matrix.columns) != info.shape:
                why = "the update is for a weight stored [in, out]; int8 codes are stored [out, in]"
            elif rectangle.mutated:
                why = f"the update is for a base that {rectangle.mutated} changed first"
            else:
                continue
            raise LoraFxError(f"{info.file}: tensor {name!r} is int8: {why}", HINT)

    def weight(self, codes: TensorInfo) -> QuantisedWeight:
        """The quantised weight with these codes."""
        module, _, scales_name = self.name.rpartition(".")
        parts = Parts(module, {f"{module}.weight": codes, self.name: self.scales})

        def read(rows: slice = ALL) -> Quantised:
            scale = parts.read(scales_name, rows).reshape(-1, 1)
            block = (1, codes.shape[1])
            return Quantised(parts.read("weight", rows), scale, None, block, unit=1 / self.unit)

        anew = parts.rescaling(("weight", scales_name), 1, self.scale)
        return QuantisedWeight(self.scheme, 8, codes.shape, read, 1, anew)


def int8_of(name: str, base: Checkpoint) -> Int8 | None:
    """The layout of a weight's int8 codes; None if they have no supported layout."""
    info = base.tensors.get(name)
    if info is None or info.dtype != "int8":
        return None
    int8, _ = int8_or_reason(name, info, base)
    return int8


def int8_or_reason(name: str, info: TensorInfo, base: Checkpoint) -> tuple[Int8 | None, str]:
    """The layout of int8 codes, or why they have no supported layout."""
    module = name.removesuffix(".weight")
    suffixes = [
        suffix for suffix in ("SCB", "weight_scale") if f"{module}.{suffix}" in base.tensors
    ]
    if len(suffixes) != 1 or not name.endswith(".weight"):
        return None, "it has no scales named SCB or weight_scale"
    if len(info.shape) != 2:
        return None, f"its shape is {list(info.shape)}; expected [out, in]"

    suffix = suffixes[0]
    scales_name = f"{module}.{suffix}"
    scales = base.tensors[scales_name]
    rows = info.shape[0]
    if suffix == "SCB":
        int8 = Int8("bitsandbytes int8", scales_name, scales, TOP)
        why = _bitsandbytes_refusal(module, base)
        shape: tuple[int, ...] = (rows,)
        expected = f"float32 [{rows}]"
    else:
        int8 = Int8("compressed-tensors int8", scales_name, scales, 1)
        why = _compressed_tensors_refusal(module, base)
        shape = (rows, 1)
        expected = f"one float for each row, [{rows}, 1]"
    if not why and (tuple(scales.shape) != shape or scales.dtype not in FLOATING):
        why = f"{suffix} is {scales.dtype} {list(scales.shape)}; expected {expected}"
    if why:
        return None, why
    return int8, ""


def _bitsandbytes_refusal(module: str, base: Checkpoint) -> str:
    """Why codes of bitsandbytes are refused; empty if they are accepted."""
    order_info = base.tensors.get(f"{module}.weight_format")
    if order_info is None or order_info.stop <= order_info.start:
        return ""
    order = stored_bytes(order_info, 0, 1)[0]
    if not order:
        return ""
    return f"weight_format is {order}, an element order for GPUs; expected 0, row by row"


def _compressed_tensors_refusal(module: str, base: Checkpoint) -> str:
    """Why codes of compressed-tensors are refused; empty if they are accepted."""
    for suffix in ("weight_global_scale", "weight_g_idx", "weight_zero_point"):
        if f"{module}.{suffix}" in base.tensors:
            return f"it has {suffix}; expected symmetric codes with one scale for each row"
    config = base.config().get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "compressed-tensors":
        return "config.json does not say that weight_scale belongs to compressed-tensors"
    return altered(config)
