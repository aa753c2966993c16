"""y + (x A) B → Gemm(x A, B, y) on flat rows, where A and B are inputs of a switchable graph.

The sum is then made inside the product. As an Add of its own it reads and writes every activation
once more, which costs as much as the products of a small rank, and the same at rank 0. Where the
result and its bias are only reshaped, all of it stays flat: Gemm(x A, B, Gemm(x, W, bias)).
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from lora_fx.onnx.flat_rows import Flat, keep_zeros, product_operands, reshaped_bias
from lora_fx.onnx.graph.flow import made_by, rank, remove_unread
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.manifest import SwitchSlot


def accumulate(graph: OnnxGraph, slots: Iterable[SwitchSlot]) -> None:
    """Rewrite every branch of that form; branches with casts or stacks in them stay as they are."""
    flat = Flat(graph)
    pairs = {(s.a, s.b): s for s in slots if not s.batch}
    for node in list(graph.model.graph.all_nodes()):
        match = _match(node)
        slot = pairs.get((str(match[1].name), str(match[2].name))) if match else None
        if match and slot and not _beside_codes(node, match[0]):
            _rewrite(node, match, slot, flat)
    graph.changed()


Match = tuple[ir.Value, ir.Value, ir.Value, ir.Value]


def _match(node: ir.Node) -> Match | None:
    """The values x, A, B and y of Add(y, MatMul(MatMul(x, A), B)); None for other nodes."""
    if node.op_type != "Add" or node.domain:
        return None
    for y, delta in (node.inputs, node.inputs[::-1]):
        outer = product_operands(delta)
        inner = product_operands(outer[0]) if outer else None
        if outer and inner and y is not None and rank(y) == rank(inner[0]) and rank(y):
            return (*inner, outer[1], y)
    return None


def _beside_codes(add: ir.Node, x: ir.Value) -> bool:
    """True where a Reshape would stand at codes of activations.

    ONNX Runtime 1.31 moves QuantizeLinear over it, with a zero point of another dtype than the
    scale's own codes, and then refuses the graph.
    """
    readers = (u.node.op_type for u in add.outputs[0].uses())
    return made_by(x, "DequantizeLinear") is not None or "QuantizeLinear" in readers


def _rewrite(add: ir.Node, match: Match, slot: SwitchSlot, flat: Flat) -> None:
    """Make one product of the sum, or of the sum and its bias; a graph's output keeps its name."""
    x, a, b, y = match
    plain = rank(y) == 2
    left = x if plain else flat.rows(add, x, slot.inside)
    t = flat.made(add, "MatMul", left, a)
    old, bias = add.outputs[0], None if plain else reshaped_bias(add, x, y)
    if bias is not None:
        total, old = flat.made(add, "Gemm", t, b, flat.layer(add, bias, y, left)), bias.outputs[0]
    else:
        total = flat.made(add, "Gemm", t, b, y if plain else flat.rows(add, y, slot.out))
        if not plain:
            shape = flat.made(add, "Shape", y)
            total = flat.made(add, "Reshape", total, shape, **keep_zeros(flat.graph))
        total.shape = old.shape
    total.type = old.type
    old.replace_all_uses_with(total, replace_graph_outputs=True)
    if total.is_graph_output():
        total.name, old.name = old.name, total.name
    remove_unread(old.producer())
