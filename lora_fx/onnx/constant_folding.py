"""Constants that onnxscript folds, and weights, which it leaves as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from lora_fx.onnx.graph.flow import follow
from lora_fx.onnx.graph.marks import DATA
from lora_fx.onnx.graph.ops import row_of
from lora_fx.onnx.graph.views import VIEWS
from lora_fx.onnx.names import FOLDED_FROM


def unfolded(weights: Collection[str]) -> Callable[[ir.Node], bool | None]:
    """A rule for onnxscript's folding of constants: whether it may fold a node, None for its own.

    It computes from tensors of up to 8,192 elements whatever it can, and an update of a weight
    would miss the rows that were looked up, or the part that was cut out. So small weights stay
    as large ones do: products, lookups and views of them are nodes, and only what is the one
    reader of a weight may be turned.
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
    """Mark the constants that weights are multiplied by, or looked up at: they are no weights."""
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
    """The names of a value and of the tensors it was folded from; none for integers."""
    if value.dtype is not None and value.dtype.is_integer():
        return set()
    return {str(value.name), *value.meta.get(FOLDED_FROM, ())}


def _is_site(node: ir.Node) -> bool:
    """True for a product or a lookup; a Gather by a plain index is another reader."""
    if row_of(node) is None:
        return False
    if node.op_type != "Gather":
        return True
    if "aten.embedding" in node.metadata_props.get("pkg.torch.onnx.fx_node", ""):
        return True
    return any(value is not None and DATA in value.metadata_props for value in node.inputs)
