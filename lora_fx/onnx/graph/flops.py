"""The FLOPs of products in an ONNX graph, from the shapes in the file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.ir.einsum import Shape
from lora_fx.onnx.graph.ops import DATA_OPS, OnnxOperand
from lora_fx.onnx.graph.values import operand, shape_of


def element_count(shape: Shape | None) -> int:
    """Return the number of elements; a symbolic size counts as 1, an unknown shape as 0."""
    if shape is None:
        return 0
    sizes = [n for n in shape if isinstance(n, int) and n >= 0]  # some files say -1 for free
    return int(np.prod(sizes, dtype=np.int64))


def flops_of_use(
    node: ir.Node, use: OnnxOperand, weight_shape: tuple[int, ...], product: ir.Value
) -> int:
    """Return the FLOPs of one use: 2 · elements of the product · in; a symbolic size is 1."""
    if use.kind.name == "embedding" or len(weight_shape) < 2:
        return 0
    if use.kind.name == "conv_transpose":
        x_shape = shape_of(node.inputs[use.x])
        return 2 * element_count(x_shape) * element_count(weight_shape[1:])
    if use.kind.name == "recurrent":
        x_shape = shape_of(node.inputs[0]) or (1,)
        return 2 * element_count(weight_shape) * element_count(x_shape[:-1])

    axes = use.kind.axes(weight_shape)
    sizes = weight_shape
    if axes.steps:
        sizes = axes.steps[0].shape  # type: ignore[union-attr]
    in_size = element_count(tuple(sizes[axis] for axis in axes.in_))
    product_shape = shape_of(product)
    if product_shape is None:
        out_size = element_count(tuple(sizes[axis] for axis in axes.out))
        return 2 * in_size * out_size
    return 2 * in_size * element_count(product_shape)


def flops_of_data(node: ir.Node) -> int:
    """Return the FLOPs of one product of activations; 0 for other nodes."""
    if (node.domain, node.op_type) not in DATA_OPS:
        return 0
    first_shape = shape_of(operand(node, 0))
    product_shape = shape_of(node.outputs[0])
    if not first_shape or product_shape is None:
        return 0
    return 2 * element_count(product_shape) * element_count(first_shape[-1:])
