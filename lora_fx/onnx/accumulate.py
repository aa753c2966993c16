"""y + (x A) B → Gemm(x A, B, y) on flat rows, where A and B are inputs of a switchable graph.

The sum is then made inside the product. As an Add of its own it reads and writes every activation
once more, which costs as much as the products of a small rank, and the same at rank 0. Where the
result and its bias are only reshaped, all of it stays flat: Gemm(x A, B, Gemm(x, W, bias)).
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from lora_fx.manifest import Slot
from lora_fx.onnx.flat import Flat, reshaped_bias
from lora_fx.onnx.graph import OnnxGraph
from lora_fx.onnx.row_rules import rank


def accumulate(graph: OnnxGraph, slots: Iterable[Slot]) -> int:
    """Rewrite every branch of that form; returns how many.

    Branches with casts or stacks in them stay as they are.
    """
    flat = Flat(graph)
    pairs = {(s.a, s.b): s for s in slots if not s.batch}
    done = 0
    for node in list(graph.model.graph.all_nodes()):
        match = _match(node)
        slot = pairs.get((str(match[1].name), str(match[2].name))) if match else None
        if match and slot:
            _rewrite(node, match, slot, flat)
            done += 1
    graph.changed()
    return done


Match = tuple[ir.Value, ir.Value, ir.Value, ir.Value]


def _match(node: ir.Node) -> Match | None:
    """(x, A, B, y) of Add(y, MatMul(MatMul(x, A), B))."""
    if node.op_type != "Add" or node.domain:
        return None
    for y, delta in (node.inputs, node.inputs[::-1]):
        outer = _product(delta)
        inner = _product(outer[0]) if outer else None
        if outer and inner and y is not None and rank(y) == rank(inner[0]) and rank(y):
            return (*inner, outer[1], y)
    return None


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Both operands of the product that made a value nothing else reads."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    if node is None or node.op_type != "MatMul" or node.domain:
        return None
    left, right = node.inputs
    return None if left is None or right is None else (left, right)


def _rewrite(add: ir.Node, match: Match, slot: Slot, flat: Flat) -> None:
    """The sum, or the sum and its bias, is one product; an output of the graph keeps its name."""
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
            total = flat.made(add, "Reshape", total, flat.made(add, "Shape", y))
        total.shape = old.shape
    total.type = old.type
    delta = next(v for v in add.inputs if v is not y)
    outer = delta.producer() if delta is not None else None
    inner = outer.inputs[0].producer() if outer is not None and outer.inputs[0] else None
    ir.convenience.replace_all_uses_with(old, total, replace_graph_outputs=True)
    if total.is_graph_output():
        total.name, old.name = old.name, total.name
    body = add.graph
    assert body is not None
    for dead in (bias, add, outer, inner, y.producer() if bias else None):
        if dead is not None:
            body.remove(dead, safe=True)
