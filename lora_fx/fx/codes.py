"""Weights stored as codes: their tensors, and the op that makes numbers of them.

The parameter keeps its name and holds the codes in bytes; buffers beside it, NAME_scale and
NAME_zero, hold a number a block, and NAME_order the places of columns that lie by their blocks.
Graphs read all of them by one op, `lora_fx::dequantise`; its result is never kept for backward: see
lora_fx.passes.reread.

========== ==================================== =================================================
format     codes                                scale and zero
========== ==================================== =================================================
int2 … 8   [rows, blocks, block·bits/8], the    [rows, blocks]; the zeros' codes lie in bytes, row
           first code in the lowest bits, as    by row, too, or are floats. Without them the middle
           ONNX Runtime's MatMulNBits has them  code is 0, such as 8 of 4 bits
nf4, fp4,  [(elements + 1) / 2], the first      [blocks] along the flattened weight; no zero
torchao's  code in the highest bits, as
nf4, OCP's bitsandbytes has them
fp4
fp8        [elements], float8_e4m3fn            the same
========== ==================================== =================================================

A row holds all that is multiplied with one x: [out, in], [experts · out, in], [out, in · kernel]. A
weight that is stored [in, out] has its rows transposed, and `turned` says so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised.fp4 import E2M1
from lora_fx.files.quantised.onnx import as_matmul_nbits
from lora_fx.ir.bit_packing import packed
from lora_fx.ir.quantised import FP4, NF4, Quantised

PARTS = ("scale", "zero", "order")
HELD = "_quantised"
"""The attribute of a module with the meaning of its parameters' codes, by leaf."""
FP8 = "float8_e4m3fn"
LEVELS = {
    "nf4": NF4,
    "fp4": FP4,
    "torchao_nf4": np.round(NF4, 4),
    "ocp_fp4": E2M1,
    "fp8": np.arange(256, dtype=np.uint8).view(numpy_dtype(FP8)).astype(np.float32),
}
"""Formats whose codes are places of a table, in the order of the codes."""


@dataclass(frozen=True)
class Stored:
    """The meaning of the codes of one parameter.

    Attributes:
        format: nf4, fp4, int4 …
        shape: The shape of the weight.
        block: The number of elements that share a scale.
        dtype: The dtype that the weight has for a model that reads it.
        turned: The weight is [..., in, out] and its rows are those of [..., out, in].
        parts: Those of PARTS that there are.
    """

    format: str
    shape: tuple[int, ...]
    block: int
    dtype: torch.dtype
    turned: bool = False
    parts: tuple[str, ...] = PARTS[:1]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return bits_of(self.format)


def bits_of(kind: str) -> int:
    """Bits of one code of a format, which is the number at its end.

    >>> bits_of("int8"), bits_of("nf4")
    (8, 4)
    """
    return int(kind[-1])


@functools.cache
def _table(kind: str) -> torch.Tensor:
    """The values of the codes in every byte, [256, codes in a byte], in their order."""
    bits = bits_of(kind)
    shifts = torch.arange(0, 8, bits)
    in_table = kind in LEVELS
    if in_table:  # these have their first code in the highest bits
        shifts = shifts.flip(0)
    codes: torch.Tensor = (torch.arange(256)[:, None] >> shifts) & (2**bits - 1)
    if not in_table:
        return codes.float()
    return torch.from_numpy(LEVELS[kind])[codes]


def dequantised(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    order: torch.Tensor | None,
    *form: Any,
) -> torch.Tensor:
    """The weight, from plain ops; products are made in float32 and rounded once to its dtype.

    `form` is what `arguments` says.
    """
    shape, kind, block, turned, dtype = form
    values = _values_of(codes, kind)
    if kind in LEVELS:
        flat = _from_blocks(values, scale, math.prod(shape), block)
    else:
        flat = _from_rows(values, scale, _zeros_of(scale, zero, kind), block)
        flat = flat[:, : math.prod(shape) // scale.shape[0]]
        if order is not None:
            flat = flat.index_copy(1, order.long(), flat)
    if turned:
        transposed_shape = [*shape[:-2], shape[-1], shape[-2]]
        return flat.to(dtype).reshape(transposed_shape).transpose(-1, -2)
    return flat.to(dtype).reshape(list(shape))


def _values_of(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """The values of the codes in bytes, [bytes, codes in a byte]."""
    return _table(kind).to(codes.device).index_select(0, codes.reshape(-1).int())


def _from_blocks(values: torch.Tensor, scale: torch.Tensor, count: int, block: int) -> torch.Tensor:
    """Values times scales, in blocks along the flattened weight."""
    flat = F.pad(values.reshape(-1)[:count], (0, -count % block))
    return (flat.reshape(-1, block) * scale[:, None]).reshape(-1)[:count]


def _from_rows(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, block: int
) -> torch.Tensor:
    """Values less zeros, times scales, in blocks of each row; the last block may reach too far."""
    rows, blocks = scale.shape
    wide = (values.reshape(rows, blocks, block) - zero) * scale[..., None]
    return wide.reshape(rows, blocks * block)


def _zeros_of(scale: torch.Tensor, zero: torch.Tensor | None, kind: str) -> torch.Tensor | float:
    """The zeros [rows, blocks, 1] as numbers; the middle code where there are none."""
    if zero is None:
        middle: float = 2.0 ** (bits_of(kind) - 1)
        return middle
    zeros = zero[..., None]
    if zero.dtype == torch.uint8:  # codes, row by row
        rows, blocks = scale.shape
        zeros = _values_of(zero, kind).reshape(rows, -1)[:, :blocks, None]
    return zeros


SCHEMA = (
    "(Tensor codes, Tensor scale, Tensor? zero, Tensor? order, int[] shape, str kind, int block, "
    "bool turned, ScalarType dtype) -> Tensor"
)
_op = torch.library.custom_op("lora_fx::dequantise", mutates_args=(), schema=SCHEMA)(dequantised)


@_op.register_fake
def _shaped(codes: torch.Tensor, *arguments: Any) -> torch.Tensor:
    shape, _, _, turned, dtype = arguments[3:]
    if not turned:
        return codes.new_empty(shape, dtype=dtype)
    transposed_shape = [*shape[:-2], shape[-1], shape[-2]]
    return codes.new_empty(transposed_shape, dtype=dtype).transpose(-1, -2)


DEQUANTISE: Callable[..., torch.Tensor] = torch.ops.lora_fx.dequantise.default


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + bias as a kernel in the weight's dtype rounds it; the result has the dtype of x."""
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


# one op, so that a branch beside it reads x before it is rounded, and is added behind
torch.library.define("lora_fx::linear_in", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("lora_fx::linear_in", "CompositeImplicitAutograd", product)
LINEAR_IN: Callable[..., torch.Tensor] = torch.ops.lora_fx.linear_in.default


def arrays_of(name: str, q: Quantised) -> tuple[str, int, dict[str, Array]]:
    """Format, block, and the arrays as the table above has them.

    Raises:
        LoraFxError: Levels or blocks that no format of the table has.
    """
    if q.codes.dtype.name == FP8:
        q = dataclasses.replace(q, codes=q.codes.view(np.uint8), levels=LEVELS["fp8"])
    if q.levels is not None:
        return _arrays_of_levels(name, q, q.levels)
    stored = as_matmul_nbits(name, q, strict=False)
    arrays = {"codes": stored.b, "scale": stored.scales}
    if stored.zero_points is not None:
        arrays["zero"] = stored.zero_points
    if q.order is not None:
        arrays["order"] = q.order.astype(np.int32)
    return f"int{stored.bits}", stored.block_size, arrays


def _arrays_of_levels(name: str, q: Quantised, levels: Array) -> tuple[str, int, dict[str, Array]]:
    """The same of codes that are places of a table."""
    if not q.flat and len(q.block) == 2 and q.block[0] > 1:  # a scale of many rows
        scale_rows = q.scale.reshape(-1, q.scale.shape[-1])
        scale = np.repeat(scale_rows, q.block[0], 0)[: len(q.codes)]
        q = dataclasses.replace(q, scale=scale, block=(1, q.block[1]))
    kinds = [
        kind for kind, table in LEVELS.items() if np.array_equal(table, levels, equal_nan=True)
    ]
    rows_end_blocks = q.block[0] == 1 and q.shape[-1] % q.block[-1] == 0
    if not kinds or not (q.flat or rows_end_blocks):
        raise LoraFxError(
            f"{name}: {len(levels)} levels in blocks of {list(q.block)} are not a known format",
            f"expected {', '.join(LEVELS)}, in blocks along the flattened weight",
        )
    codes = packed(q.codes.reshape(-1), bits_of(kinds[0]), high=True)
    scale = q.scale.reshape(-1).astype(np.float32)
    return kinds[0], q.block[-1], {"codes": codes, "scale": scale}


def arguments(stored: Stored, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of the op behind its tensors."""
    return list(stored.shape), stored.format, stored.block, stored.turned, dtype
