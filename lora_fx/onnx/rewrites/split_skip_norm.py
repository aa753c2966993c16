"""SkipLayerNormalization(x, skip, …) → LayerNormalization(Sum(x, skip)), for the CPU.

ONNX Runtime's fused kernel for the CPU goes element by element and takes some six times as long
as its vectorised sum and norm one after the other. Where only the norm reads the sum, the runtime
itself would fuse an Add with it; it knows no such rule for Sum, so sums before norms become that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_fx.onnx.graph.flow import made_by

NORMS = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}
DEFAULT_EPSILON = 1e-12
"""The epsilon of the fused operators, where the attribute is left out."""


@dataclass(frozen=True)
class SplitSkipNorm(ir.passes.InPlacePass):
    """Fused sums and norms, and Adds that the runtime would fuse with the norm after them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        changed = False
        for node in list(model.graph.all_nodes()):
            if node.domain == "com.microsoft" and node.op_type in NORMS:
                changed |= _split(node)
            elif not node.domain and node.op_type in NORMS.values():
                changed |= _hold(node)
        return ir.passes.PassResult(model, changed)


def _split(fused: ir.Node) -> bool:
    x, skip, gamma, *rest = fused.inputs
    simplified = "Simplified" in fused.op_type
    beta = rest.pop(0) if rest and not simplified else None
    bias = rest[0] if rest else None
    if any(v.uses() or v.is_graph_output() for v in fused.outputs[1:3]):  # mean and deviation
        return False
    total = ir.node("Sum", [v for v in (x, skip, bias) if v is not None])
    epsilon = fused.attributes.get_float("epsilon", DEFAULT_EPSILON)
    operands = [total.outputs[0], gamma, *([] if beta is None else [beta])]
    norm = ir.node(NORMS[fused.op_type], operands, {"axis": -1, "epsilon": epsilon})
    y, added = fused.outputs[0], total.outputs[0]
    added.name, added.type, added.shape = f"{y.name}_sum", y.type, y.shape
    _replace(fused, [total, norm], [norm.outputs[0], added])
    return True


def _hold(norm: ir.Node) -> bool:
    """Sum for an Add of two activations of one shape: a bias is a constant, or smaller."""
    add = made_by(norm.inputs[0], "Add")
    if add is None:
        return False
    a, b = add.inputs
    if a is None or b is None or a.shape is None or a.shape != b.shape:
        return False
    if a.const_value is not None or b.const_value is not None:
        return False
    total = ir.node("Sum", [a, b])
    _replace(add, [total], total.outputs)
    return True


def _replace(old: ir.Node, new: Sequence[ir.Node], values: Sequence[ir.Value]) -> None:
    """Put nodes in the place of one, whose first result, and fourth if it has one, are values."""
    assert old.graph is not None
    was = [old.outputs[0], *old.outputs[3:]]
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], new, was, values[: len(was)])
