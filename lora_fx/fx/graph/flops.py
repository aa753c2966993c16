"""FLOPs of the products of a graph, at the example's sizes."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import fx

from lora_fx.fx.graph import ops
from lora_fx.fx.graph.flow import FxFlow
from lora_fx.fx.graph.nodes import (
    hint,
    numel,
    op_name,
    shape_of,
)
from lora_fx.ir.einsum import letters

aten = torch.ops.aten


def site_flops(node: fx.Node, use: ops.FxOperand) -> int:
    """FLOPs of one use: 2 · elements of the result · in.

    A recurrent weight runs once for every step and row, and lookups are free.
    """
    if use.flops is not None:
        return use.flops
    if use.kind.name == "embedding":
        return 0
    w = shape_of(ops.pick(node, use.weight)) or ()
    x = shape_of(ops.pick(node, use.x)) or ()
    if use.kind.name == "recurrent":
        return 2 * numel(w) * numel(x[:-1])
    if use.kind.name == "conv_transpose":
        return 2 * numel(x) * numel(w[1:])

    y = shape_of(node)
    if y is None:
        return 0
    axes = use.kind.axes(tuple(hint(size) for size in w))
    split = axes.steps[0].shape if axes.steps else w  # type: ignore[union-attr]
    if use.refusal and len(split) < 2:
        return 2 * numel(y)  # a vector: every element once
    in_sizes = tuple(split[axis] for axis in axes.in_ if axis < len(split))
    return 2 * numel(y) * numel(in_sizes)


def gathered(graph: fx.Graph, flow: FxFlow) -> dict[fx.Node, str]:
    """Nodes that hold rows of one parameter, picked by numbers that a run computes.

    Experts are picked so from their stack: the one float that such an op reads is the parameter.
    """
    parameter_of: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in flow.behind or not _is_float(node):
            continue
        names = set()
        for operand in filter(_is_float, node.all_input_nodes):
            behind = flow.behind.get(operand) or ("",)
            names.add(parameter_of.get(operand) or behind[0])
        if len(names) == 1 and "" not in names:
            parameter_of[node] = names.pop()
    return parameter_of


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def data_flops(node: fx.Node) -> int:
    """FLOPs of one product of activations, 0 for anything else; an einsum has every letter's."""
    y = shape_of(node)
    if y is None:
        return 0
    if node.target in ops.DATA_OPS:
        return _attention_flops(node)
    row = ops.row_of(node)
    if row is None or row.op.startswith("embedding"):
        return 0
    if node.target is aten.einsum.default:
        return _einsum_flops(node)
    if op_name(node).startswith("conv"):
        w = shape_of(node.args[1]) or ()
        return 2 * numel(y) * numel(w[1:])

    first_factor = 1 if row.bias == 0 else 0
    factors = node.args[first_factor : first_factor + 2]
    left, right = (shape_of(factor) or () for factor in factors)
    if op_name(node) in ("addbmm", "inner", "tensordot"):  # no axis of a stack in the result
        return 2 * numel(y) * isqrt(numel(left) * numel(right) // max(1, numel(y)))
    if not left:
        return 0
    return 2 * numel(y) * hint(left[-1])


def _attention_flops(node: fx.Node) -> int:
    """FLOPs of q·kᵀ and of softmax(q·kᵀ)·v: q [..., n, d], k [..., m, d], v [m, e]."""
    q, k, v = (shape_of(operand) or () for operand in node.args[:3])
    return 2 * numel(q) * hint(k[-2]) + 2 * numel(q[:-1]) * numel(v[-2:])


def _einsum_flops(node: fx.Node) -> int:
    operands: Any = node.args[1]
    shapes = [shape_of(operand) or () for operand in operands]
    equation = str(node.args[0]).replace(" ", "")
    size_of_letter: dict[str, Any] = {}
    for term, shape in zip(
        letters(equation, [len(shape) for shape in shapes]), shapes, strict=False
    ):
        size_of_letter.update(zip(term, shape, strict=True))
    return 2 * numel(tuple(size_of_letter.values()))
