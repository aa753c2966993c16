"""The weights of torchao's tensor classes (0.18), read from their arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.base import FLOAT8, checked, wrong
from lora_fx.fx.tensors import to_numpy
from lora_fx.ir.quantised import Quantised, unpacked


def torchao_weight(path: str, weight: Any) -> tuple[str, Quantised]:
    """By the arrays of torchao's tensor classes."""
    kind, name = type(weight).__name__, f"{path}.weight"
    if kind == "NF4Tensor":
        parts = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor)
        arrays = [to_numpy(t) for t in (*parts, weight.scaler_mean, weight.nf4)]
        return "torchao nf4", nf4(name, tuple(weight.shape), *arrays)
    if not hasattr(weight, "qdata"):
        raise LoraFxError(f"{name}: torchao's {kind} is not read", "its weight-only classes are")
    data, scale, zero = weight.qdata, weight.scale, getattr(weight, "zero_point", None)
    given = to_numpy(data), to_numpy(scale), None if zero is None else to_numpy(zero)
    return f"torchao {kind}", affine(name, *given, tuple(weight.block_size or ()))


# The arrays of torchao's tensor classes (0.18).
#
#     IntxUnpackedToInt8Tensor   qdata int8 in the shape of the weight, scale and zero_point a
#                                number a block, block_size a number an axis
#     Int8Tensor                 the same; zero_point may be None
#     Float8Tensor               qdata float8; block_size may be empty: one scale
#     NF4Tensor                  quantized_data uint8, the first code in the high half, blocks along
#                                the flattened weight; quantized_scalers int8 [blocks],
#                                quantization_factor [scaler blocks] and scaler_mean in the dtype of
#                                the weight: scale = quantized_scalers / factor + mean; nf4 [16]
#
# W = (qdata − zero_point) · scale, made in float32 or in the dtype of the weight
# (`_dequantize_affine_no_dtype_check`, `_dequantize_affine_float8` in quantization/quant_primitives
# .py); the scales of NF4Tensor are rounded to that dtype twice, its products once
# (`get_original_weight`, quantization/quantize_/workflows/nf4/nf4_tensor.py).


def affine(
    where: str, qdata: Array, scale: Array, zero_point: Array | None, block_size: Sequence[int]
) -> Quantised:
    """A tensor of the first three classes.

    Args:
        where: The name of the weight, for messages.
        qdata: Codes.
        scale: A number a block.
        zero_point: The same; None for none.
        block_size: One number an axis; empty for one block.

    Raises:
        LoraFxError: Arrays that do not fit each other.
    """
    if qdata.dtype != np.int8 and str(qdata.dtype) not in FLOAT8:
        raise wrong(where, f"has qdata of {qdata.dtype}", "int8 or float8")
    block = tuple(map(int, block_size)) or qdata.shape
    if scale.size == 1:
        scale = scale.reshape(1)
    return checked(where, Quantised(qdata, scale, zero_point, block))


def nf4(
    where: str,
    shape: tuple[int, ...],
    data: Array,
    scalers: Array,
    factor: Array,
    mean: Array,
    levels: Array,
) -> Quantised:
    """An NF4Tensor.

    Args:
        where: The name of the weight, for messages.
        shape: Of the weight.
        data: quantized_data.
        scalers: quantized_scalers.
        factor: quantization_factor.
        mean: scaler_mean.
        levels: nf4.

    Raises:
        LoraFxError: Arrays that do not fit each other.
    """
    size, blocks, outer = math.prod(shape), scalers.size, factor.size
    if data.dtype != np.uint8 or 2 * data.size != size or not blocks or size % blocks:
        found = f"of {list(shape)} has {data.size} bytes of {data.dtype} in {blocks} blocks"
        raise wrong(where, found, "two codes a byte and blocks of one length")
    if not outer or blocks % outer or mean.size != 1 or not factor.all():
        found = f"has {blocks} scales in {outer} blocks with {mean.size} means"
        raise wrong(where, found, "blocks of one length, factors that are not 0, one mean")
    wide = scalers.reshape(outer, -1).astype(factor.dtype) / factor.reshape(-1, 1)
    scale = wide.reshape(-1) + mean.reshape(1)
    codes = unpacked(data.reshape(-1), 4, high=True).reshape(shape)
    return checked(where, Quantised(codes, scale, None, (size // blocks,), levels))
