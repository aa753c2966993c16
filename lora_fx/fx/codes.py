"""Weights of a tree that are stored as codes: their tensors, and the op that makes numbers of them.

The parameter keeps its name and holds the codes in bytes; buffers beside it, NAME_scale and
NAME_zero, hold a number a block, and NAME_order the places of columns that lie by their blocks.
Graphs read all of them by one op, `lora_fx::dequantise`; its result is never kept for backward: see
lora_fx.passes.recompute.

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
from lora_fx.files.quantised.floats import E2M1
from lora_fx.files.quantised.onnx import as_matmul_nbits
from lora_fx.ir.bit_packing import packed
from lora_fx.ir.quantised import FP4, NF4, Quantised

PARTS = ("scale", "zero", "order")
HELD = "_quantised"
"""The attribute of a module that says what its parameters' codes stand for, by leaf."""
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
    """What the codes of one parameter stand for.

    Attributes:
        format: nf4, fp4, int4 …
        shape: Of the weight.
        block: How many elements share a scale.
        dtype: The dtype that the weight has for a model that reads it.
        turned: The weight is [..., in, out] and its rows are those of [..., out, in].
        parts: Which of PARTS there are.
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
    flat = kind in LEVELS
    codes = (torch.arange(256)[:, None] >> (shifts.flip(0) if flat else shifts)) & (2**bits - 1)
    return torch.from_numpy(LEVELS[kind])[codes] if flat else codes.float()


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
    values = _table(kind).to(codes.device).index_select(0, codes.reshape(-1).int())
    if kind in LEVELS:
        count = math.prod(shape)
        flat = F.pad(values.reshape(-1)[:count], (0, -count % block))
        flat = (flat.reshape(-1, block) * scale[:, None]).reshape(-1)[:count]
    else:
        rows, blocks = scale.shape
        offset: torch.Tensor | float = 2.0 ** (bits_of(kind) - 1)
        if zero is not None:
            offset = zero[..., None]
            if zero.dtype == torch.uint8:
                told = _table(kind).to(codes.device).index_select(0, zero.reshape(-1).int())
                offset = told.reshape(rows, -1)[:, :blocks, None]
        wide = (values.reshape(rows, blocks, block) - offset) * scale[..., None]
        flat = wide.reshape(rows, blocks * block)[:, : math.prod(shape) // rows]
        flat = flat if order is None else flat.index_copy(1, order.long(), flat)
    if turned:
        swapped = [*shape[:-2], shape[-1], shape[-2]]
        return flat.to(dtype).reshape(swapped).transpose(-1, -2)
    return flat.to(dtype).reshape(list(shape))


SCHEMA = (
    "(Tensor codes, Tensor scale, Tensor? zero, Tensor? order, int[] shape, str kind, int block, "
    "bool turned, ScalarType dtype) -> Tensor"
)
_op = torch.library.custom_op("lora_fx::dequantise", mutates_args=(), schema=SCHEMA)(dequantised)


@_op.register_fake
def _shaped(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    shape, _, _, turned, dtype = rest[3:]
    if not turned:
        return codes.new_empty(shape, dtype=dtype)
    return codes.new_empty([*shape[:-2], shape[-1], shape[-2]], dtype=dtype).transpose(-1, -2)


DEQUANTISE: Callable[..., torch.Tensor] = torch.ops.lora_fx.dequantise.default


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + bias as a kernel in the weight's dtype rounds it; x and what is given are of one."""
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


# one op, so that a branch beside it reads x before it is rounded, and is added behind
torch.library.define("lora_fx::linear_in", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("lora_fx::linear_in", "CompositeImplicitAutograd", product)
LINEAR_IN: Callable[..., torch.Tensor] = torch.ops.lora_fx.linear_in.default


def arrays_of(name: str, q: Quantised) -> tuple[str, int, dict[str, Array]]:
    """Format, block, and the arrays as the table above has them."""
    if q.codes.dtype.name == FP8:
        q = dataclasses.replace(q, codes=q.codes.view(np.uint8), levels=LEVELS["fp8"])
    levels = q.levels
    if levels is not None:
        if not q.flat and len(q.block) == 2 and q.block[0] > 1:  # a scale of many rows
            scale = np.repeat(q.scale.reshape(-1, q.scale.shape[-1]), q.block[0], 0)[: len(q.codes)]
            q = dataclasses.replace(q, scale=scale, block=(1, q.block[1]))
        kinds = [k for k, t in LEVELS.items() if np.array_equal(t, levels, equal_nan=True)]
        goes_on = q.flat or (q.block[0] == 1 and q.shape[-1] % q.block[-1] == 0)
        if not kinds or not goes_on:
            raise LoraFxError(
                f"{name}: {len(levels)} levels in blocks of {list(q.block)} are no known format",
                f"expected {', '.join(LEVELS)}, in blocks along the flattened weight",
            )
        codes = packed(q.codes.reshape(-1), bits_of(kinds[0]), high=True)
        scale = q.scale.reshape(-1).astype(np.float32)
        return kinds[0], q.block[-1], {"codes": codes, "scale": scale}
    made = as_matmul_nbits(name, q, strict=False)
    arrays = {"codes": made.b, "scale": made.scales}
    if made.zero_points is not None:
        arrays["zero"] = made.zero_points
    if q.order is not None:
        arrays["order"] = q.order.astype(np.int32)
    return f"int{made.bits}", made.block_size, arrays


def arguments(stored: Stored, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the op takes behind its tensors."""
    return list(stored.shape), stored.format, stored.block, stored.turned, dtype
