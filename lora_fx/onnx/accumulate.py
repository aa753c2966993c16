"""y + (x A) B → Gemm(x A, B, y) on flat rows, where A and B are inputs of a switchable graph.

The sum is then made inside the product. As an Add of its own it reads and writes every activation
once more, which costs as much as the products of a small rank, and the same at rank 0. Where the
result and its bias are only reshaped (the heads of q, k and v), all of it stays flat:
Gemm(x A, B, Gemm(x, W, bias)). Elsewhere the bias is left to the runtime, which fuses it into what
comes next.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from lora_fx.manifest import Slot
from lora_fx.onnx.emitter import add_initialiser
from lora_fx.onnx.flow import MARK
from lora_fx.onnx.graph import OnnxGraph
from lora_fx.onnx.row_rules import rank


def accumulate(graph: OnnxGraph, slots: Iterable[Slot]) -> int:
    """Rewrite every branch of that form; returns how many.

    Rows are flattened by x's width, never by the rank, which may be 0. Branches with casts or
    stacks in them stay as they are.
    """
    flat: dict[tuple[int, int], ir.Value] = {}
    pairs = {(s.a, s.b): s for s in slots if not s.batch}
    done = 0
    for node in list(graph.model.graph.all_nodes()):
        match = _match(node)
        slot = pairs.get((str(match[1].name), str(match[2].name))) if match else None
        if match and slot:
            _rewrite(graph, node, match, slot, flat)
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


def _rewrite(
    graph: OnnxGraph, add: ir.Node, match: Match, slot: Slot, flat: dict[tuple[int, int], ir.Value]
) -> None:
    x, a, b, y = match
    body = add.graph
    assert body is not None

    def made(op: str, *inputs: ir.Value) -> ir.Value:
        node = ir.node(op, inputs)
        node.metadata_props[MARK] = add.metadata_props.get(MARK, "")
        node.outputs[0].name = graph.fresh(f"{slot.b}_{op}".replace(".", "_"))
        body.insert_before(add, node)
        return node.outputs[0]

    def rows(value: ir.Value, width: int) -> ir.Value:
        name = f"lora_rows_of_{width}"
        known = graph.model.graph.initializers.get(name)
        shape = known or add_initialiser(
            graph.model.graph, name, np.array([-1, width], np.int64), name
        )
        return made("Reshape", value, shape)

    plain = rank(y) == 2
    if not plain and (id(body), id(x)) not in flat:
        flat[id(body), id(x)] = rows(x, slot.inside)
    left = x if plain else flat[id(body), id(x)]
    old, bias = add.outputs[0], None if plain else _reshaped_bias(add, x, y)
    if bias is not None:
        product = y.producer()
        assert product is not None
        w, c = product.inputs[1], next(v for v in bias.inputs if v is not old)
        assert w is not None and c is not None
        whole = made("Gemm", left, w, c)
        node = whole.producer()
        assert node is not None
        node.name = product.name
        node.metadata_props.clear()
        node.metadata_props.update(product.metadata_props)
        total = made("Gemm", made("MatMul", left, a), b, whole)
        old = bias.outputs[0]
    else:
        total = made("Gemm", made("MatMul", left, a), b, y if plain else rows(y, slot.out))
        if not plain:
            total = made("Reshape", total, made("Shape", y))
        total.shape = old.shape
    total.type = old.type
    delta = next(v for v in add.inputs if v is not y)
    assert delta is not None
    outer = delta.producer()
    assert outer is not None and outer.inputs[0] is not None
    inner = outer.inputs[0].producer()
    assert inner is not None
    ir.convenience.replace_all_uses_with(old, total, replace_graph_outputs=True)
    if total.is_graph_output():
        total.name, old.name = old.name, graph.fresh(str(old.name))
    for dead in (bias, add, outer, inner, y.producer() if bias else None):
        if dead is not None:
            body.remove(dead, safe=True)


def _reshaped_bias(add: ir.Node, x: ir.Value, y: ir.Value) -> ir.Node | None:
    """The Add of a bias after the sum, where all that follows reshapes it, naming every size."""
    product, uses = y.producer(), add.outputs[0].uses()
    if product is None or product.op_type != "MatMul" or product.domain or len(y.uses()) != 1:
        return None
    w, after = product.inputs[1], next(iter(uses)).node if len(uses) == 1 else None
    if product.inputs[0] is not x or rank(w) != 2 or add.outputs[0].is_graph_output():
        return None
    if after is None or after.op_type != "Add" or after.domain or after.graph is not add.graph:
        return None
    bias, out = next(v for v in after.inputs if v is not add.outputs[0]), after.outputs[0]
    if bias is None or bias.const_value is None or rank(bias) != 1 or out.is_graph_output():
        return None
    heads = [u.node for u in out.uses()]
    flat = bool(heads) and all(
        n.op_type == "Reshape" and n.inputs[0] is out and _no_zero(n.inputs[1]) for n in heads
    )
    return after if flat else None


def _no_zero(target: ir.Value | None) -> bool:
    """A shape that copies no size from its input: none of its constants is 0."""
    node = target.producer() if target is not None else None
    parts = list(node.inputs) if node is not None and node.op_type == "Concat" else [target]
    known = [ir.convenience.get_const_tensor(v) for v in parts if v is not None]
    if len(parts) == 1 and known[0] is None:
        return False
    return all(t is None or bool((t.numpy() != 0).all()) for t in known)
