"""SkipLayerNormalization(x, skip, …) → LayerNormalization(Sum(x, skip)), for the CPU.

ONNX Runtime's fused kernel for the CPU goes element by element and takes some six times as long as
its vectorised sum and norm one after the other. Where only the norm reads the sum, the runtime
itself would fuse an Add with it; it knows no such rule for Sum, so sums before norms become that.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

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
    assert fused.graph is not None
    fused.graph.insert_before(fused, [total, norm])
    total.outputs[0].name = f"{fused.outputs[0].name}_sum"
    total.outputs[0].type, total.outputs[0].shape = fused.outputs[0].type, fused.outputs[0].shape
    _take_over(fused.outputs[0], norm.outputs[0])
    if len(fused.outputs) > 3:
        _take_over(fused.outputs[3], total.outputs[0])
    fused.graph.remove(fused, safe=True)
    return True


def _hold(norm: ir.Node) -> bool:
    """Sum for an Add of two activations of one shape: a bias is a constant, or smaller."""
    value = norm.inputs[0]
    add = value.producer() if value is not None else None
    if add is None or add.op_type != "Add" or add.domain or add.graph is None:
        return False
    a, b = add.inputs
    if a is None or b is None or a.shape is None or a.shape != b.shape:
        return False
    if a.const_value is not None or b.const_value is not None:
        return False
    total = ir.node("Sum", [a, b])
    add.graph.insert_before(add, [total])
    _take_over(add.outputs[0], total.outputs[0])
    add.graph.remove(add, safe=True)
    return True


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Readers of `old` and its place among the outputs; the name too, which an output keeps."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.type, new.shape = old.type, old.shape
    new.name, old.name = old.name, f"{old.name}_fused"
