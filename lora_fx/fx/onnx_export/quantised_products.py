"""Products with quantised weights as operators of ONNX Runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.fx.codes import LEVELS, bits_of, dequantised
from lora_fx.fx.graph.nodes import argument

aten = torch.ops.aten

PRODUCTS: dict[object, tuple[int, int, int | None, bool]] = {
    aten.linear.default: (0, 1, 2, False),
    aten.matmul.default: (0, 1, None, True),
    aten.mm.default: (0, 1, None, True),
    aten.addmm.default: (1, 2, 0, True),
}
"""Product → the places of x, of W and of the bias, and whether it reads W [in, out]."""


OTHERS = ("fp8", "torchao_nf4", "ocp_fp4")
"""Formats that ONNX Runtime has no product for."""


TURNS = {aten.t.default, aten.transpose.int, aten.permute.default, aten.mT.default}


def _dequantise(graph: fx.Graph, node: fx.Node) -> None:
    """Let every product of a quantised matrix be one of the runtime, and the rest read numbers."""
    args: Any = node.args
    codes, scale, zero, order, shape, kind, block, turned, _ = args
    node.target = dequantised
    if kind in OTHERS or len(shape) != 2 or block < 16 or block & (block - 1) or order is not None:
        return
    views = [u for u in node.users if u.target in TURNS]
    for weight, flipped in ((node, turned), *((v, not turned) for v in views)):
        for user in [u for u in weight.users if u.target in PRODUCTS]:
            x, w, b, wants = PRODUCTS[user.target]
            fits = wants is flipped and user.args[w] is weight
            scaled = float(argument(user, "alpha", 1)) * float(argument(user, "beta", 1)) != 1.0
            if not fits or user.args[x] is weight or (b == 0 and scaled):
                continue
            sizes = tuple(shape[::-1] if turned else shape)
            bias = user.args[b] if b is not None and b < len(user.args) else None
            user.target, user.kwargs = product_of_codes, {}
            user.args = (user.args[x], codes, scale, zero, sizes, kind, block, bias)


def product_of_codes(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    sizes: tuple[int, int],
    kind: str,
    block: int,
    bias: Tensor | None,
) -> Tensor:
    """x·Wᵀ + bias by an operator of ONNX Runtime, in float32, for codes of W [out, in]."""
    out, inner = sizes
    named: dict[str, Any] = {"K": inner, "N": out, "block_size": block}
    if kind in LEVELS:
        op, more = "MatMulBnb4", {"quant_type": int(kind == "nf4")}
    else:
        op, more = "MatMulNBits", {"bits": bits_of(kind), "accuracy_level": 0}
    given = (x.float(), codes, scale)
    y: Tensor = torch.onnx.ops.symbolic(
        f"com.microsoft::{op}",
        given if zero is None else (*given, zero),
        attrs=named | more,
        dtype=torch.float32,
        shape=(*x.shape[:-1], out),
        version=1,
    )
    return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias
