"""SkipLayerNormalization(x, skip, …) → LayerNormalization(Sum(x, skip)), for the CPU.

ONNX Runtime's fused kernel for the CPU goes element by element and takes some six times as long
as its vectorised sum and norm one after the other. Where only the norm reads the sum, the runtime
itself would fuse an Add with it; it knows no such rule for Sum, so sums before norms become that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_fx.onnx.graph.new_names import NewNames
from lora_fx.onnx.graph.values import made_by, operand

NORMS = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}
DEFAULT_EPSILON = 1e-12
"""The epsilon of the fused operators without the attribute."""


@dataclass(frozen=True)
class SplitSkipNorm(ir.passes.InPlacePass):
    """A rewrite of fused sums and norms, and of Adds that the runtime would fuse with a norm."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        changed = False
        names: NewNames | None = None
        for node in list(model.graph.all_nodes()):
            if node.domain == "com.microsoft" and node.op_type in NORMS:
                names = names or NewNames(model)
                changed |= _split(node, names)
            elif not node.domain and node.op_type in NORMS.values():
                changed |= _keep_apart(node)
        return ir.passes.PassResult(model, changed)


def _split(fused: ir.Node, names: NewNames) -> bool:
    """Replace a fused op by a Sum and a norm, unless its mean or deviation is read."""
    if any(output.uses() or output.is_graph_output() for output in fused.outputs[1:3]):
        return False

    x, skip, gamma = fused.inputs[:3]
    if "Simplified" in fused.op_type:  # it has no beta
        beta = None
        bias = operand(fused, 3)
    else:
        beta = operand(fused, 3)
        bias = operand(fused, 4)

    y = fused.outputs[0]
    total = ir.node("Sum", [value for value in (x, skip, bias) if value is not None])
    total.outputs[0].name = names.take(f"{y.name}_sum")
    total.outputs[0].type = y.type
    total.outputs[0].shape = y.shape

    operands = [total.outputs[0], gamma]
    if beta is not None:
        operands.append(beta)
    epsilon = fused.attributes.get_float("epsilon", DEFAULT_EPSILON)
    norm = ir.node(NORMS[fused.op_type], operands, {"axis": -1, "epsilon": epsilon})
    _replace(fused, [total, norm], [norm.outputs[0], total.outputs[0]])
    return True


def _keep_apart(norm: ir.Node) -> bool:
    """Replace an Add of two activations of one shape by Sum, which the runtime does not fuse."""
    add = made_by(norm.inputs[0], "Add")
    if add is None:
        return False
    x, skip = add.inputs
    if x is None or skip is None or x.shape is None or x.shape != skip.shape:
        return False
    if x.const_value is not None or skip.const_value is not None:
        return False
    total = ir.node("Sum", [x, skip])
    _replace(add, [total], total.outputs)
    return True


def _replace(replaced: ir.Node, nodes: Sequence[ir.Node], values: Sequence[ir.Value]) -> None:
    """Replace a node by others, which give its first result and, if used, its fourth."""
    assert replaced.graph is not None
    results = [replaced.outputs[0], *replaced.outputs[3:]]
    ir.convenience.replace_nodes_and_values(
        replaced.graph, replaced, [replaced], nodes, results, values[: len(results)]
    )
