"""The weights of torchao's tensor classes (0.18), read from their arrays.

    IntxUnpackedToInt8Tensor   qdata int8 in the shape of the weight, scale and zero_point a
                               number a block, block_size a number an axis
    Int8Tensor                 the same; zero_point may be None
    Float8Tensor               qdata float8; block_size may be empty: one scale
    NF4Tensor                  quantized_data uint8, the first code in the high half, blocks along
                               the flattened weight; quantized_scalers int8 [blocks],
                               quantization_factor [scaler blocks] and scaler_mean in the dtype of
                               the weight: scale = quantized_scalers / factor + mean; nf4 [16]

W = (qdata − zero_point) · scale, made in float32 or in the dtype of the weight
(`_dequantize_affine_no_dtype_check`, `_dequantize_affine_float8` in quantization/quant_primitives
.py); the scales of NF4Tensor are rounded to that dtype twice, its products once
(`get_original_weight`, quantization/quantize_/workflows/nf4/nf4_tensor.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.consistency import checked, wrong
from lora_fx.files.quantised.weight_parts import FLOAT8
from lora_fx.fx.tensors import to_numpy
from lora_fx.ir.bit_packing import unpacked
from lora_fx.ir.quantised import Quantised


def torchao_weight(path: str, weight: Any) -> tuple[str, Quantised]:
    """The format and the codes of a layer's weight.

    Args:
        path: That of the layer.
        weight: Its tensor, of one of torchao's classes.

    Raises:
        LoraFxError: A class that is not read, or arrays that do not fit each other.
    """
    kind = type(weight).__name__
    name = f"{path}.weight"
    if kind == "NF4Tensor":
        codes = nf4(
            name,
            tuple(weight.shape),
            to_numpy(weight.quantized_data),
            to_numpy(weight.quantized_scalers),
            to_numpy(weight.quantization_factor),
            to_numpy(weight.scaler_mean),
            to_numpy(weight.nf4),
        )
        return "torchao nf4", codes
    if not hasattr(weight, "qdata"):
        raise LoraFxError(
            f"{name}: torchao's {kind} cannot be read", "use one of torchao's weight-only classes"
        )
    zero_point = getattr(weight, "zero_point", None)
    codes = affine(
        name,
        to_numpy(weight.qdata),
        to_numpy(weight.scale),
        None if zero_point is None else to_numpy(zero_point),
        tuple(weight.block_size or ()),
    )
    return f"torchao {kind}", codes


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
        shape: That of the weight.
        data: quantized_data.
        scalers: quantized_scalers.
        factor: quantization_factor.
        mean: scaler_mean.
        levels: nf4.

    Raises:
        LoraFxError: Arrays that do not fit each other.
    """
    size = math.prod(shape)
    blocks = scalers.size
    scaler_blocks = factor.size
    has_codes = data.dtype == np.uint8 and 2 * data.size == size
    if not has_codes or not blocks or size % blocks:
        problem = f"of {list(shape)} has {data.size} bytes of {data.dtype} in {blocks} blocks"
        raise wrong(where, problem, "two codes a byte and blocks of one length")
    has_scaler_blocks = scaler_blocks and blocks % scaler_blocks == 0
    if not has_scaler_blocks or mean.size != 1 or not factor.all():
        problem = f"has {blocks} scales in {scaler_blocks} blocks with {mean.size} means"
        raise wrong(where, problem, "blocks of one length, factors that are not 0, one mean")
    scales = scalers.reshape(scaler_blocks, -1).astype(factor.dtype) / factor.reshape(-1, 1)
    scale = scales.reshape(-1) + mean.reshape(1)
    codes = unpacked(data.reshape(-1), 4, high=True).reshape(shape)
    return checked(where, Quantised(codes, scale, None, (size // blocks,), levels))
