"""How far the integers of an input may go: below the rows of the tables that they index."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.ir.kinds import Embedding
from lora_fx.onnx.graph import OnnxGraph

SAME_NUMBERS = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose",
                "Slice", "Expand", "Gather", "GatherND"}  # fmt: skip
"""Ops whose outputs are elements of their first input."""


def highest(graph: OnnxGraph) -> dict[str, int]:
    """Input → rows of the smallest table that it indexes."""
    result: dict[str, int] = {}
    for site in graph.sites():
        if isinstance(site.kind, Embedding):
            name = _input(graph.activation(site), graph.model)
            if name is not None:
                rows = site.operand[0]
                result[name] = min(result.get(name, rows), rows)
    return result


def _input(value: ir.Value | None, model: ir.Model) -> str | None:
    while value is not None:
        node = value.producer()
        if node is None:
            return value.name if value in model.graph.inputs else None
        if node.op_type not in SAME_NUMBERS:
            return None
        value = node.inputs[0]
    return None
