"""FLOPs of the products of an ONNX graph, from the shapes that the file states."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.ir.kinds import Shape
from lora_fx.onnx.graph.ops import DATA_OPS, OnnxOperand
from lora_fx.onnx.graph.values import operand, shape_of


def count(shape: Shape | None) -> int:
    """The number of elements, where a symbolic size counts once."""
    sizes = [n for n in shape or () if isinstance(n, int) and n >= 0]  # some files say -1 for free
    return int(np.prod(sizes, dtype=np.int64)) if shape is not None else 0


def flops_of_use(
    node: ir.Node, use: OnnxOperand, operand: tuple[int, ...], result: ir.Value
) -> int:
    """FLOPs of one use, 2 · elements of the result · in; a symbolic size counts once."""
    if use.kind.name == "embedding" or len(operand) < 2:
        return 0
    if use.kind.name == "conv_transpose":
        return 2 * count(shape_of(node.inputs[use.x])) * count(operand[1:])
    if use.kind.name == "recurrent":
        return 2 * count(operand) * count((shape_of(node.inputs[0]) or (1,))[:-1])
    axes = use.kind.axes(operand)
    split = axes.steps[0].shape if axes.steps else operand  # type: ignore[union-attr]
    inner = count(tuple(split[i] for i in axes.in_))
    y = shape_of(result)
    return 2 * inner * (count(y) if y is not None else count(tuple(split[i] for i in axes.out)))


def flops_of_data(node: ir.Node) -> int:
    """FLOPs of one product of activations; 0 for everything else."""
    first, y = shape_of(operand(node, 0)), shape_of(node.outputs[0])
    if (node.domain, node.op_type) not in DATA_OPS or not first or y is None:
        return 0
    return 2 * count(y) * count(first[-1:])
