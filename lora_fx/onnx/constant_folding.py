"""Constants that onnxscript folds, and weights, which it leaves as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from lora_fx.onnx.graph.flow import DATA, VIEWS, follow
from lora_fx.onnx.graph.ops import row_of
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
        viewed = node.op_type in VIEWS and node.op_type != "Gather"
        read = [v for v in node.inputs[: 1 if viewed else None] if v is not None and _of(v) & names]
        if not read or (node.op_type == "Transpose" and len(read[0].uses()) == 1):
            return None
        return False if viewed or _is_site(node) else None

    return rule


def _of(value: ir.Value) -> set[str]:
    """The name of a value, and of what it was folded from; none of sizes and other integers."""
    whole = value.dtype is not None and value.dtype.is_integer()
    return set() if whole else {str(value.name), *value.meta.get(FOLDED_FROM, ())}


def _is_site(node: ir.Node) -> bool:
    """Whether a node is a product or a lookup; what picks rows by an index is a reader."""
    known = "aten.embedding" in node.metadata_props.get("pkg.torch.onnx.fx_node", "")
    marked = any(v is not None and DATA in v.metadata_props for v in node.inputs)
    return row_of(node) is not None and (node.op_type != "Gather" or known or marked)


def mark_data(model: ir.Model, weights: Collection[str]) -> None:
    """Mark the constants that weights are multiplied by, or looked up at: they are no weights."""
    flow, names = follow(model), set(weights)
    for node in filter(_is_site, model.graph.all_nodes()):
        known = [flow.stores[w.name] for v in node.inputs if (w := flow.weight_of(v))]
        others = [v for v in known if not _of(v) & names]
        for value in others if len(others) < len(known) else ():
            value.metadata_props[DATA] = node.op_type
