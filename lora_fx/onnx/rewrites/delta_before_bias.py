"""(x·W + bias) + delta → (x·W + delta) + bias, where delta is a chain of products of the same x.

Fusions of a bias (BiasGelu, the bias of attention) look for it last, and one of them takes any
last operand for a bias. A residual is no such chain and stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from lora_fx.onnx.graph.flow import made_by

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
