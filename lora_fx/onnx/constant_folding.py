"""Rules for constant folding by onnxscript: weights are not folded."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from lora_fx.onnx.graph.flow import follow
from lora_fx.onnx.graph.marks import DATA
from lora_fx.onnx.graph.ops import row_of
from lora_fx.onnx.graph.views import VIEWS
from lora_fx.onnx.names import FOLDED_FROM


def unfolded(weights: Collection[str]) -> Callable[[ir.Node], bool | None]:
    """Return a rule on whether onnxscript may fold a node (None: its own rule decides).

    onnxscript folds everything that depends on tensors of up to 8,192 elements, and an update of
    a weight would then miss folded rows or slices. So small weights are treated as large ones:
    their products, lookups and views stay nodes, and a weight may be transposed only for its only
    reader.
    """
    names = set(weights)

    def rule(node: ir.Node) -> bool | None:
        is_view = node.op_type in VIEWS and node.op_type != "Gather"
        operands = node.inputs[:1] if is_view else node.inputs
        read = [value for value in operands if value is not None and _names_of(value) & names]
        if not read:
            return None
        if node.op_type == "Transpose" and len(read[0].uses()) == 1:
            return None
        return False if is_view or _is_site(node) else None

    return rule


def mark_data(model: ir.Model, weights: Collection[str]) -> None:
    """Mark constants that are a weight's factor or lookup index, because they are not weights."""
    flow = follow(model)
    names = set(weights)
    for node in filter(_is_site, model.graph.all_nodes()):
        stored = []
        for value in node.inputs:
            weight = flow.weight_of(value)
            if weight is not None:
                stored.append(flow.stores[weight.name])
        data = [value for value in stored if not _names_of(value) & names]
        if len(data) < len(stored):
            for value in data:
                value.metadata_props[DATA] = node.op_type


def _names_of(value: ir.Value) -> set[str]:
    """Return the names of a value and of the tensors that it was folded from; none for integers."""
    if value.dtype is not None and value.dtype.is_integer():
        return set()
    return {str(value.name), *value.meta.get(FOLDED_FROM, ())}


def _is_site(node: ir.Node) -> bool:
    """Whether this is a product or a lookup; a Gather by a constant index does not count."""
    if row_of(node) is None:
        return False
    if node.op_type != "Gather":
        return True
    if "aten.embedding" in node.metadata_props.get("pkg.torch.onnx.fx_node", ""):
        return True
    return any(value is not None and DATA in value.metadata_props for value in node.inputs)
