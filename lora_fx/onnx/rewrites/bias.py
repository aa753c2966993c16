"""(x·W + bias) + delta → (x·W + delta) + bias, where delta is a chain of products of the same x.

Fusions of a bias (BiasGelu, the bias of attention) look for it last, and one of them takes any
last operand for a bias. A residual is no such chain and stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

DEPTH = 8
"""Nodes from delta back to x: two products, scales, casts."""


@dataclass(frozen=True)
class DeltaBeforeBias(ir.passes.InPlacePass):
    """Low-rank branches that were added after the bias."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        changed = False
        for node in list(model.graph):
            if node.op_type == "Add" and not node.domain:
                changed |= _swap(node)
        return ir.passes.PassResult(model, changed)


def _swap(outer: ir.Node) -> bool:
    for at in (0, 1):
        inner_value, delta = outer.inputs[at], outer.inputs[1 - at]
        inner = inner_value.producer() if inner_value is not None else None
        if inner is None or inner.op_type != "Add" or inner_value is None or delta is None:
            continue
        if len(inner_value.uses()) != 1 or inner_value.is_graph_output():
            continue
        for b in (0, 1):
            bias, product = inner.inputs[b], inner.inputs[1 - b]
            if bias is None or product is None or bias.const_value is None:
                continue
            made = product.producer()
            if made is None or made.op_type != "MatMul" or made.inputs[0] is None:
                continue
            if not _reaches(delta, made.inputs[0], 0, DEPTH):
                continue
            sum_ = ir.node("Add", [product, delta])
            sum_.outputs[0].name, sum_.name = f"{inner_value.name}_delta", f"{outer.name}_delta"
            sum_.outputs[0].type, sum_.outputs[0].shape = outer.outputs[0].type, product.shape
            assert outer.graph is not None
            outer.graph.insert_before(outer, [sum_])
            outer.replace_input_with(at, sum_.outputs[0])
            outer.replace_input_with(1 - at, bias)
            outer.graph.remove(inner, safe=True)
            return True
    return False


def _reaches(value: ir.Value, x: ir.Value, products: int, left: int) -> bool:
    """Value is x times two matrices or more, by products, scales and casts only."""
    if value is x:
        return products >= 2
    node = value.producer()
    if node is None or not left or node.op_type not in ("MatMul", "Mul", "Cast"):
        return False
    more = products + (node.op_type == "MatMul")
    return any(v is not None and _reaches(v, x, more, left - 1) for v in node.inputs)
