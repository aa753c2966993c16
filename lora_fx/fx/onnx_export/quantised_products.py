"""Products with quantised weights as operators of ONNX Runtime, with the same bytes of codes.

MatMulNBits takes integer codes, MatMulBnb4 codes that are places of a table. A lookup takes the
codes of its rows, and dequantises these by plain ops: a run would make floats of a whole table
otherwise. Whatever else reads such a weight gets numbers by plain ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
"""Product → the positions of x, W and bias, and whether the product reads W as [in, out]."""
WITHOUT_PRODUCT = ("fp8", "torchao_nf4", "ocp_fp4")
"""The formats for which ONNX Runtime has no product."""
TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.mT.default}


def rewrite_dequantise(graph: fx.Graph, node: fx.Node) -> None:
    """Replace products of quantised matrices by the runtime's; dequantise for other readers."""
    args: Any = node.args
    codes, scale, zero, order, shape, kind, block, turned, _ = args
    node.target = dequantised
    if kind not in LEVELS and not turned and len(shape) == 2:
        for lookup in [user for user in node.users if user.target is aten.embedding.default]:
            lookup.target = rows_of_codes
            lookup.args = (lookup.args[1], *node.args)
            lookup.kwargs = {}
    if order is not None or not _has_product(kind, shape, block):
        return
    sizes = tuple(shape[::-1]) if turned else tuple(shape)
    for weight, is_in_out in _readings(node, turned):
        for product in [user for user in weight.users if user.target in PRODUCTS]:
            x_at, _, bias_at, _ = PRODUCTS[product.target]
            if not _takes_codes(product, weight, is_in_out):
                continue
            bias = None
            if bias_at is not None and bias_at < len(product.args):
                bias = product.args[bias_at]
            x = product.args[x_at]
            product.target = product_of_codes
            product.args = (x, codes, scale, zero, sizes, kind, block, bias)
            product.kwargs = {}


def _has_product(kind: str, shape: Sequence[int], block: int) -> bool:
    """Whether ONNX Runtime has a product for such codes; its blocks are 16, 32, 64 and so on."""
    power_of_two = block & (block - 1) == 0
    return kind not in WITHOUT_PRODUCT and len(shape) == 2 and block >= 16 and power_of_two


def _readings(node: fx.Node, turned: bool) -> Iterator[tuple[fx.Node, bool]]:
    """Yield a weight and its transposes, each with whether it is read as [in, out]."""
    yield node, turned
    for user in list(node.users):
        if user.target in TRANSPOSES:
            yield user, not turned


def _takes_codes(product: fx.Node, weight: fx.Node, is_in_out: bool) -> bool:
    """Whether a product is x·Wᵀ + bias of this weight, without other factors."""
    x_at, weight_at, bias_at, reads_in_out = PRODUCTS[product.target]
    if reads_in_out is not is_in_out or product.args[weight_at] is not weight:
        return False
    if product.args[x_at] is weight:
        return False
    factor = float(argument(product, "alpha", 1)) * float(argument(product, "beta", 1))
    return bias_at != 0 or factor == 1.0


def rows_of_codes(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    shape: Sequence[int],
    *form: Any,
) -> Tensor:
    """Dequantise the rows `ids` of a table whose blocks end with its rows; see `dequantised`."""
    places = ids.reshape(-1)
    zero_of_rows = None
    if zero is not None:
        zero_of_rows = zero.reshape(scale.shape[0], -1).index_select(0, places)
    rows = dequantised(
        codes.index_select(0, places),
        scale.index_select(0, places),
        zero_of_rows,
        order,
        [places.shape[0], shape[1]],
        *form,
    )
    return rows.reshape([*ids.shape, shape[1]])


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
    """Compute x·Wᵀ + bias by an ONNX Runtime operator, in float32, for codes of W [out, in]."""
    out, inner = sizes
    attributes: dict[str, Any] = {"K": inner, "N": out, "block_size": block}
    if kind in LEVELS:
        op = "MatMulBnb4"
        attributes["quant_type"] = int(kind == "nf4")
    else:
        op = "MatMulNBits"
        attributes["bits"] = bits_of(kind)
        attributes["accuracy_level"] = 0
    operands: tuple[Tensor, ...] = (x.float(), codes, scale)
    if zero is not None:
        operands = (*operands, zero)
    y: Tensor = torch.onnx.ops.symbolic(
        f"com.microsoft::{op}",
        operands,
        attrs=attributes,
        dtype=torch.float32,
        shape=(*x.shape[:-1], out),
        version=1,
    )
    y = y.to(x.dtype)
    return y if bias is None else y + bias
