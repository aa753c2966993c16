"""(x·W + bias) + delta → (x·W + delta) + bias, where delta is a chain of products of the same x.

Fusions of a bias (BiasGelu, the bias of attention) look for it last, and one of them takes any
last operand for a bias. A residual is no such chain and stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from lora_fx.onnx.graph.values import made_by

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
    total.name = f"{product.name}_delta"
    total.type = product.type
    total.shape = product.shape
    return op.Add(total, bias)


def _swaps(context: object, product: ir.Value, bias: ir.Value, delta: ir.Value) -> bool:
    """Whether the bias is a constant, and delta a chain of products of the product's input."""
    matmul = made_by(product, "MatMul")
    if matmul is None or bias.const_value is None:
        return False
    x = matmul.inputs[0]
    return x is not None and _is_chain(delta, x, 0, DEPTH)


def _is_chain(value: ir.Value, x: ir.Value, products: int, depth: int) -> bool:
    """Whether a value is x times two matrices or more, by products, scales and casts only.

    Args:
        value: The value.
        x: The other end of the chain.
        products: The products between the value and the end that the search began at.
        depth: The nodes that the search may still go back by.
    """
    if value is x:
        return products >= 2
    node = value.producer()
    if node is None or depth == 0 or node.op_type not in ("MatMul", "Mul", "Cast"):
        return False
    if node.op_type == "MatMul":
        products += 1
    for source in node.inputs:
        if source is not None and _is_chain(source, x, products, depth - 1):
            return True
    return False
