"""Limit the integers of an input to the rows of the table that it indexes.

A sample or a user's number above them would be refused by the runtime.
"""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.ir.kinds import Embedding
from lora_fx.onnx.graph.graph import OnnxGraph

SAME_NUMBERS = {
    "Cast",
    "Identity",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Transpose",
    "Slice",
    "Expand",
    "Gather",
    "GatherND",
}
"""Ops whose outputs are elements of their first input."""


def highest(graph: OnnxGraph) -> dict[str, int]:
    """For each input that indexes tables, the rows of the smallest of them."""
    limits: dict[str, int] = {}
    for site in graph.sites():
        if not isinstance(site.kind, Embedding):
            continue
        name = _input_of(graph.activation(site), graph.model)
        if name is not None:
            rows = site.operand[0]
            limits[name] = min(rows, limits.get(name, rows))
    return limits


def _input_of(ids: ir.Value | None, model: ir.Model) -> str | None:
    """The name of the input whose elements the ids are; None where a node computes them."""
    value = ids
    while value is not None:
        node = value.producer()
        if node is None:
            return value.name if value in model.graph.inputs else None
        if node.op_type not in SAME_NUMBERS:
            return None
        value = node.inputs[0]
    return None
