"""FLOPs of the products of a graph, at the example's sizes."""

from __future__ import annotations

from math import isqrt

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
    if use.kind.name == "recurrent":
        x = shape_of(ops.pick(node, use.x)) or ()
        return 2 * numel(w) * numel(x[:-1])
    if use.kind.name == "conv_transpose":
        return 2 * numel(shape_of(ops.pick(node, use.x)) or ()) * numel(w[1:])
    y = shape_of(node)
    if y is None:
        return 0
    axes = use.kind.axes(tuple(hint(n) for n in w))
    split = axes.steps[0].shape if axes.steps else w  # type: ignore[union-attr]
    if use.refusal and len(split) < 2:
        return 2 * numel(y)  # a vector: every element once
    return 2 * numel(y) * numel(tuple(split[i] for i in axes.in_ if i < len(split)))


def gathered(graph: fx.Graph, flow: FxFlow) -> dict[fx.Node, str]:
    """Nodes that hold what is picked from one parameter, by numbers that a run computes.

    Experts are picked so from their stack: the one float that such an op reads is the parameter.
    """
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in flow.behind or not _is_float(node):
            continue
        floats = [n for n in node.all_input_nodes if _is_float(n)]
        names = {found.get(n) or next(iter(flow.behind.get(n, ())), "") for n in floats}
        if len(names) == 1 and "" not in names:
            found[node] = names.pop()
    return found


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def data_flops(node: fx.Node) -> int:
    """FLOPs of one product of activations, 0 for anything else; an einsum has every letter's."""
    y, row = shape_of(node), ops.row_of(node)
    product = row is not None and not row.op.startswith("embedding")
    if y is None or not (product or node.target in ops.DATA_OPS):
        return 0
    if node.target in ops.DATA_OPS:
        q, k, v = (shape_of(a) or () for a in node.args[:3])
        return 2 * numel(q) * hint(k[-2]) + 2 * numel(q[:-1]) * numel(v[-2:])
    if node.target is aten.einsum.default:
        shapes = [shape_of(o) or () for o in node.args[1]]  # type: ignore[union-attr]
        terms = letters(str(node.args[0]).replace(" ", ""), [len(s) for s in shapes])
        pairs = (zip(t, s, strict=True) for t, s in zip(terms, shapes, strict=False))
        return 2 * numel(tuple({c: n for pair in pairs for c, n in pair}.values()))
    if op_name(node).startswith("conv"):
        return 2 * numel(y) * numel((shape_of(node.args[1]) or ())[1:])
    at = 1 if row is not None and row.bias == 0 else 0
    first, second = (shape_of(a) or () for a in node.args[at : at + 2])
    if op_name(node) in ("addbmm", "inner", "tensordot"):  # no axis of a stack in the result
        return 2 * numel(y) * isqrt(numel(first) * numel(second) // max(1, numel(y)))
    return 2 * numel(y) * hint(first[-1]) if first else 0
