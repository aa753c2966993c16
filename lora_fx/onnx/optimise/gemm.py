"""Gemm(Reshape(x, [-1, k]), W, b) → MatMul(x, W) + b, with x as it was before it was flattened.

The exporter writes GPT-2's Conv1D as Reshape, Gemm, Reshape; fusions look for MatMul and Add on
[batch, length, k]. Dimensions may be symbols. Gemms of flat matrices are left alone: the runtime
has a kernel for them. Rows keep their order, so what reshapes the product may go on doing so; a
reshape to the shape that the product has now goes away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.flow import constant, made_by
from lora_fx.onnx.graph.graph import add_initialiser


@dataclass(frozen=True)
class GemmToMatMul(ir.passes.InPlacePass):
    """Gemms with alpha = beta = 1 of flattened activations."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        changed = False
        for node in list(model.graph):
            if node.op_type == "Gemm" and not node.domain:
                changed |= _rewrite(model, node)
        return ir.passes.PassResult(model, changed)


def _rewrite(model: ir.Model, gemm: ir.Node) -> bool:
    x, w = gemm.inputs[0], gemm.inputs[1]
    flat = made_by(x, "Reshape")
    attributes = gemm.attributes
    scales = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    plain = scales == (1.0, 1.0) and not attributes.get_int("transA", 0)
    if x is None or flat is None or not plain:
        return False
    source = flat.inputs[0]
    target = constant(flat.inputs[1])
    if source is None or source.shape is None or target is None or w is None:
        return False
    sizes, shape = [int(n) for n in target.ravel()], list(source.shape)
    if len(sizes) != 2 or sizes[0] != -1 or len(shape) < 3 or sizes[1] < 1:
        return False
    out = gemm.outputs[0]
    if out.shape is None or not isinstance(out.shape[-1], int):
        return False
    uses = [u.node for u in out.uses()]
    if not uses or out.is_graph_output() or not all(_keeps_order(n, out) for n in uses):
        return False
    new: list[ir.Node] = []
    lead = shape[:-1]
    if shape[-1] != sizes[1]:  # heads and their width in one: [b, s, heads, width] → [b, s, k]
        if len(shape) != 4 or not all(isinstance(n, int) for n in shape[2:]):
            return False
        if int(shape[2]) * int(shape[3]) != sizes[1]:  # type: ignore[arg-type]
            return False
        lead = shape[:2]
        rows = np.array([0, 0, sizes[1]], np.int64)
        to = add_initialiser(model.graph, f"{out.name}_rows", rows)
        new.append(ir.node("Reshape", [source, to]))
        source = new[-1].outputs[0]
        source.name = f"{out.name}_in"
        source.type, source.shape = x.type, ir.Shape([*lead, sizes[1]])
    if attributes.get_int("transB", 0):
        new.append(ir.node("Transpose", [w], {"perm": [1, 0]}))
        w = new[-1].outputs[0]
    full = ir.Shape([*lead, out.shape[-1]])
    new.append(ir.node("MatMul", [source, w]))
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        bias = gemm.inputs[2]
        if bias.shape is None or len(bias.shape) > 1:  # a bias by rows has no place in 3-d
            return False
        new[-1].outputs[0].type, new[-1].outputs[0].shape = out.type, full
        new.append(ir.node("Add", [new[-1].outputs[0], bias]))
    y = new[-1].outputs[0]
    y.type, y.shape = out.type, full
    for i, n in enumerate(new):
        n.name = f"{out.name}_{n.op_type}"
        n.outputs[0].name = n.outputs[0].name or f"{out.name}_{i}"
    model.graph.insert_before(gemm, new)
    for after in uses:
        kept = after.outputs[0]
        if kept.shape is not None and kept.shape == full and not kept.is_graph_output():
            kept.replace_all_uses_with(y)
            model.graph.remove(after, safe=True)
        else:
            after.replace_input_with(0, y)
    model.graph.remove(gemm, safe=True)
    return True


def _keeps_order(node: ir.Node, value: ir.Value) -> bool:
    """A Reshape of the value that copies no dimension from it (no 0 in its target)."""
    if node.op_type != "Reshape" or node.domain or node.inputs[0] is not value:
        return False
    if node.attributes.get_int("allowzero", 0):
        return True
    target = constant(node.inputs[1])
    return target is not None and bool((target != 0).all())


# (x·W + bias) + delta → (x·W + delta) + bias, where delta is a chain of products of the same x.
#
# Fusions of a bias (BiasGelu, the bias of attention) look for it last, and one of them takes any
# last operand for a bias. A residual is no such chain and stays where it is.


DEPTH = 8
"""Nodes from delta back to x: two products, scales, casts."""


@dataclass(frozen=True)
class DeltaBeforeBias(ir.passes.InPlacePass):
    """Low-rank branches that were added after the bias."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        from onnxscript.rewriter import RewriteRule, RewriteRuleSet

        # the matcher itself refuses an inner sum that something else reads, or that is an output
        rules = RewriteRuleSet([RewriteRule(_bias_first, _delta_first, _swaps)], commute=True)
        return ir.passes.PassResult(model, bool(rules.apply_to_model(model)))


def _bias_first(op: Any, product: ir.Value, bias: ir.Value, delta: ir.Value) -> object:
    return op.Add(op.Add(product, bias), delta)


def _delta_first(op: Any, product: ir.Value, bias: ir.Value, delta: ir.Value) -> object:
    total = op.Add(product, delta)
    total.name, total.type, total.shape = f"{product.name}_delta", product.type, product.shape
    return op.Add(total, bias)


def _swaps(context: object, product: ir.Value, bias: ir.Value, delta: ir.Value) -> bool:
    made = made_by(product, "MatMul")
    x = None if made is None else made.inputs[0]
    return bias.const_value is not None and x is not None and _reaches(delta, x, 0, DEPTH)


def _reaches(value: ir.Value, x: ir.Value, products: int, left: int) -> bool:
    """Value is x times two matrices or more, by products, scales and casts only."""
    if value is x:
        return products >= 2
    node = value.producer()
    if node is None or not left or node.op_type not in ("MatMul", "Mul", "Cast"):
        return False
    more = products + (node.op_type == "MatMul")
    return any(v is not None and _reaches(v, x, more, left - 1) for v in node.inputs)
